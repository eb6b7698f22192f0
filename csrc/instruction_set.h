// Run-time dispatch: one build serves every x86-64 machine, and any other through the baseline.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define DFS_X86 1
#endif

namespace dfs_engine {

enum class CpuLevel { baseline, avx2, avx512 };

inline CpuLevel best_cpu_level() {
#ifdef DFS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? CpuLevel::avx512 : avx2 ? CpuLevel::avx2 : CpuLevel::baseline;
#else
  return CpuLevel::baseline;
#endif
}

// What the kernels run on: the machine's best, or less where Python asked for less when it loaded the extension.
inline CpuLevel& cpu_level() {
  static CpuLevel level = best_cpu_level();
  return level;
}

inline std::string name_of(CpuLevel level) {
  return level == CpuLevel::avx512 ? "avx512" : level == CpuLevel::avx2 ? "avx2" : "baseline";
}

// More than the machine has is not granted.
inline void limit_instruction_set(const std::string& name) {
  for (const auto level : {CpuLevel::baseline, CpuLevel::avx2}) {
    if (name_of(level) == name && level < best_cpu_level()) cpu_level() = level;
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
