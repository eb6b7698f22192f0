"""WPN, a weight prediction network (Han et al., Learning to Weight Samples for Dynamic Early-Exiting Nets, ECCV 2022).

A small net gives every sample's loss at every exit a weight. It learns what makes the model better, one step on, at
what early exiting will ask of it: each exit at the samples that will leave there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.methods.combining import check_shares
from dfs_engine.methods.learned import Learned, call_with
from dfs_engine.methods.method import Input, Method, Step
from dfs_engine.models import MultiExitModel
from dfs_engine.nn import exit_loss

# Over which axes of (samples, exits) the weights' mean is one.
CONSTRAINTS: Mapping[str, tuple[int, ...]] = {"row": (0,), "col": (1,), "mat": (0, 1)}
INPUTS = ("loss", "confidence", "both")


@dataclass(frozen=True, kw_only=True)
class WPNConfig:
    """The net that weights samples, and how it learns (used with method wpn)."""

    epsilon: float = 0.8
    """How far a weight may be from 1. Published: 0.8 on CIFAR, 0.3 on ImageNet. 0 is SGD on each half of a batch."""
    constraint_dimension: str = "col"
    """The weights have mean 1: of a sample over the exits (col), of an exit over the batch (row), or over both (mat).
    Published: col on CIFAR, mat on ImageNet."""
    meta_interval: int = 1
    """Optimizer steps between two of the net's. Published: 1 on CIFAR, 100 on ImageNet."""
    input: str = "loss"
    """What the net reads of a sample: its loss at every exit, its confidence (the largest probability), or both."""
    target_p_index: int = 15
    """How many samples are to leave at exit k: a share proportional to (target_p_index / 20)^k."""
    hidden: int = 500
    """Width of the net's hidden layer."""
    meta_lr: float = 1e-4
    """Learning rate of the net's Adam; it decays as that of the run does."""
    meta_weight_decay: float = 1e-4
    """Weight decay (L2) of the net's Adam."""

    def __post_init__(self) -> None:
        ranges = {
            ">= 0": ("epsilon", "meta_lr", "meta_weight_decay"),
            ">= 1": ("meta_interval", "target_p_index", "hidden"),
        }
        check_numbers(self, "wpn.", ranges)
        check_choice("wpn.constraint_dimension", self.constraint_dimension, CONSTRAINTS)
        check_choice("wpn.input", self.input, INPUTS)


class WPN(Method):
    """``loss = sum_k mean_i W[i, k] CE_k(i)``, with ``W = 1 + epsilon (net - mean of net)``, ``net`` in (-1, 1).

    A batch is cut in halves A and B and makes two optimizer steps: on A, after the net has learned from B, and on B,
    after it has learned from A. It learns from B by a step of the model on A that is only tried: weight decay and
    momentum as the optimizer's, without clipping. Then the exits divide B among them, the most confident samples first,
    and the sum of each exit's mean loss on its own samples is what the net lowers.

    Args:
        num_exits: of the model.
        dtype: of the model's parameters.

    Attributes:
        num_steps: () int64 buffer, optimizer steps taken.
    """

    num_steps: Tensor
    refuses: Mapping[str, str] = {
        "adamw": "the step that the weights are learned by is SGD's",
        "compile": "a compiled backward has no gradient of its own, by which the weights are learned",
        "fp16": "its loss scaling does not reach the gradients that the weights are learned by",
        "micro_batch_size": "the weights are learned from each half of a batch as a whole",
        "processes": "the step that the weights are learned by knows one process's samples",
    }

    def __init__(self, num_exits: int, config: WPNConfig | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config or WPNConfig()
        width = num_exits * (2 if self.config.input == "both" else 1)
        layers = [nn.Linear(width, self.config.hidden), nn.Linear(self.config.hidden, num_exits)]
        self.net = Learned([parameter.to(dtype) for layer in layers for parameter in layer.parameters()])
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        with torch.no_grad():
            weights = self.weights(logits, target, list(self.net.values))
        return (weights * sample_losses(logits, target)).mean(0).sum()

    def weights(self, logits: Sequence[Tensor], target: Tensor, net: Sequence[Tensor]) -> Tensor:
        """(N, num_exits), of what the exits say of each sample; the logits get no gradient.

        Args:
            net: weight and bias of both layers.
        """
        logits = [exit_logits.detach() for exit_logits in logits]
        read = {"loss": [sample_losses(logits, target)], "confidence": [confidences(logits)]}
        read["both"] = read["loss"] + read["confidence"]
        hidden = F.relu(F.linear(torch.cat(read[self.config.input], 1), net[0], net[1]))
        found = F.linear(hidden, net[2], net[3]).tanh()
        mean = found.mean(CONSTRAINTS[self.config.constraint_dimension], keepdim=True)
        return 1 + self.config.epsilon * (found - mean)

    def train_batch(self, step: Step, input: Input, target: Tensor) -> Tensor:
        """Two optimizer steps, each on half of the batch; of a batch of one sample one."""
        size, middle = len(target), len(target) // 2
        halves = [(_rows(input, part), target[part]) for part in (slice(0, middle), slice(middle, size))]
        if middle == 0:
            return step.update(input, target)
        losses = torch.zeros((), device=target.device)
        for train, meta in (halves, halves[::-1]):
            if self.num_steps.item() % self.config.meta_interval == 0:
                self._learn(step, train, meta)
            losses = losses + step.update(*train) * (len(train[1]) / size)
            self.num_steps += 1
        return losses

    def _learn(self, step: Step, train: tuple[Input, Tensor], meta: tuple[Input, Tensor]) -> None:
        """One step of the net: what it would have changed of a step on `train`, as seen on `meta`."""
        model, net = step.raw_model, self.net.leaves()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def loss_of(input: Input, target: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            logits = call_with(model, {**self._tried_step(step, buffers, net, *train), **buffers}, input)
            return self._loss_of_those_that_leave(logits, target), logits

        with sdpa_kernel(SDPBackend.MATH):  # the other kernels' backwards have no gradient
            gradients, _ = step.gradients(loss_of, *meta, net)
        # The rate falls with the run's.
        lr = self.config.meta_lr * step.optimizer.param_groups[0]["lr"] / (step.optimizer.defaults["lr"] or 1)
        self.net.adam_step(gradients, lr=lr, weight_decay=self.config.meta_weight_decay)

    def _tried_step(
        self, step: Step, buffers: Mapping[str, Tensor], net: Sequence[Tensor], input: Input, target: Tensor
    ) -> dict[str, Tensor]:
        """The model's parameters after an SGD step on these samples, differentiable by `net`."""
        parameters = {name: p for name, p in step.raw_model.named_parameters() if p.requires_grad}
        logits = call_with(step.raw_model, {**parameters, **buffers}, input)
        loss = (self.weights(logits, target, net) * sample_losses(logits, target)).mean(0).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
        gradients = {id(p): gradient for p, gradient in zip(parameters.values(), found, strict=True)}
        after = {}
        for group in step.optimizer.param_groups:
            for parameter in group["params"]:
                gradient = gradients.get(id(parameter))
                if gradient is not None:
                    move = gradient + group["weight_decay"] * parameter.detach()
                    buffer = step.optimizer.state.get(parameter, {}).get("momentum_buffer")
                    momentum = move if buffer is None else move + group["momentum"] * buffer
                    move = move + group["momentum"] * momentum if group["nesterov"] else momentum
                    after[id(parameter)] = parameter.detach() - group["lr"] * move
        return {name: after.get(id(p), p.detach()) for name, p in parameters.items()}

    def _loss_of_those_that_leave(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """The sum of each exit's mean loss on the samples that `allocate` gives it."""
        exits = allocate(confidences([exit_logits.detach() for exit_logits in logits]), self.config.target_p_index / 20)
        losses = sample_losses(logits, target)
        means = [losses[exits == index, index] for index in range(len(logits))]
        return torch.stack([chosen.mean() for chosen in means if len(chosen)]).sum()


def _rows(input: Input, rows: slice) -> Input:
    return {name: tensor[rows] for name, tensor in input.items()} if isinstance(input, Mapping) else input[rows]


def sample_losses(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """(N, num_exits), each sample's loss at every exit."""
    return torch.stack([exit_loss(exit_logits, target, reduction="none") for exit_logits in logits], 1)


def confidences(logits: Sequence[Tensor]) -> Tensor:
    """(N, num_exits), the probability of the likeliest class."""
    return torch.stack([exit_logits.softmax(1).amax(1) for exit_logits in logits], 1)


def allocate(confidence: Tensor, p: float) -> Tensor:
    """Which exit each sample leaves at: of N, exit k (from 1) gets ``floor(N p^k / sum_j p^j)``, the last one the rest.

    The exits choose in turn, shallow to deep, those samples of which they are surest.

    Args:
        confidence: (N, num_exits).

    Returns:
        (N,) int64, counted from 0.
    """
    num_samples, num_exits = confidence.shape
    shares = [p ** (index + 1) for index in range(num_exits)]
    exits = torch.full((num_samples,), num_exits - 1, device=confidence.device)
    is_left = torch.ones(num_samples, dtype=torch.bool, device=confidence.device)
    for index, share in enumerate(shares[:-1]):
        count = int(num_samples * share / sum(shares))
        chosen = confidence[:, index].masked_fill(~is_left, -1.0).topk(count).indices
        exits[chosen], is_left[chosen] = index, False
    return exits


def create_wpn(model: MultiExitModel, config: WPNConfig | None = None) -> WPN:
    """The method for `model`, in a form whose gradients have gradients."""
    check_shares("wpn", model)
    if model.num_classes == 1:
        raise ValueError("method: expected joint for a regression, got wpn, which goes by how likely classes are.")
    if model.variant == "dfs":
        raise ValueError(
            "model.variant: expected dense, detach or split with method=wpn, got dfs: the weights are learned by a "
            "gradient of gradients, which this engine's backward does not have. Use --model.variant detach, the same "
            "gradients by stock autograd."
        )
    return WPN(model.num_exits, config, next(model.parameters()).dtype)
