"""Images without labels are seen as the test images of the same dataset are."""

import pytest
import torch

from dfs_engine.data import DataConfig, load_data
from dfs_engine.data.unlabelled import load_unlabelled

Image = pytest.importorskip("PIL.Image")

SHAPE = (3, 20, 20)
MEAN = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


def save_image(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy()).save(path)


def test_images_of_ones_own_are_cut_as_its_test_images(tmp_path):
    pytest.importorskip("torchvision")
    for split in ("train", "val"):
        for label, sizes in (("cat", [(31, 45), (20, 20)]), ("dog", [(64, 24), (9, 13)])):
            for index, size in enumerate(sizes):
                save_image(tmp_path / split / label / f"{index}.png", *size)
    config = DataConfig(name="image_folder", root=str(tmp_path), crop_pct=0.8, **MEAN)
    expected = load_data(config, input_shape=SHAPE).test
    found = load_unlabelled(tmp_path / "val", config, input_shape=SHAPE)
    assert [name.split("/")[-2] for name in found.names] == ["cat", "cat", "dog", "dog"]
    for (one, position), (other, _) in zip(found.samples, expected, strict=True):
        assert torch.equal(one, other), found.names[position]


@pytest.mark.parametrize("size", [(8, 8), (20, 20), (33, 33)])
def test_an_image_of_the_models_shape_stays_whole(tmp_path, size):
    """As `BatchTransform` makes it of the pixels."""
    save_image(tmp_path / "one.png", *size)
    found = load_unlabelled(tmp_path / "one.png", DataConfig(**MEAN), input_shape=SHAPE)
    pixels = torch.frombuffer(bytearray(Image.open(tmp_path / "one.png").tobytes()), dtype=torch.uint8)
    images = pixels.view(1, *size, 3).permute(0, 3, 1, 2)
    if size != (20, 20):
        images = torch.nn.functional.interpolate(images, (20, 20), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(MEAN[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(found.samples[0][0], (images[0] / 255 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (41, 20), (1, 1), (3, 50)])
def test_of_another_shape_the_centre_is_taken(tmp_path, size):
    save_image(tmp_path / "one.png", *size)
    side = min(size)
    box = ((size[1] - side) // 2, (size[0] - side) // 2)
    Image.open(tmp_path / "one.png").crop((*box, box[0] + side, box[1] + side)).save(tmp_path / "centre.png")
    one, centre = (
        load_unlabelled(tmp_path / name, DataConfig(**MEAN), input_shape=SHAPE).samples[0][0]
        for name in ("one.png", "centre.png")
    )
    assert one.shape == SHAPE
    assert torch.equal(one, centre)


def test_image_size_and_missing_normalization(tmp_path):
    save_image(tmp_path / "one.png", 9, 9)
    found = load_unlabelled(tmp_path, DataConfig(image_size=12, **MEAN), input_shape=SHAPE)
    assert found.samples[0][0].shape == (3, 12, 12)
    with pytest.raises(ValueError, match=r"data\.mean: expected the mean and std that the weights were trained with"):
        load_unlabelled(tmp_path, DataConfig(), input_shape=SHAPE)


def test_all_images_broken(tmp_path):
    (tmp_path / "one.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"input: expected images in .*, got 1 that cannot be decoded"):
        load_unlabelled(tmp_path, DataConfig(**MEAN), input_shape=SHAPE, skip_broken=True)
