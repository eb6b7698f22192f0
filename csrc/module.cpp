// dfs_engine._C: importing it registers the kernels; what it was built with is for `dfs doctor`.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <map>
#include <string>

#include "common.h"
#include "instruction_set.h"
#include "memory.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
#ifdef _OPENMP
      {"openmp", std::to_string(_OPENMP)},
#else
      {"openmp", "none: kernels run on one thread"},
#endif
#ifdef NDEBUG
      {"mode", "release"},
#else
      {"mode", "debug"},
#endif
  };
}

// How many threads at::parallel_for really uses in this build: one, silently, if -fopenmp was forgotten.
int num_parallel_threads() {
  std::atomic<int> count{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++count; });
  return count;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++/OpenMP kernels of dfs_engine";
  m.def("build_info", &build_info, "What the extension was built with.");
  m.def(
      "instruction_set", [] { return dfs_engine::name_of(dfs_engine::cpu_level()); },
      "What the kernels run on here: avx512, avx2 or baseline.");
  m.def(
      "limit_instruction_set", &dfs_engine::limit_instruction_set,
      "Lets them run on no more than avx2 or baseline; before any has run.");
  m.def(
      "emulated_dtypes", &dfs_engine::emulated_dtypes,
      "Half-precision dtypes that this CPU has no instructions for: the kernels compute them in float32.");
  m.def(
      "caching_allocator_enable", &dfs_engine::caching_allocator_enable,
      "Switches the caching allocator of CPU tensors; returns what it was.");
  // Without the interpreter's lock: other threads of Python allocate meanwhile.
  m.def(
      "empty_cache", &dfs_engine::empty_cache, pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Frees what the caching allocator holds for later.");
  m.def("memory_allocated", &dfs_engine::memory_allocated, "Bytes of live tensors that the caching allocator serves.");
  m.def("memory_reserved", &dfs_engine::memory_reserved, "Bytes of those and of cached blocks.");
  m.def("num_parallel_threads", &num_parallel_threads, "Threads that at::parallel_for really uses.");
}
