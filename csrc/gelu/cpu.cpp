#include <cstdint>

#include "common/element.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "gelu/gelu.h"

namespace hybridengine {
namespace {

#define HE_BODY "gelu/gelu.inl"
#include "common/for_each_isa.inl"

}  // namespace

void gelu(const Gelu& work) {
  const int64_t blocks = (work.count + 63) / 64;
  parallel_for(blocks, 128, [&](int64_t begin, int64_t end) { HE_DISPATCH(run_blocks, work, begin, end); });
}

}  // namespace hybridengine
