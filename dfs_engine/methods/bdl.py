"""BDL, block-dependent losses: an exit trains the blocks next to it alone.

`bdl1` is the window alone; with `bdl2` the last exit trains all blocks. The official code runs the blocks of a window
again for each exit, on inputs without gradient. One forward and, for each exit, a backward into its window have the
same gradients, and batch norms see each batch once.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dfs_engine.checks import check_numbers
from dfs_engine.gradients import ExitGradients
from dfs_engine.methods.combining import PerExitMethod, check_shares
from dfs_engine.models import MultiExitModel


@dataclass(frozen=True, kw_only=True)
class BDLConfig:
    """How far an exit's loss reaches (used with methods bdl1 and bdl2)."""

    window: int = 3
    """Blocks that an exit trains, its own and those before it. Published: 3 on CIFAR-100 with 7 exits, 2 on ImageNet
    with 5. 1 trains every block by its own exit alone; as many as there are exits is joint."""

    def __post_init__(self) -> None:
        check_numbers(self, "bdl.", {">= 1": ("window",)})


class BDL(PerExitMethod):
    """The sum of the exits' losses, of which l_k trains its classifier and blocks ``max(1, k - window + 1)`` to k.

    Args:
        include_final: the last exit's loss trains all blocks (`bdl2`).
    """

    def __init__(self, config: BDLConfig | None = None, *, include_final: bool = False) -> None:
        super().__init__()
        self.config = config or BDLConfig()
        self.include_final = include_final

    def routing(self, model: MultiExitModel) -> list[list[nn.Parameter]]:
        """Of each exit, the parameters of its window and its classifier."""
        window, last = self.config.window, model.num_exits - 1
        routes = []
        for index in range(model.num_exits):
            whole = index < window or (self.include_final and index == last)
            outside = set() if whole else {id(p) for p in model.reached_parameters(index - window)}
            routes.append([p for p in model.reached_parameters(index) if id(p) not in outside])
        return routes

    def combine(self, gradients: ExitGradients) -> None:
        gradients.write(torch.ones(len(gradients.rows)))


def create_bdl(model: MultiExitModel, config: BDLConfig | None = None, *, include_final: bool = False) -> BDL:
    """The method for `model`, whose surgery it has to make sense with."""
    check_shares("bdl2" if include_final else "bdl1", model)
    return BDL(config, include_final=include_final)
