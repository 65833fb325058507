#include "common/allocator.h"

#include <cstdlib>
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace hybridengine {

std::string tune_allocator() {
#ifdef __GLIBC__
  // Never trim; grow by 256 MiB; no private mapping for large blocks, because those are unmapped on free.
  const bool done =
      mallopt(M_TRIM_THRESHOLD, 0x7fffffff) && mallopt(M_TOP_PAD, 256 << 20) && mallopt(M_MMAP_MAX, 0);
  return done ? "" : "glibc refused the options";
#else
  return "the C library is not glibc";
#endif
}

}  // namespace hybridengine
