"""What `dfs validate` compares."""

from dataclasses import dataclass

from dfs_engine.checks import check_choice, split_choices
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.problems import PROBLEMS
from dfs_engine.validate.tolerances import DTYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateConfig:
    """What `dfs validate` compares. Lists are comma-separated.

    Attributes:
        ops: "all", or names of ops.
        backends: "all" (every usable one, and as "split" the two stock calls of variant="split"; with quick these in
            the first of dtypes alone), or names of backends; an unusable one is then an error.
        dtypes: Some of fp64, fp32, bf16, fp16.
        device: cpu or cuda.
        quick: A random sample of the combinations, in which any two modes meet that can, under 40 s on 2 slow cores,
            instead of all of them.
        seed: Of the random inputs and of the sample.
        max_seconds: Start no further problem after this time; how many were left out is said. Default: no limit.
        progress: Show a progress bar in a terminal.
    """

    ops: str = "all"
    backends: str = "all"
    dtypes: str = "fp64,fp32,bf16,fp16"
    device: str = "cpu"
    quick: bool = False
    seed: int = 0
    max_seconds: float | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        split_choices("ops", self.ops, ["all", *PROBLEMS])
        split_choices("backends", self.backends, ["all", *backends.BACKENDS])
        split_choices("dtypes", self.dtypes, DTYPES)
        check_choice("device", self.device, ("cpu", "cuda"))
