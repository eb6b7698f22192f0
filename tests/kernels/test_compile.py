"""Every kernel compiles in every configuration for sm_80 and sm_90 without a GPU, within limits and without spills.

Spills: a kernel without local arrays needs a stack for nothing else, and `cuobjdump -res-usage` tells its size. Left to
itself, the assembler also moves a value or two to the stack to get one more block onto a multiprocessor: that is its
choice, and no spill of a tile that is too large, which given all registers still needs a stack.
"""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from dfs_engine.kernels import config, linear
from dfs_engine.kernels.config import Compilation

pytest.importorskip("triton")
if config.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: there is nothing to compile", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 166_912, 90: 232_448}
FILES = sorted(path.stem for path in Path(config.__file__).parent.glob("*.py"))
MOST_REGISTERS = 255  # that a thread can name
MOVED = 16  # bytes of stack that the assembler may take for occupancy's sake
OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def find_compilations() -> list[Compilation]:
    modules = [importlib.import_module(f"dfs_engine.kernels.{name}") for name in FILES if not name.startswith("_")]
    return [found for module in modules if hasattr(module, "compilations") for found in module.compilations()]


COMPILATIONS = find_compilations()


def stack_size(cubin: bytes, folder: Path) -> int:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = subprocess.run([OBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", usage))


def compiled(
    compilation: Compilation, capability: int, aligned: bool, **options: int
) -> triton.compiler.CompiledKernel:
    """With all pointers and sizes divisible by 16, or none known to be; of what a launch specialises at all."""
    parameters = zip(compilation.kernel.params, compilation.signature.values(), strict=True)
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, (parameter, kind) in enumerate(parameters)
        if aligned and kind.startswith(("*", "i")) and not parameter.do_not_specialize
    }
    source = ASTSource(compilation.kernel, compilation.signature, compilation.constexprs, divisible)
    options |= {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_tensor_cores(compilation: Compilation, capability: int, ptx: str) -> None:
    """They multiply, except in "ieee" float32; what they read is copied to shared memory in the background."""
    is_ieee = compilation.constexprs["PRECISION"] == "ieee" and compilation.signature["grad_output"] == "*fp32"
    multiplications = re.findall(r"(wgmma\.mma_async|mma\.sync)\.", ptx)
    assert set(multiplications) == (set() if is_ieee else {"wgmma.mma_async" if capability >= 90 else "mma.sync"})
    assert "cp.async" in ptx


def representatives() -> set[str]:
    """One compilation of every kernel, in half precision where there is one: the largest tile."""
    chosen: dict[object, Compilation] = {}
    for found in COMPILATIONS:
        if found.kernel not in chosen or ("fp16" in found.name and "fp16" not in chosen[found.kernel].name):
            chosen[found.kernel] = found
    return {found.name for found in chosen.values()}


QUICK = representatives()


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    "compilation",
    [pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.slow) for c in COMPILATIONS],
)
def test_it_compiles_within_limits(compilation, capability, tmp_path):
    kernel = compiled(compilation, capability, aligned=True)
    assert kernel.metadata.shared <= SHARED_MEMORY[capability]
    stack = stack_size(kernel.asm["cubin"], tmp_path)
    assert stack <= MOVED
    if stack:
        generous = compiled(compilation, capability, aligned=True, maxnreg=MOST_REGISTERS)
        assert stack_size(generous.asm["cubin"], tmp_path) == 0
    if "PRECISION" in compilation.constexprs:
        check_tensor_cores(compilation, capability, kernel.asm["ptx"])
    if "tl.range(" in compilation.kernel.src:  # it says how many tiles are on their way at a time
        assert "cp.async" in kernel.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("compilation", [pytest.param(c, id=c.name) for c in COMPILATIONS if c.name in QUICK])
def test_it_compiles_for_odd_sizes(compilation, capability):
    """Elements are then loaded one by one, which takes registers: large tiles may spill, but they run."""
    assert compiled(compilation, capability, aligned=False).metadata.shared <= SHARED_MEMORY[capability]


def test_the_measures_see_what_they_look_for(tmp_path):
    """A configuration that is too large for both: accumulators of 128 x 256 on four warps, six stages of operands."""
    large = next(c for c in linear.compilations() if c.constexprs["BLOCK_N"] == 256)
    large = large._replace(num_warps=4, num_stages=6)
    kernel = compiled(large, 80, aligned=True)
    assert kernel.metadata.shared > SHARED_MEMORY[80]
    assert stack_size(kernel.asm["cubin"], tmp_path) > MOVED
