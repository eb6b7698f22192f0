"""Optional packages: pyproject's extras, and what is said where one is missing."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dfs_engine
from dfs_engine.runtime.extras import EXTRAS, explained, needs

ROOT = Path(__file__).parents[2]
# distribution -> module, where they differ
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
CORE = {"torch", "numpy", "triton", "dfs_engine"}


def declared() -> dict[str, set[str]]:
    """extra -> modules, as pyproject.toml has them (Python 3.10 has no reader of TOML)."""
    text = (
        (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    )
    found = {}
    for extra, block in re.findall(r"^(\w+) = (\[.*?\])$", text, re.MULTILINE | re.DOTALL):
        names = [re.match(r"[\w-]+", requirement)[0] for requirement in ast.literal_eval(block)]
        found[extra] = {MODULES.get(name, name) for name in names}
    return found


def test_extras_are_those_of_the_project():
    extras = declared()
    for extra, modules in EXTRAS.items():
        assert set(modules) == extras[extra]
    assert extras.keys() == EXTRAS.keys() | {"all", "triton", "docs", "dev"}


def test_every_import_is_of_the_core_or_of_an_extra():
    known = CORE | {module for modules in EXTRAS.values() for module in modules}
    for folder in ("dfs_engine", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                unknown = {name.split(".")[0] for name in names} - known - set(sys.stdlib_module_names)
                assert not unknown, f"{path} imports {unknown}, which no extra brings"


def test_a_missing_package_is_named_with_its_extra():
    message = r"package timm, .* `pip install 'dfs_engine\[vision\]'`"
    with pytest.raises(ModuleNotFoundError, match=message) as raised, needs("vision"):
        raise ModuleNotFoundError("No module named 'timm'", name="timm.layers")
    assert raised.value.name == "timm"
    assert explained(raised.value) == str(raised.value)


def test_a_missing_module_that_no_extra_brings_passes_as_it_is():
    error = ModuleNotFoundError("No module named 'nosuch'", name="nosuch")
    with pytest.raises(ModuleNotFoundError) as raised, needs("vision"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        ("rich.table", "`pip install 'dfs_engine[train]'`"),
        ("datasets", "`pip install 'dfs_engine[text]'`"),
        ("nosuch", "`pip install nosuch`"),
    ],
)
def test_the_command_explains_any_missing_module(module, remedy):
    assert remedy in explained(ModuleNotFoundError(f"No module named {module!r}", name=module))


def command_without(names: list[str], *line: str) -> subprocess.CompletedProcess:
    """`dfs line...` in a process where `names` cannot be imported."""
    argv = ["dfs", *line]
    return run_without(names, f"from dfs_engine.__main__ import main; sys.argv = {argv!r}; sys.exit(main())")


def run_without(names: list[str], code: str) -> subprocess.CompletedProcess:
    """Runs code in a process where `names` cannot be imported."""
    blocked = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(dfs_engine.__file__).parents[1])}
    command = [sys.executable, "-c", blocked + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_of_a_plain_install_says_what_it_needs():
    optional = sorted({module for modules in EXTRAS.values() for module in modules})
    done = command_without(optional, "doctor")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("dfs: error: ")
    assert "pip install 'dfs_engine[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_digits_needs_the_extra_train_alone(tmp_path):
    others = [
        "torchvision",
        "timm",
        "transformers",
        "datasets",
        "pyarrow",
    ]  # scipy and PIL come with sklearn, matplotlib
    sizes = ["--epochs", "1", "--optim.warmup_epochs", "0", "--data.max_train", "100", "--model.options", "{width: 4}"]
    folder = str(tmp_path / "run")
    done = command_without(others, "train", "--config", "digits_vgg7_dfs", "--run_dir", folder, *sizes)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_models_of_other_libraries_name_their_extra():
    code = """
import dfs_engine
for name in ("vit_tiny_patch16_224", "bert"):
    try:
        dfs_engine.create_model(name)
    except (ValueError, ModuleNotFoundError) as error:
        print(error)
"""
    done = run_without(["timm", "transformers"], code)
    vit, bert = done.stdout.strip().splitlines()
    assert "dfs_engine[vision]" in vit
    assert "dfs_engine[text]" in bert
