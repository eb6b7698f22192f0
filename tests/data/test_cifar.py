"""CIFAR from both layouts, written here as tiny files."""

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dfs_engine.data import DataConfig, load_data
from dfs_engine.data.cifar import LAYOUTS
from dfs_engine.data.normalization import PRESETS

REAL = Path(__file__).parents[3] / "shared/data/cifar10"
NAMES = ("cifar10", "cifar100")


def load(name, root, **options):
    return load_data(DataConfig(name=name, root=str(root), **options), input_shape=(3, 32, 32))


def random_split(num_images, num_classes):
    images = np.random.randint(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)
    return images, np.random.randint(0, num_classes, num_images).tolist()


def write_pickles(root, name):
    """torchvision's layout, three images a file; returns the (images, labels) of all training files and of test."""
    layout = LAYOUTS[name]
    folder = root / layout.folder
    folder.mkdir()
    written = []
    for file in (*layout.train_files, layout.test_file):
        images, labels = random_split(3, layout.num_classes)
        content = {"data": images.reshape(3, -1), layout.label_key: labels}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        written.append((images, labels))
    class_names = [f"class {index}" for index in range(layout.num_classes)]
    (folder / layout.meta_file).write_bytes(pickle.dumps({layout.names_key: class_names}, protocol=2))
    train = np.concatenate([images for images, _ in written[:-1]]), [x for _, labels in written[:-1] for x in labels]
    return train, written[-1]


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, images, labels, image_column="img", label_column="label", **replaced):
    """Hugging Face's schema; `replaced` may give other bytes by row as row_3=b"..."."""
    cells = [{"bytes": png(image.transpose(1, 2, 0)), "path": None} for image in images]
    for key, value in replaced.items():
        cells[int(key.removeprefix("row_"))]["bytes"] = value
    pyarrow.parquet.write_table(pyarrow.table({image_column: cells, label_column: labels}), path, row_group_size=2)


def assert_split(dataset, images, labels):
    assert torch.equal(dataset.images.source, torch.from_numpy(images))
    assert list(dataset.images.labels) == labels


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_layout(name, tmp_path):
    train, test = write_pickles(tmp_path, name)
    splits = load(name, tmp_path)
    assert_split(splits.train, *train)
    assert_split(splits.test, *test)
    assert splits.num_classes == LAYOUTS[name].num_classes
    assert splits.class_names[3] == "class 3"
    assert f"{len(train[1])} train / 3 test" in splits.description


@pytest.mark.parametrize(
    ("name", "image_column", "label_column"),
    [("cifar10", "img", "label"), ("cifar10", "image", "label"), ("cifar100", "img", "fine_label")],
)
def test_parquet_layout(name, image_column, label_column, tmp_path):
    num_classes = LAYOUTS[name].num_classes
    first, second, test = (random_split(count, num_classes) for count in (5, 4, 3))
    for file, split in [("train-0", first), ("train-1", second), ("test-0", test)]:
        write_parquet(tmp_path / f"{file}.parquet", *split, image_column, label_column)
    splits = load(name, tmp_path)
    assert_split(splits.train, np.concatenate([first[0], second[0]]), first[1] + second[1])
    assert_split(splits.test, *test)
    assert splits.num_classes == num_classes


def test_default_augmentation_is_the_published_recipe(tmp_path):
    write_pickles(tmp_path, "cifar10")
    splits = load("cifar10", tmp_path)
    assert splits.train.transform.augmentation._asdict() == {
        "crop_padding": 4,
        "crop_fill": 128,
        "flip": True,
        "autoaugment": True,
        "policy": "cifar10",
        "color_jitter": 0.0,
        "cutout": 16,
    }
    assert not any([splits.test.transform.augmentation.flip, splits.test.transform.augmentation.autoaugment])
    assert torch.equal(splits.test[0][0], splits.test[0][0])


def test_folder_with_neither_layout_names_both(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py.*train\*\.parquet.*holds neither") as error:
        load("cifar10", tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("file", ["data_batch_4", "test_batch", "batches.meta"])
def test_missing_pickle_is_named(file, tmp_path):
    write_pickles(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / file
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        load("cifar10", tmp_path)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Ran out of input"),
        (pickle.dumps({"data": np.zeros((3, 3072), np.uint8)})[:-900], "truncated"),
        (pickle.dumps([1, 2]), "no entry 'labels'"),
        (pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "fine_labels": [1, 2, 3]}), "no entry 'labels'"),
        (pickle.dumps({"data": np.zeros((3, 3071), np.uint8), "labels": [1, 2, 3]}), "uint8 array"),
        (pickle.dumps({"data": np.zeros((3, 3072)), "labels": [1, 2, 3]}), "uint8 array"),
        (pickle.dumps({"labels": [1, 2, 3]}), "uint8 array"),
        (pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2]}), "3 images but 2 labels"),
        (pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 10]}), "label 10 is outside"),
        (pickle.dumps({"data": Bomb(), "labels": [1, 2, 3]}), "which no CIFAR file does"),
    ],
)
def test_corrupt_pickle_is_named(content, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pickles(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py/data_batch_2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}.*{problem}"):
        load("cifar10", tmp_path)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_pickle_protocol_loads(protocol, tmp_path):
    write_pickles(tmp_path, "cifar10")
    images, labels = random_split(3, 10)
    content = pickle.dumps({"data": images.reshape(3, -1), "labels": labels}, protocol=protocol)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(content)
    assert_split(load("cifar10", tmp_path).test, images, labels)


def test_missing_parquet_split_is_named(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", *random_split(3, 10))
    with pytest.raises(FileNotFoundError, match=rf"no test\*\.parquet in {tmp_path}"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"row_3": b"not an image"}, "row 3"),
        ({"row_3": b""}, "row 3"),
        ({"row_3": None}, "row 3"),
        ({"row_2": png(np.zeros((32, 32, 3), np.uint8))[:50]}, "row 2"),
        ({"row_1": png(np.zeros((28, 30, 3), np.uint8))}, "row 1: the image has 30x28"),
        ({"image_column": "picture"}, "its columns are picture, label"),
        ({"label_column": "coarse_label"}, "its columns are img, coarse_label"),
    ],
)
def test_corrupt_parquet_row_or_column_is_named(options, problem, tmp_path):
    write_parquet(tmp_path / "train-0.parquet", *random_split(4, 10), **options)
    write_parquet(tmp_path / "test-0.parquet", *random_split(4, 10))
    with pytest.raises(ValueError, match=rf"{tmp_path / 'train-0.parquet'}: {problem}"):
        load("cifar10", tmp_path)


def test_columns_of_other_names(tmp_path):
    split = random_split(3, 10)
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", *split, "picture", "kind")
    splits = load("cifar10", tmp_path, image_column="picture", label_column="kind")
    assert_split(splits.train, *split)


def test_broken_images_are_left_out_and_counted(tmp_path, caplog):
    images, labels = random_split(6, 10)
    write_parquet(tmp_path / "train.parquet", images, labels, row_1=None, row_4=b"nothing")
    write_parquet(tmp_path / "test.parquet", images, labels)
    splits = load("cifar10", tmp_path, skip_broken=True)
    kept = [0, 2, 3, 5]
    assert_split(splits.train, images[kept], [labels[row] for row in kept])
    assert_split(splits.test, images, labels)
    assert "left out 2 of 6 images of train.parquet, which cannot be decoded: row 1 of" in caplog.text
    with pytest.raises(ValueError, match=r"row 1: .*--data\.skip_broken true"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("label", [-1, 10, None])
def test_label_outside_the_classes_is_named(label, tmp_path):
    write_parquet(tmp_path / "train-0.parquet", random_split(3, 10)[0], [1, label, 2])
    with pytest.raises(ValueError, match=rf"label {label} is outside 0\.\.9"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 2000])
def test_truncated_parquet_is_named(kept, tmp_path):
    path = tmp_path / "train-0.parquet"
    write_parquet(path, *random_split(4, 10))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=str(path)):
        load("cifar10", tmp_path)


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip(f"no CIFAR-10 in {REAL}")
    return load("cifar10", REAL)


def test_real_cifar10(real):
    assert real.description == "CIFAR-10 (real, 50000 train / 10000 test)"
    assert real.class_names[:3] == ["airplane", "automobile", "bird"]
    assert np.bincount(real.train.images.labels).tolist() == [5000] * 10
    assert np.bincount(real.test.images.labels).tolist() == [1000] * 10
    pixels = real.train.images.source[::10] / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(PRESETS["cifar10"].mean), rtol=0, atol=5e-3)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(PRESETS["cifar10"].std), rtol=0, atol=5e-3)


def test_real_cifar10_batch(real):
    batch = real.train.__getitems__([0, 25_000, 49_999])
    assert all(image.shape == (3, 32, 32) and image.isfinite().all() for image, _ in batch)
