"""What an import needs, and which way imports point (CONTRIBUTING.md, "Layers")."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfs_engine
from dfs_engine.runtime import backend as backends

PACKAGE = Path(dfs_engine.__file__).parent
ROOT = Path(__file__).parents[1]

# Lower layers first. A module imports its own layer and those below it.
LAYERS = (
    {"kernels", "checks", "reference", "partition", "_checkout"},
    {"runtime"},
    {"ops"},
    {"nn"},
    {"models"},
    {"gradients"},
    {"methods", "data", "evaluation", "validate"},
    {"training", "inference"},
    {"benchmarks"},
    {"experiments"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_modules(path: Path) -> set[str]:
    """Absolute names that a file imports anywhere in it; `from package import name` counts as package.name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(part: str) -> list[Path]:
    folder = ROOT / part if part in ("kernels", "benchmarks") else PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_room_has_a_layer():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms | {"kernels", "benchmarks"} == LEVEL.keys() | {"__init__"}


@pytest.mark.parametrize("part", sorted(LEVEL))
def test_imports_point_one_way(part):
    for path in files_of(part):
        used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("dfs_engine.")}
        above = {name for name in used if LEVEL.get(name, -1) > LEVEL[part]}
        assert not above, f"{path} imports {above}"
        assert part != "models" or "kernels" not in used, f"{path}: models never import kernels"


def test_no_modules_import_each_other():
    modules = {}
    for path in (path for part in LEVEL for path in files_of(part)):
        root = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
        name = ".".join(("dfs_engine", *path.relative_to(root).with_suffix("").parts))
        modules[name.removesuffix(".__init__")] = path
    graph = {}
    for name, path in modules.items():
        # `from package import name` is of the module package.name where that is one, else of package.
        used = {each if each in modules else each.rpartition(".")[0] for each in imported_modules(path)}
        graph[name] = (used & modules.keys()) - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_reference_imports_only_torch():
    (path,) = files_of("reference")
    assert {name.split(".")[0] for name in imported_modules(path)} == {"torch", "typing"}


def run(code: str, **environment: str) -> str:
    """Runs code from the repository root, where the folder `kernels/` lies in the way of a package of that name."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_bert_runs_beside_the_kernels_folder():
    pytest.importorskip("transformers")
    code = """
import torch
from transformers import BertConfig, BertModel
sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
print(tuple(BertModel(BertConfig(**sizes))(torch.tensor([[1, 2, 3]])).last_hidden_state.shape))
import dfs_engine
"""
    assert run(code, HF_HUB_OFFLINE="1").strip() == "(1, 3, 8)"


BLOCKED = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    names = {"torchvision", "timm", "transformers", "accelerate", "jsonargparse", "safetensors", "sklearn",
             "pyarrow", "PIL", "matplotlib", "tensorboard", "tqdm", "rich", "yaml"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocker())
sys.modules["triton"] = None  # as it looks to those who ask whether it is there
import torch
import dfs_engine
from dfs_engine import ops, reference, nn
from dfs_engine.runtime import backend
from dfs_engine.validate import tolerances
from dfs_engine.runtime import doctor
model = dfs_engine.create_model("vgg7_64", width=4)
sum(logits.sum() for logits in model(torch.randn(2, 3, 8, 8))).backward()
print(backend.last_used("partitioned_linear"))
"""


def test_import_and_training_step_need_only_torch_and_numpy():
    assert run(BLOCKED, DFS_BACKEND="aten").strip() == "aten"


def test_without_the_extension_everything_runs_and_says_so():
    code = """
import sys
sys.modules["dfs_engine._C"] = None
import torch
from dfs_engine import ops
from dfs_engine.runtime import backend
ops.partitioned_linear(torch.ones(2, 4), torch.ones(3, 4), start=0, stop=2)
print(backend.last_used("partitioned_linear"), "|", backend.unavailable_reason("cpp"))
"""
    used, reason = run(code, DFS_BACKEND="").strip().split(" | ")
    assert used == "aten"
    assert "the C++ extension dfs_engine._C is not built for this torch" in reason
    assert "pip install" in reason


def test_kernels_use_more_than_one_thread():
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    from dfs_engine import _C

    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        assert _C.num_parallel_threads() == num_threads
