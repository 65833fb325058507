#pragma once

#include <cstdint>

#include "common/element.h"

namespace hybridengine {

// The numbers are shared with hybridengine/kernels/kl_pair/reference.py.
enum class Reduction : int { none = 0, sum = 1, mean = 2 };

// One of the two tensors of logits, [rows, classes], and its gradient.
struct KLSide {
  const void* logits;  // each row contiguous
  int64_t row_stride;  // in elements
  void* gradient;      // [rows, classes] contiguous, of the logits' type, or null
};

// The loss is float for float32 and bfloat16 logits, double for float64.
struct KLPair {
  ElementType element;
  KLSide first;
  KLSide second;
  const bool* mask;  // [rows], the rows that count, or null for all
  int64_t rows;
  int64_t classes;  // at least one
  double temperature;
  bool symmetric;  // the mean of both directions; otherwise KL(first || second)
  Reduction reduction;
  bool empty_is_zero;  // mean over nothing: 0 instead of NaN
  void* loss;          // one value, or [rows] for Reduction::none
};

// The divergence and the gradients asked for in the same pass. The formulas stand in kernels/kl_pair/reference.py.
void kl_pair(const KLPair& problem);

}  // namespace hybridengine
