#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

namespace hybridengine {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Runs `function` over [0, count) in torch's own thread pool, in ranges of at least `grain`; serially where torch is
// not loaded or is older than 2.10. The pool is torch's, so torch.set_num_threads() holds and no second OpenMP
// runtime is loaded.
void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context);
// Whether torch's pool was found.
bool has_thread_pool();

template <class Function>
void parallel_for(int64_t count, int64_t grain, Function&& function) {
  using Plain = std::remove_reference_t<Function>;
  parallel_ranges(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<Plain*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&function)));
}

// Runs `function` over ranges of chunks, as many elements to each thread: `starts` says at which of `elements` a chunk
// begins. The chunks stay whole, so that what is summed within one does not depend on the number of threads.
template <class Function>
void parallel_chunks(const std::vector<int64_t>& starts, int64_t elements, int64_t grain, Function&& function) {
  const auto chunk_at = [&](int64_t element) {
    int64_t low = 0, high = static_cast<int64_t>(starts.size());
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts[middle] < element) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel_for(elements, grain,
               [&](int64_t begin, int64_t end) { function(chunk_at(begin), chunk_at(end)); });
}

}  // namespace hybridengine
