// The two passes over a chunk of a weight, in double. Included once per instruction set by cpu.cpp.

// s of ASAM, of vectors and of scalars.
HE_INLINE double size_of(double w, double eta) { return __builtin_fabs(w) + eta; }
HE_INLINE DoubleLanes size_of(DoubleLanes w, double eta) { return (w < 0 ? -w : w) + eta; }

template <class Weight, class Gradient>
static Squares squares_of(const Chunk& chunk, WeightRule rule, double eta) {
  const Weight* const weight = (const Weight*)chunk.weight;
  const Gradient* const gradient = (const Gradient*)chunk.gradient;
  DoubleLanes gg[4] = {}, ww[4] = {};
  int64_t i = 0;
  for (; i + 4 * kDoubleLanes <= chunk.count; i += 4 * kDoubleLanes) {
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + part * kDoubleLanes;
      DoubleLanes g = load_wide(gradient + at);
      if (rule == WeightRule::asam) g *= size_of(load_wide(weight + at), eta);
      gg[part] += g * g;
      if (rule == WeightRule::awp) {
        const DoubleLanes w = load_wide(weight + at);
        ww[part] += w * w;
      }
    }
  }
  Squares sums{sum_of((gg[0] + gg[1]) + (gg[2] + gg[3])), sum_of((ww[0] + ww[1]) + (ww[2] + ww[3]))};
  for (; i < chunk.count; ++i) {
    const double w = to_accumulator(weight[i]);
    double g = to_accumulator(gradient[i]);
    if (rule == WeightRule::asam) g *= size_of(w, eta);
    sums.gradient += g * g;
    sums.weight += w * w;
  }
  return sums;
}

// w += rate s^2 g; returns the sum of squares of what was added. `kAdaptive`: s = |w| + eta, else 1.
template <bool kAdaptive, class Weight, class Gradient>
static double move_block(Weight* weight, const Gradient* gradient, int64_t count, double rate, double eta) {
  const auto moved = [rate, eta](auto w, auto g) {
    if constexpr (kAdaptive) {
      const auto s = size_of(w, eta);
      return w + (s * s) * (g * rate);
    }
    return w + g * rate;
  };
  DoubleLanes sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kDoubleLanes <= count; i += 2 * kDoubleLanes) {
    const DoubleLanes low = load_wide(weight + i), high = load_wide(weight + i + kDoubleLanes);
    store_wide_pair(weight + i, moved(low, load_wide(gradient + i)), moved(high, load_wide(gradient + i + kDoubleLanes)));
    const DoubleLanes first = load_wide(weight + i) - low, second = load_wide(weight + i + kDoubleLanes) - high;
    sums[0] += first * first;
    sums[1] += second * second;
  }
  double sum = sum_of(sums[0] + sums[1]);
  for (; i < count; ++i) {
    const double w = to_accumulator(weight[i]);
    store_one(weight + i, moved(w, (double)to_accumulator(gradient[i])));
    const double added = to_accumulator(weight[i]) - w;
    sum += added * added;
  }
  return sum;
}

// Saves a chunk's bits and moves it, block by block, so that it is read from memory once.
template <class Weight, class Gradient>
static double save_and_move(const Chunk& chunk, WeightRule rule, double rate, double eta) {
  constexpr int64_t kBlock = 4096;
  double sum = 0;
  for (int64_t start = 0; start < chunk.count; start += kBlock) {
    const int64_t count = chunk.count - start < kBlock ? chunk.count - start : kBlock;
    Weight* const weight = (Weight*)chunk.weight + start;
    const Gradient* const gradient = (const Gradient*)chunk.gradient + start;
    stream_copy((Weight*)chunk.saved + start, weight, count * sizeof(Weight));
    if (rate == 0) continue;  // of a gradient without direction, which may hold NaN
    sum += rule == WeightRule::asam ? move_block<true>(weight, gradient, count, rate, eta)
                                    : move_block<false>(weight, gradient, count, rate, eta);
  }
  return sum;
}

// Calls `function<Weight, Gradient>(chunk, ...)` for the chunk's element types.
#define HE_BY_ELEMENT(function, chunk, ...)                                                               \
  ((chunk).element == ElementType::float32   ? function<float, float>(chunk, __VA_ARGS__)                 \
   : (chunk).element == ElementType::float64 ? function<double, double>(chunk, __VA_ARGS__)               \
   : (chunk).gradient_element == ElementType::float32 ? function<Bf16, float>(chunk, __VA_ARGS__)         \
                                                      : function<Bf16, Bf16>(chunk, __VA_ARGS__))

static void sum_chunks(const Chunk* chunks, Squares* sums, WeightRule rule, double eta, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) sums[i] = HE_BY_ELEMENT(squares_of, chunks[i], rule, eta);
}

static void move_chunks(const Chunk* chunks, const double* rates, double* sums, WeightRule rule, double eta,
                        int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    sums[i] = HE_BY_ELEMENT(save_and_move, chunks[i], rule, rates[chunks[i].tensor], eta);
  }
}

#undef HE_BY_ELEMENT
