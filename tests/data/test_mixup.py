"""mixup and CutMix: timm's, from draws of their own."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup as TimmMixup

from dfs_engine.data import DataConfig
from dfs_engine.data.mixup import Mixup

NUM_CLASSES = 7


def batch(size, layout=torch.contiguous_format):
    images = torch.randn(size, 3, 8, 8).to(memory_format=layout)
    return images, torch.randint(NUM_CLASSES, (size,))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=str)
@pytest.mark.parametrize("size", [8, 7, 1])
def test_is_timms_under_the_seed(mode, alphas, size):
    """Of an odd batch timm gets all but the last."""
    config = DataConfig(mixup=alphas[0], cutmix=alphas[1], mixup_mode=mode, mixup_switch_prob=0.4)
    images, target = batch(size)
    got, shares = Mixup(config, NUM_CLASSES, seed=3, rank=2)(images.clone(), target, step=11)

    even = size - size % 2
    np.random.seed(np.random.SeedSequence(3, spawn_key=(2, 11)).generate_state(4))
    reference = TimmMixup(*alphas, switch_prob=0.4, mode=mode, label_smoothing=0.0, num_classes=NUM_CLASSES)
    expected, expected_shares = images.clone(), F.one_hot(target, NUM_CLASSES).float()
    if even:
        expected[:even], expected_shares[:even] = reference(images[:even].clone(), target[:even])
    assert torch.equal(got, expected)
    assert torch.equal(shares, expected_shares)
    torch.testing.assert_close(shares.sum(1), torch.ones(size))
    assert even == 0 or not torch.equal(got, images)


def test_draws_follow_seed_rank_and_step_and_leave_the_global_generators():
    images, target = batch(4)

    def mix(seed, rank, step):
        return Mixup(DataConfig(mixup=1.0), NUM_CLASSES, seed=seed, rank=rank)(images.clone(), target, step)[0]

    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = mix(0, 0, 5)
    np.random.rand(3)
    assert torch.equal(first, mix(0, 0, 5))
    for other in [(1, 0, 5), (0, 1, 5), (0, 0, 6), (0, 5, 0)]:
        assert not torch.equal(first, mix(*other)), other
    np.random.set_state(("MT19937", states[0], 624))
    state = np.random.get_state()[1:3]
    mix(0, 0, 1)
    assert np.array_equal(np.random.get_state()[1], state[0])
    assert np.random.get_state()[2] == state[1]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_share_of_the_batches_stays_as_it_is():
    images, target = batch(4)
    mixup = Mixup(DataConfig(mixup=1.0, mixup_prob=0.25), NUM_CLASSES, seed=0)
    kept = sum(torch.equal(mixup(images.clone(), target, step)[0], images) for step in range(200))
    assert 120 < kept < 180


def test_keeps_channels_last():
    images, target = batch(5, torch.channels_last)
    mixed, _ = Mixup(DataConfig(mixup=1.0), NUM_CLASSES, seed=0)(images, target, 0)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_without_timm_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "timm.data")
    with pytest.raises(ModuleNotFoundError, match=r"timm.*dfs_engine\[vision\]"):
        Mixup(DataConfig(mixup=1.0), NUM_CLASSES, seed=0)
