"""GLUE's nine tasks: from files on this machine, or through the `datasets` library."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dfs_engine.data.config import DataConfig
from dfs_engine.data.tables import FORMATS, read_table
from dfs_engine.data.text import TextDataset, TextSplits, check_texts, load_tokenizer

HUB_NAME = "nyu-mll/glue"
_ENTAILMENT = ("entailment", "not_entailment")


class Task(NamedTuple):
    """What tells the tasks apart.

    Attributes:
        columns: of the text, or of the two texts.
        class_names: by label; none: the label is a number.
        metrics: GLUE's, the one it is ranked by first (see `ExitMetrics`).
        validation: the split that is measured, because the test split has no labels.
        further: other splits that are measured, by the name of each.
    """

    columns: tuple[str, ...]
    class_names: tuple[str, ...]
    metrics: tuple[str, ...]
    validation: str = "validation"
    further: tuple[tuple[str, str], ...] = ()


TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews", "top1")),
    "sst2": Task(("sentence",), ("negative", "positive"), ("top1",)),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "top1")),
    "stsb": Task(("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "top1")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("top1",),
        "validation_matched",
        (("test_mismatched", "validation_mismatched"),),
    ),
    "qnli": Task(("question", "sentence"), _ENTAILMENT, ("top1",)),
    "rte": Task(("sentence1", "sentence2"), _ENTAILMENT, ("top1",)),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("top1",)),
}


def load_glue(config: DataConfig, longest: int) -> TextSplits:
    """Reads the task `config.name`, below `config.root` if there is one, and tokenises it.

    Args:
        longest: how many tokens the model can read.
    """
    task = TASKS[config.name]
    columns = config.text_columns() or task.columns
    if len(columns) != len(task.columns):
        raise ValueError(
            f"data.text_column: expected {len(task.columns)} for data.name={config.name}, got {', '.join(columns)}."
        )
    task = task._replace(columns=columns)
    tokenizer = load_tokenizer(config, longest)

    def encode(split: str) -> TextDataset:
        (*texts, labels), where = _read(config, task, split)
        _check_labels(labels, task, where)
        check_texts(texts, where)
        return TextDataset(
            tokenizer,
            texts,
            labels if task.class_names else list(torch.tensor(labels, dtype=torch.float32)),
            max_tokens=config.max_tokens,
            title=f"tokenising {config.name} {split}",
        )

    train, test = encode("train"), encode(task.validation)
    further = {name: encode(split) for name, split in task.further}
    counts = [f"{len(train)} train", f"{len(test)} {task.validation}"]
    counts += [f"{len(further[name])} {split}" for name, split in task.further]
    description = f"GLUE {config.name} (real, {' / '.join(counts)})"
    return TextSplits(train, test, further, list(task.class_names), task.metrics, description)


def _expected(config: DataConfig, task: Task) -> str:
    columns = ", ".join([*task.columns, config.label_column or "label"])
    return (
        f"GLUE's {config.name} as parquet files (train*.parquet and {task.validation}*.parquet with columns "
        f"{columns}), or as {', '.join(FORMATS[1:])}"
    )


def _read(config: DataConfig, task: Task, split: str) -> tuple[list[list[Any]], Callable[[int], str]]:
    """The task's columns and then the label's, and the words for where a row is."""
    names = [*task.columns, config.label_column or "label"]
    if config.root is None:
        return _read_hub(config, task, names, split), f"row {{}} of {split} of {HUB_NAME}".format
    expected = _expected(config, task)
    root = config.folder(expected)
    paths = sorted(path for path in root.glob(f"{split}*") if path.suffix in FORMATS)
    if not paths:
        raise FileNotFoundError(f"data.root: expected {expected}, got no {split}*.parquet in {root}.")
    table = read_table(paths, names, expected, text=task.columns)
    return [table.columns[name].to_pylist() for name in names], table.where


def _read_hub(config: DataConfig, task: Task, columns: list[str], split: str) -> list[list[Any]]:
    import datasets

    try:
        table = datasets.load_dataset(HUB_NAME, config.name, split=split)
    except Exception as error:  # whatever stands between here and the hub
        raise OSError(
            f"data.root: expected {config.name} from the datasets library, which could not get {HUB_NAME}: {error}. "
            f"Give a folder with {_expected(config, task)}."
        ) from error
    return [list(table[column]) for column in columns]


def _check_labels(labels: list[Any], task: Task, where: Callable[[int], str]) -> None:
    """Raises ValueError, naming the first row whose label is not known."""
    for row, label in enumerate(labels):
        known = label in range(len(task.class_names)) if task.class_names else isinstance(label, (float, int))
        if not known:
            wanted = f"a label below {len(task.class_names)}" if task.class_names else "a number as label"
            raise ValueError(f"data: expected {wanted}, got {label!r} in {where(row)}.")
