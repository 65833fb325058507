#pragma once

#include <cstdint>
#include <vector>

#include "common/element.h"

namespace hybridengine {

struct NormPart {
  ElementType element;
  const void* values;  // [count], contiguous
  int64_t count;
};

// The L2 norm of all parts together, summed in double in an order that does not depend on the number of threads.
double total_norm(const std::vector<NormPart>& parts);

}  // namespace hybridengine
