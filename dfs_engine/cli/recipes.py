"""The recipes that come with the package: `configs/` of the checkout, `dfs_engine/configs` of an install."""

from importlib.resources import files
from pathlib import Path

from dfs_engine.checks import check_choice


def list_recipes() -> list[str]:
    """Names that `--config` takes without a path."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(name_or_path: str) -> Path:
    """The file that `--config` means: one on disk, or the recipe of that name.

    Raises:
        ValueError: neither; the message names the nearest recipe, or says where they are listed.
    """
    given = Path(name_or_path).expanduser()
    if given.is_file():
        return given
    if given.suffix in (".yaml", ".yml") or given.parent != Path("."):
        raise ValueError(
            f"config: expected a file, or a recipe's name without a path, got {name_or_path} (nothing there). "
            "`dfs train --help` lists the recipes."
        )
    return _folder() / f"{check_choice('config', name_or_path, list_recipes())}.yaml"


def _folder() -> Path:
    return Path(str(files("dfs_engine.configs").joinpath("digits_vgg7_dfs.yaml"))).parent
