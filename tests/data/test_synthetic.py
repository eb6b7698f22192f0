"""Synthetic images: the same for a seed, and learnable."""

import torch

from dfs_engine.data import DataConfig, load_data


def make(**options):
    return load_data(DataConfig(name="synthetic", **options), input_shape=(3, 20, 24))


def test_sizes_and_description():
    splits = make(synthetic_train=33, synthetic_test=7, synthetic_classes=4)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (33, 7, 4)
    assert splits.train[32][0].shape == (3, 20, 24)
    assert set(splits.train.images.labels) == set(range(4))
    assert "synthetic" in splits.description
    assert "real" not in splits.description.replace("not real", "")


def test_seed_decides_the_images_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = make(synthetic_seed=3), make(synthetic_seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.train.images.source, second.train.images.source)
    assert torch.equal(first.test.images.source, second.test.images.source)
    assert not torch.equal(first.train.images.source, make(synthetic_seed=4).train.images.source)
    assert not torch.equal(first.train.images.source[:128], first.test.images.source)


def test_class_means_of_training_images_classify_test_images():
    splits = make(synthetic_classes=6)
    train, test = (part.images.source.float().flatten(1) for part in (splits.train, splits.test))
    labels = torch.tensor(splits.train.images.labels)
    means = torch.stack([train[labels == label].mean(0) for label in range(6)])
    predicted = torch.cdist(test, means).argmin(1)
    assert (predicted == torch.tensor(splits.test.images.labels)).float().mean() > 0.95


def test_nothing_is_augmented_by_default():
    splits = make()
    assert torch.equal(splits.train[0][0], splits.train[0][0])
