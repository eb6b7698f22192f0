"""The constants that images are normalised by: presets, numbers, what is refused."""

import pytest
import torch

from dfs_engine.data import DataConfig, load_data
from dfs_engine.data.normalization import PRESETS, Normalization, published_data

SYNTHETIC = {"name": "synthetic", "synthetic_train": 4, "synthetic_test": 2}
PUBLISHED = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({}, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        ({"mean": "published"}, *PUBLISHED),
        ({"mean": "cifar100", "std": "imagenet"}, (0.5071, 0.4867, 0.4408), (0.229, 0.224, 0.225)),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 1.0)}, (0.1, 0.2, 0.3), (0.4, 0.5, 1.0)),
    ],
)
def test_images_are_normalised_by(options, mean, std):
    splits = load_data(DataConfig(**SYNTHETIC, **options), input_shape=(3, 8, 8))
    assert splits.normalization == Normalization(mean, std)
    for split in (splits.train, splits.test):
        pixels = split.images.source[[1]][0].double() / 255
        expected = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        torch.testing.assert_close(split[1][0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "cifar"}, r"data\.mean: expected three numbers.*cifar10, cifar100, .*published, got 'cifar'"),
        ({"mean": "cifar10", "std": "half"}, r"data\.std: expected three numbers.*got 'half'"),
        ({"mean": (0.5, 0.5, 0.5)}, r"data\.std: expected one of the same kind as data\.mean=.*got None"),
        (
            {"mean": "cifar10", "std": (0.5, 0.5, 0.5)},
            r"data\.std: expected one of the same kind.*Give both in numbers",
        ),
        ({"std": "cifar10"}, r"data\.mean: expected one with data\.std='cifar10', got none"),
        ({"mean": (125.3, 123.0, 113.9), "std": (0.2, 0.2, 0.2)}, r"data\.mean: .*Numbers are of pixels from 0 to 1"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.0, 0.2)}, r"data\.std: expected .*got \(0\.2, 0\.0, 0\.2\)"),
        ({"mean": (0.5,), "std": (0.2,)}, r"data\.mean: expected three numbers"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_the_words_name_the_preset():
    assert str(Normalization(*PUBLISHED)) == "mean 0.4914 0.4822 0.4465, std 0.2023 0.1994 0.201 (published)"
    assert str(Normalization((0.5,) * 3, (0.2,) * 3)) == "mean 0.5 0.5 0.5, std 0.2 0.2 0.2"


def test_published_constants_are_those_of_cifar_models_alone():
    assert published_data((3, 32, 32)) == {"mean": PUBLISHED[0], "std": PUBLISHED[1]}
    assert PRESETS["published"] == PUBLISHED
    assert published_data((3, 224, 224)) == published_data((128,)) == {}
