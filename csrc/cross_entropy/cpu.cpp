#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "cross_entropy/cross_entropy.h"

namespace hybridengine {
namespace {

#define HE_BODY "cross_entropy/rows.inl"
#include "common/for_each_isa.inl"

// A task below this many elements costs more to hand over than to compute.
constexpr int64_t kElementsPerTask = 32768;

int64_t rows_per_task(int64_t classes) { return classes >= kElementsPerTask ? 1 : kElementsPerTask / (classes + 1) + 1; }

bool is_double(ElementType element) { return element == ElementType::float64; }

double read(ElementType element, const void* values, int64_t index) {
  return is_double(element) ? static_cast<const double*>(values)[index] : static_cast<const float*>(values)[index];
}

void write(ElementType element, void* values, double value) {
  if (is_double(element)) {
    *static_cast<double*>(values) = value;
  } else {
    *static_cast<float*>(values) = static_cast<float>(value);
  }
}

// Checks every target and returns what a mean divides by: the number, or the summed weight, of the rows that count.
double checked_denominator(const CrossEntropy& problem) {
  double total = 0;
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t label = problem.target[row];
    if (label == problem.ignore_index) continue;
    if (label < 0 || label >= problem.classes) {
      throw std::out_of_range("target[" + std::to_string(row) + "] = " + std::to_string(label) +
                              " is not one of the " + std::to_string(problem.classes) +
                              " classes (ignore_index is " + std::to_string(problem.ignore_index) + ")");
    }
    total += problem.weight ? read(problem.element, problem.weight, label) : 1.0;
  }
  return total;
}

// Kept between calls: allocating it anew would fault its pages in every time.
void* thread_scratch(size_t bytes) {
  thread_local std::vector<double> scratch;
  if (scratch.size() * sizeof(double) < bytes) scratch.resize(bytes / sizeof(double) + 1);
  return scratch.data();
}

size_t scratch_bytes(int64_t classes) {
  // Three doubles a block and a float a class (see rows.inl); block size as in the widest case.
  return (static_cast<size_t>(classes) / 2048 + 1) * 3 * sizeof(double) + static_cast<size_t>(classes) * sizeof(double);
}

void run_all_rows(const CrossEntropy& problem, double scale, void* losses) {
  parallel_for(problem.rows, rows_per_task(problem.classes), [&](int64_t begin, int64_t end) {
    HE_DISPATCH(run_rows, problem, begin, end, scale, losses, thread_scratch(scratch_bytes(problem.classes)));
  });
}

}  // namespace

void cross_entropy(const CrossEntropy& problem) {
  const double denominator = checked_denominator(problem);
  if (problem.reduction == Reduction::none) return run_all_rows(problem, 1.0, problem.loss);

  const bool mean = problem.reduction == Reduction::mean;
  const bool empty = mean && denominator == 0.0;
  // Over nothing the gradient is 0, also where the loss is NaN: such a batch must not destroy the weights.
  const double scale = empty ? 0.0 : mean ? 1.0 / denominator : 1.0;
  std::vector<double> losses(static_cast<size_t>(problem.rows));  // room enough for float or double
  run_all_rows(problem, scale, losses.data());
  double total = 0;  // summed in row order: the same whatever the number of threads
  for (int64_t row = 0; row < problem.rows; ++row) total += read(problem.element, losses.data(), row);
  const double nothing = problem.empty_is_zero ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  write(problem.element, problem.loss, empty ? nothing : total * scale);
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

}  // namespace hybridengine
