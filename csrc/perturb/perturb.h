#pragma once

#include <cstdint>
#include <vector>

#include "common/element.h"

namespace hybridengine {

// One embedding site of a batch. All tensors are contiguous.
struct PerturbSite {
  const void* delta;     // [batch, length, width]
  const void* gradient;  // [batch, length, width]
  const bool* mask;      // [batch, length]
  void* output;          // [batch, length, width], not overlapping the inputs
  int64_t length;
  int64_t width;
};

struct PerturbStep {
  ElementType element;
  int64_t batch;
  std::vector<PerturbSite> sites;
  double step_size;
  double epsilon;  // infinite: no projection
  bool linf;       // sign step and box instead of L2 step and ball
};

// One step of an embedding attack; norms are per sequence, joint over the sites. The formula stands in
// kernels/perturb/reference.py.
void perturb_step(const PerturbStep& step);

}  // namespace hybridengine
