#pragma once

#include <cstdint>

#include "common/element.h"

namespace hybridengine {

struct Dropout {
  ElementType element;
  const void* input;  // [count], contiguous
  void* output;       // [count], may be the input
  int64_t count;
  uint64_t seed;
  uint32_t threshold;  // an element is kept where its 16-bit random number is at least this
  double scale;        // of what is kept
};

// Inverted dropout whose mask is a function of (seed, position) alone, so that the backward pass draws it again instead
// of storing it. The formula stands in kernels/dropout/reference.py.
void dropout(const Dropout& work);

}  // namespace hybridengine
