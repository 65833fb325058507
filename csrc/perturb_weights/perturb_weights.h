#pragma once

#include <cstdint>
#include <vector>

#include "common/element.h"

namespace hybridengine {

// The numbers are shared with hybridengine/kernels/perturb_weights/cpu.py.
enum class WeightRule : int { sam = 0, asam = 1, awp = 2 };

// One tensor to move. All are contiguous, and none overlaps another.
struct MovedWeight {
  ElementType element;           // of weight and saved
  ElementType gradient_element;  // the same, or float32 beside bfloat16
  void* weight;                  // [count], moved in place
  const void* gradient;          // [count]
  void* saved;                   // [count], receives the weight's old bits
  int64_t count;
};

struct WeightMove {
  double norm;      // of s g over all tensors
  double distance;  // the norm of what was added to the weights, after rounding
  bool usable;      // whether a gradient had a direction
  bool moved;       // if not, no tensor was touched and none saved
};

// Moves all weights; the formulas stand in kernels/perturb_weights/reference.py. Sums run in double in an order that
// does not depend on the number of threads.
WeightMove perturb_weights(const std::vector<MovedWeight>& weights, WeightRule rule, double rho, double eta);

}  // namespace hybridengine
