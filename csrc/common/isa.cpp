#include "common/isa.h"

#include <atomic>
#include <stdexcept>

namespace hybridengine {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512"};

Isa detect() {
#if HE_X86_DISPATCH
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{detect()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

std::string isa_name() { return kNames[static_cast<int>(current_isa())]; }

std::vector<std::string> supported_isas() { return {kNames, kNames + static_cast<int>(detect()) + 1}; }

void set_isa(const std::string& name) {
  const std::vector<std::string> supported = supported_isas();
  std::string list;
  for (size_t level = 0; level < supported.size(); ++level) {
    if (supported[level] == name) {
      chosen().store(static_cast<Isa>(level), std::memory_order_relaxed);
      return;
    }
    list += (level ? ", " : "") + supported[level];
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here; this CPU runs: " + list);
}

}  // namespace hybridengine
