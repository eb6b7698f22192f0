"""Samples kept out of training: which, how many, how they are seen."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from dfs_engine.data import DataConfig, load_data
from dfs_engine.data.draw import draw_share


@pytest.mark.parametrize(
    ("num_samples", "share", "count"), [(50, 0.1, 5), (30, 0.1, 3), (7, 0.5, 4), (7, 0.1, 1), (9, 0.05, 0), (9, 0.9, 8)]
)
def test_the_parts_are_whole_and_apart(num_samples, share, count):
    labels = np.random.randint(0, 4, num_samples)
    kept, drawn = draw_share(labels, share, 0)
    assert len(drawn) == count
    assert sorted(kept + drawn) == list(range(num_samples))
    assert (kept, drawn) == (sorted(kept), sorted(drawn))


def test_every_class_gives_its_share_at_random():
    labels = np.repeat([0, 1, 2], [1000, 200, 40])
    np.random.shuffle(labels)
    _, drawn = draw_share(labels, 0.25, 3)
    assert np.bincount(labels[drawn]).tolist() == [250, 50, 10]
    assert draw_share(labels, 0.25, 3)[1] == drawn
    assert draw_share(labels, 0.25, 4)[1] != drawn


def test_a_frozen_draw():
    """Of numbers too. Saved runs rely on it: if this fails, they would be resumed on other samples."""
    assert draw_share([0, 0, 0, 0, 0, 0, 1, 1, 1, 1], 0.3, 7)[1] == [0, 3, 7]
    assert draw_share([0.5, 4.0, 1.25, 3.0, 2.0], 0.4, 7)[1] == [2, 3]


def test_val_is_kept_out_of_training_and_seen_as_a_test_sample_is():
    config = DataConfig(name="synthetic", synthetic_train=40, synthetic_test=5, crop_padding=2, val_fraction=0.25)
    splits = load_data(config, input_shape=(3, 8, 8))
    whole = load_data(DataConfig(name="synthetic", synthetic_train=40, synthetic_test=5), input_shape=(3, 8, 8)).train
    assert isinstance(splits.train, Subset)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (30, 10, 5)
    kept, drawn = splits.train.indices, splits.val.indices
    assert sorted([*kept, *drawn]) == list(range(40))
    assert list(splits.measured) == ["test", "val"]
    for _ in range(3):
        for position, index in enumerate(drawn):
            image, label = splits.val[position]
            assert torch.equal(image, whole[index][0])
            assert label == whole[index][1]
    assert not all(torch.equal(splits.train[at][0], whole[index][0]) for at, index in enumerate(kept))
    assert splits.description.endswith("(not real, 40 train / 5 test), of train 10 kept out as val")


@pytest.mark.parametrize("share", [0.01, 0.999999999])
def test_a_share_that_leaves_nothing(share):
    config = DataConfig(name="synthetic", synthetic_train=8, val_fraction=share)
    with pytest.raises(ValueError, match=r"data\.val_fraction: .*8 training samples on both sides, got"):
        load_data(config, input_shape=(3, 8, 8))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=r"data\.val_fraction: expected a number in \[0, 1\), got"):
        DataConfig(val_fraction=share)
