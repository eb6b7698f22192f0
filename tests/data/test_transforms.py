"""Each augmentation does its own thing, to each image on its own, from torch's global generator."""

import pytest
import torch
from torchvision.transforms import v2

from dfs_engine.data.config import Augmentation
from dfs_engine.data.transforms import BatchTransform, random_crop, random_cutout, random_flip

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def random_images(num_images=64, size=(32, 32)):
    return torch.randint(1, 256, (num_images, 3, *size), dtype=torch.uint8)


def test_crop_is_a_shift_of_up_to_padding_pixels():
    images = random_images(800, (8, 10))
    cropped = random_crop(images, padding=2, fill=0)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    offsets = set()
    for image, got in zip(padded, cropped, strict=True):
        (offset,) = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y : y + 8, x : x + 10], got)]
        offsets.add(offset)
    assert offsets == {(y, x) for y in range(5) for x in range(5)}


def test_crop_fills_the_border():
    cropped = random_crop(torch.full((200, 3, 6, 6), 9, dtype=torch.uint8), padding=3, fill=128)
    assert set(cropped.unique().tolist()) == {9, 128}


def test_flip_mirrors_some_images_and_keeps_the_others():
    images = random_images(200)
    flipped = random_flip(images)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert torch.all(mirrored ^ kept)
    assert 50 < mirrored.sum() < 150


@pytest.mark.parametrize("size", [1, 5, 16])
def test_cutout_blacks_out_one_square_clipped_at_the_border(size):
    images = random_images(200, (32, 24))  # no pixel is black
    holes = random_cutout(images, size) == 0
    areas = holes[:, 0].sum((1, 2))
    for hole, area in zip(holes, areas, strict=True):
        assert torch.equal(hole[0], hole[2])
        height, width = hole[0].any(1).sum(), hole[0].any(0).sum()
        assert height * width == area
    assert areas.max() == size * size
    assert len(set(holes[:, 0].flatten(1).float().argmax(1).tolist())) > 10


def test_cutout_keeps_the_other_pixels():
    images = random_images()
    cut = random_cutout(images, 16)
    assert torch.equal(cut[cut != 0], images[cut != 0])


def test_test_transform_only_normalises():
    images = random_images(5)
    expected = v2.functional.normalize(images / 255, list(MEAN), list(STD))
    got = BatchTransform((32, 32), MEAN, STD)(images)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_resize_is_bilinear_in_any_aspect():
    grey = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
    grey[..., 4:] = 204
    resized = BatchTransform((12, 32), (0,) * 3, (1,) * 3)(grey)
    assert resized.shape == (2, 3, 12, 32)
    assert torch.all(resized[..., 0, 1:] >= resized[..., 0, :-1])
    assert len(resized.unique()) > 2


@pytest.mark.parametrize(
    "option",
    [
        {"crop_padding": 4},
        {"flip": True},
        {"autoaugment": True},
        {"color_jitter": 0.4},
        {"cutout": 16},
        {"autoaugment": True, "policy": "imagenet"},
    ],
)
def test_each_augmentation_alone_changes_images_and_follows_the_seed(option):
    images = random_images()
    before = images.clone()
    plain = BatchTransform((32, 32), MEAN, STD)(images)
    transform = BatchTransform((32, 32), MEAN, STD, Augmentation(**option))
    torch.manual_seed(11)
    first = transform(images)
    second = transform(images)
    torch.manual_seed(11)
    assert torch.equal(transform(images), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert torch.equal(images, before)


def test_autoaugment_draws_for_each_image():
    image = random_images(1)
    batch = image.expand(60, -1, -1, -1)
    augmented = BatchTransform((32, 32), MEAN, STD, Augmentation(autoaugment=True))(batch)
    assert len(augmented.flatten(1).unique(dim=0)) > 10


@pytest.mark.parametrize("size", [(32, 32), (5, 7), (8, 20)])
def test_resize_is_torchvisions(size):
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    resized = BatchTransform(size, (0,) * 3, (1,) * 3)(images)
    expected = v2.functional.resize(images, list(size)).float() / 255
    torch.testing.assert_close(resized, expected)


def test_color_jitter_is_torchvisions_drawn_for_each_image():
    images = random_images(6)
    transform = BatchTransform((32, 32), (0,) * 3, (1,) * 3, Augmentation(color_jitter=0.4))
    torch.manual_seed(5)
    got = transform(images)
    torch.manual_seed(5)
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
    expected = torch.stack([jitter(image) for image in images])
    torch.testing.assert_close(got, expected / 255)


def test_color_jitter_stays_within_its_share():
    """Of one grey, contrast and saturation change nothing but the rounding."""
    grey = torch.full((300, 3, 4, 4), 100, dtype=torch.uint8)
    jittered = BatchTransform((4, 4), (0,) * 3, (1,) * 3, Augmentation(color_jitter=0.3))(grey) * 255
    assert torch.all((jittered >= 67) & (jittered <= 131))
    assert jittered.min() < 80
    assert jittered.max() > 120
