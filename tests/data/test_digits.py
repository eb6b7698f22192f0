"""The embedded dataset."""

import hashlib

import pytest
import torch
from sklearn.datasets import load_digits as load_from_sklearn
from torch.utils.data import DataLoader

from dfs_engine.data import DataConfig, load_data
from dfs_engine.data.digits import is_test


@pytest.fixture(scope="module")
def splits():
    return load_data(DataConfig(), input_shape=(3, 32, 32))


def test_split_never_changes():
    test = is_test(load_from_sklearn().target)
    assert (test.sum(), (~test).sum()) == (359, 1438)
    assert (
        hashlib.sha256(test.tobytes()).hexdigest() == "7e23901c6e5ad623c7aa6ed74120d0bd3f3302a1d21bb7c98d46de81f67b33e6"
    )


def test_split_is_stratified_and_disjoint(splits):
    train, test = (torch.bincount(torch.tensor(part.images.labels)) for part in (splits.train, splits.test))
    assert torch.all((test / (train + test) - 0.2).abs() < 0.01)
    # The 1,797 images are all different, so an image in both parts would show.
    images = torch.cat([splits.train.images.source, splits.test.images.source]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 1797


def test_items(splits):
    image, label = splits.train[3]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert type(label) is int
    assert torch.equal(image[0], image[2])
    assert len(splits.train) == 1438
    assert splits.num_classes == len(splits.class_names) == 10
    assert splits.description == "scikit-learn digits (real, 1438 train / 359 test)"


def test_training_images_are_normalised(splits):
    pixels = splits.train.images.source / 255
    transform = splits.train.transform
    torch.testing.assert_close(transform._mean.flatten() / 255, pixels.mean().expand(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(1 / transform._inverse_std.flatten() / 255, pixels.std().expand(3), rtol=0, atol=1e-3)


def test_digits_are_shifted_but_never_mirrored(splits):
    augmentation = splits.train.transform.augmentation
    assert not augmentation.flip
    assert augmentation.crop_padding == 1
    assert len({tuple(splits.train[0][0].flatten().tolist()) for _ in range(40)}) > 1
    assert torch.equal(splits.test[0][0], splits.test[0][0])


@pytest.mark.parametrize("size", [16, 24])
def test_image_size_overrides_the_model(size):
    splits = load_data(DataConfig(image_size=size), input_shape=(3, 32, 32))
    assert splits.test[0][0].shape == (3, size, size)


def test_loader_fetches_batches(splits):
    images, labels = next(iter(DataLoader(splits.test, batch_size=7)))
    assert images.shape == (7, 3, 32, 32)
    assert labels.dtype == torch.int64
    for i in range(7):
        assert torch.equal(images[i], splits.test[i][0])
        assert labels[i] == splits.test[i][1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_seed_repeats_an_epoch(splits, num_workers):
    def epoch():
        loader = DataLoader(splits.train, batch_size=500, shuffle=True, num_workers=num_workers)
        return torch.cat([images for images, _ in loader])

    torch.manual_seed(5)
    first = epoch()
    second = epoch()
    torch.manual_seed(5)
    assert torch.equal(first, epoch())
    assert not torch.equal(first, second)
