"""Routing on the logits of all exits: what early exit would have predicted, without a model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfs_engine.inference.policies import PolicyLike, State, check_policy, decide
from dfs_engine.inference.prediction import Prediction


def check_logits(logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """As a list, if it is one tensor (N, num_classes) for each exit.

    Raises:
        ValueError: it is not.
    """
    exits = list(logits)
    shapes = [tuple(each.shape) for each in exits]
    if not shapes or len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(
            f"logits: expected one tensor (N, num_classes) for each exit, all of one shape, got the shapes {shapes}. "
            "They are what a model returns in evaluation mode, its batches joined exit by exit."
        )
    return exits


@torch.no_grad()
def simulate(logits: Sequence[Tensor] | Tensor, policy: PolicyLike) -> Prediction:
    """What `EarlyExit` predicts where the exits' logits are these.

    Equivalent to: for each sample, the first exit at which the policy says that it is done, the last one otherwise.

    Args:
        logits: of every exit, shallow to deep: num_exits tensors (N, num_classes), or one (num_exits, N, num_classes).
        policy: see `dfs_engine.inference.policies`; it is asked about all samples at every exit.

    Raises:
        ValueError: logits of other shapes, or a policy that does not fit them. TypeError: no policy, or one that
            returns something else.
    """
    exits = check_logits(logits)
    check_policy(policy, len(exits), exits[0].size(1))
    state: State = {}
    done, values = zip(*(decide(policy, each, index, state) for index, each in enumerate(exits)), strict=True)
    taken = torch.stack(done).int()
    taken[-1] = 1
    first = taken.argmax(0)  # of equal ones argmax gives the first
    samples = torch.arange(len(first), device=first.device)
    chosen = torch.stack(exits)[first, samples]
    return Prediction(chosen.argmax(-1), first, torch.stack(values)[first, samples], chosen)
