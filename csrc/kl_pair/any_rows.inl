// All of kl_pair for one instruction set. Included once per instruction set by cpu.cpp.

#include "kl_pair/terms.inl"

#include "kl_pair/rows.inl"
#include "kl_pair/short_rows.inl"

template <class Element, bool kSymmetric>
static void run_either_length(const KLPair& problem, int64_t begin, int64_t end, double scale, void* losses,
                              void* scratch) {
  // 1/T is the inner derivative; the two directions are halved.
  const double factor = scale / problem.temperature * (kSymmetric ? 0.5 : 1.0);
  const bool is_short = problem.classes <= kShortRow;
  auto* const run = is_short ? run_short_rows<Element, kSymmetric> : run_long_rows<Element, kSymmetric>;
  run(problem, begin, end, factor, losses, scratch);
}

template <class Element>
static void run_either_way(const KLPair& problem, int64_t begin, int64_t end, double scale, void* losses,
                           void* scratch) {
  auto* const run = problem.symmetric ? run_either_length<Element, true> : run_either_length<Element, false>;
  run(problem, begin, end, scale, losses, scratch);
}

static void run_rows(const KLPair& problem, int64_t begin, int64_t end, double scale, void* losses, void* scratch) {
  switch (problem.element) {
    case ElementType::float32:
      return run_either_way<float>(problem, begin, end, scale, losses, scratch);
    case ElementType::bfloat16:
      return run_either_way<Bf16>(problem, begin, end, scale, losses, scratch);
    case ElementType::float64:
      return run_either_way<double>(problem, begin, end, scale, losses, scratch);
  }
}
