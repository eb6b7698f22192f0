#!/bin/sh
# Tests of the C++ kernels under the address and undefined-behaviour sanitizers.
#
#   tests/sanitize.sh [pytest arguments]    default: the tests of the kernels that are this project's own
#
# Works on a copy of the tree, so that the build in place stays as it is. PYTHON chooses the interpreter, SANITIZE_DIR a
# folder to keep (a second run then compiles only what changed).
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if [ -n "${SANITIZE_DIR:-}" ]; then
    mkdir -p "$SANITIZE_DIR"
    copy=$(cd "$SANITIZE_DIR" && pwd)
else
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
fi
for path in csrc dfs_engine kernels benchmarks tests; do
    mkdir -p "$copy/$path"
    cp -Rp "$root/$path/." "$copy/$path/"
done
cp -p "$root/setup.py" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$copy/"
rm -f "$copy"/dfs_engine/*.so
cd "$copy"

# vptr would need the type information of torch's classes.
sanitize="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
DEBUG=1 CFLAGS="$sanitize" LDFLAGS="$sanitize" "$python" setup.py --quiet build_ext --inplace
ls dfs_engine/_C.*.so > /dev/null

if [ $# -eq 0 ]; then
    # The compiler's tracing and the subprocesses add time, and nothing for the kernels; those compute no float64.
    set -- tests/ops/test_norm_act.py tests/ops/test_winograd.py tests/ops/test_gemm.py tests/ops/test_conv2d.py \
        tests/ops/test_depthwise.py tests/ops/test_dropout.py tests/runtime/test_memory.py tests/ops/test_linear.py \
        tests/ops/test_conv_act.py \
        -k "not aten and not compile and not opcheck and not meta"
fi
# libasan comes before everything else, and libstdc++ with it: it wraps the throwing of exceptions.
compiler=${CXX:-g++}
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$copy" DFS_BACKEND=cpp \
    "$python" -m pytest -q "$@"
