import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from dfs_engine.training.batches import EpochBatches, eval_loader, train_loader


class RandomItems(Dataset):
    """Each item is a fresh random number beside its index."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.rand(()), index


def epoch_of(batches, epoch=0, start=0):
    batches.epoch, batches.start = epoch, start
    return list(batches)


def test_every_image_once_in_an_order_of_the_epoch():
    batches = EpochBatches(10, 4, seed=1)
    first, second = epoch_of(batches), epoch_of(batches, epoch=1)
    for epoch in (first, second):
        assert [len(batch.indices) for batch in epoch] == [4, 4, 2]
        assert sorted(index for batch in epoch for index in batch.indices) == list(range(10))
    assert first != second
    assert first == epoch_of(EpochBatches(10, 4, seed=1))
    assert first != epoch_of(EpochBatches(10, 4, seed=2))


def test_start_skips_the_first_batches():
    batches = EpochBatches(10, 4, seed=1)
    assert epoch_of(batches, epoch=2, start=1) == epoch_of(batches, epoch=2)[1:]
    batches.start = 1
    assert len(batches) == 2


def test_a_fresh_subset_for_each_epoch():
    batches = EpochBatches(50, 4, seed=1, max_samples=10)
    assert batches.num_batches == 3
    assert batches.num_in_epoch == 10
    first, second = ([index for batch in epoch_of(batches, epoch) for index in batch.indices] for epoch in (0, 1))
    assert len(set(first)) == len(set(second)) == 10
    assert set(first) != set(second)
    assert first == [index for batch in epoch_of(EpochBatches(50, 4, seed=1)) for index in batch.indices][:10]
    assert epoch_of(EpochBatches(10, 4, seed=1, max_samples=50)) == epoch_of(EpochBatches(10, 4, seed=1))


def test_processes_share_each_batch():
    whole = epoch_of(EpochBatches(11, 4, seed=5))
    parts = [epoch_of(EpochBatches(11, 4, seed=5, rank=rank, num_processes=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 2  # without the smaller last batch
    for batch, one, other in zip(whole, *parts, strict=False):
        assert sorted(one.indices + other.indices) == sorted(batch.indices)
        assert one.seed != other.seed


def test_batch_size_that_processes_cannot_share():
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        EpochBatches(11, 4, seed=0, num_processes=3)
    with pytest.raises(ValueError, match="batch_size: expected at most the 3 samples of an epoch, got 4"):
        EpochBatches(3, 4, seed=0, num_processes=2)


def test_augmentation_depends_on_the_batch_alone_and_leaves_the_global_generator():
    batches = EpochBatches(10, 4, seed=1)
    loader = train_loader(RandomItems(), batches, num_workers=0, pin_memory=False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [noise for noise, _ in loader]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    batches.start = 2
    torch.testing.assert_close(next(iter(loader))[0], first[2], rtol=0, atol=0)
    batches.epoch = 1
    assert not torch.equal(next(iter(loader))[0], first[2])


def test_test_images_are_shared_without_repetition():
    data = TensorDataset(torch.arange(7))
    seen = [
        value.item()
        for rank in range(2)
        for (batch,) in eval_loader(data, 2, num_workers=0, pin_memory=False, rank=rank, num_processes=2)
        for value in batch
    ]
    assert sorted(seen) == list(range(7))
