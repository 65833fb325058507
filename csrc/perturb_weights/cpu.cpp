#include "perturb_weights/perturb_weights.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

namespace hybridengine {
namespace {

// A part of a tensor for one thread.
struct Chunk {
  ElementType element;
  ElementType gradient_element;
  void* weight;
  const void* gradient;
  void* saved;
  int64_t count;
  int64_t tensor;  // its number in the list
};

struct Squares {
  double gradient;  // (s g)^2
  double weight;    // w^2, for AWP alone
};

#define HE_BODY "perturb_weights/move.inl"
#include "common/for_each_isa.inl"

constexpr int64_t kChunk = 1 << 16;

int64_t bytes_of(ElementType element) {
  return element == ElementType::float64 ? 8 : element == ElementType::float32 ? 4 : 2;
}

struct Chunks {
  std::vector<Chunk> list;
  std::vector<int64_t> starts;
  int64_t elements = 0;
};

Chunks chunks_of(const std::vector<MovedWeight>& weights) {
  Chunks chunks;
  for (size_t tensor = 0; tensor < weights.size(); ++tensor) {
    const MovedWeight& one = weights[tensor];
    const int64_t width = bytes_of(one.element), gradient_width = bytes_of(one.gradient_element);
    for (int64_t start = 0; start < one.count; start += kChunk) {
      chunks.list.push_back({one.element, one.gradient_element, static_cast<char*>(one.weight) + start * width,
                             static_cast<const char*>(one.gradient) + start * gradient_width,
                             static_cast<char*>(one.saved) + start * width,
                             one.count - start < kChunk ? one.count - start : kChunk, static_cast<int64_t>(tensor)});
      chunks.starts.push_back(chunks.elements);
      chunks.elements += chunks.list.back().count;
    }
  }
  return chunks;
}

bool has_direction(double norm) { return norm > 0 && std::isfinite(norm); }

// What a gradient is multiplied with; 0 where it has no direction.
double rate_of(double numerator, double norm) {
  const double rate = has_direction(norm) ? numerator / norm : 0.0;
  return std::isfinite(rate) ? rate : 0.0;
}

}  // namespace

WeightMove perturb_weights(const std::vector<MovedWeight>& weights, WeightRule rule, double rho, double eta) {
  const Chunks chunks = chunks_of(weights);
  std::vector<Squares> sums(chunks.list.size()), totals(weights.size());
  parallel_chunks(chunks.starts, chunks.elements, kChunk, [&](int64_t begin, int64_t end) {
    HE_DISPATCH(sum_chunks, chunks.list.data(), sums.data(), rule, eta, begin, end);
  });
  double all = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    totals[chunks.list[i].tensor].gradient += sums[i].gradient;
    totals[chunks.list[i].tensor].weight += sums[i].weight;
    all += sums[i].gradient;
  }
  const double norm = std::sqrt(all);
  std::vector<double> rates;
  bool usable = false, moved = false;
  for (const Squares& total : totals) {
    const bool alone = rule == WeightRule::awp;
    const double own = alone ? std::sqrt(total.gradient) : norm;
    rates.push_back(rate_of(alone ? rho * std::sqrt(total.weight) : rho, own));
    usable = usable || has_direction(own);
    moved = moved || rates.back() != 0;
  }
  if (!moved) return {norm, 0.0, usable, false};
  std::vector<double> added(chunks.list.size());
  parallel_chunks(chunks.starts, chunks.elements, kChunk, [&](int64_t begin, int64_t end) {
    HE_DISPATCH(move_chunks, chunks.list.data(), rates.data(), added.data(), rule, eta, begin, end);
  });
  double distance = 0;
  for (const double one : added) distance += one;
  return {norm, std::sqrt(distance), usable, true};
}

}  // namespace hybridengine
