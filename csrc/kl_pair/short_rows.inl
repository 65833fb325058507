// Rows of few classes, as many at once as a vector has lanes: lane k of every vector belongs to row k, so that no sum
// runs across lanes. A row that is missing or does not count has zeros for logits, and with them a loss and gradients
// of zero.

// The logits of a class side by side: to[class][lane].
template <class Element>
static void gather(const KLPair& problem, const KLSide& side, int64_t begin, int64_t count, Accumulator<Element>* to) {
  constexpr int lanes = Lanes<Element>::count;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t index = begin + lane;
    const bool counts = lane < count && (!problem.mask || problem.mask[index]);
    const Element* const row = (const Element*)side.logits + (counts ? index * side.row_stride : 0);
    for (int64_t i = 0; i < problem.classes; ++i) to[i * lanes + lane] = counts ? to_accumulator(row[i]) : 0;
  }
}

template <class Element>
static void scatter(const Accumulator<Element>* from, int64_t classes, int64_t begin, int64_t count, void* gradient) {
  constexpr int lanes = Lanes<Element>::count;
  if (!gradient) return;
  for (int64_t lane = 0; lane < count; ++lane) {
    Element* const row = (Element*)gradient + (begin + lane) * classes;
    for (int64_t i = 0; i < classes; ++i) store_one(row + i, from[i * lanes + lane]);
  }
}

template <class Vector, class Scalar>
HE_INLINE Vector maximum_by_lane(const Scalar* logits, int64_t classes) {
  Vector best = splat<Vector>(-__builtin_inff());
  constexpr int lanes = Lanes<Scalar>::count;
  for (int64_t i = 0; i < classes; ++i) best = larger(load(logits + i * lanes), best);
  return best;
}

template <class Vector>
HE_INLINE RowSums sums_of_lane(const Moments<Vector>& sums, int lane) {
  const auto top = largest(sums.first)[0];
  return {sums.first[lane],        sums.second[lane],        sums.change[lane],       sums.first_moved[lane],
          sums.second_moved[lane], sums.highest[lane] > top, sums.lowest[lane] < -top};
}

template <class Vector>
HE_INLINE void set_lane(Finish<Vector>& by, int lane, const Finish<double>& one) {
  by.first_factor[lane] = one.first_factor;
  by.second_factor[lane] = one.second_factor;
  by.rest[lane] = one.rest;
  by.first_mean[lane] = one.first_mean;
  by.second_mean[lane] = one.second_mean;
}

// Up to a vector of rows.
template <class Element, bool kSymmetric>
static void run_lanes(const KLPair& problem, int64_t begin, int64_t count, double scale,
                      Accumulator<Element>* losses, void* scratch) {
  using Scalar = Accumulator<Element>;
  using Vector = typename Lanes<Element>::Vector;
  constexpr int lanes = Lanes<Element>::count;
  const int64_t classes = problem.classes, size = classes * lanes;
  Scalar* const a = (Scalar*)scratch;
  Scalar *const b = a + size, *const e = b + size, *const f = e + size;
  gather<Element>(problem, problem.first, begin, count, a);
  gather<Element>(problem, problem.second, begin, count, b);
  Level<Vector, Scalar> level{maximum_by_lane<Vector>(a, classes), maximum_by_lane<Vector>(b, classes), Vector{},
                              (Scalar)(1.0 / problem.temperature)};
  level.shift = level.first_maximum - level.second_maximum;
  Moments<Vector> moments = no_moments<Vector>();
  for (int64_t i = 0; i < size; i += lanes) {
    Vector first, second;
    exponentiate<kSymmetric>(load(a + i), load(b + i), level, moments, first, second);
    store(e + i, first);
    store(f + i, second);
  }
  RowSums sums[lanes];
  Finish<Vector> by{};
  for (int lane = 0; lane < lanes; ++lane) {
    sums[lane] = sums_of_lane(moments, lane);
    set_lane(by, lane, finish_of(sums[lane]));
  }
  Vector total{};
  for (int64_t i = 0; i < size; i += lanes) {  // the gradients take the places of the logits
    Vector first, second;
    finish<kSymmetric>(load(a + i), load(b + i), load(e + i), load(f + i), level, by, total, first, second);
    store(a + i, (Vector)(first * (Scalar)scale));
    store(b + i, (Vector)(second * (Scalar)scale));
  }
  scatter<Element>(a, classes, begin, count, problem.first.gradient);
  scatter<Element>(b, classes, begin, count, problem.second.gradient);
  for (int lane = 0; lane < count; ++lane) losses[lane] = (Scalar)divergence_of<kSymmetric>(total[lane], sums[lane]);
}

template <class Element, bool kSymmetric>
static void run_short_rows(const KLPair& problem, int64_t begin, int64_t end, double scale, void* losses,
                           void* scratch) {
  constexpr int lanes = Lanes<Element>::count;
  for (int64_t index = begin; index < end; index += lanes) {
    const int64_t count = end - index < lanes ? end - index : lanes;
    run_lanes<Element, kSymmetric>(problem, index, count, scale, (Accumulator<Element>*)losses + index, scratch);
  }
}
