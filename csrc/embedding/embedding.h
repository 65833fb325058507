#pragma once

#include <cstdint>

#include "common/element.h"

namespace hybridengine {

struct EmbeddingGradient {
  ElementType element;   // float32 or float64
  const void* gradient;  // [count, width], contiguous
  const int64_t* ids;    // [count], each in [0, rows)
  void* output;          // [rows, width]
  int64_t count;
  int64_t rows;
  int64_t width;
  int64_t padding;  // a row that gets no gradient, or -1
};

// output[ids[i]] += gradient[i] over a zeroed output, in the order of i.
void embedding_gradient(const EmbeddingGradient& work);

}  // namespace hybridengine
