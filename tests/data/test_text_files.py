"""Texts of one's own: CSV, TSV, JSON lines, parquet; one column or two; words as labels."""

import csv
import json

import pytest
from torch.utils.data import DataLoader

from dfs_engine.data import DataConfig, load_data

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ENDINGS = ("csv", "tsv", "jsonl", "json", "parquet")


def write(path, rows):
    """`rows`: dictionaries."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def rows(count, first=0, **columns):
    columns = columns or {"text": "w{0} w{1}", "label": None}
    values = ["good", "bad", "so so"]
    return [
        {
            name: values[index % 3] if form is None else form.format(index % 40, (index + 1) % 40)
            for name, form in columns.items()
        }
        for index in range(first, first + count)
    ]


def load(root, tiny_bert, **options):
    config = DataConfig(name="text_files", root=str(root), tokenizer=str(tiny_bert), max_tokens=18, **options)
    return load_data(config, input_shape=(20,))


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format(tmp_path, tiny_bert, ending):
    write(tmp_path / f"train-0.{ending}", rows(5))
    write(tmp_path / f"train-1.{ending}", rows(4, 5))
    write(tmp_path / f"validation.{ending}", rows(3, 9))
    splits = load(tmp_path, tiny_bert)
    assert splits.class_names == ["bad", "good", "so so"]
    assert (splits.num_classes, splits.metrics) == (3, ("top1",))
    assert splits.description == f"text files {tmp_path} (9 train / 3 test)"
    batch, labels = next(iter(DataLoader(splits.train, batch_size=9)))
    assert labels.tolist() == [1, 0, 2] * 3
    # [CLS] wi wi+1 [SEP]; the four special tokens come first in the vocabulary.
    assert batch["input_ids"].tolist() == [[2, 4 + index, 5 + index, 3] for index in range(9)]


def test_pairs_from_columns_of_other_names(tmp_path, tiny_bert):
    pairs = rows(4, asked="w{0}", answer="w{1} w{1}", verdict=None)
    write(tmp_path / "train.csv", pairs)
    write(tmp_path / "dev.jsonl", pairs)
    splits = load(tmp_path, tiny_bert, text_column=("asked", "answer"), label_column="verdict")
    for part in (splits.train, splits.test):
        item, label = part[2]
        assert item["input_ids"].tolist() == [2, 6, 3, 7, 7, 3]
        assert item["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1]
        assert label == 2
    alone = load(tmp_path, tiny_bert, text_column="answer", label_column="verdict")
    assert alone.train[2][0]["input_ids"].tolist() == [2, 7, 7, 3]


def test_text_stays_text(tmp_path, tiny_bert):
    """Whatever it looks like: numbers, dates, nothing, null; quotes and line breaks."""
    texts = ["12", "2024-01-01", "", "null", 'w1, "w2"\nw3', "NA"]
    data = [{"text": text, "label": index % 2} for index, text in enumerate(texts)]
    for ending in ("csv", "jsonl"):
        root = tmp_path / ending
        root.mkdir()
        write(root / f"train.{ending}", data)
        write(root / f"test.{ending}", data)
        splits = load(root, tiny_bert)
        assert splits.class_names == ["0", "1"]
        assert len(splits.train) == len(texts)
        assert [token for token in splits.train[4][0]["input_ids"].tolist() if token in (5, 6, 7)] == [5, 6, 7]


def test_one_file_gives_a_share_for_testing_and_one_for_val(tmp_path, tiny_bert):
    write(tmp_path / "reviews.csv", rows(30))
    for root in (tmp_path, tmp_path / "reviews.csv"):
        splits = load(root, tiny_bert, val_fraction=0.25)
        assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 6, 6)
        assert splits.description.startswith(f"text files {root} (24 train / 6 test drawn by split_seed 0)")
        seen = [item["input_ids"][1].item() - 4 for part in (splits.train, splits.val, splits.test) for item, _ in part]
        assert sorted(seen) == list(range(30))
        assert sorted(label for _, label in splits.test) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.csv",
            "text,kind\nw1,0\n",
            r"columns text, label .*got .*train\.csv with columns text, kind.*label_column",
        ),
        (
            "train.csv",
            "text,label\nw1,0\nw2\n",
            r"got .*train\.csv that cannot be read: CSV parse error.*Expected 2 columns",
        ),
        (
            "train.jsonl",
            '{"text": "w1", "label": 0}\n{"text": 3',
            r"got .*train\.jsonl that cannot be read: JSON parse error",
        ),
        ("train.json", '[{"text": "w1", "label": 0}]', r"got .*train\.json that cannot be read"),
        ("train.csv", "", r"got .*train\.csv that cannot be read"),
        ("train.parquet", "PAR1", r"got .*train\.parquet that cannot be read"),
        (
            "train.jsonl",
            '{"text": "w1", "label": 0}\n{"label": 1}\n',
            r"expected text, got \[None\] in row 1 of .*train\.jsonl",
        ),
        ("train.csv", "text,label\nw1,0.5\nw2,1\n", r"expected whole numbers or words in label, got 0\.5 in row 0 of"),
        ("train.csv", "text,label\nw1,good\nw2,\n", r"expected whole numbers or words in label, got '' in row 1 of"),
        (
            "train.csv",
            "text,label\nw1,1\nw2,2\n",
            r"label of the training samples \(1, 2\), got 0 in row 0 of .*test\.csv",
        ),
    ],
)
def test_wrong_file_is_named(tmp_path, tiny_bert, name, content, message):
    (tmp_path / name).write_text(content)
    (tmp_path / "test.csv").write_text("text,label\nw1,0\n")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tiny_bert)


def test_glue_from_csv_with_other_columns(tmp_path, tiny_bert):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", [{"review": "w1 w2", "stars": index % 2} for index in range(4)])
    config = DataConfig(
        name="sst2",
        root=str(tmp_path),
        tokenizer=str(tiny_bert),
        max_tokens=18,
        text_column="review",
        label_column="stars",
    )
    splits = load_data(config, input_shape=(20,))
    assert splits.class_names == ["negative", "positive"]
    assert splits.train[1][0]["input_ids"].tolist() == [2, 5, 6, 3]
    with pytest.raises(ValueError, match=r"data\.text_column: expected 2 for data\.name=rte, got review"):
        load_data(
            DataConfig(name="rte", root=str(tmp_path), tokenizer=str(tiny_bert), max_tokens=9, text_column="review"),
            input_shape=(20,),
        )


@pytest.mark.parametrize(
    "options",
    [
        {"name": "digits", "label_column": "kind"},
        {"name": "image_folder", "image_column": "picture"},
        {"name": "image_parquet", "text_column": "text"},
        {"name": "cifar10", "test_fraction": 0.1},
        {"name": "text_files", "skip_broken": True},
    ],
)
def test_option_of_another_dataset(options):
    name, field = options["name"], next(reversed(options))
    with pytest.raises(ValueError, match=rf"data\.{field}: expected none with data\.name={name}, got .*an option of"):
        DataConfig(**options)
