#include <cstdint>
#include <cstring>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "ema/ema.h"

namespace hybridengine {
namespace {

#define HE_BODY "ema/update.inl"
#include "common/for_each_isa.inl"

constexpr int64_t kChunk = 1 << 16;

int64_t bytes_of(ElementType element) {
  return element == ElementType::float64 ? 8 : element == ElementType::float32 ? 4 : 2;
}

}  // namespace

void ema_update(const std::vector<Average>& averages, double rate) {
  std::vector<Average> chunks;
  std::vector<int64_t> starts;
  int64_t elements = 0;
  for (const Average& one : averages) {
    for (int64_t start = 0; start < one.count; start += kChunk) {
      const int64_t count = one.count - start < kChunk ? one.count - start : kChunk;
      chunks.push_back({one.element, one.weight_element,
                        static_cast<char*>(one.average) + start * bytes_of(one.element),
                        static_cast<const char*>(one.weight) + start * bytes_of(one.weight_element), count});
      starts.push_back(elements);
      elements += count;
    }
  }
  parallel_chunks(starts, elements, kChunk,
                  [&](int64_t begin, int64_t end) { HE_DISPATCH(update_chunks, chunks.data(), rate, begin, end); });
}

}  // namespace hybridengine
