#include <cstdint>
#include <cstring>
#include <vector>

#include "common/element.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "keep/keep.h"

namespace hybridengine {
namespace {

#define HE_BODY "keep/copy.inl"
#include "common/for_each_isa.inl"

constexpr int64_t kChunkBytes = 1 << 18;

}  // namespace

void copy_all(const std::vector<CopiedBytes>& parts) {
  std::vector<CopiedBytes> chunks;
  std::vector<int64_t> starts;
  int64_t bytes = 0;
  for (const CopiedBytes& part : parts) {
    for (int64_t start = 0; start < part.bytes; start += kChunkBytes) {
      const int64_t size = part.bytes - start < kChunkBytes ? part.bytes - start : kChunkBytes;
      chunks.push_back({static_cast<char*>(part.target) + start, static_cast<const char*>(part.source) + start, size});
      starts.push_back(bytes);
      bytes += size;
    }
  }
  parallel_chunks(starts, bytes, kChunkBytes,
                  [&](int64_t begin, int64_t end) { HE_DISPATCH(copy_chunks, chunks.data(), begin, end); });
}

}  // namespace hybridengine
