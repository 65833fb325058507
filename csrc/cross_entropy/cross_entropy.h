#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/reduction.h"

namespace hybridengine {

// Accumulators (weight, loss) are float for float32 and bfloat16 logits, double for float64.
struct CrossEntropy {
  ElementType element;
  const void* logits;  // [rows, classes], each row contiguous
  int64_t row_stride;  // in elements
  const int64_t* target;
  const void* weight;  // [classes] or null; not together with smoothing
  int64_t rows;
  int64_t classes;
  int64_t ignore_index;
  double smoothing;
  Reduction reduction;
  bool empty_is_zero;  // mean over nothing: 0 instead of NaN
  void* loss;          // one value, or [rows] for Reduction::none
  void* gradient;      // [rows, classes] contiguous, of the logits' type, or null
};

// Loss and, if asked for, its gradient in the same pass. The formula stands in kernels/cross_entropy/reference.py.
// Throws std::out_of_range for a target that is neither a class nor ignore_index, before anything is written.
void cross_entropy(const CrossEntropy& problem);

// gradient[row, :] *= factor[row * factor_stride], in place; nothing is touched where every factor is 1.
void scale_rows(ElementType element, void* gradient, int64_t rows, int64_t classes, const void* factor,
                int64_t factor_stride);

}  // namespace hybridengine
