"""Images of any size from parquet files, with columns of any name."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dfs_engine.data import DataConfig, load_data

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(value, size):
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def cells(count, first=0):
    """One grey value an image, each of another size."""
    return [png(first + index, (10 + 3 * index, 40 - index)) for index in range(count)]


def write(path, images, labels, image="image", label="label", names=None):
    table = pa.table({image: images, label: labels, "id": list(range(len(labels)))})
    if names is not None:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=2)


def load(root, **options):
    return load_data(DataConfig(name="image_parquet", root=str(root), **options), input_shape=(3, 16, 16))


def grey(image):
    return image[0].mean().item() * 0.229 * 255 + 0.485 * 255


def test_columns_sizes_and_words_as_labels(tmp_path):
    write(tmp_path / "train-0.parquet", cells(3), ["cat", "ant", "cat"], "picture", "kind")
    write(tmp_path / "train-1.parquet", cells(2, 100), ["dog", "ant"], "picture", "kind")
    write(tmp_path / "test.parquet", cells(2, 50), ["dog", "cat"], "picture", "kind")
    splits = load(tmp_path, image_column="picture", label_column="kind")
    assert splits.class_names == ["ant", "cat", "dog"]
    assert splits.description == f"parquet images {tmp_path} (5 train / 2 test)"
    images, labels = next(iter(DataLoader(splits.train, batch_size=5)))
    assert images.shape == (5, 3, 16, 16)
    assert labels.tolist() == [1, 0, 1, 2, 0]
    assert [grey(image) for image in images] == pytest.approx([0, 1, 2, 100, 101], abs=0.1)
    images, labels = next(iter(DataLoader(splits.test, batch_size=2, num_workers=1)))
    assert [grey(image) for image in images] == pytest.approx([50, 51], abs=0.1)
    assert labels.tolist() == [2, 1]


def test_hugging_faces_structs_and_class_names(tmp_path):
    images = [{"bytes": cell, "path": f"{index}.png"} for index, cell in enumerate(cells(4))]
    write(tmp_path / "train.parquet", images, [0, 1, 0, 1], names=["plane", "bird", "never"])
    write(tmp_path / "validation.parquet", images[:2], [1, 2], names=["plane", "bird", "never"])
    splits = load(tmp_path)
    assert splits.class_names == ["plane", "bird", "never"]
    assert [label for _, label in splits.test] == [1, 2]


def test_one_file_gives_a_share_for_testing_and_one_for_val(tmp_path):
    write(tmp_path / "all.parquet", cells(20), [7, 9] * 10)
    for root in (tmp_path, tmp_path / "all.parquet"):
        splits = load(root, val_fraction=0.25)
        assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 4, 4)
        assert splits.class_names == ["7", "9"]
        seen = [round(grey(image)) for part in (splits.train, splits.val, splits.test) for image, _ in part]
        assert sorted(seen) == list(range(20))
        for image, label in splits.test:
            assert label == round(grey(image)) % 2


@pytest.mark.parametrize("at_start", [b"", b"not an image", None])
def test_broken_cell_is_named_or_left_out(tmp_path, at_start, caplog):
    write(tmp_path / "train-0.parquet", cells(3), [0, 1, 0])
    write(tmp_path / "train-1.parquet", [*cells(2), at_start, *cells(1)], [0, 1, 0, 1])
    write(tmp_path / "test.parquet", cells(2), [0, 1])
    with pytest.raises(ValueError, match=rf"expected an image, got row 2 of {tmp_path}/train-1\.parquet .*skip_broken"):
        load(tmp_path)
    splits = load(tmp_path, skip_broken=True)
    assert [label for _, label in splits.train] == [0, 1, 0, 0, 1, 1]
    assert f"left out 1 of 7 images of the training images, which cannot be decoded: row 2 of {tmp_path}" in caplog.text


def test_truncated_cell_is_named_when_it_is_read(tmp_path):
    noise = io.BytesIO()
    Image.fromarray(np.random.randint(0, 256, (40, 40, 3), np.uint8)).save(noise, "PNG")
    write(tmp_path / "train.parquet", [*cells(2), noise.getvalue()[:900]], [0, 1, 0])
    write(tmp_path / "test.parquet", cells(2), [0, 1])
    splits = load(tmp_path)
    with pytest.raises(ValueError, match=rf"expected an image, got row 2 of {tmp_path}/train\.parquet"):
        splits.train[2]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            [0, 1],
            {"label_column": "kind"},
            r"expected .*columns image, kind, got .*columns image, label, id.*label_column",
        ),
        ([0, 1], {"image_column": "id"}, r"data\.image_column: expected encoded images .*in id, .*got int64"),
        ([0.5, 1.0], {}, r"data\.label_column: expected whole numbers or words in label, got 0\.5 in row 0 of"),
        ([0, None], {}, r"data\.label_column: expected whole numbers or words in label, got None in row 1 of"),
        ([3, 3], {}, r"data\.label_column: expected two classes or more in label, got \[3\] alone"),
    ],
)
def test_wrong_columns(tmp_path, labels, options, message):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", cells(2), labels)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **options)


def test_label_that_training_does_not_have(tmp_path):
    write(tmp_path / "train.parquet", cells(2), ["a", "b"])
    write(tmp_path / "test.parquet", cells(2), ["a", "c"])
    with pytest.raises(
        ValueError, match=r"label of the training samples \(a, b\), got 'c' in row 1 of .*test\.parquet"
    ):
        load(tmp_path)


def test_folder_without_one_of_the_splits(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root: .*empty folder"):
        load(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"data\.root: .*without any \.parquet"):
        load(tmp_path)
    write(tmp_path / "train.parquet", cells(2), [0, 1])
    with pytest.raises(FileNotFoundError, match=r"no file of the test split\. Name one so, or give a single file"):
        load(tmp_path)
    (tmp_path / "train.parquet").rename(tmp_path / "val.parquet")
    with pytest.raises(FileNotFoundError, match=r"no file of the train split"):
        load(tmp_path)


def test_training_images_are_random_crops(tmp_path):
    gradient = io.BytesIO()
    Image.fromarray(np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (64, 64, 3)).copy()).save(
        gradient, "PNG"
    )
    write(tmp_path / "all.parquet", [gradient.getvalue()] * 10, [0, 1] * 5)
    splits = load(tmp_path, val_fraction=0.25)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.val[0][0], splits.val[1][0])
    assert torch.equal(splits.val[0][0], splits.test[0][0])
