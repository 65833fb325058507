// One perturbation step of each sequence.
//
// float32 and bfloat16 are computed in float, which memory can keep up with; sums of squares go on in double after every
// few products. Sequences whose numbers do not fit, and float64, take the way of wide.inl. Which way a sequence takes
// depends on its own numbers alone.

// Sums over the kept positions of a sequence, of float products.
//
// A lane adds at most 4 products before two lanes are added and widened: 5 roundings, each of 2^-24 of what is summed.
// So the root of a sum of squares is off by 2.5 * 2^-24 of itself at most, and by far less on average.
struct Sums {
  double gradient;  // g g
  double cross;     // d g
  double delta;     // d d
};

template <bool kWithDelta, class Element>
static Sums sums_of(const PerturbStep& step, int64_t sequence) {
  DoubleLanes gg = {}, dg = {}, dd = {};
  double gg_rest = 0, dg_rest = 0, dd_rest = 0;
  for_each_position<Element>(step, sequence, [&](const Position<Element>& at) {
    if (!at.kept) return;
    int64_t i = 0;
    while (i + kFloatLanes <= at.width) {
      FloatLanes parts[3][2] = {};
      for (int turn = 0; turn < 8 && i + kFloatLanes <= at.width; ++turn, i += kFloatLanes) {
        const FloatLanes g = load(at.gradient + i);
        parts[0][turn % 2] += g * g;
        if (kWithDelta) {
          const FloatLanes d = load(at.delta + i);
          parts[1][turn % 2] += d * g;
          parts[2][turn % 2] += d * d;
        }
      }
      gg += widened(parts[0][0] + parts[0][1]);
      if (kWithDelta) {
        dg += widened(parts[1][0] + parts[1][1]);
        dd += widened(parts[2][0] + parts[2][1]);
      }
    }
    for (; i < at.width; ++i) {
      const double d = to_accumulator(at.delta[i]), g = to_accumulator(at.gradient[i]);
      gg_rest += g * g;
      dg_rest += d * g;
      dd_rest += d * d;
    }
  });
  return {sum_of(gg) + gg_rest, sum_of(dg) + dg_rest, sum_of(dd) + dd_rest};
}

// Writes `value(delta, gradient)`, of vectors or scalars, where the mask keeps and zero elsewhere.
template <class Element, class Value>
HE_INLINE void write_sequence(const PerturbStep& step, int64_t sequence, Value value) {
  for_each_position<Element>(step, sequence, [&](const Position<Element>& at) {
    if (!at.kept) {
      __builtin_memset((void*)at.output, 0, at.width * sizeof(Element));
      return;
    }
    int64_t i = 0;
    for (; i + kFloatLanes <= at.width; i += kFloatLanes) {
      store(at.output + i, value(load(at.delta + i), load(at.gradient + i)));
    }
    for (; i < at.width; ++i) store_one(at.output + i, value(to_accumulator(at.delta[i]), to_accumulator(at.gradient[i])));
  });
}

// Whether float holds a factor with all its digits, and room for products.
HE_INLINE bool fits(double factor) { return factor == 0 || (factor > 1e-30 && factor < 1e30); }

// Below this sum, products lost to float's smallest number (2^-126 each where subnormals are off) could be felt.
constexpr double kSmallestSum = 1e-22;

template <class Element>
static bool run_linf(const PerturbStep& step, int64_t sequence) {
  if (!(sums_of<false, Element>(step, sequence).gradient < __builtin_inf())) return false;
  const float size = (float)step.step_size, limit = (float)step.epsilon;
  write_sequence<Element>(step, sequence, [size, limit](auto d, auto g) { return clamp(d + sign_step(g, size), limit); });
  return true;
}

template <class Element>
static bool run_l2(const PerturbStep& step, int64_t sequence) {
  const bool projects = step.epsilon < __builtin_inf();
  const Sums sums = projects ? sums_of<true, Element>(step, sequence) : sums_of<false, Element>(step, sequence);
  if (!(sums.gradient > kSmallestSum && sums.gradient < __builtin_inf())) return false;
  const double rate = step.step_size / __builtin_sqrt(sums.gradient);
  double shrink = 1.0;
  if (projects) {
    // ||d + r g||^2 without another pass. Where the step undoes most of delta its digits cancel: not here then. With
    // half of the terms left, the norm is off by at most 4 times what each sum is: 10 * 2^-24 of itself.
    const double apart = sums.delta + rate * rate * sums.gradient;
    const double squares = apart + 2 * rate * sums.cross;
    if (!(squares > kSmallestSum && squares < __builtin_inf() && squares >= apart / 2)) return false;
    const double norm = __builtin_sqrt(squares);
    if (norm > step.epsilon) shrink = step.epsilon / norm;
  }
  if (!fits(rate) || !fits(shrink)) return false;
  const float r = (float)rate, s = (float)shrink;
  write_sequence<Element>(step, sequence, [r, s](auto d, auto g) { return (d + g * r) * s; });
  return true;
}

template <class Element>
static void run_sequence(const PerturbStep& step, int64_t sequence) {
  const bool done = step.linf ? run_linf<Element>(step, sequence) : run_l2<Element>(step, sequence);
  if (!done) run_wide<Element>(step, sequence);
}

static void run_sequences(const PerturbStep& step, int64_t begin, int64_t end) {
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    switch (step.element) {
      case ElementType::float32:
        run_sequence<float>(step, sequence);
        break;
      case ElementType::bfloat16:
        run_sequence<Bf16>(step, sequence);
        break;
      case ElementType::float64:
        run_wide<double>(step, sequence);
        break;
    }
  }
}
