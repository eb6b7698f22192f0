"""Models as files that run without this package: `torch.export` and ONNX, whole or cut behind each exit."""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from dfs_engine.checks import check_choice
from dfs_engine.inference.exported import DESCRIPTION_FILE, ExportedModel
from dfs_engine.inference.graph import Graph, cut, trace
from dfs_engine.models import MultiExitModel
from dfs_engine.models.multi_exit import run_model
from dfs_engine.runtime.extras import needs
from dfs_engine.runtime.progress_bar import progress_bar

FORMATS = {"torch": "pt2", "onnx": "onnx"}
"""Format -> how its files end."""
_METADATA_KEY = "dfs_engine"
# By how much a graph's logits may differ from the model's, relative to the largest: another runtime sums in another
# order, and in half precision rounds between operators that PyTorch fuses.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which saved weights to export, and how."""

    path: Path
    """A run folder, or the model.safetensors of one."""
    output: Path | None = None
    """Folder to write. Default: export_FORMAT, or export_FORMAT_staged, beside the weights."""
    format: str = "torch"
    """torch (torch.export's .pt2 files: load with torch.export.load, compile with AOTInductor) or onnx."""
    staged: bool = False
    """One graph for each exit, so that whoever runs them can stop behind any of them. Else one graph with all exits."""
    opset: int | None = None
    """Version of ONNX's operators. Default: the newest that torch writes."""
    overwrite: bool = False
    """Replace what an earlier export wrote to the same folder."""

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)


def run(config: ExportConfig) -> dict[str, Any]:
    """Exports saved weights; see `export_model`.

    Returns:
        "folder", "files" (name -> bytes), "largest_difference" and what `export.json` holds.
    """
    from dfs_engine.models.weights import load_model, read_description, weights_path

    model, saved = load_model(config.path), read_description(config.path)
    name = f"export_{config.format}_staged" if config.staged else f"export_{config.format}"
    folder = config.output or weights_path(config.path).parent / name
    data = saved["data"]
    about = {
        "class_names": saved.get("class_names"),
        "normalization": _normalization(data),
        "tokenizer": data.get("tokenizer"),
        "max_tokens": data.get("max_tokens") if data.get("tokenizer") else None,
    }
    options: Any = {name: getattr(config, name) for name in ("format", "staged", "opset", "overwrite")}
    found = export_model(model.eval(), folder, **options, about=about)
    files = {file.name: file.stat().st_size for file in sorted(Path(folder).expanduser().iterdir())}
    return {"folder": str(folder), "files": files, **found}


def _normalization(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """What pixels between 0 and 1 have to go through: three numbers each."""
    from dfs_engine.data.normalization import PRESETS

    mean, std = data.get("mean"), data.get("std")
    if isinstance(mean, str):
        mean = PRESETS[mean].mean
    if isinstance(std, str):
        std = PRESETS[std].std
    return None if mean is None or std is None else {"mean": list(mean), "std": list(std)}


def export_model(
    model: MultiExitModel,
    folder: str | Path,
    *,
    format: str = "torch",
    staged: bool = False,
    example_input: Tensor | Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a model as graphs of stock operators, which run without this package.

    A model of any variant computes there what it computes in evaluation mode. Batches may have any number of samples,
    sentences any number of tokens that the model takes; images keep their size. The graphs are run on a random batch
    and compared with the model before anything is left behind.

    Args:
        model: in evaluation mode. It stays as it is.
        folder: to write: `export.json` (see `dfs_engine.inference.exported`) and model.pt2 or model.onnx, or with
            `staged` a stage_K file for each exit.
        format: "torch" or "onnx".
        staged: one graph for each exit: of what its logits need and no exit before it has computed. It takes state, and
            returns its logits and the state that it makes. The decision who goes on is with whoever runs them, such as
            ``EarlyExit(ExportedModel(folder), policy)``.
        example_input: a batch of 2 samples or more, as `model.forward` takes it, or by the names of its arguments.
            None: what `model.example_inputs` makes up; a model that `attach_exits` made for something else than images
            needs one.
        about: what else `export.json` is to hold, e.g. class_names.
        opset: of ONNX; None: the newest that torch writes.
        overwrite: whether to replace what an earlier export wrote there.

    Returns:
        What `export.json` holds, with "largest_difference" between the graphs' logits and the model's, absolute.

    Raises:
        ModuleNotFoundError: "onnx" without the packages of the extra `export`. FileExistsError: there is something in
            the folder. ValueError: a model in training mode, or one that cannot be traced or cut, for the reason named.
        RuntimeError: the graphs compute something else.
    """
    check_choice("format", format, FORMATS)
    if format == "onnx":
        with needs("export"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    _check_model(model, format)
    target = _free(Path(folder).expanduser(), overwrite)
    inputs = _example(model, example_input)
    dims = {0: Dim("batch")}
    if model.max_tokens is not None:
        dims[1] = Dim("tokens", max=model.max_tokens)

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        graphs = [trace(model, inputs, dims, model.num_exits)]
        if staged:
            graphs = cut(graphs[0], inputs, dims)
        names = [f"stage_{index}" for index in range(1, len(graphs) + 1)] if staged else ["model"]
        files = [f"{name}.{FORMATS[format]}" for name in names]
        described = _describe(model, inputs, dims, format, graphs, files, about or {})
        with progress_bar(len(files), "graph", enabled=len(files) > 1) as bar:
            for graph, file in zip(graphs, files, strict=True):
                bar.set_description(file)
                write = _write_onnx if format == "onnx" else _write_torch
                write(partial / file, graph, json.dumps(described), opset)
                bar.update()
        (partial / DESCRIPTION_FILE).write_text(json.dumps(described, indent=1) + "\n")
        difference = _compare(model, partial, model.example_inputs(3) if example_input is None else inputs)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**described, "largest_difference": difference}


def _check_model(model: Any, format: str) -> None:
    if not isinstance(model, MultiExitModel):
        raise TypeError(f"model: expected a MultiExitModel, got {type(model).__name__}. attach_exits makes one.")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"model: expected one in evaluation mode, got {training[0]} in training mode. Call model.eval() first."
        )
    dtype = next(model.parameters()).dtype
    if format == "onnx" and dtype == torch.bfloat16:
        raise ValueError(
            "model: expected float32, float16 or float64 for ONNX, whose runtimes compute hardly anything in bfloat16, "
            "got bfloat16. Call model.float() first."
        )


def _free(folder: Path, overwrite: bool) -> Path:
    """The folder, if an export may take its place."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    is_export = (folder / DESCRIPTION_FILE).is_file()
    if not (overwrite and is_export):
        remedy = "Add --overwrite to replace it." if is_export else "Give another --output."
        raise FileExistsError(
            f"output: expected a folder with nothing in it, got {folder}, "
            f"{'with an export' if is_export else 'where something else is'}. {remedy}"
        )
    return folder


def _example(model: MultiExitModel, given: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A batch of two samples or more: of one, torch.export would take the size for a constant."""
    inputs = model.example_inputs(2) if given is None else given
    if isinstance(inputs, Tensor):
        (name, *_) = model.example_inputs(1)
        inputs = {name: inputs}
    inputs = dict(inputs)
    sizes = {name: tuple(value.shape) for name, value in inputs.items()}
    if len({size[:1] for size in sizes.values()}) != 1 or next(iter(sizes.values()))[:1] < (2,):
        raise ValueError(f"example_input: expected a batch of 2 samples or more, got tensors of the shapes {sizes}.")
    return inputs


def _describe(
    model: MultiExitModel,
    inputs: Mapping[str, Tensor],
    dims: Mapping[int, Dim],
    format: str,
    graphs: list[Graph],
    files: list[str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What stands in `export.json`."""
    first = next(iter(inputs.values()))
    packages = ("torch", "onnx") if format == "onnx" else ("torch",)
    return {
        "format": format,
        "inputs": {
            name: {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": [dims[dim].__name__ if dim in dims else size for dim, size in enumerate(value.shape)],
                "default": model.input_defaults.get(name),
            }
            for name, value in inputs.items()
        },
        "graphs": [
            {"file": file, "inputs": list(graph.inputs), "outputs": list(graph.outputs)}
            for graph, file in zip(graphs, files, strict=True)
        ],
        "num_exits": model.num_exits,
        "num_classes": model.num_classes,
        "input_shape": list(first.shape[1:] if model.max_tokens is None else model.input_shape),
        "class_names": None,
        "normalization": None,
        "tokenizer": None,
        "max_tokens": model.max_tokens,
        **{name: value for name, value in about.items() if value is not None},
        "model": model.get_config(),
        "versions": {name: version(name) for name in packages},
    }


def _write_torch(file: Path, graph: Graph, description: str, opset: int | None) -> None:
    torch.export.save(graph.program, file, extra_files={DESCRIPTION_FILE: description})


def _write_onnx(file: Path, graph: Graph, description: str, opset: int | None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # of two inputs that have as many samples
        written = torch.onnx.export(
            graph.program,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=opset,
            dynamic_shapes=graph.dims,
            verbose=False,
        )
    assert written is not None
    written.model.metadata_props[_METADATA_KEY] = description
    written.save(file, external_data=None)  # beside it only where one file may not be as large


def _compare(model: MultiExitModel, folder: Path, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference between the logits of the graphs in `folder` and the model's.

    Raises:
        RuntimeError: too large a one.
    """
    with torch.no_grad():
        expected = run_model(model, inputs)
    found = ExportedModel(folder)(**inputs)
    difference = max(float((a.to(b.device) - b).abs().max()) for a, b in zip(found, expected, strict=True))
    largest = max(float(logits.abs().max()) for logits in expected)
    tolerance = _TOLERANCES.get(expected[0].dtype, 0.0) * max(1.0, largest)
    if not difference <= tolerance:
        raise RuntimeError(
            f"export: expected the exported graphs to compute the model's logits to {tolerance:.1g}, got a difference "
            f"of {difference:.3g}. Nothing was written. Please report this with the model's name and the versions of "
            "`dfs doctor`."
        )
    return difference
