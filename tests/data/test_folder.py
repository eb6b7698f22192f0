"""A folder of image files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dfs_engine.data import DataConfig, load_data


def write_image(path, value, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    for split, count in [("train", 3), ("val", 2)]:
        for name, value in [("ant", 10), ("bee", 200)]:
            for index in range(count):
                write_image(tmp_path / split / name / f"{index}.png", value)
    return tmp_path


def load(root):
    return load_data(DataConfig(name="image_folder", root=str(root)), input_shape=(3, 16, 16))


def test_reads_both_splits(root):
    splits = load(root)
    assert splits.class_names == ["ant", "bee"]
    assert "6 train / 4 test" in splits.description
    images, labels = next(iter(DataLoader(splits.test, batch_size=4)))
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    expected = (10 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images[0], expected[:, None, None].expand(3, 16, 16))
    assert splits.train[5][1] == 1


def test_test_folder_may_be_called_test(root):
    (root / "val").rename(root / "test")
    assert len(load(root).test) == 4


@pytest.mark.parametrize("missing", ["train", "val"])
def test_missing_split_is_named(root, missing):
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"data\.root: expected .*{root / missing}"):
        load(root)


def test_class_without_images_is_named(root):
    (root / "train" / "cow").mkdir()
    with pytest.raises(FileNotFoundError, match="cow"):
        load(root)


def test_classes_must_agree(root):
    write_image(root / "train" / "cow" / "0.png", 5)
    with pytest.raises(ValueError, match=r"same class folders .*got cow"):
        load(root)


def test_corrupt_image_is_named(root):
    path = root / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    splits = load(root)
    with pytest.raises(ValueError, match=str(path)):
        splits.test[3]
