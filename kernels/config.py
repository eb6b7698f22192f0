"""How kernels are launched: block sizes per op and shape, tuned tables, input precision, what fits which GPU.

Importable without Triton. Nothing here reads device data or synchronises, so that launches can be captured in a CUDA
graph, and the same shape always gets the same configuration, so that results repeat bitwise.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from dfs_engine.checks import check_choice

Result = TypeVar("Result")
_Function = TypeVar("_Function", bound=Callable[..., Any])
Entries = dict[str, dict[str, Any]]  # of a tuned table, by `table_key`

TABLES = Path(__file__).parent / "tables"
PRECISIONS = ("ieee", "tf32", "tf32x3")
TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# What Triton looks for in pointers (bytes) and strides (elements) before it loads several elements at once.
ALIGNMENT = 16

# Triton decides when a kernel is decorated, hence at import. It runs kernels on the CPU then, slowly, one by one.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

# The H100's; stands for a GPU that is not there.
_NOMINAL_SMS = 132

# What reading an element of an operand costs, and writing a partial sum and reading it back, in multiplications: by
# what the tensor cores, the L2 cache and the memory of an H100 do in half precision.
_READ, _PARTIAL_SUM = 64, 512
# Of so many waves of programs the last one hardly counts; of so many partial sums each, more gain little.
_MANY_WAVES = 12
# Rows or pixels that fill a GPU: 512 tiles of 128 in each column of tiles, four for a multiprocessor.
_MANY_ROWS = 2**16


class Config(NamedTuple):
    """One way to launch a kernel: tile of the output, step along the reduced axis, and its number of partial sums."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1


# How kernels without a matrix product are launched: nothing to pipeline.
PLAIN: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


class Compilation(NamedTuple):
    """One kernel as it would be launched, for tests that compile without a GPU.

    Attributes:
        name: for messages.
        kernel: the `@triton.jit` function.
        signature: type of every argument by name, "constexpr" for constants.
        constexprs: value of every constant by name.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def compilation(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], config: Config | None = None
) -> Compilation:
    """A kernel's compilation from the types of its pointers; every other argument is a 32-bit integer.

    Args:
        name: what to call it; the configuration is added.
        kernel: the `@triton.jit` function.
        types, constants: by argument name; names that the kernel does not have are left out.
        config: None: launched with PLAIN.
    """
    known = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in kernel.arg_names}
    if config is None:
        return Compilation(name, kernel, signature, known, PLAIN["num_warps"], PLAIN["num_stages"])
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}-{config.num_warps}w-{config.num_stages}s"
    return Compilation(f"{name}-{tile}", kernel, signature, known, config.num_warps, config.num_stages)


class Variant(NamedTuple):
    """A configuration with a dtype ("fp32", "fp16", "bf16") and an input precision that it may be launched with."""

    dtype: str
    precision: str
    config: Config


class NoConfigFits(RuntimeError):  # noqa: N818 - reads as what happened
    """Every configuration of a launch needs more shared memory or registers than the GPU has."""


# By what multiplies: tensor cores, except for "ieee"; "tf32x3" does it three times, in more registers. Largest first.
_MATMUL: dict[str, tuple[Config, ...]] = {
    "half": (
        Config(128, 256, 64, 8, 3),
        Config(128, 128, 64, 8, 3),
        Config(64, 128, 64, 4, 3),
        Config(64, 64, 64, 4, 3),
    ),
    "tf32": (Config(128, 128, 32, 8, 3), Config(64, 128, 32, 4, 3), Config(64, 64, 32, 4, 3)),
    "tf32x3": (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3)),
    "ieee": (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3)),
}
_defined: dict[str, dict[str, tuple[Config, ...]]] = {}
_forced: dict[str, tuple[Config, ...]] = {}
_input_precision: str | None = None


def define(op: str, **configs: tuple[Config, ...]) -> None:
    """Gives an op configurations of its own, largest first, instead of the matrix product's.

    Args:
        op: its name.
        configs: by what multiplies, any of `half`, `tf32`, `tf32x3`, `ieee`; the others stay the matrix product's.
    """
    _defined[op] = {**_MATMUL, **configs}


def candidates(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, geometry: str = "", device: torch.device | None = None
) -> tuple[Config, ...]:
    """Configurations to try, best first: forced ones, or the tuned table's and after it the heuristic's.

    Args:
        op: a kernel's name, e.g. "linear_grad_input". Names that end in "grad_weight" may split the reduced axis.
        m, n, k: output rows, output columns, length of the reduced axis; all at least 1.
        dtype: of the inputs.
        geometry: a convolution's, from `convolution`.
        device: the tensors'. None: the current GPU, which a launch has made theirs.
    """
    if op in _forced:
        return _forced[op]
    entry = _entry(op, m, n, k, dtype, geometry, device)
    tuned = () if entry is None else (Config(*entry["config"]),)
    return tuned + _heuristic(_configs(op, dtype), m, n, k, _is_split(op), _num_sms(device))


def tunable(op: str, m: int, n: int, k: int, dtype: torch.dtype) -> list[Config]:
    """What `dfs bench tune` tries: all that the heuristic chooses from. Args: as `candidates`."""
    ways = (_splits(config, m, n, k, _is_split(op), _num_sms()) for config in _configs(op, dtype))
    return list(itertools.chain.from_iterable(ways))


def _configs(op: str, dtype: torch.dtype) -> tuple[Config, ...]:
    return _defined.get(op, _MATMUL)[_kind(dtype, precision(op))]


def _is_split(op: str) -> bool:
    """Whether the reduced axis, which is the one that grows with the batch, may be split."""
    return op.endswith("grad_weight")


@functools.lru_cache(4096)
def _heuristic(configs: tuple[Config, ...], m: int, n: int, k: int, is_split: bool, num_sms: int) -> tuple[Config, ...]:
    """The cheapest tile, then the smaller ones, should it need more memory than there is; each in its best split."""
    cost = functools.partial(_cost, m=m, n=n, k=k, num_sms=num_sms)
    ways = [min(_splits(config, m, n, k, is_split, num_sms), key=cost) for config in configs]
    return tuple(ways[ways.index(min(ways, key=cost)) :])


def _cost(config: Config, m: int, n: int, k: int, num_sms: int) -> int:
    """Of a launch, in multiplications of one multiprocessor, those included that stick out or idle in the last wave."""
    waves = math.ceil(_num_tiles(config, m, n) * config.split / num_sms)
    area, edge = config.block_m * config.block_n, config.block_m + config.block_n
    depth = math.ceil(k / (config.split * config.block_k)) * config.block_k
    return waves * (depth * (area + _READ * edge) + (_PARTIAL_SUM * area if config.split > 1 else 0))


def _splits(config: Config, m: int, n: int, k: int, is_split: bool, num_sms: int) -> list[Config]:
    """With one sum, and with the most partial sums that each number of waves of programs holds."""
    if not is_split:
        return [config]
    tiles = _num_tiles(config, m, n)
    # Each partial sum takes at least four steps, or writing it out would cost more than it gives. A program or two for
    # each multiprocessor may take many of them.
    longest, filling = k // (4 * config.block_k), 2 * num_sms // tiles
    most = min(longest, max(filling, _MANY_WAVES), _MANY_WAVES * num_sms // tiles)
    by_waves = {math.ceil(tiles * split / num_sms): split for split in range(1, most + 1)}
    return [config._replace(split=split) for split in sorted({1, *by_waves.values()})]


def _num_tiles(config: Config, m: int, n: int) -> int:
    return math.ceil(m / config.block_m) * math.ceil(n / config.block_n)


def aligned(start: int, stop: int) -> tuple[int, int]:
    """The slice widened to multiples of ALIGNMENT: reading a little more at once is faster than one by one."""
    return start // ALIGNMENT * ALIGNMENT, math.ceil(stop / ALIGNMENT) * ALIGNMENT


@contextlib.contextmanager
def forced(op: str, *configs: Config) -> Iterator[None]:
    """Makes `candidates` give exactly these for an op in the block, process-wide: for tuning and for tests.

    As every explicit request they run or raise NoConfigFits: nothing else computes the op then.
    """
    previous = _forced.get(op)
    _forced[op] = configs
    try:
        yield
    finally:
        if previous is None:
            del _forced[op]
        else:
            _forced[op] = previous


def is_forced(op: str) -> bool:
    """Whether a block of `forced` is open for it."""
    return op in _forced


def launch(op: str, configs: Sequence[Config], run: Callable[[Config], Result]) -> Result:
    """Calls `run` with the first configuration that fits the GPU.

    Raises:
        NoConfigFits: none does.
    """
    from triton.runtime.errors import OutOfResources

    said = []
    for config in configs:
        try:
            return run(config)
        except OutOfResources as error:
            said.append(f"{tuple(config)}: {error}")
    raise NoConfigFits(f"{op}: no configuration fits this GPU: " + "; ".join(said))


def variants(op: str) -> Iterator[Variant]:
    """Every configuration that `candidates` may give for an op, tables included, with every dtype and precision."""
    for dtype, choice in itertools.product(TYPE_NAMES, PRECISIONS):
        if dtype != torch.float32 and choice != "ieee":
            continue  # half precision has one way to multiply
        configs = dict.fromkeys(_defined.get(op, _MATMUL)[_kind(dtype, choice)])
        prefix = f"{op} {_key(dtype, choice)} "
        tuned = itertools.chain.from_iterable(table.items() for table in _tables.values())
        configs |= {Config(*entry["config"])._replace(split=1): None for key, entry in tuned if key.startswith(prefix)}
        for config in configs:
            yield Variant(TYPE_NAMES[dtype], choice, config)


def _constant_to_compile(function: _Function) -> _Function:
    """Of what it cannot trace, torch.compile takes the result that it finds; the kernels ask again when they run.

    As `torch.compiler.assume_constant_result`, which would import all of dynamo with this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_to_compile
def precision(op: str = "linear") -> str:
    """`input_precision` of `tl.dot` for float32 inputs: "ieee", "tf32" or "tf32x3".

    What `set_input_precision` says, else as stock PyTorch: tf32 where `torch.backends.cudnn.allow_tf32` (ops whose name
    starts with "conv") or `torch.backends.cuda.matmul.allow_tf32` (all others) allows it.
    """
    if _input_precision is not None:
        return _input_precision
    # Not `allow_tf32`: reading that one raises where the settings were made through the newer names.
    allowed = torch.backends.cudnn.conv if op.startswith("conv") else torch.backends.cuda.matmul
    return "tf32" if allowed.fp32_precision == "tf32" else "ieee"


def set_input_precision(value: str | None) -> None:
    """Sets `input_precision` of every kernel, process-wide; None follows torch's own settings (the default).

    Raises:
        ValueError: not one of None, "ieee", "tf32", "tf32x3".
    """
    global _input_precision
    _input_precision = None if value is None else check_choice("input_precision", value, PRECISIONS)


def _kind(dtype: torch.dtype, precision: str) -> str:
    """The class of configurations that a dtype and a precision share."""
    return precision if dtype == torch.float32 else "half"


@_constant_to_compile
def gpu_name(device: torch.device | None = None) -> str | None:
    """Whose tuned table counts: the name of a GPU (None: the current one), None for another device or without any."""
    gpu = _gpu(device)
    return None if gpu is None else gpu.name


def _num_sms(device: torch.device | None = None) -> int:
    gpu = _gpu(device)
    return _NOMINAL_SMS if gpu is None else gpu.multi_processor_count


def _gpu(device: torch.device | None) -> Any | None:
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    return torch.cuda.get_device_properties(device)


def table_path(gpu: str) -> Path:
    """Where `dfs bench tune` writes the table of a GPU, of the name that torch gives it.

    JSON: {"gpu": name, "entries": {table_key: {"config": [...], "triton_us": t, "aten_us": t}}}; further keys beside
    "entries" say what it was measured with. "config" is null for kernels that have but one way to be launched.
    """
    return TABLES / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def read_tables() -> dict[str, Entries]:
    """The tuned tables that come with this version: entries by GPU."""
    tables = [json.loads(path.read_text()) for path in sorted(TABLES.glob("*.json"))]
    return {table["gpu"]: table["entries"] for table in tables}


# Read at import: torch.compile traces `prefers_triton`, and cannot look into files.
_tables = read_tables()


def use_table(table: dict[str, Any]) -> None:
    """Takes a table that was measured just now, as from the next start on. What is compiled already does not see it."""
    _tables[table["gpu"]] = table["entries"]


def convolution(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> str:
    """A convolution's geometry as `table_key` spells it, e.g. "3x3s2x2d1x1"."""
    (height, width), (down, right), (apart_h, apart_w) = kernel, stride, dilation
    return f"{height}x{width}s{down}x{right}d{apart_h}x{apart_w}"


def table_key(op: str, m: int, n: int, k: int, dtype: torch.dtype, geometry: str = "") -> str:
    """The shape class of a launch: sizes to the nearest power of two, so that a batch size of 100 finds that of 128.

    The axis that grows with the batch, rows or pixels, counts up to _MANY_ROWS. With more of them a full GPU does the
    same things more often, and aten's kernel too: which is faster no longer changes. So one class is tuned at one batch
    size and met at all larger ones.
    """
    many = {"k" if _is_split(op) else "m": _MANY_ROWS}
    sizes = "x".join(str(_nearest_power(size, many.get(axis))) for axis, size in (("m", m), ("n", n), ("k", k)))
    return " ".join([op, _key(dtype, precision(op)), sizes, *([geometry] if geometry else [])])


def _nearest_power(size: int, most: int | None = None) -> int:
    """By comparisons, of which torch.compile makes guards where the size is symbolic: it compiles once a class."""
    power = 1
    while power != most and size > math.isqrt(2 * power * power):
        power *= 2
    return power


def _key(dtype: torch.dtype, precision: str) -> str:
    return f"fp32-{precision}" if dtype == torch.float32 else TYPE_NAMES[dtype]


def prefers_triton(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, geometry: str = "", device: torch.device | None = None
) -> bool:
    """Whether the tuned table of the tensors' GPU says that the kernel beats `aten` in this shape class.

    What `auto` asks on CUDA. False without a table, for a shape class that is not in it, and for other dtypes. Args: as
    `candidates`.
    """
    entry = _entry(op, m, n, k, dtype, geometry, device)
    return entry is not None and entry["triton_us"] < entry["aten_us"]


def _entry(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, geometry: str, device: torch.device | None
) -> dict[str, Any] | None:
    if not _tables or dtype not in TYPE_NAMES or min(m, n, k) < 1:
        return None
    return _tables.get(gpu_name(device) or "", {}).get(table_key(op, m, n, k, dtype, geometry))
