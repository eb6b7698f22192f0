"""Where a run stands."""

from dataclasses import dataclass, field, fields
from typing import Any

from dfs_engine.models.weights import REMEDY
from dfs_engine.training import report


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint, so it holds plain values only."""

    epoch: int = 0
    """Epochs completed."""
    step_in_epoch: int = 0
    """Steps done of the epoch after those."""
    step: int = 0
    """Optimizer steps done in all."""
    loss_sums: tuple[float, ...] = ()
    """Sum over the epoch's samples so far of each exit's loss; empty at the start of an epoch."""
    seconds: float = 0.0
    """Training time of the epoch so far."""
    rows: list[report.Row] = field(default_factory=list)
    """Metrics of the completed epochs."""

    @classmethod
    def load(cls, saved: dict[str, Any], num_exits: int) -> "Progress":
        """Of a checkpoint's manifest. Raises ValueError for what `vars(progress)` cannot have written."""
        names = [item.name for item in fields(cls)]
        counts, sums = [saved.get(name) for name in names[:3]], saved.get("loss_sums")
        well_formed = saved.keys() == set(names) and all(isinstance(count, int) and count >= 0 for count in counts)
        if not well_formed or not isinstance(sums, list) or len(sums) not in (0, num_exits):
            raise ValueError(
                f"checkpoint: expected progress of {', '.join(names)} in its manifest, got {str(saved)[:200]}. {REMEDY}"
            )
        return cls(**saved)
