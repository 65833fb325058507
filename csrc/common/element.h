#pragma once

#include <cstdint>

namespace hybridengine {

// The numbers are shared with hybridengine/kernels/native.py.
enum class ElementType : int { float32 = 0, bfloat16 = 1, float64 = 2 };

struct Bf16 {
  uint16_t bits;
};

// What sums and per-row results of an element type are kept in.
template <class Element>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class Element>
using Accumulator = typename AccumulatorOf<Element>::Type;

}  // namespace hybridengine
