#pragma once

#include "common/cuda/platform.cuh"

// Arithmetic whose rounding the kernels rely on.

namespace hybridengine {

constexpr float kLog2E = 1.4426950408889634f;

// exp(x) by one multiplication and one instruction: relative error 2^-22 + |x| 2^-24, and 0 below 2^-126. For
// softmax |x| is the distance from the maximum: where it is large, the result is small beside the sum.
__device__ __forceinline__ float fast_exp(float x) {
#ifdef HE_EMULATION
  return exp2f(x * kLog2E);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * kLog2E));
  return result;
#endif
}

// A product that stays one: were it contracted with a following subtraction, `scale * x - maximum` would
// leave the rounding error of the maximum, which at 1e30 is 1e22 and exponentiates to infinity.
__device__ __forceinline__ float rounded_product(float left, float right) { return __fmul_rn(left, right); }

}  // namespace hybridengine
