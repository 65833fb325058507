// Compiles one body once per instruction set, each in a namespace of its own. Use:
//
//     #define HE_BODY "cross_entropy/rows.inl"
//     #include "common/for_each_isa.inl"
//
// Standard headers must be included before: a standard template first seen inside a target region could be emitted
// with that region's instructions, and the linker might pick that copy for everyone. For the same reason the bodies
// use no standard templates.
//
// A vector must have the native width of its instruction set: 64-byte vectors under AVX2 were measured 7x slower.

#define HE_INLINE static inline __attribute__((always_inline))

#define HE_VECTOR_BYTES 16
namespace on_baseline {
#include "common/vector.inl"
#include "common/stream.inl"
#include HE_BODY
}  // namespace on_baseline
#undef HE_VECTOR_BYTES
#undef HE_HAS_AVX512

#if HE_X86_DISPATCH

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#define HE_VECTOR_BYTES 32
namespace on_avx2 {
#include "common/vector.inl"
#include "common/stream.inl"
#include HE_BODY
}  // namespace on_avx2
#undef HE_VECTOR_BYTES
#undef HE_HAS_AVX512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#define HE_VECTOR_BYTES 64
namespace on_avx512 {
#include "common/vector.inl"
#include "common/stream.inl"
#include HE_BODY
}  // namespace on_avx512
#undef HE_VECTOR_BYTES
#undef HE_HAS_AVX512
#pragma GCC pop_options

// Calls `function` of the namespace that current_isa() names.
#define HE_DISPATCH(function, ...)                                \
  (current_isa() >= Isa::avx512 ? on_avx512::function(__VA_ARGS__) \
   : current_isa() == Isa::avx2 ? on_avx2::function(__VA_ARGS__)   \
                                : on_baseline::function(__VA_ARGS__))

#else

#define HE_DISPATCH(function, ...) on_baseline::function(__VA_ARGS__)

#endif

#undef HE_INLINE
#undef HE_BODY
