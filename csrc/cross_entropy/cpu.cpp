#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "cross_entropy/cross_entropy.h"

namespace hybridengine {
namespace {

struct RowResult {
  double loss;
  double lse;
};

#define HE_BODY "cross_entropy/rows.inl"
#include "common/for_each_isa.inl"

// A task below this many elements costs more to hand over than to compute.
constexpr int64_t kElementsPerTask = 32768;

int64_t rows_per_task(int64_t classes) { return classes >= kElementsPerTask ? 1 : kElementsPerTask / (classes + 1) + 1; }

double read(ElementType element, const void* values, int64_t index) {
  return element == ElementType::float64 ? static_cast<const double*>(values)[index]
                                         : static_cast<const float*>(values)[index];
}

void write(ElementType element, void* values, int64_t index, double value) {
  if (!values) return;
  if (element == ElementType::float64) {
    static_cast<double*>(values)[index] = value;
  } else {
    static_cast<float*>(values)[index] = static_cast<float>(value);
  }
}

// Kept between calls: allocating it anew would fault its pages in every time.
void* thread_scratch(size_t bytes) {
  thread_local std::vector<double> scratch;
  const size_t doubles = bytes / sizeof(double) + 9;
  if (scratch.size() < doubles) scratch.resize(doubles);
  // On a cache line of its own, so that whole vectors never straddle two.
  const uintptr_t start = reinterpret_cast<uintptr_t>(scratch.data());
  return reinterpret_cast<void*>((start + 63) & ~uintptr_t{63});
}

size_t scratch_bytes(int64_t classes) {
  const size_t count = static_cast<size_t>(classes);
  return (count / 2048 + 1) * 2 * sizeof(double) + count * sizeof(double) + 64;  // see rows.inl
}

}  // namespace

void cross_entropy(const CrossEntropy& problem, const Incoming& incoming, void* loss, void* lse) {
  parallel_for(problem.rows, rows_per_task(problem.classes), [&](int64_t begin, int64_t end) {
    void* const scratch = thread_scratch(scratch_bytes(problem.classes));
    for (int64_t row = begin; row < end; ++row) {
      const double by_loss = incoming.loss ? read(problem.element, incoming.loss, row * incoming.loss_stride) : 1.0;
      const double by_lse = incoming.lse ? read(problem.element, incoming.lse, row) : 0.0;
      const RowResult result = HE_DISPATCH(run_row, problem, row, by_loss, by_lse, scratch);
      write(problem.element, loss, row, result.loss);
      write(problem.element, lse, row, result.lse);
    }
    finish_streaming();
  });
}

LabelTotals label_totals(ElementType element, const int64_t* target, const void* weight, int64_t rows, int64_t classes,
                         int64_t ignore_index) {
  LabelTotals totals{0, 0.0};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t label = target[row];
    if (label == ignore_index) continue;
    if (label < 0 || label >= classes) {
      throw std::out_of_range("target[" + std::to_string(row) + "] = " + std::to_string(label) +
                              " is not one of the " + std::to_string(classes) + " classes (ignore_index is " +
                              std::to_string(ignore_index) + ")");
    }
    totals.rows += 1;
    totals.weight += weight ? read(element, weight, label) : 1.0;
  }
  return totals;
}

void scale_rows(ElementType element, void* gradient, int64_t rows, int64_t classes, const void* factor,
                int64_t factor_stride) {
  bool all_one = true;
  for (int64_t row = 0; row < rows && all_one; ++row) all_one = read(element, factor, row * factor_stride) == 1.0;
  if (all_one) return;
  parallel_for(rows, rows_per_task(classes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      HE_DISPATCH(multiply_row, element, gradient, row, classes, read(element, factor, row * factor_stride));
    }
  });
}

double sum_in_order(ElementType element, const void* values, int64_t count) {
  double total = 0;
  for (int64_t index = 0; index < count; ++index) total += read(element, values, index);
  return total;
}

}  // namespace hybridengine
