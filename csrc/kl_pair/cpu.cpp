#include "kl_pair/kl_pair.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

namespace hybridengine {
namespace {

// Up to so many classes several rows are computed at once: a row does not fill the vectors, and sums across their lanes
// would cost more than the rest.
constexpr int64_t kShortRow = 128;

#define HE_BODY "kl_pair/any_rows.inl"
#include "common/for_each_isa.inl"

// A task below this many elements costs more to hand over than to compute.
constexpr int64_t kElementsPerTask = 16384;

int64_t rows_per_task(int64_t classes) { return kElementsPerTask / (classes + 1) + 1; }

int64_t counted_rows(const KLPair& problem) {
  if (!problem.mask) return problem.rows;
  int64_t count = 0;
  for (int64_t row = 0; row < problem.rows; ++row) count += problem.mask[row];
  return count;
}

// Kept between calls: allocating it anew would fault its pages in every time.
void* thread_scratch(size_t bytes) {
  thread_local std::vector<double> scratch;
  if (scratch.size() * sizeof(double) < bytes) scratch.resize(bytes / sizeof(double) + 1);
  return scratch.data();
}

// A row's exponentials on both sides; of short rows a vector of at most 64 bytes for each, and for the logits.
size_t scratch_bytes(int64_t classes) {
  return static_cast<size_t>(classes) * (classes <= kShortRow ? 4 * 64 : 2 * sizeof(double));
}

void run_all_rows(const KLPair& problem, double scale, void* losses) {
  parallel_for(problem.rows, rows_per_task(problem.classes), [&](int64_t begin, int64_t end) {
    HE_DISPATCH(run_rows, problem, begin, end, scale, losses, thread_scratch(scratch_bytes(problem.classes)));
  });
}

// In row order: the same whatever the number of threads.
template <class Loss>
void reduce(const KLPair& problem, double scale, bool empty, const Loss* losses) {
  double total = 0;
  for (int64_t row = 0; row < problem.rows; ++row) total += losses[row];
  const double nothing = problem.empty_is_zero ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  *static_cast<Loss*>(problem.loss) = static_cast<Loss>(empty ? nothing : total * scale);
}

}  // namespace

void kl_pair(const KLPair& problem) {
  if (problem.reduction == Reduction::none) return run_all_rows(problem, 1.0, problem.loss);

  const bool mean = problem.reduction == Reduction::mean;
  const int64_t count = mean ? counted_rows(problem) : 1;
  const bool empty = count == 0;
  // Over nothing the gradient is 0, also where the loss is NaN: every row is left out.
  const double scale = empty ? 0.0 : 1.0 / static_cast<double>(count);
  std::vector<double> losses(static_cast<size_t>(problem.rows));  // room enough for float or double
  run_all_rows(problem, scale, losses.data());
  if (problem.element == ElementType::float64) {
    reduce(problem, scale, empty, losses.data());
  } else {
    reduce(problem, scale, empty, reinterpret_cast<const float*>(losses.data()));
  }
}

}  // namespace hybridengine
