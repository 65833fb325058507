#include "common/isa.h"

#include <atomic>
#include <stdexcept>

#if HE_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hybridengine {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "amx"};

#if HE_HAS_AMX
// Whether this CPU multiplies bfloat16 in tiles and Linux lets this process use them (for good: it is asked here).
bool may_use_amx() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa detect() {
#if HE_X86_DISPATCH
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if HE_HAS_AMX
  static const bool amx = avx512 && may_use_amx();
  if (amx) return Isa::amx;
#endif
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
