// Vectors of HE_VECTOR_BYTES bytes, by GCC/Clang vector extensions. Included once per instruction set.

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

// A store past the caches, which neither reads what it overwrites nor keeps it: for what is not needed again soon. The
// target is aligned to the vector; `stream_fence` ends a run of them.
#if !HE_X86_DISPATCH
HE_INLINE void stream(float* target, FloatLanes vector) { store(target, vector); }
HE_INLINE void stream_fence() {}
#else
#if HE_VECTOR_BYTES == 64
HE_INLINE void stream(float* target, FloatLanes vector) { __builtin_ia32_movntps512(target, vector); }
#elif HE_VECTOR_BYTES == 32
HE_INLINE void stream(float* target, FloatLanes vector) { __builtin_ia32_movntps256(target, vector); }
#else
HE_INLINE void stream(float* target, FloatLanes vector) { __builtin_ia32_movntps(target, vector); }
#endif
HE_INLINE void stream_fence() { __builtin_ia32_sfence(); }
#endif

// memcpy by `stream`.
HE_INLINE void stream_bytes(void* target, const void* source, int64_t bytes) {
  char* to = (char*)target;
  const char* from = (const char*)source;
  const int64_t beyond = (int64_t)((uintptr_t)to % HE_VECTOR_BYTES);
  int64_t head = beyond ? HE_VECTOR_BYTES - beyond : 0;
  if (head > bytes) head = bytes;
  __builtin_memcpy(to, from, head);
  int64_t i = head;
  for (; i + HE_VECTOR_BYTES <= bytes; i += HE_VECTOR_BYTES) stream((float*)(to + i), load_as<FloatLanes>(from + i));
  __builtin_memcpy(to + i, from + i, bytes - i);
  stream_fence();
}

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

// exp(x) for x <= 0, NaN kept, error about 1 ulp; 0 below the smallest normal number.
// x = k*ln2 + r with |r| <= ln2/2: k comes from the rounding that adding 1.5*2^23 forces, ln2 is split in two so that
// k*ln2 loses nothing (Cody and Waite), exp(r) is a polynomial, 2^k goes straight into the exponent bits.
HE_INLINE FloatLanes exp_of_nonpositive(FloatLanes x) {
  const FloatLanes lowest = splat<FloatLanes>(-87.33654f);
  const FloatLanes clamped = x < lowest ? lowest : x;
  const FloatLanes shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const FloatLanes k = shifted - 12582912.0f;
  const IntLanes exponent = (IntLanes)shifted << 23;
  const FloatLanes r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  FloatLanes p = splat<FloatLanes>(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const FloatLanes value = (FloatLanes)((IntLanes)p + exponent);
  const FloatLanes positive = x < lowest ? FloatLanes{} : value;
  return x == x ? positive : x;
}
HE_INLINE DoubleLanes exp_of_nonpositive(DoubleLanes x) {
  for (int lane = 0; lane < kDoubleLanes; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}
