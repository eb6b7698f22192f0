"""An exported model, run by onnxruntime or, of the format "torch", by PyTorch. What `export_model` wrote is enough.

A folder holds `export.json`, which describes it, and one file for each graph:

    format       "torch" or "onnx"
    inputs       name -> dtype, shape (a name stands for any size) and what a missing one is filled with
    graphs       one, of all exits, or one for each exit: its file, and the names of what it takes and returns, in order
    num_exits, num_classes, class_names, input_shape, normalization, tokenizer, max_tokens, model, versions
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfs_engine.models import MultiExitModel
from dfs_engine.models.multi_exit import OnExit
from dfs_engine.nn import Fork, select_rows
from dfs_engine.runtime.extras import needs

DESCRIPTION_FILE = "export.json"
_Run = Callable[[list[Tensor]], list[Tensor]]


class ExportedModel(MultiExitModel):
    """Runs what `export_model` wrote: called as the model was, it returns every exit's logits, without gradients.

    One that was exported in stages stops early: ``EarlyExit(ExportedModel(folder), policy)`` runs a stage for the
    samples alone that are still there.

    Args:
        folder: that `export_model` wrote.
        num_threads: of onnxruntime; None: torch's.
        providers: of onnxruntime, where a graph may run; those of the CPU unless given.

    Attributes:
        description: what `export.json` holds.

    Raises:
        FileNotFoundError: nothing exported there. ModuleNotFoundError: a file of ONNX without onnxruntime.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        about = read_description(folder)
        super().__init__(
            [],
            [],
            Fork(variant="dense"),
            num_classes=about["num_classes"],
            input_shape=tuple(about["input_shape"]),
        )
        self.description = about
        self.name = f"{about['model']['name']}, exported"
        path = Path(folder).expanduser()
        files = [path / graph["file"] for graph in about["graphs"]]
        if about["format"] == "onnx":
            self._runs = [_run_onnx(file, num_threads or torch.get_num_threads(), providers) for file in files]
        else:
            self._runs = [_run_torch(file) for file in files]
        self.eval()

    @property
    def num_exits(self) -> int:
        return self.description["num_exits"]

    @torch.no_grad()
    def forward(self, *input: Any, on_exit: OnExit | None = None, **named: Any) -> list[Tensor]:
        """As the model's own forward, on tensors or NumPy arrays.

        Raises:
            TypeError: other arguments than the model's. ValueError: `on_exit`, of a model exported as a whole.
        """
        graphs = self.description["graphs"]
        values = self._values(input, named)
        if len(graphs) < self.num_exits:
            if on_exit is not None:
                raise ValueError(
                    "on_exit: expected a model exported in stages, got one graph of all exits, which no sample can "
                    "leave. Export it with staged=True (dfs export --staged)."
                )
            return self._runs[0]([values[name] for name in graphs[0]["inputs"]])
        logits = []
        for index, (graph, run) in enumerate(zip(graphs, self._runs, strict=True)):
            exit_logits, *made = run([values[name] for name in graph["inputs"]])
            logits.append(exit_logits)
            kept = None if on_exit is None else on_exit(index, exit_logits)
            if kept is not None and len(kept) == 0:
                break
            values.update(zip(graph["outputs"][1:], made, strict=True))
            later = {name for other in graphs[index + 1 :] for name in other["inputs"]}
            values = {name: value for name, value in values.items() if name in later}
            if kept is not None:
                values = {name: select_rows(value, kept) for name, value in values.items()}
        return logits

    def _values(self, input: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every input by its name."""
        expected = self.description["inputs"]
        given = {**dict(zip(expected, input, strict=False)), **named}
        given = {name: torch.as_tensor(value) for name, value in given.items() if value is not None}
        missing = [name for name, about in expected.items() if name not in given and about["default"] is None]
        unknown = given.keys() - expected.keys()
        if missing or unknown or len(input) > len(expected):
            raise TypeError(
                f"input: expected {', '.join(expected)}, got {', '.join(given) or 'nothing'}"
                f"{f' and {len(input)} values' if len(input) > len(expected) else ''}."
            )
        first = next(iter(given.values()))
        return {
            name: _checked(name, given[name], about)
            if name in given
            else torch.full(first.shape, about["default"], dtype=getattr(torch, about["dtype"]))
            for name, about in expected.items()
        }

    def get_config(self) -> dict[str, Any]:
        """Of the model that was exported."""
        return self.description["model"]


def _checked(name: str, value: Tensor, about: Mapping[str, Any]) -> Tensor:
    """An input on the CPU and in the graph's dtype.

    Raises:
        ValueError: of another shape.
    """
    shape = about["shape"]
    fits = [isinstance(wanted, str) or size == wanted for size, wanted in zip(value.shape, shape, strict=False)]
    if value.dim() != len(shape) or not all(fits):
        raise ValueError(
            f"{name}: expected shape ({', '.join(map(str, shape))}), as the model was exported, got "
            f"{tuple(value.shape)}."
        )
    return value.to("cpu", getattr(torch, about["dtype"]))


def read_description(folder: str | Path) -> dict[str, Any]:
    """What `export.json` of a folder holds.

    Raises:
        FileNotFoundError: there is none. ValueError: it is none.
    """
    path = Path(folder).expanduser() / DESCRIPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: expected one that `dfs export` wrote, with {DESCRIPTION_FILE}, got {folder} (nothing there)."
        )
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"folder: expected JSON in {path}, got {error}. Export the model again.") from None
    return description


def _run_onnx(file: Path, num_threads: int, providers: Sequence[str]) -> _Run:
    with needs("export"):
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # errors: a graph's own advice to its makers is of no use here
    session = onnxruntime.InferenceSession(file, options, providers=list(providers))
    names = [value.name for value in session.get_inputs()]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, arrays)]

    return run


def _run_torch(file: Path) -> _Run:
    module = torch.export.load(file).module()
    return lambda inputs: list(module(*inputs))
