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


def test_corrupt_image_is_named(root):
    path = root / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    splits = load(root)
    with pytest.raises(ValueError, match=str(path)):
        splits.test[3]


@pytest.mark.parametrize(("crop_pct", "resized"), [(None, 256), (0.9, 248), (1.0, 224)])
def test_centre_crop_keeps_its_share(root, crop_pct, resized):
    noise = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "val" / "ant" / "0.png")
    tall = (resized, int(resized * 300 / 260))  # the shorter side becomes `resized`
    expected = np.asarray(Image.fromarray(noise).resize(tall, Image.Resampling.BILINEAR))
    top, left = round((tall[1] - 224) / 2), round((tall[0] - 224) / 2)
    expected = torch.from_numpy(expected[top : top + 224, left : left + 224].copy()).permute(2, 0, 1)
    image, _ = load(root, 224, crop_pct=crop_pct).test[0]
    torch.testing.assert_close(pixels(image), expected.float(), atol=0.01, rtol=0)


def test_random_crop_takes_its_share_of_the_area(root):
    """Of a ramp, the crop's range of values is the crop's width."""
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (240, 240, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(root / "train" / "ant" / "0.png")

    def widths(**options):
        images = torch.stack([pixels(load(root, 16, flip=False, **options).train[0][0]) for _ in range(40)])
        return (images.amax((1, 2, 3)) - images.amin((1, 2, 3))) / 225  # 15/16 of the crop, between pixels' centres

    whole = widths(crop_scale=(1.0, 1.0))
    torch.testing.assert_close(whole, torch.ones(40), atol=0.02, rtol=0)
    small = widths(crop_scale=(0.09, 0.16))  # sides of 0.3 to 0.4, in aspects of 3:4 to 4:3
    assert torch.all((small > 0.24) & (small < 0.48))
    assert widths().max() > small.max()
