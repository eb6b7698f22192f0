// Run-time dispatch: one build serves every x86-64 machine, and any other through the baseline.
#pragma once

#include <cstdlib>
#include <cstring>

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

}  // namespace dfs_engine
