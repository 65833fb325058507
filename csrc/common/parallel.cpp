#include "common/parallel.h"

#include <dlfcn.h>

#include <stdexcept>

namespace hybridengine {
namespace {

// The C function of torch's stable shim (torch/csrc/stable/c/shim.h). Declared here so that no torch header is needed.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context);

TorchParallelFor find_torch_parallel_for() {
#ifdef __APPLE__
  const char* const library = "libtorch_cpu.dylib";
#else
  const char* const library = "libtorch_cpu.so";
#endif
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? reinterpret_cast<TorchParallelFor>(dlsym(handle, "torch_parallel_for")) : nullptr;
}

TorchParallelFor torch_parallel_for() {
  static const TorchParallelFor function = find_torch_parallel_for();
  return function;
}

}  // namespace

bool has_thread_pool() { return torch_parallel_for() != nullptr; }

void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context) {
  if (count <= 0) return;
  if (count <= grain || !has_thread_pool()) {
    function(0, count, context);
  } else if (torch_parallel_for()(0, count, grain, function, context) != 0) {
    throw std::runtime_error("torch_parallel_for failed inside a native kernel");
  }
}

}  // namespace hybridengine
