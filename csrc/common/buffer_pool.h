#pragma once

#include <cstddef>

namespace hybridengine {

struct PoolStatistics {
  size_t live_bytes;  // lent out
  size_t idle_bytes;  // kept for reuse
  size_t limit_bytes;
};

// Memory for one large tensor. Taken from a process-wide pool of huge pages and given back when it is destroyed.
//
// Why a pool: most of the time of a large elementwise CPU operation is the kernel zeroing fresh pages (a new 131 MB
// tensor costs 65 ms to touch, a reused one 8 ms). The pool keeps at most HYBRIDENGINE_POOL MiB idle (default 1024; 0
// keeps nothing) and may be used from any thread and after fork().
class Buffer {
 public:
  explicit Buffer(size_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_;
  size_t size_;
  size_t mapped_;
};

PoolStatistics pool_statistics();
// Returns idle memory to the operating system; says how many bytes.
size_t release_pool();

}  // namespace hybridengine
