"""What `dfs bench ops` times: the shapes, the cases of one interleaving, and the flags that choose them."""

from dataclasses import dataclass

from dfs_engine.benchmarks.op_cases import OP_NAMES, STOCK_PATHS, OpCase
from dfs_engine.benchmarks.options import LAYOUTS, check_least
from dfs_engine.benchmarks.shapes import SHAPES, LinearShape, Shape, matching
from dfs_engine.checks import split_betas, split_choices
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import DTYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOpsConfig:
    """What `dfs bench ops` times. Lists are comma-separated.

    Attributes:
        ops: Some of conv2d, linear, norm_act.
        shapes: Which shapes: patterns of family/shape, for example "vgg7/*,bert/*".
        backends: Some of dense (stock, full gradient), detach (stock, published cat + detach), aten, cpp.
        layouts: Some of nchw, channels_last; linear layers have one.
        dtypes: Some of fp32, bf16, fp16, fp64. Each is a measurement of its own.
        beta: Shares of channels with gradient, timed in turns with each other.
        rounds: How often every case is timed; at least 20 for numbers to publish.
        warmup: How often it runs before that, not timed.
        max_seconds: Start no further round of a shape and dtype after this time. Default: no limit.
        num_threads: CPU threads. Default: torch's.
        seed: Of the random data.
        detail: Time the two gradients of convolutions and linears one by one too.
        quick: One shape of each family and op, fp32, 5 rounds: to see that it works.
        output: CSV file to append the measurements to. Default: none.
        progress: Show a progress bar in a terminal.
    """

    ops: str = "conv2d,linear,norm_act"
    shapes: str = "*"
    backends: str = "dense,detach,aten,cpp"
    layouts: str = "nchw,channels_last"
    dtypes: str = "fp32"
    beta: str = "0.5"
    rounds: int = 20
    warmup: int = 2
    max_seconds: float | None = None
    num_threads: int | None = None
    seed: int = 0
    detail: bool = False
    quick: bool = False
    output: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        split_choices("ops", self.ops, OP_NAMES)
        split_choices("backends", self.backends, (*STOCK_PATHS, "aten", "cpp"))
        split_choices("layouts", self.layouts, LAYOUTS)
        split_choices("dtypes", self.dtypes, DTYPES)
        split_betas("beta", self.beta)
        check_least(self, dict.fromkeys(("rounds", "warmup", "num_threads"), 1))
        if not self.chosen_shapes:
            families = ", ".join(dict.fromkeys(shape.family for shape in SHAPES))
            raise ValueError(
                f"shapes: expected patterns that match some of the shapes of {families}, got {self.shapes!r}. "
                'Write family/shape with wildcards, e.g. "vgg7/*".'
            )

    @property
    def chosen_shapes(self) -> list[Shape]:
        """What is timed."""
        ops = split_choices("ops", self.ops, OP_NAMES)
        shapes = [shape for shape in matching(SHAPES, self.shapes) if shape.op in ops]
        firsts = {(shape.family, shape.op): shape for shape in reversed(shapes)}
        return [shape for shape in shapes if shape in firsts.values()] if self.quick else shapes

    @property
    def chosen_dtypes(self) -> list[str]:
        return ["fp32"] if self.quick else split_choices("dtypes", self.dtypes, DTYPES)

    @property
    def paths(self) -> list[str]:
        return split_choices("backends", self.backends, (*STOCK_PATHS, "aten", "cpp"))

    def cases(self, shape: Shape, dtype: str) -> list[OpCase]:
        """One interleaving, without the backends that are not there."""
        return [
            OpCase(path, layout, beta)
            for path in self.paths
            if reason_unmeasured(path, shape.op, dtype) is None
            for beta in ([None] if path == "dense" else split_betas("beta", self.beta))
            for layout in (["-"] if isinstance(shape, LinearShape) else split_choices("layouts", self.layouts, LAYOUTS))
        ]


def reason_unmeasured(path: str, op: str, dtype: str) -> str | None:
    """Why a way of computing cannot be timed, or None."""
    if path in STOCK_PATHS:
        return None
    refused = backends.unsupported_dtype(OP_NAMES[op], path, DTYPES[dtype])
    return backends.unavailable_reason(path) or (refused and f"{op} in {dtype}: {refused}")
