#pragma once

#include <string>
#include <vector>

// One body is compiled for several instruction sets inside `#pragma GCC target`; Clang has no such pragma and
// other architectures have other names, so there the baseline (16-byte vectors: SSE2, NEON) is all there is.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HE_X86_DISPATCH 1
#else
#define HE_X86_DISPATCH 0
#endif

// Matrix products in AMX tiles: a system call of Linux lends them to the process.
#if HE_X86_DISPATCH && defined(__linux__) && __GNUC__ >= 11
#define HE_HAS_AMX 1
#else
#define HE_HAS_AMX 0
#endif

namespace hybridengine {

// `amx` is avx512 with matrix products in tiles.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The instruction set in use: the best that this CPU runs, unless a lower one was set.
Isa current_isa();
std::string isa_name();
// Names this CPU can run, lowest first.
std::vector<std::string> supported_isas();
// Throws std::invalid_argument for an unknown name or one that this CPU cannot run. Meant for tests and bug hunts.
void set_isa(const std::string& name);
// Makes what this thread wrote past the cache visible to others.
inline void finish_streaming() {
#if HE_X86_DISPATCH
  __builtin_ia32_sfence();
#endif
}

}  // namespace hybridengine
