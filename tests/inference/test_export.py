"""Exported graphs, whole and in stages, against the models that they were made of."""

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfs_engine import attach_exits, cli, create_model
from dfs_engine.inference import EarlyExit, ExportedModel, MaxProbability, Patience, export_model, simulate
from dfs_engine.inference.graph import check_aten
from dfs_engine.models import MultiExitModel
from dfs_engine.models.weights import save_model

BERT = {
    "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 12, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "vgg7_64": {"width": 4},
    "resnet18": {"width": 4},
    "msdnet_cifar_lin_grow": {"num_exits": 3, "channels": 4, "growth": 4, "num_scales": 3, "head_width": 16},
    "vit_tiny_patch16_224": {
        "img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 18, "num_heads": 3, "start_block": 1
    },
    "bert": {"config": BERT},
    "attached": {},
}  # fmt: skip
NEEDS = {"vit_tiny_patch16_224": "timm", "bert": "transformers"}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
NUM_CLASSES = 5
MARGIN = 1e-5
"""How far from its threshold a probability has to be for rounding not to change who leaves."""


class Backbone(nn.Module):
    """The exit at `branch` lies inside a residual sum, so that two tensors pass it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.second, self.last = nn.Conv2d(6, 8, 3, stride=2), nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images).tanh()
        return self.last(self.second(first + self.branch(first)).tanh().mean((2, 3)))


def make_model(family: str, **options: Any) -> MultiExitModel:
    """With normalisations that do something, and logits that tell samples apart."""
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    if family == "attached":
        model: Any = attach_exits(Backbone(), ["first", "branch"], example_input=torch.zeros(1, 3, 16, 16), **options)
    else:
        model = create_model(family, num_classes=NUM_CLASSES, **FAMILIES[family], **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.input_shape = model.input_shape if family == "bert" else (3, 16, 16)
    model.eval()
    if family == "attached":
        return model
    with torch.no_grad():  # random classifiers say nearly the same of all samples
        for logits, exit in zip(all_logits(model, batch(family, 32)), model.exits, strict=True):
            *_, last = (module for module in exit.modules() if isinstance(module, nn.Linear))
            if last.bias is not None:
                scale = min(1 / logits.std(0).mean(), 100)
                last.weight.mul_(scale)
                last.bias.sub_(logits.mean(0)).mul_(scale)
    return model


def batch(family: str, num_samples: int, num_tokens: int = 9) -> dict[str, Tensor]:
    if family != "bert":
        # Of different colours and contrasts, which logits of random weights tell apart.
        contrast, colour = 4 * torch.rand(num_samples, 1, 1, 1), 3 * torch.randn(num_samples, 3, 1, 1)
        return {"input": contrast * torch.randn(num_samples, 3, 16, 16) + colour}
    lengths = torch.randint(min(2, num_tokens), num_tokens + 1, (num_samples, 1))
    return {
        "input_ids": torch.randint(BERT["vocab_size"], (num_samples, num_tokens)),
        "attention_mask": (torch.arange(num_tokens) < lengths).long(),
    }


def all_logits(model: Any, input: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return model(**input)


def of_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(family, format, staged) -> the model and the folder that it was exported to, once for all tests."""

    @functools.cache
    def make(family: str, format: str, staged: bool) -> Any:
        if format == "onnx":
            of_onnx()
        model, folder = make_model(family), tmp_path_factory.mktemp("export") / "model"
        about = {"class_names": list("abcde"), "tokenizer": None}
        export_model(model, folder, format=format, staged=staged, about=about)
        return model, folder

    return make


def halves(logits: list[Tensor]) -> MaxProbability:
    """At every exit about half of those who come would leave; where probabilities are crowded, between two of them."""
    values = [each.softmax(-1).amax(-1).sort().values for each in logits[:-1]]
    return MaxProbability([float(value[len(value) // 2 - 1 : len(value) // 2 + 1].mean()) for value in values])


def assert_same_routing(found: Any, expected: Any, policy: Any, logits: list[Tensor]) -> None:
    clear = torch.ones(len(expected.exits), dtype=torch.bool)
    for index, each in enumerate(logits):
        two = each.topk(2).values
        is_far = two[:, 0] - two[:, 1] > MARGIN
        if isinstance(policy, MaxProbability) and index < len(logits) - 1:
            is_far &= (each.softmax(-1).amax(-1) - policy.threshold[index]).abs() > MARGIN
        clear &= is_far | (expected.exits < index)
    assert (~clear).sum() <= 1 + 0.1 * len(clear)
    for name in ("exits", "classes"):
        torch.testing.assert_close(getattr(found, name)[clear], getattr(expected, name)[clear], rtol=0, atol=0)
    torch.testing.assert_close(found.logits[clear], expected.logits[clear], rtol=1e-4, atol=1e-4)


@FAMILY
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_whole_graph_has_the_logits_of_all_exits(family, format, exported):
    model, folder = exported(family, format, False)
    runs = ExportedModel(folder)
    assert runs.num_exits == model.num_exits
    for num_samples in (1, 7, 0):
        input = batch(family, num_samples)
        expected, found = all_logits(model, input), runs(**input)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not any(logits.requires_grad for logits in found)


# Graphs of many operators take 15 seconds and more to be cut, checked and loaded.
LARGE = ("resnet18", "msdnet_cifar_lin_grow", "vit_tiny_patch16_224")
STAGED = [
    pytest.param(
        family, format, marks=[pytest.mark.slow] * (family in LARGE and (family, format) != (LARGE[-1], "torch"))
    )
    for family in FAMILIES
    for format in ("torch", "onnx")
]


@pytest.mark.parametrize(("family", "format"), STAGED)
def test_stages_stop_early_as_the_model_does(family, format, exported):
    model, folder = exported(family, format, True)
    runs = ExportedModel(folder)
    input = batch(family, 60)
    logits = all_logits(model, input)
    torch.testing.assert_close(runs(**input), logits, rtol=1e-4, atol=1e-5)
    for policy in (halves(logits), Patience(2)):
        found, expected = EarlyExit(runs, policy)(**input), EarlyExit(model, policy)(**input)
        assert_same_routing(found, expected, policy, logits)
    assert len(simulate(logits, halves(logits)).exits.unique()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "attached"])
def test_a_thousand_samples_by_onnxruntime(family, exported):
    model, folder = exported(family, "onnx", True)
    runs = ExportedModel(folder)
    input = batch(family, 1000)
    logits = all_logits(model, input)
    for policy in (halves(logits), Patience(2)):
        found, expected = EarlyExit(runs, policy)(**input), EarlyExit(model, policy)(**input)
        assert_same_routing(found, expected, policy, logits)


def test_a_stage_sees_undecided_samples_only(exported):
    model, folder = exported("vgg7_64", "torch", True)
    runs, input, seen = ExportedModel(folder), batch("vgg7_64", 40), []
    runs._runs = [lambda given, run=run: seen.append(len(given[0])) or run(given) for run in runs._runs]
    taken = EarlyExit(runs, halves(all_logits(model, input)))(**input).exits
    assert seen == [int((taken >= index).sum()) for index in range(len(seen))]
    assert seen[0] == 40 > seen[1] > 0
    EarlyExit(runs, MaxProbability(0.0))(**input)
    assert len(seen) == 1 + len(seen[:-1])
    assert seen[-1] == 40


def test_sentences_of_any_length_and_inputs_left_out(exported):
    model, folder = exported("bert", "torch", False)
    runs = ExportedModel(folder)
    for num_tokens in (1, 4, 12):
        input = batch("bert", 5, num_tokens)
        torch.testing.assert_close(runs(**input), all_logits(model, input), rtol=1e-4, atol=1e-5)
    ids = input["input_ids"]
    torch.testing.assert_close(runs(ids.numpy()), all_logits(model, {"input_ids": ids}), rtol=1e-4, atol=1e-5)
    types = torch.randint(2, ids.shape)
    both = {**input, "token_type_ids": types}
    torch.testing.assert_close(runs(**both), all_logits(model, both), rtol=1e-4, atol=1e-5)


def test_the_description_says_what_it_takes_to_run(exported):
    _, folder = exported("bert", "torch", False)
    description = json.loads((folder / "export.json").read_text())
    assert description["inputs"]["attention_mask"] == {"dtype": "int64", "shape": ["batch", "tokens"], "default": 1}
    assert description["graphs"] == [
        {"file": "model.pt2", "inputs": ["input_ids", "attention_mask", "token_type_ids"],
         "outputs": ["logits_1", "logits_2", "logits_3"]}
    ]  # fmt: skip
    assert (description["num_exits"], description["num_classes"], description["max_tokens"]) == (3, NUM_CLASSES, 12)
    assert description["class_names"] == list("abcde")
    extra = {"export.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    assert json.loads(extra["export.json"]) == description


def test_onnx_files_have_names_and_the_description(exported):
    _, folder = exported("msdnet_cifar_lin_grow", "onnx", True)
    import onnx

    file = onnx.load(folder / "stage_1.onnx")
    (input,) = file.graph.input
    assert input.name == "input"
    assert input.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert file.graph.output[0].name == "logits"
    (entry,) = file.metadata_props
    assert json.loads(entry.value)["graphs"][0]["outputs"] == [output.name for output in file.graph.output]
    assert all(not node.domain for node in file.graph.node)


# In a process in which neither this package nor Triton can be imported.
LOADS = """
import importlib.abc, json, pathlib, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dfs_engine", "triton"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocker())
import torch
folder = pathlib.Path(sys.argv[1])
about = json.loads((folder / "export.json").read_text())
values, logits = torch.load(folder.parent / "input.pt"), []
for graph in about["graphs"]:
    given = [values[name] for name in graph["inputs"]]
    if about["format"] == "torch":
        with torch.no_grad():
            made = torch.export.load(folder / graph["file"]).module()(*given)
    else:
        import onnxruntime
        session = onnxruntime.InferenceSession(folder / graph["file"])
        made = session.run(None, dict(zip(graph["inputs"], (value.numpy() for value in given))))
        made = [torch.from_numpy(value) for value in made]
    values.update(zip(graph["outputs"], made))
    logits += [value for name, value in zip(graph["outputs"], made) if name.startswith("logits")]
assert "dfs_engine" not in sys.modules
torch.save(logits, folder.parent / "logits.pt")
"""


@FAMILY
@pytest.mark.parametrize(("format", "staged"), [("torch", False), ("torch", True), ("onnx", True)])
def test_files_load_where_this_package_cannot_be_imported(family, format, staged, exported):
    model, folder = exported(family, format, staged)
    input = batch(family, 6)
    if family == "bert":
        input["token_type_ids"] = torch.zeros_like(input["input_ids"])
    torch.save(input, folder.parent / "input.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LOADS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=environment)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder.parent / "logits.pt")
    torch.testing.assert_close(found, all_logits(model, input), rtol=1e-4, atol=1e-5)


@FAMILY
@pytest.mark.parametrize("options", [{}, {"reference": False}, {"variant": "split"}, {"variant": "detach"}], ids=str)
def test_torch_export_of_a_model_itself_has_aten_operators_alone(family, options):
    """As users call it, without `export_model`: with gradients on, and whatever backend is asked for."""
    model = make_model(family, backend="reference", **options)
    input = batch(family, 3)
    dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in input}
    program = torch.export.export(model, (), input, dynamic_shapes=dynamic).run_decompositions({})
    check_aten(program)
    assert all(node.op != "call_module" for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(**input), all_logits(model, input), rtol=1e-4, atol=1e-5)


def test_a_default_model_exports_as_its_dense_copy_does():
    """No concatenation, no slice, nothing computed twice: what the split adds is for gradients."""
    model = make_model("vgg7_64")
    targets = [
        [str(node.target) for node in torch.export.export(each, (torch.randn(2, 3, 16, 16),)).graph.nodes
         if node.op == "call_function"]
        for each in (model, model.to_variant("dense"))
    ]  # fmt: skip
    assert [name.replace("relu_", "relu") for name in targets[0]] == [
        name.replace("relu_", "relu") for name in targets[1]
    ]


def test_no_export_in_training_mode():
    model = make_model("vgg7_64")
    with pytest.raises(RuntimeError, match=r"evaluation mode, got one of variant='dfs' in training mode"):
        torch.export.export(model.train(), (torch.randn(2, 3, 16, 16),))
    with pytest.raises(ValueError, match=r"expected one in evaluation mode, got the model in training mode.*eval\(\)"):
        export_model(model, "nowhere")


def test_check_aten_names_what_is_none():
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.dfs_engine.linear(x, x, None)

    with pytest.raises(ValueError, match=r"ATen operators alone.*got dfs_engine\.linear\.default"):
        check_aten(torch.export.export(Sorts(), (torch.randn(3, 3),)))


class LooksAtValues(Backbone):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > 0 else -images)


class MixesSamples(Backbone):
    """Behind its first exit nothing has a row for each sample."""

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images).tanh()
        pixels = first.movedim(1, -1).flatten(0, 2).tanh()
        second = self.branch(pixels.unflatten(0, (-1, 16, 16)).movedim(-1, 1))
        return self.last(self.second(second).mean((2, 3)) + pixels.unflatten(0, (-1, 256)).mean((1, 2))[:, None])


def test_backbones_that_cannot_be_traced_or_cut(tmp_path):
    example = torch.zeros(1, 3, 16, 16)
    model = attach_exits(LooksAtValues(), ["first"], example_input=example).eval()
    with pytest.raises(ValueError, match=r"export: expected the model to be one that torch\.export can trace, got "):
        export_model(model, tmp_path / "a")
    model = attach_exits(MixesSamples(), ["branch"], example_input=example).eval()
    export_model(model, tmp_path / "b")
    with pytest.raises(ValueError, match=r"staged: expected what passes behind exit 1 to have a row for each sample"):
        export_model(model, tmp_path / "c", staged=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_wrong_arguments(tmp_path):
    model = make_model("vgg7_64")
    with pytest.raises(ValueError, match=r"format: expected one of torch, onnx, got 'onxn'\. Did you mean 'onnx'"):
        export_model(model, tmp_path, format="onxn")
    with pytest.raises(TypeError, match=r"expected a MultiExitModel, got Linear"):
        export_model(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=r"example_input: expected a batch of 2 samples or more"):
        export_model(model, tmp_path / "a", example_input=torch.randn(1, 3, 16, 16))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"where something else is\. Give another --output"):
        export_model(model, tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"


def test_bfloat16_is_nothing_for_onnx(tmp_path):
    of_onnx()
    with pytest.raises(ValueError, match=r"got bfloat16\. Call model\.float\(\) first"):
        export_model(make_model("vgg7_64").bfloat16(), tmp_path / "a", format="onnx")


def test_missing_packages_are_named_before_any_work(tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dfs_engine\[export\]'"):
        export_model(make_model("vgg7_64"), tmp_path / "a", format="onnx")
    assert not list(tmp_path.iterdir())


def test_running_needs_onnxruntime(exported, monkeypatch):
    _, folder = exported("vgg7_64", "onnx", False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"package onnxruntime, .* `pip install 'dfs_engine\[export\]'`"):
        ExportedModel(folder)


def test_what_an_exported_model_refuses(exported, tmp_path):
    _, folder = exported("vgg7_64", "torch", False)
    runs = ExportedModel(folder)
    with pytest.raises(ValueError, match=r"on_exit: expected a model exported in stages"):
        EarlyExit(runs, MaxProbability(0.5))(torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"input: expected shape \(batch, 3, 16, 16\).*got \(2, 3, 8, 8\)"):
        runs(torch.randn(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"input: expected input, got images"):
        runs(images=torch.randn(2, 3, 16, 16))
    with pytest.raises(FileNotFoundError, match=r"dfs export.*export\.json"):
        ExportedModel(tmp_path)


def test_the_command(tmp_path, capsys):
    model = make_model("vgg7_64")
    model.input_shape = (3, 32, 32)
    data = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    save_model(model, tmp_path, {"data": data, "class_names": list("abcde")})
    assert cli.main(["export", str(tmp_path), "--staged", "--json", str(tmp_path / "said.json")]) == 0
    assert "stage_6.pt2" in capsys.readouterr().out
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["largest_difference"] < 1e-4
    assert said["normalization"] == data
    runs, images = ExportedModel(tmp_path / "export_torch_staged"), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(runs(images), all_logits(model, {"input": images}), rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tmp_path), "--staged"])
    assert ended.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), "--staged", "--overwrite"]) == 0
