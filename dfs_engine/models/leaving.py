"""How samples leave a backbone with attached exits, whose code between two exits is one call of the backbone."""

from torch import Tensor

from dfs_engine.models.multi_exit import OnExit
from dfs_engine.nn import select_rows
from dfs_engine.nn.reading import say_once


def say_where_all_wait(names: list[str]) -> None:
    """Says once at which exits, by the modules' names, no sample leaves the batch."""
    if names:
        say_once(
            f"Behind {', '.join(names)} the backbone reads what was made before, or torch.fx cannot trace it, so no "
            "sample leaves the batch there: it runs on until all its samples are decided. The predictions are the same."
        )


class AllLeftError(Exception):
    """Ends a forward pass of the backbone: no sample is left."""


class Leaving:
    """One forward pass in which samples leave.

    Where the backbone reads nothing but the feature any more, the batch is made smaller. Elsewhere those who left run
    on with it, and are not looked at again.

    Args:
        on_exit: see `MultiExitModel.forward`.

    Attributes:
        logits: of the exits that have run, each of the samples that reached it.
    """

    def __init__(self, on_exit: OnExit) -> None:
        self.on_exit = on_exit
        self.logits: list[Tensor] = []
        self._rows: Tensor | None = None  # of the batch that runs, those that have not left; None: all

    def __call__(self, logits: Tensor, output: Tensor, *, is_cut: bool) -> Tensor:
        """What the backbone reads behind an exit.

        Args:
            logits: of the batch that runs.
            output: what the backbone would read, of that batch.
            is_cut: whether it reads nothing else any more.

        Raises:
            AllLeftError: no sample is left.
        """
        if self._rows is not None:
            logits = select_rows(logits, self._rows)
        kept = self.on_exit(len(self.logits), logits)
        self.logits.append(logits)
        if kept is not None and len(kept) == 0:
            raise AllLeftError
        if kept is not None:
            self._rows = kept if self._rows is None else select_rows(self._rows, kept)
        if self._rows is None or not is_cut:
            return output
        rows, self._rows = self._rows, None
        return select_rows(output, rows)

    def end(self, output: Tensor) -> None:
        """The same for the backbone's own output, the last exit's logits."""
        logits = output if self._rows is None else select_rows(output, self._rows)
        self.on_exit(len(self.logits), logits)
        self.logits.append(logits)
