// Cross-entropy of single rows. Included once per instruction set by cpu.cpp.
//
// One exponential per element: a block of the row is exponentiated against the block's own maximum and kept; when the
// row's maximum M and sum S are known, one multiplication per element by exp(block maximum - M) / S finishes the
// gradient. The second pass finds the block in the cache.

constexpr int64_t kBlock = 2048;

struct BlockSums {
  double shift;         // what was subtracted: the maximum, or 0 in a block of -inf
  double exponentials;  // sum of exp(x - shift)
  double deviations;    // sum of x - shift, for smoothing only
};

template <class Element>
HE_INLINE double block_maximum(const Element* logits, int64_t count) {
  using Vector = typename Lanes<Element>::Vector;
  constexpr int lanes = Lanes<Element>::count;
  Vector best[4];
  for (Vector& lane : best) lane = splat<Vector>(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    for (int part = 0; part < 4; ++part) best[part] = larger(load(logits + i + part * lanes), best[part]);
  }
  double maximum = maximum_of(larger(larger(best[0], best[1]), larger(best[2], best[3])));
  for (; i < count; ++i) {
    const double value = to_accumulator(logits[i]);
    maximum = value > maximum ? value : maximum;
  }
  return maximum;
}

template <class Element, bool kKeep, bool kSmooth>
HE_INLINE BlockSums exponentiate_block(const Element* logits, int64_t count, Accumulator<Element>* exponentials) {
  using Vector = typename Lanes<Element>::Vector;
  constexpr int lanes = Lanes<Element>::count;
  const double maximum = block_maximum(logits, count);
  const auto shift = (Accumulator<Element>)(maximum == -__builtin_inf() ? 0.0 : maximum);
  Vector sums[2] = {Vector{}, Vector{}};
  Vector deviations[2] = {Vector{}, Vector{}};
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    for (int part = 0; part < 2; ++part) {
      const Vector deviation = load(logits + i + part * lanes) - shift;
      const Vector value = exp_of_nonpositive(deviation);
      if (kKeep) store(exponentials + i + part * lanes, value);
      if (kSmooth) deviations[part] += deviation;
      sums[part] += value;
    }
  }
  BlockSums block{shift, sum_of(sums[0] + sums[1]), kSmooth ? sum_of(deviations[0] + deviations[1]) : 0.0};
  for (; i < count; i += lanes) {  // the tail, padded with -inf, whose exponential is 0
    const int64_t left = count - i < lanes ? count - i : lanes;
    Vector deviation = splat<Vector>(-__builtin_inff());
    for (int64_t lane = 0; lane < left; ++lane) {
      deviation[lane] = to_accumulator(logits[i + lane]) - shift;
      if (kSmooth) block.deviations += deviation[lane];
    }
    const Vector value = exp_of_nonpositive(deviation);
    if (kKeep) __builtin_memcpy(exponentials + i, &value, left * sizeof(exponentials[0]));
    block.exponentials += sum_of(value);
  }
  return block;
}

struct RowSums {
  double maximum;
  double exponentials;  // sum of exp(x - maximum)
  double mean;          // of the logits, for smoothing only
};

template <class Element, bool kKeep, bool kSmooth>
HE_INLINE RowSums exponentiate_row(const Element* logits, int64_t classes, Accumulator<Element>* exponentials,
                                   BlockSums* blocks) {
  RowSums row{-__builtin_inf(), 0.0, 0.0};
  double largest_shift = -__builtin_inf();
  int64_t block_count = 0;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t count = classes - start < kBlock ? classes - start : kBlock;
    const BlockSums block = exponentiate_block<Element, kKeep, kSmooth>(
        logits + start, count, kKeep ? exponentials + start : exponentials);
    blocks[block_count++] = block;
    // A block of -inf has shift 0; its sum is 0, so it must not raise the maximum of the row.
    if (block.exponentials != 0.0 && block.shift > largest_shift) largest_shift = block.shift;
    if (kSmooth) row.mean += block.deviations + block.shift * (double)count;
  }
  row.maximum = largest_shift;
  const double shift = largest_shift == -__builtin_inf() ? 0.0 : largest_shift;
  for (int64_t b = 0; b < block_count; ++b) {
    if (blocks[b].exponentials != 0.0) row.exponentials += blocks[b].exponentials * __builtin_exp(blocks[b].shift - shift);
  }
  row.mean /= (double)classes;
  return row;
}

// gradient = exponentials * factor - offset, blockwise. `exponentials` may be `gradient` itself.
template <class Element>
HE_INLINE void finish_gradient(const Accumulator<Element>* exponentials, Element* gradient, int64_t classes,
                               const BlockSums* blocks, const RowSums& row, double scale, double offset) {
  using Vector = typename Lanes<Element>::Vector;
  constexpr int lanes = Lanes<Element>::count;
  const auto minus = (Accumulator<Element>)offset;
  for (int64_t start = 0; start < classes; start += kBlock, ++blocks) {
    const int64_t end = classes - start < kBlock ? classes : start + kBlock;
    const double shift = blocks->exponentials == 0.0 ? row.maximum : blocks->shift;
    const auto factor = (Accumulator<Element>)(scale * __builtin_exp(shift - row.maximum) / row.exponentials);
    int64_t i = start;
    for (; i + lanes <= end; i += lanes) store(gradient + i, (Vector)(load(exponentials + i) * factor - minus));
    for (; i < end; ++i) store_one(gradient + i, exponentials[i] * factor - minus);
  }
}

template <class Element, bool kGradient, bool kSmooth>
static void run_row(const CrossEntropy& problem, int64_t index, double scale, Accumulator<Element>* loss, void* scratch) {
  const int64_t classes = problem.classes;
  const int64_t label = problem.target[index];
  const Element* const logits = (const Element*)problem.logits + index * problem.row_stride;
  Element* const gradient = kGradient ? (Element*)problem.gradient + index * classes : nullptr;
  if (label == problem.ignore_index || scale == 0.0) {
    // An ignored row contributes nothing, whatever it holds, NaN included.
    *loss = 0;
    if constexpr (kGradient) __builtin_memset((void*)gradient, 0, classes * sizeof(Element));
    return;
  }
  BlockSums* const blocks = (BlockSums*)scratch;
  auto* exponentials = (Accumulator<Element>*)(blocks + (classes + kBlock - 1) / kBlock);
  // Where the gradient has the accumulator's type it can hold the exponentials itself.
  if constexpr (kGradient && sizeof(Element) == sizeof(Accumulator<Element>)) exponentials = (Accumulator<Element>*)gradient;
  const RowSums row = exponentiate_row<Element, kGradient, kSmooth>(logits, classes, exponentials, blocks);

  const double label_weight = problem.weight ? (double)((const Accumulator<Element>*)problem.weight)[label] : 1.0;
  const double hard = (1.0 - problem.smoothing) * label_weight;
  const double soft = kSmooth ? problem.smoothing : 0.0;
  const double log_sum = __builtin_log(row.exponentials);
  const double label_logit = to_accumulator(logits[label]);
  // (M - x) + log S, not logsumexp - x: for logits around 1e30 the latter would be 0.
  double value = hard * ((row.maximum - label_logit) + log_sum);
  if (kSmooth) value += soft * ((row.maximum - row.mean) + log_sum);
  *loss = (Accumulator<Element>)value;
  if constexpr (kGradient) {
    const double uniform = soft / (double)classes;
    finish_gradient<Element>(exponentials, gradient, classes, blocks, row, scale * (hard + soft), scale * uniform);
    // The label's own entry is p - 1: formed in double, rounded once.
    const double probability = __builtin_exp(label_logit - row.maximum) / row.exponentials;
    store_one(gradient + label, scale * ((hard + soft) * probability - uniform - hard));
  }
}

template <class Element>
static void run_rows_of(const CrossEntropy& problem, int64_t begin, int64_t end, double scale, void* losses, void* scratch) {
  const bool smooth = problem.smoothing != 0.0;
  auto* const run = problem.gradient ? (smooth ? run_row<Element, true, true> : run_row<Element, true, false>)
                                     : (smooth ? run_row<Element, false, true> : run_row<Element, false, false>);
  for (int64_t index = begin; index < end; ++index) {
    run(problem, index, scale, (Accumulator<Element>*)losses + index, scratch);
  }
}

static void run_rows(const CrossEntropy& problem, int64_t begin, int64_t end, double scale, void* losses, void* scratch) {
  switch (problem.element) {
    case ElementType::float32:
      return run_rows_of<float>(problem, begin, end, scale, losses, scratch);
    case ElementType::bfloat16:
      return run_rows_of<Bf16>(problem, begin, end, scale, losses, scratch);
    case ElementType::float64:
      return run_rows_of<double>(problem, begin, end, scale, losses, scratch);
  }
}

template <class Element>
static void multiply_row_of(Element* row, int64_t count, double factor) {
  using Vector = typename Lanes<Element>::Vector;
  constexpr int lanes = Lanes<Element>::count;
  const auto narrow = (Accumulator<Element>)factor;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(row + i, (Vector)(load(row + i) * narrow));
  for (; i < count; ++i) store_one(row + i, to_accumulator(row[i]) * narrow);
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
