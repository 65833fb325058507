// One perturbation step of one sequence in double: for float64, and for what leaves the range of float.
//
// Everything is rounded once, into the output: squares of float32 and bfloat16 neither overflow nor underflow in double,
// and a step of any size is exact to the last bit of the output.

// Sums `term` over the kept positions of a sequence. `term` takes a vector or a scalar of delta and of the gradient.
template <class Element, class Term>
HE_INLINE double wide_sum(const PerturbStep& step, int64_t sequence, Term term) {
  double total = 0;
  for_each_position<Element>(step, sequence, [&](const Position<Element>& at) {
    if (!at.kept) return;
    DoubleLanes sums[2] = {DoubleLanes{}, DoubleLanes{}};
    int64_t i = 0;
    for (; i + 2 * kDoubleLanes <= at.width; i += 2 * kDoubleLanes) {
      sums[0] += term(load_wide(at.delta + i), load_wide(at.gradient + i));
      sums[1] += term(load_wide(at.delta + i + kDoubleLanes), load_wide(at.gradient + i + kDoubleLanes));
    }
    double sum = sum_of(sums[0] + sums[1]);
    for (; i < at.width; ++i) sum += term((double)to_accumulator(at.delta[i]), (double)to_accumulator(at.gradient[i]));
    total += sum;
  });
  return total;
}

// Writes `value(delta, gradient)` where the mask keeps and zero elsewhere.
template <class Element, class Value>
HE_INLINE void wide_write(const PerturbStep& step, int64_t sequence, Value value) {
  for_each_position<Element>(step, sequence, [&](const Position<Element>& at) {
    if (!at.kept) {
      __builtin_memset((void*)at.output, 0, at.width * sizeof(Element));
      return;
    }
    int64_t i = 0;
    for (; i + 2 * kDoubleLanes <= at.width; i += 2 * kDoubleLanes) {
      store_wide_pair(at.output + i, value(load_wide(at.delta + i), load_wide(at.gradient + i)),
                      value(load_wide(at.delta + i + kDoubleLanes), load_wide(at.gradient + i + kDoubleLanes)));
    }
    for (; i < at.width; ++i) {
      store_one(at.output + i, value((double)to_accumulator(at.delta[i]), (double)to_accumulator(at.gradient[i])));
    }
  });
}

struct GradientNorm {
  bool finite;
  double prescale;  // a power of two, 1 except for float64 gradients of extreme size
  double norm;      // of prescale * gradient
};

// Largest |gradient| of a sequence; NaN or infinity if there is one.
template <class Element>
static double largest_gradient(const PerturbStep& step, int64_t sequence) {
  double largest = 0;
  for_each_position<Element>(step, sequence, [&](const Position<Element>& at) {
    for (int64_t i = 0; at.kept && i < at.width; ++i) {
      const double size = __builtin_fabs((double)to_accumulator(at.gradient[i]));
      if (!(size <= largest) && largest == largest) largest = size;  // once NaN, it stays
    }
  });
  return largest;
}

template <class Element>
HE_INLINE GradientNorm gradient_norm(const PerturbStep& step, int64_t sequence) {
  double squares = wide_sum<Element>(step, sequence, [](auto, auto g) { return g * g; });
  double prescale = 1.0;
  if (sizeof(Element) == sizeof(double) && !(squares > 1e-280 && squares < __builtin_inf())) {
    const double largest = largest_gradient<Element>(step, sequence);
    if (!(largest < __builtin_inf())) return {false, 1.0, 0.0};
    int exponent = 0;
    if (largest > 0) __builtin_frexp(largest, &exponent);
    prescale = __builtin_ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
    squares = wide_sum<Element>(
        step, sequence, [prescale](auto, auto g) { return (g * prescale) * (g * prescale); });
  }
  return {squares < __builtin_inf(), prescale, __builtin_sqrt(squares)};
}

template <class Element>
static void wide_l2_step(const PerturbStep& step, int64_t sequence, const GradientNorm& gradient) {
  const double prescale = gradient.prescale;
  // A zero gradient has no direction: no step.
  const double rate = gradient.norm > 0 ? step.step_size / gradient.norm : 0.0;
  const auto moved = [prescale, rate](auto d, auto g) { return d + (g * prescale) * rate; };
  double shrink = 1.0;
  if (step.epsilon < __builtin_inf()) {
    const double norm = __builtin_sqrt(wide_sum<Element>(step, sequence, [moved](auto d, auto g) {
      const auto z = moved(d, g);
      return z * z;
    }));
    if (norm > step.epsilon) shrink = step.epsilon / norm;
  }
  wide_write<Element>(step, sequence, [moved, shrink](auto d, auto g) { return moved(d, g) * shrink; });
}

template <class Element>
static void run_wide(const PerturbStep& step, int64_t sequence) {
  const GradientNorm gradient = gradient_norm<Element>(step, sequence);
  if (!gradient.finite) {
    wide_write<Element>(step, sequence, [](auto d, auto) { return d; });
  } else if (step.linf) {
    const double size = step.step_size, limit = step.epsilon;
    wide_write<Element>(step, sequence,
                            [size, limit](auto d, auto g) { return clamp(d + sign_step(g, size), limit); });
  } else {
    wide_l2_step<Element>(step, sequence, gradient);
  }
}
