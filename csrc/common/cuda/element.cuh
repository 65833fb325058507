#pragma once

#include <cstdint>

#include "common/cuda/platform.cuh"

// Elements of a row and how they are read: one by one, or as packs of 16 bytes where all rows involved allow
// it.

namespace hybridengine {

using Half = __half;
using Bf16 = __nv_bfloat16;

// The numbers are shared with hybridengine/kernels/cuda_library.py.
enum class CudaElement : int { float32 = 0, bfloat16 = 1, float16 = 3 };

constexpr int kPackBytes = 16;

template <class Element>
constexpr int kPackSize = kPackBytes / static_cast<int>(sizeof(Element));

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(Half value) { return __half2float(value); }

// Rounded to nearest even.
__device__ __forceinline__ void from_float(float value, float& element) { element = value; }
__device__ __forceinline__ void from_float(float value, Bf16& element) {
  element = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void from_float(float value, Half& element) { element = __float2half_rn(value); }

// How many neighbouring elements are worked on at once, as a type: `visit(column, Count<8>{})`.
template <int number>
struct Count {
  static constexpr int value = number;
};

// `count` values in registers.
template <int count>
struct Values {
  float at[count];
};

// Aligned to 16 bytes at most: 8 floats beside 8 bfloat16 are read by two loads.
template <class Element, int count>
struct alignas(sizeof(Element) * count < kPackBytes ? sizeof(Element) * count : kPackBytes) Pack {
  Element at[count];
};

template <int count, class Element>
__device__ __forceinline__ Values<count> load_values(const Element* source) {
  using Packed = Pack<Element, count>;
  HE_CHECK_ALIGNED(source, alignof(Packed));
  const Packed pack = *reinterpret_cast<const Packed*>(source);
  Values<count> values;
#pragma unroll
  for (int lane = 0; lane < count; ++lane) values.at[lane] = to_float(pack.at[lane]);
  return values;
}

template <int count, class Element>
__device__ __forceinline__ void store_values(Element* destination, const Values<count>& values) {
  using Packed = Pack<Element, count>;
  HE_CHECK_ALIGNED(destination, alignof(Packed));
  Packed pack;
#pragma unroll
  for (int lane = 0; lane < count; ++lane) from_float(values.at[lane], pack.at[lane]);
  *reinterpret_cast<Packed*>(destination) = pack;
}

// Which columns of a row are worked on as packs: `packs` of them from column `head` on; the others one by
// one.
struct RowSplit {
  int head;
  int packs;
};

// Splits a row of `Element`s so that its packs are aligned. A row may start anywhere: with 50257 classes
// every row starts elsewhere in its 16 bytes, so each finds its own head. Rows beside it (a gradient, soft
// targets) must reach their alignment at the same column (`none` stands for no such row); otherwise nothing
// is packed.
template <class Element>
__device__ __forceinline__ RowSplit split_row(const Element* row, int columns) {
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kPackBytes);
  const int head = (kPackBytes - past) % kPackBytes / static_cast<int>(sizeof(Element));
  if (past % sizeof(Element) != 0 || head >= columns) return {0, 0};
  return {head, (columns - head) / kPackSize<Element>};
}

template <class Beside>
__device__ __forceinline__ bool is_aligned_at(const Beside* row, int column) {
  return row == nullptr || reinterpret_cast<uintptr_t>(row + column) % kPackBytes == 0;
}

// Calls `visit(column, Count<n>{})` for every column, shared out over the threads of the block; n is the size
// of a pack, or 1.
template <class Element, class Visit>
__device__ __forceinline__ void visit_row(RowSplit split, int columns, Visit visit) {
  constexpr int size = kPackSize<Element>;
  for (int pack = threadIdx.x; pack < split.packs; pack += blockDim.x)
    visit(split.head + pack * size, Count<size>{});
  const int packed = split.packs * size;
  for (int single = threadIdx.x; single < columns - packed; single += blockDim.x) {
    visit(single < split.head ? single : single + packed, Count<1>{});
  }
}

}  // namespace hybridengine
