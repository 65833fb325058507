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

// Uniform draws for one embedding site. All tensors are contiguous.
struct StartSite {
  const void* uniform;  // [batch, length, width], in [0, 1)
  const bool* mask;     // [batch, length]
  void* output;         // [batch, length, width], not overlapping the inputs
  int64_t length;
  int64_t width;
};

struct PerturbStart {
  ElementType element;
  int64_t batch;
  std::vector<StartSite> sites;
  double epsilon;
  bool linf;  // within a box instead of a ball
};

// The random start of an embedding attack. The formula stands in kernels/perturb_start/reference.py.
void perturb_start(const PerturbStart& start);

// One step of an embedding attack; norms are per sequence, joint over the sites. The formula stands in
// kernels/perturb/reference.py.
void perturb_step(const PerturbStep& step);

}  // namespace hybridengine
