#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "norm/norm.h"

namespace hybridengine {
namespace {

#define HE_BODY "norm/sum.inl"
#include "common/for_each_isa.inl"

constexpr int64_t kChunk = 1 << 16;

int64_t size_of(ElementType element) {
  return element == ElementType::float64 ? 8 : element == ElementType::float32 ? 4 : 2;
}

}  // namespace

double total_norm(const std::vector<NormPart>& parts) {
  std::vector<NormPart> chunks;
  for (const NormPart& part : parts) {
    for (int64_t start = 0; start < part.count; start += kChunk) {
      const char* const values = static_cast<const char*>(part.values) + start * size_of(part.element);
      chunks.push_back({part.element, values, part.count - start < kChunk ? part.count - start : kChunk});
    }
  }
  std::vector<double> sums(chunks.size());
  parallel_for(static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    HE_DISPATCH(sum_chunks, chunks.data(), sums.data(), begin, end);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace hybridengine
