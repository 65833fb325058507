#include <cstdint>
#include <cstring>

#include "common/isa.h"
#include "common/parallel.h"
#include "dropout/dropout.h"

namespace hybridengine {
namespace {

#define HE_BODY "dropout/mask.inl"
#include "common/for_each_isa.inl"

}  // namespace

void dropout(const Dropout& work) {
  const int64_t blocks = (work.count + 63) / 64;
  parallel_for(blocks, 512, [&](int64_t begin, int64_t end) { HE_DISPATCH(run_blocks, work, begin, end); });
}

}  // namespace hybridengine
