"""Token ids of texts of any length, padded batch by batch."""

import random

import pytest
import torch
from torch.utils.data import DataLoader

from dfs_engine.data import text
from dfs_engine.data.text import TextDataset

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return transformers.AutoTokenizer.from_pretrained(tiny_bert)


def sentences(count):
    return [" ".join(f"w{random.randrange(40)}" for _ in range(random.randrange(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("num_texts", [1, 2], ids=["sentences", "pairs"])
@pytest.mark.parametrize("at_once", [3, 100])
def test_batches_are_what_the_tokenizer_pads(tokenizer, monkeypatch, num_texts, at_once):
    monkeypatch.setattr(text, "_TEXTS_AT_ONCE", at_once)
    texts, labels = [sentences(11) for _ in range(num_texts)], list(range(11))
    dataset = TextDataset(tokenizer, texts, labels, max_tokens=9)
    assert len(dataset) == 11
    for indices in ([4], [7, 0, 10], list(range(11))):
        chosen = [[column[index] for index in indices] for column in texts]
        expected = tokenizer(*chosen, truncation=True, max_length=9, padding=True, return_tensors="pt")
        batch, target = next(iter(DataLoader(torch.utils.data.Subset(dataset, indices), batch_size=len(indices))))
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
        assert target.tolist() == indices
    assert dataset[2][1] == 2


def test_padding_has_the_tokenizers_values(tokenizer):
    class Odd:
        pad_token_id, pad_token_type_id = 7, 3

        def __call__(self, *args, **kwargs):
            return {"input_ids": [[1], [1, 2, 4]], "token_type_ids": [[0], [0, 1, 1]]}

    batch, _ = next(iter(DataLoader(TextDataset(Odd(), [["a", "b c d"]], [0, 1], max_tokens=9), batch_size=2)))
    assert batch["input_ids"].tolist() == [[1, 7, 7], [1, 2, 4]]
    assert batch["token_type_ids"].tolist() == [[0, 3, 3], [0, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_tokenizer_without_token_types(tokenizer):
    class Plain:
        pad_token_id, pad_token_type_id = 0, 0

        def __call__(self, *args, **kwargs):
            return {"input_ids": [[1, 5]]}

    item, _ = TextDataset(Plain(), [["a"]], [0], max_tokens=9)[0]
    assert item.keys() == {"input_ids", "attention_mask"}
