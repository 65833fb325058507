// Cross-entropy of single rows. Included once per instruction set by cpu.cpp.
//
// One exponential per element: a block of the row is exponentiated against the block's own maximum and kept in scratch
// memory, which stays in the cache; when the row's maximum M and sum S are known, one multiplication per element by
// exp(block maximum - M) / S finishes the gradient. Two ways: `plain` rows are softmax and label alone; `shaped` ones
// have a scale, a softcap or targets at every class, and pay for them.

constexpr int64_t kBlock = 2048;
// A smaller gradient may well be read from the cache next.
constexpr int64_t kStreamedElements = 1 << 20;

struct Block {
  double shift;         // what was subtracted: the maximum, or 0 in a block of -inf
  double exponentials;  // sum of exp(y - shift)
};

// What a row has in itself, before any gradient comes in.
struct Row {
  double maximum;
  double exponentials;  // S: sum of exp(y - maximum)
  double dense;         // sum of the dense targets q
  double deviations;    // sum of q (maximum - y)
};

// exp(x) for x <= 0. Most rows have one block, whose maximum is theirs.
HE_INLINE double decay(double x) { return x == 0.0 ? 1.0 : __builtin_exp(x); }

template <class Source>
HE_INLINE double block_maximum(const Source* values, int64_t count) {
  using Vector = typename Lanes<Source>::Vector;
  constexpr int lanes = Lanes<Source>::count;
  Vector best[4];
  for (Vector& lane : best) lane = splat<Vector>(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    for (int part = 0; part < 4; ++part) best[part] = larger(load(values + i + part * lanes), best[part]);
  }
  best[0] = larger(larger(best[0], best[1]), larger(best[2], best[3]));
  each_vector<Source>(count - i, [&](int64_t at, auto size) __attribute__((always_inline)) {
    best[0] = larger(load(values + i + at, size, -__builtin_inff()), best[0]);
  });
  return maximum_of(best[0]);
}

// Short runs are summed in float, the runs in double: beside the 1 of the maximum, floats would round off the rest, which
// is all there is to the gradient of a confident row.
template <class Element, class Body>
HE_INLINE void each_run(int64_t count, Body body) {
  constexpr int64_t run = 8 * Lanes<Element>::count;
  for (int64_t start = 0; start < count; start += run) body(start, count - start < run ? count - start : run);
}

// exponentials[i] = exp(values[i] - maximum of the block); the two may be the same memory.
template <class Source, bool kKeep>
HE_INLINE Block exponentiate_block(const Source* values, int64_t count, Accumulator<Source>* exponentials) {
  using Vector = typename Lanes<Source>::Vector;
  const double maximum = block_maximum(values, count);
  const auto shift = (Accumulator<Source>)(maximum == -__builtin_inf() ? 0.0 : maximum);
  DoubleLanes total = DoubleLanes{};
  each_run<Source>(count, [&](int64_t start, int64_t length) __attribute__((always_inline)) {
    Vector sum = Vector{};
    each_vector<Source>(length, [&](int64_t i, auto size) __attribute__((always_inline)) {
      __builtin_prefetch((const char*)(values + start + i) + kBlock * sizeof(Source));
      const Vector value = exp_of_nonpositive(load(values + start + i, size, -__builtin_inff()) - shift);
      if (kKeep) store(exponentials + start + i, value, size);
      sum += value;
    });
    total += widened(sum);
  });
  return {(double)shift, sum_of(total)};
}

// y = softcap tanh(scale x / softcap), or scale x.
template <class Vector>
HE_INLINE Vector shaped_logit(const CrossEntropy& problem, Vector x) {
  using Scalar = decltype(x[0] + x[0]);
  const Vector scaled = x * (Scalar)problem.scale;
  if (problem.softcap == 0.0) return scaled;
  return tanh_of(scaled * (Scalar)(1.0 / problem.softcap)) * (Scalar)problem.softcap;
}

// dy/dx
template <class Vector>
HE_INLINE Vector slope(const CrossEntropy& problem, Vector x) {
  using Scalar = decltype(x[0] + x[0]);
  if (problem.softcap == 0.0) return splat<Vector>((Scalar)problem.scale);
  const Vector t = tanh_of(x * (Scalar)(problem.scale / problem.softcap));
  return ((Scalar)1 - t * t) * (Scalar)problem.scale;
}

template <class Element>
HE_INLINE double shape_one(const CrossEntropy& problem, double x) {
  return shaped_logit(problem, splat<typename Lanes<Element>::Vector>((Accumulator<Element>)x))[0];
}
template <class Element>
HE_INLINE double slope_one(const CrossEntropy& problem, double x) {
  return slope(problem, splat<typename Lanes<Element>::Vector>((Accumulator<Element>)x))[0];
}

// Whether every class has a target of its own, beside the label's.
HE_INLINE bool has_dense_targets(const CrossEntropy& problem) {
  return problem.smoothing != 0.0 || problem.soft_target;
}

// The targets q at the classes from `start`, without the label's own share.
template <class Element, class Size>
HE_INLINE typename Lanes<Element>::Vector dense_targets(const CrossEntropy& problem, int64_t row, int64_t start, Size size) {
  using Vector = typename Lanes<Element>::Vector;
  using Scalar = Accumulator<Element>;
  Vector q = splat<Vector>((Scalar)(problem.smoothing / (double)problem.classes));
  if (problem.soft_target) {
    const Scalar* const given = (const Scalar*)problem.soft_target + row * problem.classes + start;
    q += load(given, size, 0.0f) * (Scalar)(1.0 - problem.smoothing);
  }
  return problem.weight ? q * load((const Scalar*)problem.weight + start, size, 0.0f) : q;
}

// sum of q and of q (shift - y), with y in `logits`; a class without weight contributes nothing, whatever its logit.
template <class Element>
HE_INLINE void add_dense(const CrossEntropy& problem, int64_t index, int64_t start, int64_t count,
                         const Accumulator<Element>* logits, double shift, double* mass, double* deviations) {
  using Vector = typename Lanes<Element>::Vector;
  DoubleLanes total = DoubleLanes{}, moved = DoubleLanes{};
  const auto narrow = (Accumulator<Element>)shift;
  each_run<Element>(count, [&](int64_t first, int64_t length) __attribute__((always_inline)) {
    Vector run_total = Vector{}, run_moved = Vector{};
    each_vector<Element>(length, [&](int64_t at, auto size) __attribute__((always_inline)) {
      const int64_t i = first + at;
      const Vector q = keep(dense_targets<Element>(problem, index, start + i, size), size);
      const Vector deviation = narrow - load(logits + i, size, narrow);
      run_total += q;
      run_moved += q == 0 ? Vector{} : q * deviation;
    });
    total += widened(run_total);
    moved += widened(run_moved);
  });
  *mass = sum_of(total);
  *deviations = sum_of(moved);
}

template <class Element, bool kKeep, bool kShaped>
HE_INLINE Row read_row(const CrossEntropy& problem, int64_t index, const Element* logits,
                       Accumulator<Element>* exponentials, Block* blocks) {
  Row row{-__builtin_inf(), 0.0, 0.0, 0.0};
  double dense_shift = 0.0;  // sum of q * shift of its block, for sum of q (maximum - y)
  int64_t block_count = 0;
  for (int64_t start = 0; start < problem.classes; start += kBlock) {
    const int64_t count = problem.classes - start < kBlock ? problem.classes - start : kBlock;
    Accumulator<Element>* const kept = kKeep ? exponentials + start : exponentials;
    Block block;
    if constexpr (kShaped) {
      each_vector<Element>(count, [&](int64_t i, auto size) __attribute__((always_inline)) {
        store(kept + i, shaped_logit(problem, load(logits + start + i, size, 0.0f)), size);
      });
      const double maximum = block_maximum(kept, count);
      if (has_dense_targets(problem)) {
        const double shift = maximum == -__builtin_inf() ? 0.0 : maximum;
        double mass, deviations;
        add_dense<Element>(problem, index, start, count, kept, shift, &mass, &deviations);
        row.dense += mass;
        row.deviations += deviations;
        dense_shift += mass * shift;
      }
      block = exponentiate_block<Accumulator<Element>, true>(kept, count, kept);
    } else {
      block = exponentiate_block<Element, kKeep>(logits + start, count, kept);
    }
    blocks[block_count++] = block;
    // A block of -inf has shift 0; its sum is 0, so it must not raise the maximum of the row.
    if (block.exponentials != 0.0 && block.shift > row.maximum) row.maximum = block.shift;
  }
  const double shift = row.maximum == -__builtin_inf() ? 0.0 : row.maximum;
  for (int64_t b = 0; b < block_count; ++b) {
    if (blocks[b].exponentials != 0.0) row.exponentials += blocks[b].exponentials * decay(blocks[b].shift - shift);
  }
  if (kShaped && has_dense_targets(problem)) row.deviations += row.dense * row.maximum - dense_shift;
  return row;
}

// gradient[i] = exponentials[i] * factor, past the cache. The factor is a number.
template <class Element>
HE_INLINE void stream_scaled(const Accumulator<Element>* exponentials, int64_t count, Accumulator<Element> factor,
                             Element* gradient) {
  using Vector = typename Lanes<Element>::Vector;
  constexpr int vectors = Pack<Element>::vectors;
  constexpr int64_t step = vectors * Lanes<Element>::count;
  int64_t i = 0;
  for (; i < count && ((uintptr_t)(gradient + i) & (HE_VECTOR_BYTES - 1)); ++i) store_one(gradient + i, exponentials[i] * factor);
  for (; i + step <= count; i += step) {
    Vector numbers[vectors];
    for (int part = 0; part < vectors; ++part) numbers[part] = load(exponentials + i + part * Lanes<Element>::count) * factor;
    stream_numbers(gradient + i, numbers);
  }
  for (; i < count; ++i) store_one(gradient + i, exponentials[i] * factor);
}

// gradient = dy/dx (by_p p - by_q q), blockwise, without the label's share of q.
template <class Element, bool kShaped>
HE_INLINE void write_gradient(const CrossEntropy& problem, int64_t index, const Element* logits,
                              const Accumulator<Element>* exponentials, const Block* blocks, const Row& row, double by_p,
                              double by_q, Element* gradient) {
  using Vector = typename Lanes<Element>::Vector;
  using Scalar = Accumulator<Element>;
  const bool dense = kShaped && has_dense_targets(problem);
  const bool streams =
      gradient != logits && problem.classes >= kBlock && problem.rows * problem.classes >= kStreamedElements;
  for (int64_t start = 0; start < problem.classes; start += kBlock, ++blocks) {
    const int64_t count = problem.classes - start < kBlock ? problem.classes - start : kBlock;
    const double shift = blocks->exponentials == 0.0 ? row.maximum : blocks->shift;
    const auto factor = (Scalar)(by_p * decay(shift - row.maximum) / row.exponentials);
    if (!kShaped && streams && factor == factor) {
      stream_scaled(exponentials + start, count, factor, gradient + start);
      continue;
    }
    each_vector<Element>(count, [&](int64_t i, auto size) __attribute__((always_inline)) {
      const int64_t at = start + i;
      Vector value = load(exponentials + at, size, 0.0f) * factor;
      if constexpr (kShaped) {
        if (dense) value -= dense_targets<Element>(problem, index, at, size) * (Scalar)by_q;
        value *= slope(problem, load(logits + at, size, 0.0f));
      }
      store(gradient + at, value, size);
    });
  }
}

template <class Element, bool kGradient, bool kShaped>
HE_INLINE RowResult finish_row(const CrossEntropy& problem, int64_t index, double by_loss, double by_lse, void* scratch) {
  using Scalar = Accumulator<Element>;
  const int64_t classes = problem.classes;
  const int64_t label = problem.target ? problem.target[index] : -1;
  const Element* const logits = (const Element*)problem.logits + index * problem.row_stride;
  Element* const gradient = kGradient ? (Element*)problem.gradient + index * problem.gradient_stride : nullptr;
  if (problem.target && label == problem.ignore_index) {
    // An ignored row contributes nothing, whatever it holds, NaN included.
    if constexpr (kGradient) __builtin_memset((void*)gradient, 0, classes * sizeof(Element));
    return {0.0, 0.0};
  }
  Block* const blocks = (Block*)scratch;
  const int64_t block_bytes = ((classes + kBlock - 1) / kBlock * (int64_t)sizeof(Block) + 63) & ~(int64_t)63;
  Scalar* const exponentials = (Scalar*)((char*)scratch + block_bytes);
  // The label's logit is read before the gradient may overwrite it.
  const double label_raw = label < 0 ? 0.0 : (double)to_accumulator(logits[label]);
  const double label_logit = kShaped ? shape_one<Element>(problem, label_raw) : label_raw;
  const Row row = read_row<Element, kGradient, kShaped>(problem, index, logits, exponentials, blocks);

  const double label_weight = label >= 0 && problem.weight ? (double)((const Scalar*)problem.weight)[label] : 1.0;
  const double hard = label < 0 ? 0.0 : (1.0 - problem.smoothing) * label_weight;
  const double log_sum = __builtin_log(row.exponentials);
  // A row of -inf has no softmax.
  const double lse = row.exponentials == 0.0 ? __builtin_nan("") : row.maximum + log_sum;
  // (M - y) + log S, not lse - y: for logits around 1e30 the latter would be 0.
  double loss = hard == 0.0 ? 0.0 : hard * ((row.maximum - label_logit) + log_sum);
  if (kShaped && has_dense_targets(problem)) loss += row.deviations + row.dense * log_sum;
  if constexpr (kGradient) {
    const double by_q = by_loss * problem.loss_factor;
    const double by_p = by_q * (hard + row.dense) + by_loss * (2.0 * problem.z_factor * problem.z_loss) * lse + by_lse;
    // The label's own entry is p - 1: formed in double, rounded once. Where p is near 1 its exponential is 1 exactly.
    const double kept = label < 0 ? 0.0 : (double)exponentials[label] * decay(blocks[label / kBlock].shift - row.maximum);
    const double probability = kept / row.exponentials;
    const double label_slope = kShaped ? slope_one<Element>(problem, label_raw) : 1.0;
    double uniform = 0.0;
    if (kShaped && has_dense_targets(problem)) uniform = problem.smoothing / (double)classes * label_weight;
    write_gradient<Element, kShaped>(problem, index, logits, exponentials, blocks, row, by_p, by_q, gradient);
    if (label >= 0) store_one(gradient + label, label_slope * (by_p * probability - by_q * (hard + uniform)));
  }
  return {problem.loss_factor * loss + problem.z_factor * problem.z_loss * lse * lse, lse};
}

template <class Element>
static RowResult run_row_of(const CrossEntropy& problem, int64_t index, double by_loss, double by_lse, void* scratch) {
  const bool shaped = problem.scale != 1.0 || problem.softcap != 0.0 || problem.smoothing != 0.0 || problem.soft_target;
  if (problem.gradient) {
    return shaped ? finish_row<Element, true, true>(problem, index, by_loss, by_lse, scratch)
                  : finish_row<Element, true, false>(problem, index, by_loss, by_lse, scratch);
  }
  return shaped ? finish_row<Element, false, true>(problem, index, by_loss, by_lse, scratch)
                : finish_row<Element, false, false>(problem, index, by_loss, by_lse, scratch);
}

static RowResult run_row(const CrossEntropy& problem, int64_t index, double by_loss, double by_lse, void* scratch) {
  switch (problem.element) {
    case ElementType::float32:
      return run_row_of<float>(problem, index, by_loss, by_lse, scratch);
    case ElementType::bfloat16:
      return run_row_of<Bf16>(problem, index, by_loss, by_lse, scratch);
    default:
      return run_row_of<double>(problem, index, by_loss, by_lse, scratch);
  }
}

template <class Element>
static void multiply_row_of(Element* row, int64_t count, double factor) {
  using Vector = typename Lanes<Element>::Vector;
  const auto narrow = (Accumulator<Element>)factor;
  each_vector<Element>(count, [&](int64_t i, auto size) __attribute__((always_inline)) {
    store(row + i, (Vector)(load(row + i, size, 0.0f) * narrow), size);
  });
}

static void multiply_row(ElementType element, void* gradient, int64_t index, int64_t classes, double factor) {
  switch (element) {
    case ElementType::float32:
      return multiply_row_of((float*)gradient + index * classes, classes, factor);
    case ElementType::bfloat16:
      return multiply_row_of((Bf16*)gradient + index * classes, classes, factor);
    case ElementType::float64:
      return multiply_row_of((double*)gradient + index * classes, classes, factor);
  }
}
