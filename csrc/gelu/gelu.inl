// GELU of a range of blocks. Included once per instruction set by cpu.cpp.
//
// With a = |x|, e = exp(-a^2/2) and c = 1/sqrt(2 pi), the normal distribution has the upper tail Q(a) = e R(a), where
// the Mills ratio R(a) = exp(a^2/2) erfc(a/sqrt 2) / 2 falls smoothly from 1/2. A polynomial p does for R, without the
// division that the usual forms in 1/(1 + k a) need. The derivative's tail is e (R(a) - c a), so it takes the same
// polynomial with another linear term, and costs what the value costs:
//     value       x > 0:  x (1 - e p(a))       x < 0:  x e p(a)
//     derivative  x > 0:  1 - e (p(a) - c a)   x < 0:  e (p(a) - c a)
//
// p has degree 11 and the constant term 1/2, so that Phi(0) is exact. Its other coefficients minimise the largest
// e |R - p| over 0 < a <= 5.5 (Remez exchange in 50 digits) and were rounded to float32; beyond, p keeps its last
// value. The exponential is 2^k 2^r, 2^r a polynomial of degree 6 with the constant term 1 and the least relative error
// over |r| <= 1/2, found in the same way. With u = 2^-24, the rounding of one operation, absolute errors are at most
//                                                                           value    derivative
//     e |R - p| over all a, coefficients rounded, p cut off at 5.5          0.44 u     0.57 u
//     Horner's roundings in p, without FMA, times e                         0.91 u     1.37 u
//     2^r: 0.36 u by its coefficients and 2 u by Horner's roundings,
//         relative to a tail of at most 1/2                                 1.18 u     1.18 u
//     2.3 u in the exponent, times a^2/2 and the tail                       0.20 u     0.40 u
//     the product e p                                                       0.50 u     0.50 u
//     1 - tail and the last product                                         2.00 u     2.26 u
// The maxima lie at different a: the sums at one a stay below 4 u = 2 eps of |x| for the value and 6 u = 3 eps of the
// incoming gradient for the derivative. Over every float32 of 2^-12 <= |x| < 32 the largest are 2.3 u and 2.6 u. (Half
// of the smallest |x| is not always a float32: there the value is off by half a step of the subnormal numbers.)
// These bounds are absolute. In the negative tail, where the value itself vanishes, its relative error grows: to 0.4%
// at x = -4.5 and 80% below -5.4, where |x Phi(x)| is less than 2e-7. Below -13.2 the result is zero.

// Coefficients from the constant term up.
constexpr float kPower[] = {1.0f,
                            6.931472421e-01f,
                            2.402265221e-01f,
                            5.550310388e-02f,
                            9.617692791e-03f,
                            1.340664458e-03f,
                            1.559468365e-04f};
template <bool kSlope>
constexpr float kTail[] = {0.5f,
                           kSlope ? -7.978834510e-01f : -3.989411294e-01f,
                           2.499773800e-01f,
                           -1.328249127e-01f,
                           6.196513399e-02f,
                           -2.552480251e-02f,
                           9.046657011e-03f,
                           -2.612287411e-03f,
                           5.710040568e-04f,
                           -8.626942872e-05f,
                           7.879521945e-06f,
                           -3.238435227e-07f};

// Several vectors go in lockstep: the steps of one wait for each other, and so many of them fill the CPU's window that
// it does not reach the next vector by itself. Two were measured an eighth faster than one.
constexpr int kGroup = 2;
constexpr int kGroupLanes = kGroup * kFloatLanes;

template <int kCount>
HE_INLINE void polynomial(const float (&coefficients)[kCount], const FloatLanes (&x)[kGroup], FloatLanes (&p)[kGroup]) {
  for (int i = 0; i < kGroup; ++i) p[i] = splat<FloatLanes>(coefficients[kCount - 1]);
#pragma GCC unroll 16
  for (int k = kCount - 2; k >= 0; --k) {
    for (int i = 0; i < kGroup; ++i) p[i] = p[i] * x[i] + coefficients[k];
  }
}

// exp(-x^2/2) for |x| <= 13.2, where it is a normal number. The exponent k comes from the rounding that adding
// 1.5*2^23 forces; s - k is exact.
HE_INLINE void bell_at(const FloatLanes (&x)[kGroup], FloatLanes (&bell)[kGroup]) {
  FloatLanes r[kGroup];
  BitLanes k[kGroup];  // without sign, so that it may overflow where |x| is larger and nobody reads the result
  for (int i = 0; i < kGroup; ++i) {
    const FloatLanes s = x[i] * x[i] * -0.7213475204f;  // log2(e) / 2
    const FloatLanes shifted = s + 12582912.0f;
    r[i] = s - (shifted - 12582912.0f);
    k[i] = (BitLanes)shifted << 23;
  }
  polynomial(kPower, r, bell);
  for (int i = 0; i < kGroup; ++i) bell[i] = (FloatLanes)((BitLanes)bell[i] + k[i]);
}

// Phi(x), or with kSlope the derivative of x Phi(x). Floats without sign are in the order of their bits, NaN last, and
// integers have a minimum in one instruction.
template <bool kSlope>
HE_INLINE void share_at(const FloatLanes (&x)[kGroup], FloatLanes (&share)[kGroup]) {
  const IntLanes last = splat<IntLanes>(0x40b00000);  // 5.5
  const IntLanes end = splat<IntLanes>(0x41533333);   // 13.2
  FloatLanes bell[kGroup], a[kGroup], p[kGroup];
  IntLanes size[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    size[i] = (IntLanes)x[i] & 0x7fffffff;
    a[i] = (FloatLanes)(size[i] < last ? size[i] : last);
  }
  bell_at(x, bell);
  polynomial(kTail<kSlope>, a, p);
  for (int i = 0; i < kGroup; ++i) {
    // Far out the tail is zero. The slope of infinity and NaN is NaN, as torch's is; the value gets it from x Phi(x).
    const FloatLanes beyond = kSlope ? x[i] * 0.0f : FloatLanes{};
    const FloatLanes tail = (size[i] < end ? bell[i] : beyond) * p[i];
    share[i] = (IntLanes)x[i] < 0 ? tail : 1.0f - tail;
  }
}

constexpr int kBlock = 64;

template <bool kBackward>
HE_INLINE void run_block(const float* input, const float* gradient, float* output) {
  for (int start = 0; start < kBlock; start += kGroupLanes) {
    FloatLanes x[kGroup], share[kGroup];
    for (int i = 0; i < kGroup; ++i) x[i] = load(input + start + i * kFloatLanes);
    share_at<kBackward>(x, share);
    for (int i = 0; i < kGroup; ++i) {
      const int place = start + i * kFloatLanes;
      store(output + place, (kBackward ? load(gradient + place) : x[i]) * share[i]);
    }
  }
}

// What is left of the last block goes through copies of full length.
template <bool kBackward>
static void run_rest(const Gelu& work, int64_t start) {
  float input[kBlock] = {}, gradient[kBlock] = {}, output[kBlock];
  const int64_t size = (work.count - start) * sizeof(float);
  __builtin_memcpy(input, work.input + start, size);
  if (kBackward) __builtin_memcpy(gradient, work.gradient + start, size);
  run_block<kBackward>(input, gradient, output);
  __builtin_memcpy(work.output + start, output, size);
}

template <bool kBackward>
static void run_range(const Gelu& work, int64_t begin, int64_t end) {
  const int64_t whole = work.count / kBlock;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlock;
    if (block == whole) {
      run_rest<kBackward>(work, start);
    } else {
      run_block<kBackward>(work.input + start, kBackward ? work.gradient + start : nullptr, work.output + start);
    }
  }
}

static void run_blocks(const Gelu& work, int64_t begin, int64_t end) {
  if (work.gradient) {
    run_range<true>(work, begin, end);
  } else {
    run_range<false>(work, begin, end);
  }
}
