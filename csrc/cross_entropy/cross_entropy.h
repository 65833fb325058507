#pragma once

#include <cstdint>

#include "common/element.h"

namespace hybridengine {

// Rows of logits and what is to be computed of them. The formulas and names stand in
// kernels/cross_entropy/reference.py. Accumulators (weight, soft targets, loss, lse, incoming gradients) are float for
// float32 and bfloat16 logits, double for float64.
struct CrossEntropy {
  ElementType element;
  const void* logits;  // [rows, classes], each row contiguous
  int64_t row_stride;  // in elements
  int64_t rows;
  int64_t classes;

  const int64_t* target;    // [rows], or null where the targets are soft
  const void* soft_target;  // [rows, classes] accumulators, contiguous, or null
  const void* weight;       // [classes] accumulators, or null: 1
  int64_t ignore_index;

  double smoothing;
  double scale;
  double softcap;  // 0: none
  double z_loss;
  double loss_factor;  // of each row's loss: 1, or 1 / (what a mean divides by)
  double z_factor;     // of each row's z term

  void* gradient;           // [rows, classes] of the logits' type, or null; may be the logits themselves
  int64_t gradient_stride;  // in elements
};

// Gradients that come in: of the losses (one value or [rows]: the stride is 0 or 1; null: 1) and of the log-sum-exps
// ([rows]; null: 0). Accumulators.
struct Incoming {
  const void* loss = nullptr;
  int64_t loss_stride = 0;
  const void* lse = nullptr;
};

// Row losses (times their factors) and log-sum-exps [rows], each unless null, and the gradient of what is incoming in
// the same pass. Labels must have been checked by label_totals.
void cross_entropy(const CrossEntropy& problem, const Incoming& incoming, void* loss, void* lse);

struct LabelTotals {
  int64_t rows;   // that count
  double weight;  // their summed class weights
};

// Checks every label. Throws std::out_of_range for one that is neither a class nor ignore_index.
LabelTotals label_totals(ElementType element, const int64_t* target, const void* weight, int64_t rows, int64_t classes,
                         int64_t ignore_index);

// gradient[row, :] *= factor[row * factor_stride], in place; nothing is touched where every factor is 1.
void scale_rows(ElementType element, void* gradient, int64_t rows, int64_t classes, const void* factor,
                int64_t factor_stride);

// The sum of accumulators, in double and in order: the same whatever the number of threads.
double sum_in_order(ElementType element, const void* values, int64_t count);

}  // namespace hybridengine
