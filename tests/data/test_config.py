"""DataConfig: what it refuses, and that every field explains itself."""

import dataclasses
import inspect

import pytest

from dfs_engine.data import DataConfig, load_data
from dfs_engine.data.config import Augmentation


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_train", 0),
        ("max_tokens", 2),
        ("image_size", 0),
        ("num_workers", -1),
        ("crop_padding", -1),
        ("cutout", -2),
        ("synthetic_train", 0),
        ("synthetic_test", 0),
        ("synthetic_classes", 1),
        ("synthetic_seed", -1),
    ],
)
def test_number_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"data\.{field}: expected a number >= \d+, got {value}"):
        DataConfig(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color_jitter": -0.1}, r"data\.color_jitter: expected a number >= 0, got -0\.1"),
        ({"color_jitter": float("nan")}, r"data\.color_jitter: expected a number >= 0, got nan"),
        ({"name": "image_folder", "crop_pct": 0.0}, r"data\.crop_pct: expected a number in \(0, 1\], got 0\.0"),
        ({"name": "image_folder", "crop_pct": 90.0}, r"data\.crop_pct: expected a number in \(0, 1\], got 90"),
        ({"name": "image_folder", "crop_scale": (0.5, 0.2)}, r"data\.crop_scale: .*rising.*got \[0\.5, 0\.2\]"),
        ({"name": "cifar10", "crop_pct": 0.9}, r"data\.crop_pct: expected none with data\.name=cifar10.*Leave it out"),
        ({"name": "sst2", "crop_scale": (0.1, 1.0)}, r"data\.crop_scale: expected none with data\.name=sst2"),
    ],
)
def test_wrong_jitter_and_crops_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_unknown_dataset_lists_the_valid_ones_and_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"data\.name: .*digits, cifar10, cifar100, image_folder, image_parquet, synthetic.*mean 'cifar10'",
    ):
        DataConfig(name="cifar-10")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().name = "cifar10"


def test_every_field_has_a_docstring():
    lines = [line.strip() for line in inspect.getsource(DataConfig).splitlines()]
    for field in dataclasses.fields(DataConfig):
        (position,) = [i for i, line in enumerate(lines) if line.startswith(f"{field.name}: ")]
        assert lines[position + 1].startswith('"""'), field.name


def test_none_takes_the_default_and_off_switches_it_off():
    default = Augmentation(crop_padding=4, crop_fill=128, flip=True, autoaugment=True, cutout=16)
    assert DataConfig().augmentation(default) == default
    off = DataConfig(crop_padding=0, flip=False, autoaugment=False, cutout=0).augmentation(default)
    assert off == Augmentation(crop_fill=128)


def test_augmentation_reads_as_words():
    everything = Augmentation(crop_padding=4, crop_fill=128, flip=True, autoaugment=True, cutout=16)
    assert str(everything) == "random crops padded by 4, mirrored, AutoAugment (cifar10), cutout 16"
    assert str(Augmentation(crop_fill=128)) == "no augmentation"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "image_folder"])
def test_root_none_missing_file_or_empty(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.root: expected a folder for data\.name=" + name):
        load_data(DataConfig(name=name), input_shape=(3, 32, 32))
    for folder, found in [("missing", "nothing there"), ("file", "a file"), ("empty", "empty folder")]:
        with pytest.raises(FileNotFoundError, match=rf"data\.root: .*{found}") as error:
            load_data(DataConfig(name=name, root=str(tmp_path / folder)), input_shape=(3, 32, 32))
        assert str(tmp_path / folder) in str(error.value)


def test_input_shape_must_have_three_channels():
    with pytest.raises(ValueError, match="input_shape: expected 3 channels"):
        load_data(DataConfig(), input_shape=(1, 32, 32))
