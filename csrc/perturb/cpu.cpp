#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "common/parallel.h"
#include "perturb/perturb.h"

namespace hybridengine {
namespace {

#define HE_BODY "perturb/bodies.inl"
#include "common/for_each_isa.inl"

// Sequences for one thread at least.
template <class Site>
int64_t grain_of(const std::vector<Site>& sites) {
  int64_t elements = 0;  // of one sequence
  for (const Site& site : sites) elements += site.length * site.width;
  return elements >= 16384 ? 1 : 16384 / (elements + 1) + 1;
}

}  // namespace

void perturb_step(const PerturbStep& step) {
  parallel_for(step.batch, grain_of(step.sites), [&](int64_t begin, int64_t end) { HE_DISPATCH(run_sequences, step, begin, end); });
}

void perturb_start(const PerturbStart& start) {
  parallel_for(start.batch, grain_of(start.sites),
               [&](int64_t begin, int64_t end) { HE_DISPATCH(start_sequences, start, begin, end); });
}

}  // namespace hybridengine
