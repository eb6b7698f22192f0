"""A folder of image files."""

from pathlib import Path

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


def load(root, side=16, **options):
    config = DataConfig(name="image_folder", root=str(root), **options)
    return load_data(config, input_shape=(3, side, side))


def pixels(normalised):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (normalised * std[:, None, None] + mean[:, None, None]) * 255


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


def truncate(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    return path


@pytest.mark.parametrize("kept", [0, 20])
def test_what_is_no_image_is_named_before_training(root, kept):
    path = truncate(root / "train" / "bee" / "1.png", kept)
    with pytest.raises(ValueError, match=rf"data\.root: expected an image, got {path} .*--data\.skip_broken true"):
        load(root)


def test_truncated_image_is_named_when_it_is_read(root):
    path = truncate(root / "val" / "bee" / "1.png", 60)
    splits = load(root)
    with pytest.raises(ValueError, match=str(path)):
        splits.test[3]


def test_broken_images_are_left_out_and_counted(root, caplog):
    broken = [truncate(root / "train" / "ant" / f"{index}.png", kept) for index, kept in ((0, 0), (2, 60))]
    test = truncate(root / "val" / "bee" / "0.png", 60)
    splits = load(root, skip_broken=True)
    assert "left out 2 of 6 images of the training images, which cannot be decoded: " + ", ".join(map(str, broken)) in (
        caplog.text
    )
    assert f"left out 1 of 4 images of the test images, which cannot be decoded: {test}" in caplog.text
    assert "(4 train / 3 test)" in splits.description
    assert [label for _, label in splits.train] == [0, 1, 1, 1]
    assert [label for _, label in splits.test] == [0, 0, 1]


def test_nothing_but_broken_images(root):
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected images in the test images, got 4 that cannot be decoded"):
        load(root, skip_broken=True)


@pytest.fixture
def flat(tmp_path):
    for name, value, count in [("ant", 10, 20), ("bee", 200, 10)]:
        for index in range(count):
            write_image(tmp_path / "flat" / name / f"{index}.png", value + index, (20 + index, 30))
    return tmp_path / "flat"


def test_flat_folder_gives_a_share_for_testing(flat):
    splits = load(flat)
    assert splits.class_names == ["ant", "bee"]
    assert splits.description == f"image folder {flat} (24 train / 6 test drawn by split_seed 0)"
    assert [label for _, label in splits.test] == [0] * 4 + [1] * 2
    assert len(splits.train) == 24

    def files(images):
        return {images.source.encoded.where(row) for row in images.source.rows}

    assert not files(splits.train.images) & files(splits.test.images)
    assert files(load(flat).test.images) == files(splits.test.images)
    assert files(load(flat, split_seed=1).test.images) != files(splits.test.images)
    assert len(load(flat, test_fraction=0.5).test) == 15
    with pytest.raises(
        ValueError, match=r"data\.test_fraction: .*30 samples on both sides, got 0\.01\. .*no test split"
    ):
        load(flat, test_fraction=0.01)


def test_val_images_are_cropped_as_test_images_are(flat):
    splits = load(flat, val_fraction=0.25, flip=False)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 6, 6)
    draws = [torch.stack([image for image, _ in splits.val]) for _ in range(2)]
    assert torch.equal(*draws)
    source = splits.val.dataset.images.source
    for (image, label), position in zip(splits.val, splits.val.indices, strict=True):
        number = int(Path(source.encoded.where(source.rows[position])).stem)
        expected = ((200 if label else 10) + number) / 255
        assert image[0].mean().item() * 0.229 + 0.485 == pytest.approx(expected, abs=1e-4)
