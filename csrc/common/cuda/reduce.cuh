#pragma once

#include "common/cuda/platform.cuh"

// Reductions over a warp and over a block, of any small struct of 4-byte fields.

namespace hybridengine {

constexpr int kWarpSize = 32;
constexpr int kMostWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The value of the lane whose number differs in the bits of `mask`.
template <class Value>
__device__ __forceinline__ Value shuffle_xor(Value value, int mask) {
  static_assert(sizeof(Value) % sizeof(unsigned) == 0, "a shuffle moves 4 bytes");
  union Words {
    Value value;
    unsigned at[sizeof(Value) / sizeof(unsigned)];
  };
  Words words{value};
#pragma unroll
  for (unsigned& word : words.at) word = __shfl_xor_sync(kAllLanes, word, mask);
  return words.value;
}

template <class Value, class Combine>
__device__ __forceinline__ Value warp_reduce(Value value, Combine combine) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}

// The combination of every thread's value, on every thread. `shared` has room for kMostWarps values and is
// not used again by the kernel; the block is made of whole warps. Memory that other threads read before is
// free to be written after it.
template <class Value, class Combine, class Shared>
__device__ __forceinline__ Value block_reduce(Value value, Value nothing, Shared& shared, Combine combine) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_reduce(value, combine);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = nothing;
  if (lane < static_cast<int>(blockDim.x) / kWarpSize) value = shared[lane];
  return warp_reduce(value, combine);
}

// Adds, for block_reduce.
struct Sum {
  __device__ __forceinline__ float operator()(float left, float right) const { return left + right; }
};

}  // namespace hybridengine
