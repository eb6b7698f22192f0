"""What every exit says of every sample: the few bytes from which tables and curves can be made without the network.

The file is one of safetensors. Of each set of samples, SET (test, val, ...), it has the tensors

    SET.confidence  float32 (num_exits, N), the probability of the class predicted
    SET.classes     uint8 (num_exits, N), or int16 or int32 where there are more classes: the class predicted
    SET.labels      the same (N,), the right class

and, as JSON in its metadata under "dfs_engine_per_sample", what a network alone can tell: `Saved.description`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs_engine.evaluation.calibration import calibrated_confidence
from dfs_engine.runtime.files import open_tensors, tensors_of, write_tensors

HELD_OUT = "val"
"""The set that thresholds and temperatures come from: what `data.val_fraction` keeps out of training."""
_METADATA_KEY = "dfs_engine_per_sample"
_PARTS = ("confidence", "classes", "labels")


class Outputs(NamedTuple):
    """What every exit says of N samples, shallow to deep.

    Attributes:
        split: which samples they are: "test", a further test set's name, or "val", those kept out of training.
        confidence: float32 (num_exits, N), the largest probability.
        classes: int64 (num_exits, N), which class that is.
        labels: int64 (N,), the right class.
    """

    split: str
    confidence: Tensor
    classes: Tensor
    labels: Tensor

    @property
    def is_right(self) -> Tensor:
        """bool (num_exits, N)."""
        return self.classes == self.labels

    @classmethod
    def of(cls, split: str, logits: Sequence[Tensor] | Tensor, labels: Tensor) -> "Outputs":
        """Of every exit's logits (N, num_classes)."""
        confidence, classes = torch.stack(list(logits)).float().softmax(-1).max(-1)
        return cls(split, confidence, classes, labels)


class OutputCollector:
    """Collects `Outputs` batch by batch on the CPU, as `training.evaluate` hands them on.

    Args:
        temperatures: of each exit, to know `calibrated` too. None: all 1.
        keep_logits: to have `logits` too, which take num_exits * N * num_classes floats.
    """

    def __init__(self, split: str, *, temperatures: Sequence[float] | None = None, keep_logits: bool = False) -> None:
        self.split, self.temperatures, self.keep_logits = split, temperatures, keep_logits
        self._outputs: list[Outputs] = []
        self._calibrated: list[Tensor] = []
        self._logits: list[Tensor] = []

    def __call__(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        stacked = torch.stack(list(logits)).float()
        found = Outputs.of(self.split, stacked, labels)
        self._outputs.append(Outputs(self.split, *(part.cpu() for part in found[1:])))
        if self.keep_logits:
            self._logits.append(stacked.cpu())
        if self.temperatures is not None:
            self._calibrated.append(calibrated_confidence(stacked, self.temperatures).cpu())

    @property
    def outputs(self) -> Outputs:
        _, confidence, classes, labels = zip(*self._outputs, strict=True)
        return Outputs(self.split, torch.cat(confidence, 1), torch.cat(classes, 1), torch.cat(labels))

    @property
    def calibrated(self) -> Tensor | None:
        """float32 (num_exits, N), the largest probability at each exit's temperature."""
        return torch.cat(self._calibrated, 1) if self._calibrated else None

    @property
    def logits(self) -> Tensor:
        """float32 (num_exits, N, num_classes)."""
        return torch.cat(self._logits, 1)


class Saved(NamedTuple):
    """What `dfs eval` knows of a network once it has run: the rest is arithmetic on it (`report.summarize`).

    Attributes:
        outputs: by set, "test" first; none of a network that predicts numbers.
        description: JSON-able: which network and data; each set's `ExitMetrics.compute` in "metrics"; each exit's
            "operations", "seconds", "temperatures" and, by set, "calibrated_errors".
    """

    outputs: dict[str, Outputs]
    description: dict[str, Any]


def save_per_sample(path: Path, saved: Saved) -> None:
    """Writes the file that the module's docstring describes."""
    tensors: dict[str, Tensor] = {}
    for split, outputs in saved.outputs.items():
        whole = _smallest_integer(max(int(outputs.classes.max()), int(outputs.labels.max())))
        parts = (outputs.confidence.float(), outputs.classes.to(whole), outputs.labels.to(whole))
        tensors |= {f"{split}.{name}": part for name, part in zip(_PARTS, parts, strict=True)}
    write_tensors(path, tensors, {_METADATA_KEY: json.dumps(saved.description)})


def _smallest_integer(largest: int) -> torch.dtype:
    return next(kind for kind in (torch.uint8, torch.int16, torch.int32) if largest <= torch.iinfo(kind).max)


def load_per_sample(path: Path | str) -> Saved:
    """Reads what `save_per_sample` wrote.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged, or no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file that `dfs eval` wrote, got {path} (nothing there).")
    with open_tensors(path, "path") as file:
        text = (file.metadata() or {}).get(_METADATA_KEY)
        if text is None:
            raise ValueError(
                f"path: expected per-sample outputs that `dfs eval` wrote, got {path} without them. Give the "
                "per_sample.safetensors of a run's folder eval."
            )
        tensors, description = tensors_of(file), json.loads(text)
    splits = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    ordered = [split for split in description["metrics"] if split in splits]
    return Saved({split: _outputs_of(split, tensors) for split in ordered}, description)


def _outputs_of(split: str, tensors: Mapping[str, Tensor]) -> Outputs:
    confidence, classes, labels = (tensors[f"{split}.{name}"] for name in _PARTS)
    return Outputs(split, confidence, classes.long(), labels.long())


def is_per_sample_file(path: Path | str) -> bool:
    """Whether `save_per_sample` wrote it, by its header."""
    path = Path(path).expanduser()
    if not path.is_file():
        return False
    try:
        with open_tensors(path, "path") as file:
            return _METADATA_KEY in (file.metadata() or {})
    except ValueError:
        return False
