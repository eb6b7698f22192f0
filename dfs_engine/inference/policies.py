"""Who may leave at an exit. A policy is any callable

    (logits, exit_index, state) -> (done, value)

    logits      (n, num_classes), of the samples that are still there
    exit_index  from 0
    state       a dict, empty at the first exit, for what is to be known at the next one: of its tensors, which have a
                row for each sample, those who leave lose theirs
    done        bool (n,), who leaves; nobody asks at the last exit, where all do
    value       (n,), what the decision was made by

What it says of a sample may depend on that sample alone: which others are still there is chance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
PolicyLike: TypeAlias = Callable[[Tensor, int, State], tuple[Tensor, Tensor]]


class Policy:
    """A policy that knows what it can be used for; any other callable does as well."""

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def check(self, num_exits: int, num_classes: int) -> None:
        """Raises ValueError unless it can decide about logits (n, num_classes) of so many exits."""
        if num_classes < 2:
            raise ValueError(
                f"policy: expected logits of two or more classes for {self!r}, got num_classes={num_classes}. Give a "
                "callable of your own for a regression."
            )


@dataclass(frozen=True)
class _Threshold(Policy):
    """Decides by a number that it computes of the logits.

    Attributes:
        sign: 1: who has the threshold or more leaves; -1: who has the threshold or less.
        limits: between which a threshold can be.
    """

    threshold: float | Sequence[float]
    sign: ClassVar[int]
    limits: ClassVar[tuple[float, float]]

    def __post_init__(self) -> None:
        name, never, (lowest, highest) = type(self).__name__, self.sign * math.inf, self.limits
        is_one = isinstance(self.threshold, Real)
        try:
            thresholds = tuple(map(float, cast(Any, [self.threshold] if is_one else self.threshold)))
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}: expected threshold to be a number or a list of numbers, got {self.threshold!r}."
            ) from None
        for threshold in thresholds:
            if not (lowest <= threshold <= highest or threshold == never):
                raise ValueError(
                    f"{name}: expected {lowest:g} <= threshold <= {highest:g}, got threshold={threshold:g}. "
                    f"At {never:g} nobody leaves."
                )
        object.__setattr__(self, "threshold", thresholds[0] if is_one else thresholds)  # frozen, so hashable too

    def check(self, num_exits: int, num_classes: int) -> None:
        super().check(num_exits, num_classes)
        if isinstance(self.threshold, tuple) and len(self.threshold) != num_exits - 1:
            raise ValueError(
                f"{type(self).__name__}: expected one threshold for all exits, or {num_exits - 1}, one for each of "
                f"{num_exits} exits but the last, which always decides, got {len(self.threshold)}."
            )

    def value(self, logits: Tensor) -> Tensor:
        """(n, num_classes) -> (n,), in float32 or, of float64 logits, float64."""
        raise NotImplementedError

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, Tensor]:
        value = self.value(logits)
        if not isinstance(self.threshold, tuple):
            threshold: Any = self.threshold
        elif exit_index < len(self.threshold):
            threshold = self.threshold[exit_index]
        else:  # the last exit
            return torch.ones_like(value, dtype=torch.bool), value
        return value >= threshold if self.sign > 0 else value <= threshold, value


@dataclass(frozen=True)
class MaxProbability(_Threshold):
    """Who has a class of at least this probability leaves. A NaN never does.

    Equivalent to: ``logits.softmax(-1).amax(-1) >= threshold``.

    Args:
        threshold: in [0, 1], one for all exits or a list of one for each exit but the last; math.inf: nobody leaves.

    Raises:
        ValueError: a threshold out of its range. TypeError: something else than numbers.
    """

    sign = 1
    limits = (0.0, 1.0)

    def value(self, logits: Tensor) -> Tensor:
        """The largest probability."""
        return _at_least_float32(logits).softmax(-1).amax(-1)


@dataclass(frozen=True)
class Entropy(_Threshold):
    """Who has at most this entropy leaves, in nats: from 0, certain, to log(num_classes). A NaN never does.

    Equivalent to: ``torch.distributions.Categorical(logits=logits).entropy() <= threshold``.

    Args:
        threshold: 0 or more, one for all exits or a list of one for each exit but the last; -math.inf: nobody leaves.

    Raises:
        ValueError: a threshold out of its range. TypeError: something else than numbers.
    """

    sign = -1
    limits = (0.0, math.inf)

    def value(self, logits: Tensor) -> Tensor:
        """The entropy."""
        return torch.special.entr(_at_least_float32(logits).softmax(-1)).sum(-1)


@dataclass(frozen=True)
class Patience(Policy):
    """Who has got the same class from `num_equal` exits in a row leaves (PABEE, Zhou et al., NeurIPS 2020).

    PABEE counts agreements between neighbours: its patience is `num_equal - 1`.

    Args:
        num_equal: 1 or more; 1: all leave at the first exit.

    Raises:
        ValueError: less than 1. TypeError: no integer.
    """

    num_equal: int

    def __post_init__(self) -> None:
        if isinstance(self.num_equal, bool) or not isinstance(self.num_equal, int):
            raise TypeError(f"Patience: expected num_equal to be an integer, got {self.num_equal!r}.")
        if self.num_equal < 1:
            raise ValueError(f"Patience: expected num_equal >= 1, got num_equal={self.num_equal}.")

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, Tensor]:
        classes = logits.argmax(-1)
        count = torch.ones_like(classes)
        if "classes" in state:
            count += torch.where(classes == state["classes"], state["count"], 0)
        state.update(classes=classes, count=count)
        return count >= self.num_equal, count


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_policy(policy: Any, num_exits: int, num_classes: int) -> None:
    """That something is a policy, and fits.

    Raises:
        TypeError: it is none. ValueError: it does not fit.
    """
    if isinstance(policy, type) or not callable(policy):
        is_class = isinstance(policy, type)
        remedy = f"Write {policy.__name__}(...)." if is_class else "MaxProbability(0.9) is one."
        raise TypeError(
            f"policy: expected a callable (logits, exit_index, state) -> (done, value), got {policy!r}. {remedy}"
        )
    if isinstance(policy, Policy):
        policy.check(num_exits, num_classes)


def decide(policy: PolicyLike, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, Tensor]:
    """Calls a policy and looks at what it returns.

    Raises:
        TypeError: it is not (done, value) of the documented shapes and dtypes.
    """
    result: Any = policy(logits, exit_index, state)
    shape = tuple(logits.shape[:1])
    parts = result if isinstance(result, tuple) else (result,)
    found = [f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part) for part in parts]
    if len(parts) != 2 or found[0] != f"torch.bool {shape}" or not found[1].endswith(f" {shape}"):
        raise TypeError(
            f"policy: expected (done, value), a bool tensor {shape} and a tensor of numbers {shape}, got "
            f"({', '.join(found)}) at exit {exit_index}."
        )
    return result
