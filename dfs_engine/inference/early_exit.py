"""A model that computes for each sample no more than its exit needs."""

import inspect
from typing import Any

import torch
from torch import Tensor

from dfs_engine.inference.policies import PolicyLike, State, check_policy, decide
from dfs_engine.inference.prediction import Prediction
from dfs_engine.models import MultiExitModel
from dfs_engine.models.multi_exit import evaluating
from dfs_engine.nn import select_rows


class EarlyExit:
    """Inference in which each sample leaves at the first exit where a policy says that it is done.

    Those who are done leave the batch, and the next block gets the others alone: its tensors, scales, tokens or masks
    with fewer rows. Where all are done, the deeper blocks do not run. Of a model that `attach_exits` made, samples
    leave where torch.fx shows that the backbone reads nothing but the exit's feature any more; at another exit all run
    on until the last one is done, which the log says.

    The model runs in eval mode and without gradient, under whatever autocast there is. Modules in training mode are put
    into eval mode for the call, and back. A model in eval mode is not written to, so threads may share it.

    Args:
        model: of any family; used, not copied.
        policy: `MaxProbability`, `Entropy`, `Patience`, or any callable (see `dfs_engine.inference.policies`).

    Raises:
        TypeError: no `MultiExitModel`, one whose own `forward` has no `on_exit`, or no policy. ValueError: a policy
            that does not fit the model.
    """

    def __init__(self, model: MultiExitModel, policy: PolicyLike) -> None:
        if not isinstance(model, MultiExitModel):
            inner = next((name for name in ("module", "_orig_mod") if hasattr(model, name)), None)
            remedy = f"Give what it wraps, model.{inner}." if inner else "attach_exits makes one of any backbone."
            raise TypeError(f"EarlyExit: expected a MultiExitModel, got model={type(model).__name__}. {remedy}")
        if "on_exit" not in inspect.signature(model.forward).parameters:
            raise TypeError(
                f"EarlyExit: expected {type(model).__name__}.forward to have on_exit, as MultiExitModel's has, got one "
                "without it. Take it there and hand it on to _run."
            )
        check_policy(policy, model.num_exits, model.num_classes)
        self.model, self.policy = model, policy

    def __call__(self, *input: Any, **named: Any) -> Prediction:
        """As `predict`."""
        return self.predict(*input, **named)

    @torch.no_grad()
    def predict(self, *input: Any, **named: Any) -> Prediction:
        """Runs a batch of any size, 0 too.

        Args:
            input, named: what the model is called with: images (N, C, H, W); of a BERT input_ids, attention_mask and
                token_type_ids, (N, T) each.

        Returns:
            What `simulate(model(*input, **named), policy)` does, up to rounding: a layer may sum in another order in a
            smaller batch.

        Raises:
            TypeError: the policy returns something else than (done, value).
        """
        routing = _Routing(self.policy, self.model.num_exits - 1)
        with evaluating(self.model):
            logits = self.model(*input, **named, on_exit=routing)
        return routing.join(logits)

    def __repr__(self) -> str:
        return f"EarlyExit({self.model.name or type(self.model).__name__}, {self.policy!r})"


class _Routing:
    """Asks the policy behind each exit of one forward pass, and notes who leaves."""

    def __init__(self, policy: PolicyLike, last: int) -> None:
        self.policy, self.last = policy, last
        self.state: State = {}
        self.samples: Tensor | None = None  # who is still there, by their rows in the batch; None: all
        self.left: list[tuple[Tensor, Tensor, Tensor]] = []
        """Of each exit, who left: their rows in the batch, their rows in the logits, the policy's values of them."""

    def __call__(self, index: int, logits: Tensor) -> Tensor | None:
        """See `MultiExitModel.forward`."""
        done, value = decide(self.policy, logits, index, self.state)
        if index == self.last:
            done = torch.ones_like(done)
        if self.samples is None:
            self.samples = torch.arange(len(logits), device=logits.device)
        leave, stay = done.nonzero().squeeze(1), (~done).nonzero().squeeze(1)
        self.left.append((self.samples[leave], leave, value[leave]))
        if len(leave) == 0 and len(stay) > 0:
            return None
        self.samples = self.samples[stay]
        for name, kept in self.state.items():
            self.state[name] = select_rows(kept, stay)
        return stay

    def join(self, logits: list[Tensor]) -> Prediction:
        """Args: what the model returned."""
        samples, rows, values = zip(*self.left, strict=True)
        order = torch.cat(samples).argsort()
        chosen = torch.cat([select_rows(each, those) for each, those in zip(logits, rows, strict=True)])[order]
        exits = torch.cat([torch.full_like(those, index) for index, those in enumerate(rows)])[order]
        return Prediction(chosen.argmax(-1), exits, torch.cat(values)[order], chosen)
