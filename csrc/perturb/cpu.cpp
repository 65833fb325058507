#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "common/parallel.h"
#include "perturb/perturb.h"

namespace hybridengine {
namespace {

#define HE_BODY "perturb/step.inl"
#include "common/for_each_isa.inl"

}  // namespace

void perturb_step(const PerturbStep& step) {
  int64_t elements = 0;  // of one sequence
  for (const PerturbSite& site : step.sites) elements += site.length * site.width;
  const int64_t grain = elements >= 16384 ? 1 : 16384 / (elements + 1) + 1;
  parallel_for(step.batch, grain, [&](int64_t begin, int64_t end) { HE_DISPATCH(run_sequences, step, begin, end); });
}

}  // namespace hybridengine
