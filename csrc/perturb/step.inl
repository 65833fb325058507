// One perturbation step of one sequence. Included once per instruction set by cpu.cpp.
//
// Everything is computed in double and rounded once, into the output: squares of float32 and bfloat16 neither overflow
// nor underflow there, a step of any size is exact to the last bit of the output, and the kernel is bound by memory.
// Sums run position by position in a fixed order and skip masked positions, so a sequence gives the same bits alone,
// in any batch and under any padding.

template <class Element>
struct Position {
  const Element* delta;
  const Element* gradient;
  Element* output;
  bool kept;
};

template <class Element>
HE_INLINE Position<Element> position_of(const PerturbSite& site, int64_t sequence, int64_t index) {
  const int64_t place = sequence * site.length + index;
  const int64_t offset = place * site.width;
  return {(const Element*)site.delta + offset, (const Element*)site.gradient + offset, (Element*)site.output + offset,
          site.mask[place]};
}

// Sums `term` over the kept positions of a sequence. `term` takes a vector or a scalar of delta and of the gradient.
template <class Element, class Term>
HE_INLINE double sum_over_sequence(const PerturbStep& step, int64_t sequence, Term term) {
  double total = 0;
  for (const PerturbSite& site : step.sites) {
    for (int64_t index = 0; index < site.length; ++index) {
      const Position<Element> at = position_of<Element>(site, sequence, index);
      if (!at.kept) continue;
      DoubleLanes sums[2] = {DoubleLanes{}, DoubleLanes{}};
      int64_t i = 0;
      for (; i + 2 * kDoubleLanes <= site.width; i += 2 * kDoubleLanes) {
        sums[0] += term(load_wide(at.delta + i), load_wide(at.gradient + i));
        sums[1] += term(load_wide(at.delta + i + kDoubleLanes), load_wide(at.gradient + i + kDoubleLanes));
      }
      double sum = sum_of(sums[0] + sums[1]);
      for (; i < site.width; ++i) sum += term((double)to_accumulator(at.delta[i]), (double)to_accumulator(at.gradient[i]));
      total += sum;
    }
  }
  return total;
}

// Writes `value(delta, gradient)` where the mask keeps and zero elsewhere.
template <class Element, class Value>
HE_INLINE void write_sequence(const PerturbStep& step, int64_t sequence, Value value) {
  for (const PerturbSite& site : step.sites) {
    for (int64_t index = 0; index < site.length; ++index) {
      const Position<Element> at = position_of<Element>(site, sequence, index);
      if (!at.kept) {
        __builtin_memset((void*)at.output, 0, site.width * sizeof(Element));
        continue;
      }
      int64_t i = 0;
      for (; i + 2 * kDoubleLanes <= site.width; i += 2 * kDoubleLanes) {
        store_wide_pair(at.output + i, value(load_wide(at.delta + i), load_wide(at.gradient + i)),
                        value(load_wide(at.delta + i + kDoubleLanes), load_wide(at.gradient + i + kDoubleLanes)));
      }
      for (; i < site.width; ++i) {
        store_one(at.output + i, value((double)to_accumulator(at.delta[i]), (double)to_accumulator(at.gradient[i])));
      }
    }
  }
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
  for (const PerturbSite& site : step.sites) {
    for (int64_t index = 0; index < site.length; ++index) {
      const Position<Element> at = position_of<Element>(site, sequence, index);
      for (int64_t i = 0; at.kept && i < site.width; ++i) {
        const double size = __builtin_fabs((double)to_accumulator(at.gradient[i]));
        if (!(size <= largest)) largest = size;
        if (!(size < __builtin_inf())) return size;
      }
    }
  }
  return largest;
}

template <class Element>
HE_INLINE GradientNorm gradient_norm(const PerturbStep& step, int64_t sequence) {
  double squares = sum_over_sequence<Element>(step, sequence, [](auto, auto g) { return g * g; });
  double prescale = 1.0;
  if (sizeof(Element) == sizeof(double) && !(squares > 1e-280 && squares < __builtin_inf())) {
    const double largest = largest_gradient<Element>(step, sequence);
    if (!(largest < __builtin_inf())) return {false, 1.0, 0.0};
    int exponent = 0;
    if (largest > 0) __builtin_frexp(largest, &exponent);
    prescale = __builtin_ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
    squares = sum_over_sequence<Element>(
        step, sequence, [prescale](auto, auto g) { return (g * prescale) * (g * prescale); });
  }
  return {squares < __builtin_inf(), prescale, __builtin_sqrt(squares)};
}

template <class Element>
static void l2_step(const PerturbStep& step, int64_t sequence, const GradientNorm& gradient) {
  const double prescale = gradient.prescale;
  // A zero gradient has no direction: no step.
  const double rate = gradient.norm > 0 ? step.step_size / gradient.norm : 0.0;
  const auto moved = [prescale, rate](auto d, auto g) { return d + (g * prescale) * rate; };
  double shrink = 1.0;
  if (step.epsilon < __builtin_inf()) {
    const double norm = __builtin_sqrt(sum_over_sequence<Element>(step, sequence, [moved](auto d, auto g) {
      const auto z = moved(d, g);
      return z * z;
    }));
    if (norm > step.epsilon) shrink = step.epsilon / norm;
  }
  write_sequence<Element>(step, sequence, [moved, shrink](auto d, auto g) { return moved(d, g) * shrink; });
}

HE_INLINE double sign_step(double g, double size) { return g > 0 ? size : g < 0 ? -size : 0.0; }
HE_INLINE DoubleLanes sign_step(DoubleLanes g, double size) {
  const DoubleLanes up = splat<DoubleLanes>(size);
  return g > 0 ? up : (g < 0 ? -up : DoubleLanes{});
}
HE_INLINE double clamp(double z, double limit) { return z > limit ? limit : z < -limit ? -limit : z; }
HE_INLINE DoubleLanes clamp(DoubleLanes z, double limit) {
  const DoubleLanes up = splat<DoubleLanes>(limit);
  return z > up ? up : (z < -up ? -up : z);
}

template <class Element>
static void run_sequence(const PerturbStep& step, int64_t sequence) {
  const GradientNorm gradient = gradient_norm<Element>(step, sequence);
  if (!gradient.finite) {
    write_sequence<Element>(step, sequence, [](auto d, auto) { return d; });
  } else if (step.linf) {
    const double size = step.step_size, limit = step.epsilon;
    write_sequence<Element>(step, sequence,
                            [size, limit](auto d, auto g) { return clamp(d + sign_step(g, size), limit); });
  } else {
    l2_step<Element>(step, sequence, gradient);
  }
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
        run_sequence<double>(step, sequence);
        break;
    }
  }
}
