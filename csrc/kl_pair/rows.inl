// Rows of many classes, one after another. Three passes over a row that stays in the cache: maxima; exponentials and
// their sums; divergence and gradients. Partial sums in the accumulator's type go over a block, their sum is in double.

constexpr int64_t kBlock = 1024;

// Up to a vector of elements, the missing ones filled up.
template <class Element>
HE_INLINE typename Lanes<Element>::Vector load_up_to(const Element* source, int64_t left, Accumulator<Element> fill) {
  using Vector = typename Lanes<Element>::Vector;
  if (left >= Lanes<Element>::count) return load(source);
  Vector vector = splat<Vector>(fill);
  for (int64_t lane = 0; lane < left; ++lane) vector[lane] = to_accumulator(source[lane]);
  return vector;
}
// A class that does not exist has the logit -inf.
template <class Element>
HE_INLINE typename Lanes<Element>::Vector load_logits(const Element* source, int64_t left) {
  return load_up_to(source, left, -__builtin_inff());
}

template <class Element>
HE_INLINE void store_up_to(Element* target, typename Lanes<Element>::Vector vector, int64_t left) {
  if (left >= Lanes<Element>::count) return store(target, vector);
  for (int64_t lane = 0; lane < left; ++lane) store_one(target + lane, vector[lane]);
}

template <class Element>
static double row_maximum(const Element* logits, int64_t classes) {
  using Vector = typename Lanes<Element>::Vector;
  constexpr int lanes = Lanes<Element>::count;
  Vector best[4];
  for (Vector& part : best) part = splat<Vector>(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * lanes <= classes; i += 4 * lanes) {
    for (int part = 0; part < 4; ++part) best[part] = larger(load(logits + i + part * lanes), best[part]);
  }
  for (; i < classes; i += lanes) best[0] = larger(load_logits(logits + i, classes - i), best[0]);
  return maximum_of(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

template <class Element>
struct Row {
  const Element* a;
  const Element* b;
  Accumulator<Element>* first_exponentials;
  Accumulator<Element>* second_exponentials;
  Level<Accumulator<Element>, Accumulator<Element>> level;
};

template <bool kSymmetric, class Element, class Vector>
HE_INLINE void exponentiate_at(const Row<Element>& row, int64_t i, int64_t left, Moments<Vector>& block) {
  Vector e, f;
  exponentiate<kSymmetric>(load_logits(row.a + i, left), load_logits(row.b + i, left), row.level, block, e, f);
  store_up_to(row.first_exponentials + i, e, left);
  store_up_to(row.second_exponentials + i, f, left);
}

template <class Element, bool kSymmetric>
static void exponentiate_block(const Row<Element>& row_in_memory, int64_t start, int64_t end, RowSums& sums) {
  using Vector = typename Lanes<Element>::Vector;
  constexpr int lanes = Lanes<Element>::count;
  const Row<Element> row = row_in_memory;  // which the stores do not change
  Moments<Vector> block = no_moments<Vector>();
  int64_t i = start;
  for (; i + lanes <= end; i += lanes) exponentiate_at<kSymmetric>(row, i, lanes, block);
  if (i < end) exponentiate_at<kSymmetric>(row, i, end - i, block);
  const double top = largest(block.first)[0];
  sums.first += sum_of(block.first);
  sums.second += sum_of(block.second);
  sums.change += sum_of(block.change);
  sums.first_moved += sum_of(block.first_moved);
  sums.first_only |= maximum_of(block.highest) > top;
  if constexpr (kSymmetric) {
    sums.second_moved += sum_of(block.second_moved);
    sums.second_only |= maximum_of((Vector)-block.lowest) > top;
  }
}

template <bool kSymmetric, bool kFirst, bool kSecond, class Element, class Vector>
HE_INLINE void finish_at(const Row<Element>& row, int64_t i, int64_t left, const Finish<Accumulator<Element>>& by,
                         Accumulator<Element> scale, Element* first_out, Element* second_out, Vector& total) {
  const Vector e = load_up_to(row.first_exponentials + i, left, 0);
  const Vector f = load_up_to(row.second_exponentials + i, left, 0);
  Vector first, second;
  finish<kSymmetric>(load_logits(row.a + i, left), load_logits(row.b + i, left), e, f, row.level, by, total, first,
                     second);
  if constexpr (kFirst) store_up_to(first_out + i, (Vector)(first * scale), left);
  if constexpr (kSecond) store_up_to(second_out + i, (Vector)(second * scale), left);
}

// Returns the sum of the terms of the divergence over a block.
template <class Element, bool kSymmetric, bool kFirst, bool kSecond>
static double finish_block(const Row<Element>& row_in_memory, int64_t start, int64_t end,
                           const Finish<Accumulator<Element>>& finish_in_memory, Accumulator<Element> scale,
                           Element* first_out, Element* second_out) {
  constexpr int lanes = Lanes<Element>::count;
  const Row<Element> row = row_in_memory;
  const Finish<Accumulator<Element>> by = finish_in_memory;
  typename Lanes<Element>::Vector total{};
  int64_t i = start;
  for (; i + lanes <= end; i += lanes) {
    finish_at<kSymmetric, kFirst, kSecond>(row, i, lanes, by, scale, first_out, second_out, total);
  }
  if (i < end) finish_at<kSymmetric, kFirst, kSecond>(row, i, end - i, by, scale, first_out, second_out, total);
  return sum_of(total);
}

template <class Element, bool kSymmetric, bool kFirst, bool kSecond>
static double run_row(const KLPair& problem, int64_t index, double scale, void* scratch) {
  using Scalar = Accumulator<Element>;
  const int64_t classes = problem.classes;
  Element* const first_out = (Element*)problem.first.gradient + (kFirst ? index * classes : 0);
  Element* const second_out = (Element*)problem.second.gradient + (kSecond ? index * classes : 0);
  if (problem.mask && !problem.mask[index]) {
    // A row that does not count contributes nothing, whatever it holds, NaN included.
    if constexpr (kFirst) __builtin_memset((void*)first_out, 0, classes * sizeof(Element));
    if constexpr (kSecond) __builtin_memset((void*)second_out, 0, classes * sizeof(Element));
    return 0.0;
  }
  Row<Element> row{(const Element*)problem.first.logits + index * problem.first.row_stride,
                   (const Element*)problem.second.logits + index * problem.second.row_stride,
                   (Scalar*)scratch,
                   (Scalar*)scratch + classes,
                   {}};
  // Where a gradient has the accumulator's type it can hold the exponentials itself.
  if constexpr (kFirst && sizeof(Element) == sizeof(Scalar)) row.first_exponentials = (Scalar*)first_out;
  if constexpr (kSecond && sizeof(Element) == sizeof(Scalar)) row.second_exponentials = (Scalar*)second_out;
  const auto first_maximum = (Scalar)row_maximum(row.a, classes), second_maximum = (Scalar)row_maximum(row.b, classes);
  row.level = {first_maximum, second_maximum, first_maximum - second_maximum, (Scalar)(1.0 / problem.temperature)};
  RowSums sums;
  for (int64_t start = 0; start < classes; start += kBlock) {
    exponentiate_block<Element, kSymmetric>(row, start, classes - start < kBlock ? classes : start + kBlock, sums);
  }
  const Finish<double> wide = finish_of(sums);
  const Finish<Scalar> by{(Scalar)wide.first_factor, (Scalar)wide.second_factor, (Scalar)wide.rest,
                          (Scalar)wide.first_mean, (Scalar)wide.second_mean};
  double total = 0.0;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t end = classes - start < kBlock ? classes : start + kBlock;
    total += finish_block<Element, kSymmetric, kFirst, kSecond>(row, start, end, by, (Scalar)scale, first_out,
                                                                second_out);
  }
  return divergence_of<kSymmetric>(total, sums);
}

template <class Element, bool kSymmetric>
static void run_long_rows(const KLPair& problem, int64_t begin, int64_t end, double scale, void* losses,
                          void* scratch) {
  const bool first = problem.first.gradient, second = problem.second.gradient;
  auto* const run =
      first ? (second ? run_row<Element, kSymmetric, true, true> : run_row<Element, kSymmetric, true, false>)
            : (second ? run_row<Element, kSymmetric, false, true> : run_row<Element, kSymmetric, false, false>);
  for (int64_t index = begin; index < end; ++index) {
    ((Accumulator<Element>*)losses)[index] = (Accumulator<Element>)run(problem, index, scale, scratch);
  }
}
