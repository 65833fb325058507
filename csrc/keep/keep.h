#pragma once

#include <cstdint>
#include <vector>

namespace hybridengine {

struct CopiedBytes {
  void* target;
  const void* source;  // not overlapping
  int64_t bytes;
};

// Copies all parts in one parallel pass, past the caches.
void copy_all(const std::vector<CopiedBytes>& parts);

}  // namespace hybridengine
