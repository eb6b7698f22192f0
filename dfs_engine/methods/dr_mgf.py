"""DR-MGF, "disentangle and fuse": Meta-GF with an importance of each kernel for each exit (Sun et al.).

The released code is of multi-task segmentation; what is particular to exits here follows the defaults in it that are
marked so. Of a convolution that several exits reach, exit k's pass trains ``W / ||W|| * m_k`` (the norm is each 2-D
kernel's) in place of W, and learns the importance u_k that m_k is made of. Kernels of 1 x 1 are trained by their
importance alone: divided by their norm, signs are left of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfs_engine.checks import check_numbers
from dfs_engine.methods.combining import check_shares
from dfs_engine.methods.fusing import FusingMethod
from dfs_engine.methods.learned import Learned, Tensors, call_with
from dfs_engine.methods.method import Input, Step
from dfs_engine.models import MultiExitModel

# In m_k: the weight of exit k's own importance, where every other exit's is 1.
_OWN = 10.0
# In p_k.
_SHRINK, _POWER = 1e-4, 0.75
_FIRST_FUSION = 1e-3
_LEAST = 1e-12


@dataclass(frozen=True, kw_only=True)
class DRMGFConfig:
    """How exits are told apart and fused (used with method dr_mgf)."""

    aux: float = 0.4
    """Weight of the other exits' losses in an exit's pass."""
    start: int = 50
    """From this epoch on, counted from 0, importances stay as they are, kernels are trained as they are, and what the
    fusion learns is averaged over epochs."""
    meta_lr: float = 0.1
    """Learning rate of the fusion's Adam."""
    ema_old: float = 0.9
    """Share that the fusion variables keep of what they were before the epoch, from epoch `start` on."""
    importance_lr: float | None = None
    """Learning rate of the importances' SGD, which decays as that of the run does. Default: the run's."""
    importance_momentum: float = 0.9
    """Momentum of the importances' SGD."""
    importance_weight_decay: float = 5e-5
    """Weight decay of the importances' SGD."""
    inverse_order: bool = True
    """The deepest exit's pass comes first, as in the published MSDNet runs."""
    average: bool = False
    """Fuse by the mean, and learn nothing for it: exits, not exits + 1, passes an epoch."""
    leak_momentum: bool = False
    """An exit's pass goes on with the momentum of the pass before, as in the published code, instead of with none."""

    def __post_init__(self) -> None:
        ranges = {
            ">= 0": ("aux", "start", "meta_lr", "importance_lr", "importance_weight_decay"),
            "[0, 1]": ("ema_old",),
            "[0, 1)": ("importance_momentum",),
        }
        check_numbers(self, "dr_mgf.", ranges)


class DRMGF(FusingMethod):
    """Exits are trained apart for a pass each, by kernels gated for each, and their changes fused kernel by kernel.

    ``theta_0 + sum_k pi_k (theta_k - theta_0) / sum_k pi_k``, over the exits k that reach a tensor, with
    ``pi_k = |u_k| / sum_in |u_k| |s_k|`` of a convolution's kernels and ``|s_k|`` of a batch norm's channels, of which
    no importance is learned; other tensors take the mean change. s is learned in the last pass by the sum of the
    fused net's losses. In exit k's pass

    ``m_k = (10 p_k + sum_{j != k} p_j) / (10 + others)``, ``p_j = |u_j| / (1 + 1e-4 sum_in |u_j|)^.75``.

    The statistics of batch norms are pooled over the exits' passes.

    Args:
        model: to be trained by this method; its kernels' norms are where the importances start.
    """

    refuses: Mapping[str, str] = {
        **FusingMethod.refuses,
        "processes": "importances are learned beside the weights whose gradients DistributedDataParallel averages",
    }

    def __init__(self, model: MultiExitModel, config: DRMGFConfig | None = None) -> None:
        self.config = config or DRMGFConfig()
        super().__init__(
            model,
            aux=self.config.aux,
            aux_weights=(1.0,) * model.num_exits,
            inverse_order=self.config.inverse_order,
            leak_momentum=self.config.leak_momentum,
        )
        self.meta_lr = self.config.meta_lr
        self.num_phases = model.num_exits + (not self.config.average)
        shared = {name for name in self.names if len(self.reaching[name]) > 1}
        convs = shared_kernels(model)
        self.convs = [name for name in self.names if name in convs]
        norms = [path for path, norm in _norms(model) if f"{path}.weight" in self.reaching]
        self.norms = {path: self.reaching[f"{path}.weight"] for path in norms}
        self.in_norms = [name for name in self.names if name in shared and name.rpartition(".")[0] in self.norms]
        stacked = [
            torch.stack([_kernel_norms(model.get_parameter(name))] * len(self.reaching[name])) for name in self.convs
        ]
        self.importance = Learned(stacked)
        channels = [
            torch.stack([model.get_parameter(name).detach()] * len(self.reaching[name])) for name in self.in_norms
        ]
        self.fusion = Learned([torch.full_like(tensor, _FIRST_FUSION) for tensor in (*stacked, *channels)])
        self.before = Tensors(list(self.fusion.values))
        buffers = dict(model.named_buffers())
        # Each exit's (mean, variance) of each norm, after its pass.
        self.statistics = nn.ModuleList(
            Tensors([buffers[f"{path}.{kind}"] for path in self._norms_of(exit) for kind in _STATISTICS])
            for exit in range(self.num_exits)
        )
        self._leaves: list[Tensor] | None = None  # of the importances, in a gated pass

    def _norms_of(self, exit: int) -> list[str]:
        return [path for path, exits in self.norms.items() if exit in exits]

    def run(self, model: nn.Module, input: Input) -> tuple[list[Tensor], list[Tensor] | None]:
        if self._leaves is None:
            return super().run(model, input)
        return call_with(model, self._gated(model, self.exit, self._leaves), input), None

    def _gated(self, model: nn.Module, exit: int, importances: Sequence[Tensor]) -> dict[str, Tensor]:
        """What exit k's pass has in place of the kernels that it shares."""
        gated = {}
        for name, importance in zip(self.convs, importances, strict=True):
            if exit in self.reaching[name]:
                weight = model.get_parameter(name)
                norm = torch.linalg.vector_norm(weight, dim=(2, 3), keepdim=True).clamp_min(_LEAST)
                gated[name] = weight / norm * gate(importance, self.reaching[name].index(exit))[..., None, None]
        return gated

    def train_exit(self, step: Step, input: Input, target: Tensor) -> Tensor:
        if step.epoch >= self.config.start:
            return super().train_exit(step, input, target)
        self._leaves = leaves = self.importance.leaves()
        try:
            losses = super().train_exit(step, input, target)
        finally:
            self._leaves = None
        (group, *_), base = step.optimizer.param_groups, step.optimizer.defaults["lr"]
        own = self.config.importance_lr
        self.importance.sgd_step(
            [leaf.grad for leaf in leaves],
            lr=group["lr"] if own is None else own * group["lr"] / (base or 1),
            momentum=self.config.importance_momentum,
            weight_decay=self.config.importance_weight_decay,
        )
        return losses

    def result(self, step: Step, exit: int) -> list[Tensor]:
        """With the gate in the kernels."""
        gated: dict[str, Tensor] = {}
        if step.epoch < self.config.start:
            gated = self._gated(step.raw_model, exit, list(self.importance.values))
        plain = zip(self.reached[exit], super().result(step, exit), strict=True)
        return [gated.get(name, value) for name, value in plain]

    def fused(self, learned: Sequence[Tensor]) -> dict[str, Tensor]:
        start = dict(zip(self.names, self.start, strict=True))
        own = [self.own_of(exit) for exit in range(self.num_exits)]
        shares = dict(zip((*self.convs, *self.in_norms), learned, strict=True))
        importance = dict(zip(self.convs, self.importance.values, strict=True))
        fused = {}
        for name, exits in self.reaching.items():
            if len(exits) == 1:
                fused[name] = own[exits[0]][name]
            elif exits:
                changes = torch.stack([own[exit][name] for exit in exits]) - start[name]
                if name in shares and not self.config.average:
                    share = shares[name].abs()
                    if name in importance:
                        size = importance[name].abs()
                        share = (size / size.sum(2, keepdim=True).clamp_min(_LEAST) * share)[..., None, None]
                    fused[name] = start[name] + (share * changes).sum(0) / share.sum(0).clamp_min(_LEAST)
                else:
                    fused[name] = start[name] + changes.mean(0)
        return fused

    def begin_phase(self, step: Step) -> None:
        super().begin_phase(step)
        if step.phase == self.num_exits:
            self.before.copy_(list(self.fusion.values))

    def end_phase(self, step: Step) -> None:
        super().end_phase(step)
        if step.phase < self.num_exits:
            self._keep_statistics(step.raw_model, self.order[step.phase])
        if step.phase == self.num_exits - 1:
            self._pool_statistics(step.raw_model)
        if step.phase == self.num_exits and step.epoch >= self.config.start:
            for s, before in zip(self.fusion.values, self.before, strict=True):
                s.lerp_(before, self.config.ema_old)

    def _keep_statistics(self, model: nn.Module, exit: int) -> None:
        buffers = dict(model.named_buffers())
        found = [buffers[f"{path}.{kind}"] for path in self._norms_of(exit) for kind in _STATISTICS]
        cast(Tensors, self.statistics[exit]).copy_(found)

    @torch.no_grad()
    def _pool_statistics(self, model: nn.Module) -> None:
        """Of the passes of the exits that reach a norm: the mean and the variance of all together."""
        found: dict[str, list[list[Tensor]]] = {path: [] for path in self.norms}
        for exit in range(self.num_exits):
            values = list(cast(Tensors, self.statistics[exit]))
            for index, path in enumerate(self._norms_of(exit)):
                found[path].append(values[2 * index : 2 * index + 2])
        for path, pairs in found.items():
            means, variances = (torch.stack(values) for values in zip(*pairs, strict=True))
            norm: Any = model.get_submodule(path)
            mean = means.mean(0)
            norm.running_var.copy_((variances + means**2).mean(0) - mean**2)
            norm.running_mean.copy_(mean)


_STATISTICS = ("running_mean", "running_var")


def gate(importance: Tensor, own: int) -> Tensor:
    """m of the exit with this row, (O, I); its own importance counts ten times as much as another exit's.

    Args:
        importance: (exits, O, I), of the exits that reach the convolution.
    """
    size = importance.abs()
    shrunk = size / (1 + _SHRINK * size.sum(2, keepdim=True)) ** _POWER
    others = len(importance) - 1
    return ((_OWN - 1) * shrunk[own] + shrunk.sum(0)) / (_OWN + others)


def _kernel_norms(weight: Tensor) -> Tensor:
    """(O, I), the L2 norm of each 2-D kernel of (O, I, height, width)."""
    return torch.linalg.vector_norm(weight.detach(), dim=(2, 3))


def _norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Batch norms that keep statistics, and their paths."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return [(path, norm) for path, norm in found if norm.running_mean is not None]


def shared_kernels(model: MultiExitModel) -> dict[str, nn.Parameter]:
    """Weights of the 2-D convolutions that several exits reach, by name."""
    counts: dict[int, int] = {}
    for index in range(model.num_exits):
        for key in {id(p) for p in model.reached_parameters(index)}:
            counts[key] = counts.get(key, 0) + 1
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return {
        f"{path}.weight": cast(nn.Parameter, layer.weight)
        for path, layer in layers
        if layer.weight.requires_grad and counts.get(id(layer.weight), 0) > 1
    }


def create_dr_mgf(model: MultiExitModel, config: DRMGFConfig | None = None) -> DRMGF:
    """The method for `model`, which has to be one of convolutions."""
    check_shares("dr_mgf", model)
    shared = {id(p): p for index in range(model.num_exits - 1) for p in model.reached_parameters(index) if p.dim() > 1}
    heads = {id(p) for index in range(model.num_exits) for p in model.exit_parameters(index)}
    in_all = sum(p.numel() for key, p in shared.items() if key not in heads)
    in_kernels = sum(p.numel() for p in shared_kernels(model).values())
    if in_kernels < in_all / 2:
        raise ValueError(
            f"method: expected meta_gf for {model.name or 'this model'}, got dr_mgf, which weighs exits by the kernels "
            f"of 2-D convolutions: those have {in_kernels} of the {in_all} weights that exits share here."
        )
    return DRMGF(model, config)
