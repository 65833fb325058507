// Vectors of HE_VECTOR_BYTES bytes, by GCC/Clang vector extensions. Included once per instruction set.

#define HE_HAS_AVX512 (HE_X86_DISPATCH && HE_VECTOR_BYTES == 64)

constexpr int kFloatLanes = HE_VECTOR_BYTES / 4;
constexpr int kDoubleLanes = HE_VECTOR_BYTES / 8;

typedef float FloatLanes __attribute__((vector_size(HE_VECTOR_BYTES)));
typedef int32_t IntLanes __attribute__((vector_size(HE_VECTOR_BYTES)));
typedef uint32_t BitLanes __attribute__((vector_size(HE_VECTOR_BYTES)));
typedef double DoubleLanes __attribute__((vector_size(HE_VECTOR_BYTES)));
// As many elements as FloatLanes (Bf16Lanes) or DoubleLanes (Narrow...) hold.
typedef uint16_t Bf16Lanes __attribute__((vector_size(HE_VECTOR_BYTES / 2)));
typedef float NarrowFloatLanes __attribute__((vector_size(HE_VECTOR_BYTES / 2)));
typedef uint32_t NarrowBitLanes __attribute__((vector_size(HE_VECTOR_BYTES / 2)));
typedef uint16_t NarrowBf16Lanes __attribute__((vector_size(HE_VECTOR_BYTES / 4)));

// The vector an element is computed in.
template <class Element>
struct Lanes {
  using Vector = FloatLanes;
  static constexpr int count = kFloatLanes;
};
template <>
struct Lanes<double> {
  using Vector = DoubleLanes;
  static constexpr int count = kDoubleLanes;
};

template <class Vector, class Scalar>
HE_INLINE Vector splat(Scalar value) {
  return Vector{} + value;
}

// memcpy of a whole vector compiles to one unaligned load or store and breaks no aliasing rule.
template <class Vector>
HE_INLINE Vector load_as(const void* source) {
  Vector vector;
  __builtin_memcpy(&vector, source, sizeof(Vector));
  return vector;
}

HE_INLINE FloatLanes load(const float* source) { return load_as<FloatLanes>(source); }
HE_INLINE DoubleLanes load(const double* source) { return load_as<DoubleLanes>(source); }
HE_INLINE FloatLanes load(const Bf16* source) {
  return (FloatLanes)(__builtin_convertvector(load_as<Bf16Lanes>(source), BitLanes) << 16);
}

HE_INLINE void store(float* target, FloatLanes vector) { __builtin_memcpy(target, &vector, sizeof(vector)); }
HE_INLINE void store(double* target, DoubleLanes vector) { __builtin_memcpy(target, &vector, sizeof(vector)); }

// Rounds to nearest even; NaN becomes the quiet NaN that torch uses.
HE_INLINE void store(Bf16* target, FloatLanes vector) {
  const BitLanes bits = (BitLanes)vector;
  const BitLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitLanes result = vector == vector ? rounded : splat<BitLanes>(0x7fc0u);
  const Bf16Lanes narrow = __builtin_convertvector(result, Bf16Lanes);
  __builtin_memcpy(target, &narrow, sizeof(narrow));
}

// The same in double precision, kDoubleLanes elements at a time.
HE_INLINE DoubleLanes load_wide(const double* source) { return load(source); }
HE_INLINE DoubleLanes load_wide(const float* source) {
  return __builtin_convertvector(load_as<NarrowFloatLanes>(source), DoubleLanes);
}
HE_INLINE DoubleLanes load_wide(const Bf16* source) {
  const NarrowBitLanes bits = __builtin_convertvector(load_as<NarrowBf16Lanes>(source), NarrowBitLanes) << 16;
  return __builtin_convertvector((NarrowFloatLanes)bits, DoubleLanes);
}

// Two vectors to neighbouring places. Narrowed to one full vector first: half-filled ones narrow slowly.
HE_INLINE void store_wide_pair(double* target, DoubleLanes low, DoubleLanes high) {
  store(target, low);
  store(target + kDoubleLanes, high);
}
template <class Element>
HE_INLINE void store_wide_pair(Element* target, DoubleLanes low, DoubleLanes high) {
  const NarrowFloatLanes halves[2] = {__builtin_convertvector(low, NarrowFloatLanes),
                                      __builtin_convertvector(high, NarrowFloatLanes)};
  store(target, load_as<FloatLanes>(halves));
}

// One element at a time.
HE_INLINE float to_accumulator(float element) { return element; }
HE_INLINE double to_accumulator(double element) { return element; }
HE_INLINE float to_accumulator(Bf16 element) {
  const uint32_t bits = (uint32_t)element.bits << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

HE_INLINE void store_one(float* target, double value) { *target = (float)value; }
HE_INLINE void store_one(double* target, double value) { *target = value; }
HE_INLINE void store_one(Bf16* target, double value) {
  const float narrow = (float)value;
  uint32_t bits;
  __builtin_memcpy(&bits, &narrow, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  target->bits = narrow == narrow ? (uint16_t)rounded : (uint16_t)0x7fc0u;
}

// NaN lanes lose against numbers: callers find NaN through the sum, not through the maximum.
template <class Vector>
HE_INLINE Vector larger(Vector candidate, Vector best) {
  return candidate > best ? candidate : best;
}

template <class Vector>
HE_INLINE double maximum_of(Vector vector) {
  auto best = vector[0];
  for (int lane = 1; lane < (int)(sizeof(Vector) / sizeof(best)); ++lane) best = vector[lane] > best ? vector[lane] : best;
  return best;
}

template <class Vector>
HE_INLINE double sum_of(Vector vector) {
  double sum = 0;
  for (int lane = 0; lane < (int)(sizeof(Vector) / sizeof(vector[0])); ++lane) sum += vector[lane];
  return sum;
}

// Lanes added to their neighbours in double, as many as DoubleLanes holds.
HE_INLINE DoubleLanes widened(FloatLanes vector) {
  NarrowFloatLanes halves[2];
  __builtin_memcpy(halves, &vector, sizeof(vector));
  return __builtin_convertvector(halves[0], DoubleLanes) + __builtin_convertvector(halves[1], DoubleLanes);
}
HE_INLINE DoubleLanes widened(DoubleLanes vector) { return vector; }

// exp(x) for x <= 0, NaN kept, error about 1 ulp; 0 below the smallest normal number.
// x = k*ln2 + r with |r| <= ln2/2: k comes from the rounding that adding 1.5*2^23 forces, ln2 is split in two so that
// k*ln2 loses nothing (Cody and Waite), exp(r) is a polynomial.
HE_INLINE FloatLanes exp_of_nonpositive(FloatLanes x) {
  constexpr float lowest = -87.33654f;
#if HE_HAS_AVX512
  const FloatLanes bounded = x;  // what overflows below `lowest` is masked in the end
#else
  const FloatLanes bounded = x < lowest ? splat<FloatLanes>(lowest) : x;
#endif
  const FloatLanes shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const FloatLanes k = shifted - 12582912.0f;
  const FloatLanes r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
  FloatLanes p = splat<FloatLanes>(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if HE_HAS_AVX512
  // p * 2^k in one instruction, through which NaN goes by itself. 21: not less; 4: round as set.
  const auto normal = __builtin_ia32_cmpps512_mask(x, splat<FloatLanes>(lowest), 21, 0xffff, 4);
  return __builtin_ia32_scalefps512_mask(p, k, FloatLanes{}, normal, 4);
#else
  const FloatLanes value = (FloatLanes)((IntLanes)p + ((IntLanes)shifted << 23));  // 2^k into the exponent bits
  const FloatLanes positive = x < lowest ? FloatLanes{} : value;
  return x == x ? positive : x;
#endif
}
HE_INLINE DoubleLanes exp_of_nonpositive(DoubleLanes x) {
  for (int lane = 0; lane < kDoubleLanes; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

// tanh(x), error about 2 ulp. Near 0 an odd polynomial (Cephes), because 1 - 2 / (exp(2x) + 1) would cancel there.
HE_INLINE FloatLanes tanh_of(FloatLanes x) {
  const FloatLanes size = x < 0 ? -x : x;
  const FloatLanes square = x * x;
  FloatLanes p = splat<FloatLanes>(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const FloatLanes small = p * square * x + x;
  const FloatLanes decay = exp_of_nonpositive(size * -2.0f);
  const FloatLanes large = (1.0f - decay) / (1.0f + decay);
  return size < 0.625f ? small : (x < 0 ? -large : large);
}
HE_INLINE DoubleLanes tanh_of(DoubleLanes x) {
  for (int lane = 0; lane < kDoubleLanes; ++lane) x[lane] = __builtin_tanh(x[lane]);
  return x;
}

// Loops over arrays whose length is no multiple of the vector: the body is called with Whole for full vectors and once
// with Part for the rest, and hands that on to load, store and keep.
struct Whole {};
struct Part {
  int64_t count;
};

template <class Element, class Body>
HE_INLINE void each_vector(int64_t count, Body body) {
  constexpr int lanes = Lanes<Element>::count;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, Whole{});
  if (i < count) body(i, Part{count - i});
}

template <class Element>
HE_INLINE typename Lanes<Element>::Vector load(const Element* source, Whole, float) {
  return load(source);
}
template <class Element>
HE_INLINE typename Lanes<Element>::Vector load(const Element* source, Part part, float filler) {
  auto vector = splat<typename Lanes<Element>::Vector>((Accumulator<Element>)filler);
  for (int64_t lane = 0; lane < part.count; ++lane) vector[lane] = to_accumulator(source[lane]);
  return vector;
}
#if HE_HAS_AVX512
HE_INLINE unsigned lanes_of(Part part) { return (1u << part.count) - 1u; }
HE_INLINE FloatLanes load(const float* source, Part part, float filler) {
  return __builtin_ia32_loadups512_mask(source, splat<FloatLanes>(filler), (unsigned short)lanes_of(part));
}
HE_INLINE DoubleLanes load(const double* source, Part part, float filler) {
  return __builtin_ia32_loadupd512_mask(source, splat<DoubleLanes>((double)filler), (unsigned char)lanes_of(part));
}
HE_INLINE FloatLanes load(const Bf16* source, Part part, float filler) {
  typedef int16_t ShortLanes __attribute__((vector_size(32)));
  const auto bits = (Bf16Lanes)__builtin_ia32_loaddquhi256_mask((const short*)source, (ShortLanes){}, (unsigned short)lanes_of(part));
  const FloatLanes loaded = (FloatLanes)(__builtin_convertvector(bits, BitLanes) << 16);
  IntLanes number;
  for (int lane = 0; lane < kFloatLanes; ++lane) number[lane] = lane;
  return number < (int32_t)part.count ? loaded : splat<FloatLanes>(filler);
}
#endif

template <class Element, class Vector>
HE_INLINE void store(Element* target, Vector vector, Whole) {
  store(target, vector);
}
template <class Element, class Vector>
HE_INLINE void store(Element* target, Vector vector, Part part) {
  for (int64_t lane = 0; lane < part.count; ++lane) store_one(target + lane, vector[lane]);
}
#if HE_HAS_AVX512
HE_INLINE void store(float* target, FloatLanes vector, Part part) {
  __builtin_ia32_storeups512_mask(target, vector, (unsigned short)lanes_of(part));
}
HE_INLINE void store(double* target, DoubleLanes vector, Part part) {
  __builtin_ia32_storeupd512_mask(target, vector, (unsigned char)lanes_of(part));
}
HE_INLINE void store(Bf16* target, FloatLanes vector, Part part) {
  typedef int16_t ShortLanes __attribute__((vector_size(32)));
  Bf16 all[kFloatLanes];
  store(all, vector);
  __builtin_ia32_storedquhi256_mask((short*)target, load_as<ShortLanes>(all), (unsigned short)lanes_of(part));
}
#endif

// The vector with zeros where there are no elements.
template <class Vector>
HE_INLINE Vector keep(Vector vector, Whole) {
  return vector;
}
template <class Vector>
HE_INLINE Vector keep(Vector vector, Part part) {
  Vector kept = Vector{};
  for (int64_t lane = 0; lane < part.count; ++lane) kept[lane] = vector[lane];
  return kept;
}
