#include "common/buffer_pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace hybridengine {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  void* data;
  size_t bytes;
};

size_t limit_from_environment() {
  const char* const text = std::getenv("HYBRIDENGINE_POOL");
  if (!text || !*text) return size_t{1024} << 20;
  const long long mebibytes = std::atoll(text);
  return mebibytes > 0 ? static_cast<size_t>(mebibytes) << 20 : 0;
}

// Huge pages need an aligned start, which older kernels do not give: map one page more and cut off both ends.
void* map_aligned(size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const uintptr_t start = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t aligned = (start + kHugePage - 1) & ~(kHugePage - 1);
  if (aligned != start) munmap(mapped, aligned - start);
  if (aligned != start + kHugePage) munmap(reinterpret_cast<void*>(aligned + bytes), start + kHugePage - aligned);
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);  // advice: failure only costs speed
#endif
  return reinterpret_cast<void*>(aligned);
}

class Pool {
 public:
  // Never destroyed: tensors may die after static destructors have run.
  static Pool& instance() {
    static Pool* const pool = [] {
      Pool* const made = new Pool;
      // A child must not inherit the mutex locked by a thread that does not exist there.
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] { instance().mutex_.unlock(); });
      return made;
    }();
    return *pool;
  }

  Block take(size_t size) {
    const size_t bytes = (size + kHugePage - 1) & ~(kHugePage - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = idle_.end();
      // A block up to a quarter larger is close enough: sequence lengths differ from batch to batch.
      for (auto block = idle_.begin(); block != idle_.end(); ++block) {
        const bool fits = block->bytes >= bytes && block->bytes <= bytes + bytes / 4;
        if (fits && (best == idle_.end() || block->bytes <= best->bytes)) best = block;
      }
      if (best != idle_.end()) {
        const Block found = *best;
        idle_.erase(best);
        idle_bytes_ -= found.bytes;
        live_bytes_ += found.bytes;
        return found;
      }
    }
    void* const data = map_aligned(bytes);
    if (!data) throw std::bad_alloc();
    const std::lock_guard<std::mutex> lock(mutex_);
    live_bytes_ += bytes;
    return {data, bytes};
  }

  void give(Block block) {
    std::deque<Block> evicted;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      live_bytes_ -= block.bytes;
      idle_bytes_ += block.bytes;
      idle_.push_back(block);
      while (idle_bytes_ > limit_) {  // the one idle for longest goes first
        idle_bytes_ -= idle_.front().bytes;
        evicted.push_back(idle_.front());
        idle_.pop_front();
      }
    }
    for (const Block& old : evicted) munmap(old.data, old.bytes);
  }

  size_t release() {
    std::deque<Block> released;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      released.swap(idle_);
      idle_bytes_ = 0;
    }
    size_t bytes = 0;
    for (const Block& block : released) {
      munmap(block.data, block.bytes);
      bytes += block.bytes;
    }
    return bytes;
  }

  PoolStatistics statistics() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {live_bytes_, idle_bytes_, limit_};
  }

 private:
  std::mutex mutex_;
  std::deque<Block> idle_;  // oldest first
  size_t idle_bytes_ = 0;
  size_t live_bytes_ = 0;
  const size_t limit_ = limit_from_environment();
};

}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  const Block block = Pool::instance().take(bytes);
  data_ = block.data;
  mapped_ = block.bytes;
}

Buffer::~Buffer() { Pool::instance().give({data_, mapped_}); }

PoolStatistics pool_statistics() { return Pool::instance().statistics(); }

size_t release_pool() { return Pool::instance().release(); }

}  // namespace hybridengine
