// Run-time dispatch: one build serves every x86-64 machine, and any other through the baseline.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define DFS_X86 1
#endif

namespace dfs_engine {

enum class CpuLevel { baseline, avx2, avx512 };

// DFS_CPU=baseline|avx2|avx512 asks for less than the machine has; more is not granted.
inline CpuLevel cpu_level() {
  static const CpuLevel level = [] {
    CpuLevel best = CpuLevel::baseline;
#ifdef DFS_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = CpuLevel::avx2;
    if (best == CpuLevel::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = CpuLevel::avx512;
    }
    const char* asked = std::getenv("DFS_CPU");
    if (asked != nullptr && std::strcmp(asked, "baseline") == 0) return CpuLevel::baseline;
    if (asked != nullptr && std::strcmp(asked, "avx2") == 0 && best == CpuLevel::avx512) return CpuLevel::avx2;
#endif
    return best;
  }();
  return level;
}

// Its name, as DFS_CPU spells it.
inline std::string instruction_set() {
  switch (cpu_level()) {
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::avx2: return "avx2";
    default: return "baseline";
  }
}

// `name` of the namespace baseline, avx2 or avx512 that belongs to this machine. Each file has its own three, by
// kernels/for_each_instruction_set.inc.
#ifdef DFS_X86
#define DFS_DISPATCH(name) \
  (cpu_level() == CpuLevel::avx512 ? avx512::name : cpu_level() == CpuLevel::avx2 ? avx2::name : baseline::name)
#else
#define DFS_DISPATCH(name) (baseline::name)
#endif

}  // namespace dfs_engine
