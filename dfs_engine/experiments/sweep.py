"""`dfs sweep beta`: accuracy of every exit against beta, as a comparison whose rows are betas."""

from dataclasses import dataclass

from dfs_engine.checks import split_betas
from dfs_engine.experiments.compare import ComparisonConfig, compare
from dfs_engine.experiments.report import Report
from dfs_engine.experiments.rows import Row
from dfs_engine.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class SweepBetaConfig(ComparisonConfig):
    """Which betas the recipe is run with."""

    betas: str = "0.1,0.3,0.5,0.7,0.9"
    """Shares of each feature's channels that the deeper layers train, comma-separated."""
    dense: bool = True
    """Run the recipe without surgery too, to compare with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        split_betas("betas", self.betas)

    def rows(self, recipe: TrainConfig) -> list[Row]:
        """Raises ValueError for a recipe that splits nothing."""
        variant = recipe.model.variant
        if variant == "dense":
            raise ValueError(
                "model.variant: expected one that splits features, got dense, which has no beta. Add --model.variant "
                "dfs."
            )
        rows = [Row("dense", {"model.variant": "dense"})] if self.dense else []
        return rows + [
            Row(f"{variant}-beta{beta:g}", {"model.beta": beta}) for beta in split_betas("betas", self.betas)
        ]


def run(config: SweepBetaConfig, recipe: TrainConfig) -> Report:
    """Trains what is missing, and draws accuracy_beta.png; see `compare.run`."""
    return compare(config.rows(recipe), recipe, config)
