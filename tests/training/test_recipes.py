"""The recipes in `configs/` are what `dfs train` reads."""

from pathlib import Path

import pytest

from dfs_engine.cli_parser import Parser
from dfs_engine.training.config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_is_a_valid_config(path):
    parser = Parser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig)
    values = parser.instantiate(parser.parse_args(["--config", str(path)]))
    del values["config"]
    config = TrainConfig(**vars(values))
    assert config.data.name == "image_folder" or config.data.name in path.stem
