#pragma once

#include <cstdint>

#include "common/element.h"

namespace hybridengine {

// A matrix whose rows or whose columns are contiguous: one of the strides, in elements, is 1.
struct Matrix {
  ElementType element;
  const void* values;
  int64_t row_stride;
  int64_t column_stride;
};

// C (+)= A B with A [rows, depth] of float32 or bfloat16, B [depth, columns] of bfloat16 and C [rows, columns] of
// float32, or of bfloat16 where nothing is added to it: the sums are then rounded once.
//
// Products of bfloat16 numbers are exact in float32 and are summed in it; subnormal numbers count as 0. A float32
// number is multiplied as the sum of two bfloat16 numbers, which have 16 of its 24 bits, or rounded to one, 8 bits, if
// it is smaller than 1/64 of the largest in its contiguous row or column: where few are large that saves nearly half of
// the work. Against a float32 A an infinity in B gives NaN: it meets second parts that are 0.
struct Matmul {
  Matrix a;
  Matrix b;
  int64_t rows;
  int64_t columns;
  int64_t depth;
  ElementType c_element;
  void* c;
  int64_t c_stride;  // of its rows, in elements
  bool accumulate;
};

// Needs Isa::amx; throws std::invalid_argument where that is not in use.
void matmul(const Matmul& problem);

}  // namespace hybridengine
