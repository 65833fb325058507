#pragma once

#include <cstdint>

namespace hybridengine {

struct Gelu {
  const float* input;     // [count], contiguous
  const float* gradient;  // of the output, [count], contiguous; null for the forward pass
  float* output;          // [count]
  int64_t count;
};

// With Phi the distribution function of the standard normal and phi its density: the forward pass writes x Phi(x), the
// backward pass gradient (Phi(x) + x phi(x)), within the errors derived in gelu.inl. Same bits for any number of
// threads.
void gelu(const Gelu& work);

}  // namespace hybridengine
