"""The optional packages, and which of the project's extras brings each.

Only torch and numpy are always there. What needs more imports it within `needs`, so that whoever lacks it is told what
to install.
"""

import contextlib
from collections.abc import Iterator

# extra -> top-level modules. pyproject.toml has the versions; tests/runtime/test_extras.py compares the two.
EXTRAS = {
    "vision": ("torchvision", "timm", "PIL", "pyarrow"),
    "text": ("transformers", "datasets", "pyarrow", "sklearn", "scipy"),
    "hub": ("huggingface_hub", "safetensors"),
    "train": (
        "accelerate", "filelock", "jsonargparse", "matplotlib", "yaml", "rich", "safetensors", "sklearn", "tensorboard",
        "torchmetrics", "tqdm",
    ),
    "methods": ("torchjd",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "bench": ("jsonargparse", "matplotlib", "yaml", "rich", "tqdm"),
}  # fmt: skip


def explained(error: ModuleNotFoundError) -> str:
    """The error's message, with the first extra that brings the module, or the module itself, as the remedy."""
    if "pip install" in str(error):  # it says so itself
        return str(error)
    name = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    return f"{error}. Run `pip install {name if extra is None else _quoted(extra)}`."


def _quoted(extra: str) -> str:
    return f"'dfs_engine[{extra}]'"  # in quotes: shells read brackets


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of optional packages: says which extra brings the one that is missing.

    Raises:
        ModuleNotFoundError: a module of `extra` is not installed; any other passes as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS[extra]:
            raise
        raise ModuleNotFoundError(
            f"expected the package {name}, which is not installed. Run `pip install {_quoted(extra)}`.", name=name
        ) from error
