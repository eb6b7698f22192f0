"""`nn.Dropout` with this engine's kernel."""

from torch import Tensor, nn

from dfs_engine.ops.dropout import dropout
from dfs_engine.runtime.backend import check_backend


class Dropout(nn.Dropout):
    """Drop-in for `nn.Dropout`; see `dfs_engine.ops.dropout`.

    Args:
        p: the probability that an element is zeroed.
        backend: "reference", "aten", "cpp", "triton"; None or "auto" picks.
    """

    def __init__(self, p: float = 0.5, *, backend: str | None = None) -> None:
        super().__init__(p)
        self.backend = check_backend(backend)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return dropout(input, self.p, self.training, backend=self.backend)


def convert_dropouts(module: nn.Module, backend: str | None = None) -> None:
    """Replaces every plain `nn.Dropout` inside `module` by a `Dropout`, except where it works in place."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout and not child.inplace:
            setattr(module, name, Dropout(child.p, backend=backend).train(child.training))
        else:
            convert_dropouts(child, backend)
