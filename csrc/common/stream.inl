// Stores past the caches: what is written once and read much later must neither be fetched before it is overwritten nor
// push out what is needed sooner. Targets are aligned to HE_VECTOR_BYTES; the thread calls finish_streaming() (isa.h) when
// it is done. Included once per instruction set, after vector.inl.

HE_INLINE void stream(void* target, BitLanes bits) {
#if HE_HAS_AVX512
  __builtin_ia32_movntps512((float*)target, (FloatLanes)bits);
#elif HE_X86_DISPATCH && HE_VECTOR_BYTES == 32
  __builtin_ia32_movntps256((float*)target, (FloatLanes)bits);
#elif HE_X86_DISPATCH
  __builtin_ia32_movntps((float*)target, (FloatLanes)bits);
#else
  __builtin_memcpy(target, &bits, sizeof(bits));
#endif
}

// As many numbers as fill HE_VECTOR_BYTES, which lie in so many vectors. None is NaN.
template <class Element>
struct Pack {
  static constexpr int vectors = 1;
};
template <>
struct Pack<Bf16> {
  static constexpr int vectors = 2;
};

HE_INLINE void stream_numbers(float* target, const FloatLanes* numbers) { stream(target, (BitLanes)numbers[0]); }
HE_INLINE void stream_numbers(double* target, const DoubleLanes* numbers) { stream(target, (BitLanes)numbers[0]); }
HE_INLINE void stream_numbers(Bf16* target, const FloatLanes* numbers) {
#if HE_X86_DISPATCH
  typedef uint16_t HalfLanes __attribute__((vector_size(HE_VECTOR_BYTES)));
  HalfLanes parts[2], upper;
  for (int part = 0; part < 2; ++part) {
    const BitLanes bits = (BitLanes)numbers[part];
    parts[part] = (HalfLanes)(bits + 0x7fffu + ((bits >> 16) & 1u));  // to nearest even, in the upper half
  }
  for (int lane = 0; lane < HE_VECTOR_BYTES / 2; ++lane) upper[lane] = (uint16_t)(2 * lane + 1);
  stream(target, (BitLanes)__builtin_shuffle(parts[0], parts[1], upper));
#else
  for (int part = 0; part < 2; ++part) store(target + part * kFloatLanes, numbers[part]);
#endif
}

// memcpy past the caches, to any address.
HE_INLINE void stream_copy(void* target, const void* source, int64_t bytes) {
  char* to = (char*)target;
  const char* from = (const char*)source;
  const int64_t beyond = (int64_t)((uintptr_t)to % HE_VECTOR_BYTES);
  int64_t head = beyond ? HE_VECTOR_BYTES - beyond : 0;
  if (head > bytes) head = bytes;
  __builtin_memcpy(to, from, head);
  int64_t i = head;
  for (; i + HE_VECTOR_BYTES <= bytes; i += HE_VECTOR_BYTES) stream(to + i, load_as<BitLanes>(from + i));
  __builtin_memcpy(to + i, from + i, bytes - i);
}
