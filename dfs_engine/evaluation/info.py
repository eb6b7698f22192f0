"""`dfs info`: what each exit of a model costs, and what a training step costs in each variant."""

from dataclasses import asdict, dataclass, field
from typing import Any

from dfs_engine.checks import check_numbers, split_betas
from dfs_engine.evaluation.flops import FlopCount, count_flops
from dfs_engine.evaluation.operations import ExitCost, count_operations
from dfs_engine.models import VARIANTS, MultiExitModel, create_model


@dataclass(frozen=True, kw_only=True, slots=True)
class InfoConfig:
    """What `dfs info` counts.

    Attributes:
        model: A model's name, as of `dfs train --model.name`.
        num_classes: Width of every exit's logits.
        beta: Shares of each feature's channels that the deeper layers train, comma-separated.
        reference: Each side also reads the other's channels, without sending gradient.
        exit_gradient: own (the exit trains its channels only) or whole (all of them). Default: the family's.
        batch_size: Of the training step.
        options: The family's own options, for example {growth: 6} of an MSDNet.
        device: meta (nothing is computed) or cpu (for a model that looks at values).
    """

    model: str
    num_classes: int = 10
    beta: str = "0.1,0.3,0.5,0.7,0.9"
    reference: bool = True
    exit_gradient: str | None = None
    batch_size: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "meta"

    def __post_init__(self) -> None:
        split_betas("beta", self.beta)
        check_numbers(self, "", {">= 1": ("batch_size",)})

    def build(self, variant: str, beta: float = 0.5) -> MultiExitModel:
        """The model in evaluation mode: a batch norm in training refuses a batch of one."""
        return create_model(
            self.model,
            num_classes=self.num_classes,
            variant=variant,
            beta=beta,
            reference=self.reference,
            exit_gradient=self.exit_gradient,
            device=self.device,
            **self.options,
        ).eval()


@dataclass(frozen=True, slots=True)
class Training:
    """FLOPs of one training step; `beta` is None for dense, which splits nothing."""

    variant: str
    beta: float | None
    flops: FlopCount


@dataclass(frozen=True, slots=True)
class InfoReport:
    """What `run` counted."""

    config: InfoConfig
    exits: list[ExitCost]
    training: list[Training]

    def to_json(self) -> dict[str, Any]:
        """JSON-able: operations count a multiply-add as one, FLOPs as two."""
        return {
            **asdict(self.config),
            "exits": [asdict(cost) for cost in self.exits],
            "training": [
                {"variant": row.variant, "beta": row.beta, "forward": row.flops.forward, "backward": row.flops.backward}
                for row in self.training
            ],
        }

    def exit_table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows, in millions."""
        headings = ["exit", "parameters", "operations", "parameters alone", "operations alone"]
        rows = [[str(index), *_millions(*asdict(cost).values())] for index, cost in enumerate(self.exits, start=1)]
        return headings, rows

    def training_table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows, in millions and relative to the first row."""
        headings = ["variant", "beta", "forward", "backward", "backward vs dense"]
        dense = self.training[0].flops.backward
        rows = [
            [
                row.variant,
                "" if row.beta is None else f"{row.beta:g}",
                *_millions(row.flops.forward, row.flops.backward),
                f"{row.flops.backward / dense:.3f}",
            ]
            for row in self.training
        ]
        return headings, rows


def _millions(*counts: int) -> list[str]:
    return [f"{count / 1e6:.2f}" for count in counts]


def run(config: InfoConfig) -> InfoReport:
    """Builds the model in every variant and counts.

    Raises:
        ValueError, TypeError: what `create_model` refuses. NotImplementedError: an operator that nobody has counted.
    """
    dense, *split = VARIANTS
    model = config.build(dense)
    training = [Training(dense, None, count_flops(model, model.example_input(config.batch_size)))]
    for variant in split:
        for beta in split_betas("beta", config.beta):
            model = config.build(variant, beta)
            training.append(Training(variant, beta, count_flops(model, model.example_input(config.batch_size))))
    return InfoReport(config, count_operations(config.build(dense)), training)
