"""What `dfs bench inference` times, and the flags that choose it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dfs_engine.benchmarks.options import LAYOUTS, check_least, split_ints
from dfs_engine.checks import split_choices
from dfs_engine.models import check_model

DTYPES = ("fp32", "bf16")


class InferenceCase(NamedTuple):
    """One way to predict.

    Attributes:
        variant: "stock" (the full model in stock PyTorch), "model" (as it was trained, unprepared), "prepared" (our
            evaluation mode) or "early exit" (of the prepared model).
        mode: "eager" or "compile"; of early exit, what it may lose of the full model's accuracy.
        layout: memory order of images; "" for tokens.
    """

    variant: str
    mode: str = "eager"
    layout: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchInferenceConfig:
    """What `dfs bench inference` times. Lists are comma-separated.

    With a run folder: the run's weights on its test data, early exit with thresholds from its validation data. Without:
    the full model alone, on random weights and random data.

    Attributes:
        run_dir: Folder of a `dfs train` run with data.val_fraction above 0. Default: none.
        data_root: Where the run's data are now. Default: where they were.
        model: Without a run folder: a model's name, as of `dfs train --model.name`.
        options: Without a run folder: the family's own options, for example {width: 32} of a VGG.
        batch_size: Images or sentences per call. Each is a measurement of its own.
        dtypes: Some of fp32, bf16 (autocast). Each is a measurement of its own.
        layouts: Of the stock forms: some of nchw, channels_last; a model of tokens has one.
        compile: Of the stock forms: some of off, on (torch.compile).
        drops: What early exit may lose of the full model's accuracy on the validation data, as shares: 0.01 is one
            point. Empty: no early exit.
        max_samples: Look at so many test and validation samples at most. Default: all.
        rounds: How often every case is timed, at least.
        samples: How many samples every case sees at least, so that small batches are timed more often.
        warmup: How often a case runs before that, not timed.
        max_seconds: Start no further round of a measurement after this time; all its cases have the same n. Default:
            no limit.
        num_threads: CPU threads. Default: torch's.
        seed: Of random weights and data.
        output: CSV file to append the measurements to; a picture, accuracy against time, is drawn beside it. Default:
            none.
        progress: Show a progress bar in a terminal.
    """

    run_dir: Path | None = None
    data_root: Path | None = None
    model: str = "vgg7_64"
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: str = "1,8,64,256"
    dtypes: str = "fp32"
    layouts: str = "nchw,channels_last"
    compile: str = "off,on"
    drops: str = "0,0.002,0.01,0.03"
    max_samples: int | None = None
    rounds: int = 20
    samples: int = 200
    warmup: int = 2
    max_seconds: float | None = None
    num_threads: int | None = None
    seed: int = 0
    output: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        check_model(self.model)
        split_ints("batch_size", self.batch_size)
        split_choices("dtypes", self.dtypes, DTYPES)
        split_choices("layouts", self.layouts, LAYOUTS)
        split_choices("compile", self.compile, ("off", "on"))
        _ = self.chosen_drops
        check_least(self, dict.fromkeys(("rounds", "samples", "num_threads", "max_samples"), 1))
        if self.data_root is not None and self.run_dir is None:
            raise ValueError(f"data_root: expected a run_dir beside it, got data_root={self.data_root} alone.")

    @property
    def chosen_drops(self) -> list[float]:
        parts = [part.strip() for part in self.drops.split(",") if part.strip()]
        try:
            drops = [float(part) for part in parts]
        except ValueError:
            drops = [-1.0]
        if any(not 0 <= drop < 1 for drop in drops):
            raise ValueError(
                f"drops: expected comma-separated shares in [0, 1), got {self.drops!r}. 0.01 is one point."
            )
        return list(dict.fromkeys(drops))

    def stock_cases(self, reads_tokens: bool) -> list[InferenceCase]:
        """The full model in stock forms."""
        layouts = [""] if reads_tokens else split_choices("layouts", self.layouts, LAYOUTS)
        modes = [
            "compile" if each == "on" else "eager" for each in split_choices("compile", self.compile, ("off", "on"))
        ]
        return [InferenceCase("stock", mode, layout) for layout in layouts for mode in modes]

    def rounds_of(self, batch_size: int) -> int:
        return max(self.rounds, -(-self.samples // batch_size))
