#pragma once

// The part of CUDA that the kernels use, on one CPU thread: csrc/common/cuda/platform.cuh includes this in
// the place of the CUDA headers, and g++ compiles the very same .cu.
//
// Blocks run one after the other. Every thread of a block is a fiber with a stack of its own; it gives way
// where a GPU thread may have to wait: at a barrier and at a shuffle. What is noticed, and makes the launch
// fail with a text:
//
//   - a barrier that not every thread reaches, or that threads reach at different lines (divergence);
//   - a shuffle that not every lane of the warp takes part in;
//   - shared memory touched by two threads, one of them writing, without a barrier between (a race), read
//     before it was written, or out of bounds;
//   - a pack that is loaded from or stored to an unaligned address.
//
// The order in which fibers run can be changed: correct kernels give the same bits in each. Nothing is said
// of speed, of the memory model within a warp, or of the accuracy of approximate instructions.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"
#include "shared_memory.h"

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define HE_SHARED(Type, name, count) static ::emulation::Shared<Type, count> name
#define HE_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), ::emulation::launch(blocks, threads, [&] { kernel(__VA_ARGS__); }))
#define HE_CHECK_ALIGNED(pointer, bytes) ::emulation::check_aligned(pointer, bytes)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
struct cudaFuncAttributes {};

#define threadIdx ::emulation::machine.thread_index
#define blockIdx ::emulation::machine.block_index
#define blockDim ::emulation::machine.block_shape
#define gridDim ::emulation::machine.grid_shape

#define __syncthreads() ::emulation::barrier(__LINE__)

template <class Type>
Type __shfl_xor_sync(unsigned mask, Type value, int lanes) {
  return emulation::shuffle(mask, value, emulation::lane() ^ lanes);
}
template <class Type>
Type __shfl_sync(unsigned mask, Type value, int source) {
  return emulation::shuffle(mask, value, source % emulation::kWarp);
}
template <class Type>
Type __shfl_down_sync(unsigned mask, Type value, unsigned by) {
  const int source = emulation::lane() + static_cast<int>(by);
  return emulation::shuffle(mask, value, source < emulation::kWarp ? source : emulation::lane());
}

// Fibers give way nowhere else, so plain statements are atomic.
template <class Type>
Type atomicCAS(Type* address, Type expected, Type value) {
  const Type before = *address;
  if (before == expected) *address = value;
  return before;
}
template <class Type>
Type atomicAdd(Type* address, Type value) {
  const Type before = *address;
  *address = before + value;
  return before;
}

// Not inlined, so that no addition can be contracted with it.
__attribute__((noinline)) inline float __fmul_rn(float left, float right) { return left * right; }

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half element) { return static_cast<float>(element.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

inline float __bfloat162float(__nv_bfloat16 element) {
  const uint32_t bits = static_cast<uint32_t>(element.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};  // the NaN that the GPU makes
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline cudaError_t cudaGetLastError() {
  return emulation::machine.failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulation::machine.failure.c_str() : "invalid argument";
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return cudaSuccess; }

// Python sets the order of the fibers here.
extern "C" __attribute__((visibility("default"), used)) inline void emulation_set_order(unsigned order) {
  emulation::machine.order = order;
}
