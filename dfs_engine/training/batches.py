"""Which samples each step sees: a pure function of seed, epoch and step.

A resumed run therefore continues with the very batches, and the very augmentation, that an uninterrupted one would have
seen, whatever the number of worker processes.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dfs_engine.data.encoded import BrokenImageError


class Batch(NamedTuple):
    """What the sampler asks the dataset for."""

    indices: list[int]
    seed: int
    """Of the augmentation's random draws."""


class EpochBatches(Sampler[Batch]):
    """The shuffled batches of one epoch, `batch_size` samples over all processes together.

    Several processes take every num_processes-th sample of each batch. They leave out a smaller last batch, so that the
    mean of the processes' gradients is the gradient of the mean.

    Args:
        num_samples: in the dataset.
        max_samples: an epoch takes at most so many, drawn afresh for each.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        max_samples: int | None = None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size % num_processes:
            raise ValueError(
                f"batch_size: expected a multiple of the {num_processes} processes, got {batch_size}. "
                "It counts the samples of all processes together."
            )
        in_epoch = num_samples if max_samples is None else min(num_samples, max_samples)
        full, rest = divmod(in_epoch, batch_size)
        self.num_batches = full + (rest > 0 and num_processes == 1)
        if self.num_batches == 0:
            raise ValueError(f"batch_size: expected at most the {in_epoch} samples of an epoch, got {batch_size}.")
        self.num_samples = num_samples
        self.num_in_epoch = min(in_epoch, self.num_batches * batch_size)
        """Samples that an epoch sees."""
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = 0
        self.start = 0
        """First batch to give, for a resumed epoch."""

    def __len__(self) -> int:
        return self.num_batches - self.start

    def __iter__(self) -> Iterator[Batch]:
        entropy = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]) >> 1)
        order = torch.randperm(self.num_samples, generator=generator)[: self.num_in_epoch].tolist()
        seeds = torch.randint(2**62, (self.num_batches, self.num_processes), generator=generator)[:, self.rank].tolist()
        for step in range(self.start, self.num_batches):
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield Batch(whole[self.rank :: self.num_processes], seeds[step])


class SeededDataset(Dataset[Any]):
    """Draws each batch's augmentation from the batch's own seed, and leaves torch's global generator as it was."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: Batch) -> Sequence[Any]:
        # Not torch.manual_seed: it would reseed the GPU too, whose draws belong to dropout.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(batch.seed)
        try:
            return _fetch(self.dataset, batch.indices)
        finally:
            generator.set_state(state)


def _fetch(dataset: Dataset[Any], indices: list[int]) -> Sequence[Any]:
    fetch = getattr(dataset, "__getitems__", None)
    return fetch(indices) if fetch is not None else [dataset[index] for index in indices]


def to_device(
    input: Tensor | Mapping[str, Tensor], device: torch.device, memory_format: torch.memory_format
) -> Tensor | dict[str, Tensor]:
    """A batch's images in `memory_format`, or its mapping of token tensors, on the device."""
    if isinstance(input, Mapping):
        return {name: tensor.to(device, non_blocking=True) for name, tensor in input.items()}
    return input.to(device, non_blocking=True, memory_format=memory_format)


def micro_batches(
    input: Tensor | Mapping[str, Tensor], target: Tensor, size: int | None
) -> Iterator[tuple[Tensor | dict[str, Tensor], Tensor]]:
    """A batch in pieces of `size` samples, the last of what is left; None: in one piece."""
    size = len(target) if size is None else size
    for start in range(0, len(target), size):
        piece = slice(start, start + size)
        part = {name: tensor[piece] for name, tensor in input.items()} if isinstance(input, Mapping) else input[piece]
        yield part, target[piece]


def _leave_process_group(_worker: int) -> None:
    """Ctrl-C in a terminal, and torchrun's SIGTERM, go to all of a group; the main process alone ends its workers."""
    os.setpgrp()


class Loader(DataLoader[Any]):
    """A DataLoader whose workers' `BrokenImageError` is what it was there, and whose workers can be told to stop."""

    _running: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._running = super().__iter__()
        try:
            yield from self._running
        except BrokenImageError as error:  # torch passes it on with the worker's traceback in front, as text
            raise BrokenImageError(str(error).rpartition(f"{BrokenImageError.__name__}: ")[2].strip()) from None
        except (OSError, EOFError) as error:
            if str(error).startswith("Caught"):  # by a worker that lives
                raise
            raise RuntimeError(f"{_DEATH} was gone when it should have handed over a batch ({error!r})") from error

    def stop_workers(self) -> None:
        """Ends them and forgets them, whatever state they are in."""
        running, self._running, self._iterator = self._running, None, None
        if hasattr(running, "_shutdown_workers"):
            running._shutdown_workers()


_DEATH = "DataLoader worker"  # what torch's messages about one begin with


@contextlib.contextmanager
def worker_deaths(loaders: Iterable[Loader]) -> Iterator[None]:
    """Raises ChildProcessError, which says what to do, for torch's RuntimeError about a worker process that died.

    That can come from anywhere in the block: torch raises it in the handler of a signal.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_DEATH):
            raise
        with _without_child_handler():  # which would raise again, about the same worker
            for loader in loaders:
                loader.stop_workers()
        reason = str(error).split(". ")[0].rstrip(".")
        raise ChildProcessError(
            f"data.num_workers: expected worker processes that live, but {reason}. Most often there is too little "
            "memory, or shared memory (/dev/shm): lower --data.num_workers; 0 prepares the batches in this process."
        ) from None


@contextlib.contextmanager
def _without_child_handler() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # then torch has none either
        yield
        return
    handler = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def train_loader(dataset: Dataset[Any], batches: EpochBatches, *, num_workers: int, pin_memory: bool) -> Loader:
    """A loader of this process's share of each training batch."""
    return Loader(
        SeededDataset(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_process_group,
        generator=torch.Generator(),  # without one, starting an epoch draws from the global generator
    )


def eval_loader(
    dataset: Any, batch_size: int, *, num_workers: int, pin_memory: bool, rank: int = 0, num_processes: int = 1
) -> Loader:
    """A loader of this process's share of the test samples, each exactly once over all processes."""
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=range(rank, len(dataset), num_processes),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_process_group,
        generator=torch.Generator(),
    )
