#pragma once

#include <cstdint>
#include <vector>

#include "common/element.h"

namespace hybridengine {

// One running average. Both are contiguous and do not overlap.
struct Average {
  ElementType element;         // of the average: float32 or float64
  ElementType weight_element;  // the same, or bfloat16 beside float32
  void* average;               // [count], updated in place
  const void* weight;          // [count]
  int64_t count;
};

// average += rate (weight - average), in the precision of the average, for all in one parallel pass.
void ema_update(const std::vector<Average>& averages, double rate);

}  // namespace hybridengine
