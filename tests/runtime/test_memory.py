"""The caching allocator of CPU tensors: contents, reuse, bound, and pointers that outlive a switch."""

import gc
import random
import sys
import threading

import pytest
import torch

from dfs_engine.runtime import backend, memory

LARGE = 2**18  # bytes; smaller blocks are torch's

requires_extension = pytest.mark.skipif(not memory.is_available(), reason="needs the C++ extension")


def floats(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes // 4)


@pytest.fixture
def caching():
    before = memory.caching_allocator_enable()
    gc.collect()  # tensors of earlier tests, which may have come from it
    memory.empty_cache()
    yield
    memory.caching_allocator_enable(before)
    memory.empty_cache()


@requires_extension
def test_live_tensors_never_share_memory(caching):
    live: list[tuple[torch.Tensor, float]] = []
    for step in range(300):
        if live and random.random() < 0.48:
            tensor, value = live.pop(random.randrange(len(live)))
            assert (tensor == value).all(), f"overwritten at step {step}"
        else:
            live.append((floats(random.randrange(LARGE // 2, 12 * LARGE)).fill_(step), float(step)))
    assert all((tensor == value).all() for tensor, value in live)


@requires_extension
def test_what_is_held_stays_within_half_above_the_peak(caching):
    base = memory.memory_allocated()
    live: list[torch.Tensor] = []
    peak = 0
    for _ in range(400):
        if live and random.random() < 0.5:
            live.pop(random.randrange(len(live)))
        else:
            live.append(floats(random.randrange(LARGE, 40 * LARGE)))
        allocated = memory.memory_allocated() - base
        # A reused block may be a quarter larger than what was asked for.
        assert sum(t.nbytes for t in live) <= allocated <= 1.25 * sum(t.nbytes for t in live)
        peak = max(peak, allocated)
        assert memory.memory_reserved() - base <= 1.5 * peak
    live.clear()
    memory.empty_cache()
    assert memory.memory_reserved() == memory.memory_allocated() == base


@requires_extension
def test_freed_memory_is_taken_again_and_by_a_request_of_about_its_size_only(caching):
    first, second = floats(8 * LARGE), floats(8 * LARGE)
    places = first.data_ptr(), second.data_ptr()
    del first
    del second
    last = floats(8 * LARGE)
    assert last.data_ptr() == places[1], "of equal blocks the one freed last"
    assert floats(7 * LARGE).data_ptr() == places[0]
    held = memory.memory_reserved()
    small = floats(4 * LARGE)
    assert memory.memory_reserved() == held + small.nbytes
    large = floats(9 * LARGE)
    assert memory.memory_reserved() == held + small.nbytes + large.nbytes


@requires_extension
def test_who_was_not_wanted_for_the_longest_time_goes_first(caching):
    base = memory.memory_reserved()
    blocks = {size: floats(size * LARGE) for size in (8, 16, 32)}
    places = {size: block.data_ptr() for size, block in blocks.items()}
    for size in (16, 8, 32):
        del blocks[size]
    # At most 84 may be held: beside 40 there is room for 8 and 32.
    large = floats(40 * LARGE)
    assert memory.memory_reserved() - base == 80 * LARGE
    kept = [floats(size * LARGE) for size in (32, 8)]
    assert [tensor.data_ptr() for tensor in kept] == [places[32], places[8]]
    assert memory.memory_reserved() - base == large.nbytes + sum(tensor.nbytes for tensor in kept)


@requires_extension
def test_others_allocate_while_a_large_cache_is_emptied(caching):
    """Neither the interpreter's lock nor the allocator's is held while thousands of blocks are given back."""
    interval, gate = sys.getswitchinterval(), threading.Lock()
    gate.acquire()
    emptying = finished = False
    allocated: list[int] = []

    def work() -> None:
        while True:
            gate.acquire()
            if finished:
                return
            allocated.append(0)
            while emptying and allocated[-1] < 8:
                floats(LARGE)
                allocated[-1] += emptying

    worker = threading.Thread(target=work)
    worker.start()
    try:
        # Now a thread runs until it gives the interpreter's lock away: the worker starts in `empty_cache`, or after it.
        sys.setswitchinterval(1000)
        for _ in range(100):
            cached = [floats(LARGE) for _ in range(2000)]
            del cached
            emptying = True
            if gate.locked():
                gate.release()
            memory.empty_cache()
            emptying = False
            if 8 in allocated:
                break
    finally:
        sys.setswitchinterval(interval)
        finished = True
        if gate.locked():
            gate.release()
        worker.join()
    assert 8 in allocated


@requires_extension
def test_small_blocks_are_left_to_torch(caching):
    before = memory.memory_allocated()
    small = [floats(LARGE - 4) for _ in range(10)]
    assert memory.memory_allocated() == before
    large = floats(LARGE)
    assert memory.memory_allocated() == before + LARGE
    assert len(small) == 10
    assert large.numel()


@requires_extension
def test_tensors_outlive_the_switch_in_both_directions():
    stock = torch.full((LARGE,), 3.0)
    with memory.caching_allocator():
        ours = torch.full((LARGE,), 4.0)
        del stock
        assert memory.memory_allocated() >= ours.nbytes
        # A storage that grows moves from one allocator's memory to another's.
        moved = torch.ones(8)
        moved.untyped_storage().resize_(4 * LARGE)
        assert moved.tolist() == [1.0] * 8
    assert not memory.caching_allocator_enable(False)
    assert (ours == 4).all()
    held = memory.memory_allocated()
    shared = ours.numpy()
    del ours
    assert memory.memory_allocated() == held
    assert (shared == 4).all()
    del shared, moved
    assert memory.memory_reserved() == memory.memory_allocated() < held


@requires_extension
def test_contexts_nest_and_restore():
    assert memory.caching_allocator_enable(False) is False
    with memory.caching_allocator():
        with memory.caching_allocator(False):
            assert memory.caching_allocator_enable(False) is False
        with memory.caching_allocator():
            kept = floats(LARGE).data_ptr()
        assert floats(LARGE).data_ptr() == kept, "the inner context emptied the outer one's cache"
        assert memory.caching_allocator_enable() is True
    assert memory.caching_allocator_enable(False) is False


@requires_extension
def test_threads_allocate_and_free_for_each_other(caching):
    shelf: list[tuple[torch.Tensor, float]] = []
    lock, wrong, first_seed = threading.Lock(), [], random.getrandbits(32)

    def work(number: int) -> None:
        draw = random.Random(first_seed + number)
        for step in range(200):
            value = number * 1000.0 + step
            tensor = floats(draw.randrange(LARGE, 4 * LARGE)).fill_(value)
            with lock:
                shelf.append((tensor, value))
                other, expected = shelf.pop(draw.randrange(len(shelf)))
            if not (other == expected).all():
                wrong.append(expected)
            del tensor, other

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.empty_cache()
    for thread in threads:
        thread.join()
    assert not wrong
    shelf.clear()
    gc.collect()
    memory.empty_cache()
    assert memory.memory_reserved() == memory.memory_allocated()


class Squares(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((LARGE,), float(index)) ** 2


@requires_extension
def test_forked_workers_of_a_loader_work(caching):
    kept = torch.full((LARGE,), 5.0)
    loader = torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2)
    assert [batch[:, 0].tolist() for batch in loader] == [[0, 1], [4, 9], [16, 25], [36, 49]]
    assert (kept == 5).all()


@requires_extension
def test_the_profiler_sees_its_tensors(caching):
    from dfs_engine.benchmarks.measure import peak_memory

    def call() -> None:
        first = floats(4 * LARGE)
        second = floats(8 * LARGE)
        del first, second

    call()  # cached by now
    assert peak_memory(call) == 12 * LARGE


@requires_extension
def test_results_do_not_depend_on_it():
    """A convolutional step, which goes through oneDNN and its raw pointers."""
    seed = random.getrandbits(32)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Conv2d(16, 24, 3), torch.nn.BatchNorm2d(24), torch.nn.Conv2d(24, 17, 3))
        for _ in range(3):
            model(torch.randn(9, 16, 33, 31)).square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients()
    with memory.caching_allocator():
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_without_the_extension_it_says_so(monkeypatch):
    monkeypatch.setattr(backend, "_extension_missing", "it is not built here; install g++")
    assert not memory.is_available()
    with memory.caching_allocator(False):
        pass
    for call in (memory.caching_allocator_enable, memory.empty_cache, memory.memory_reserved):
        with pytest.raises(RuntimeError, match=r"caching allocator: it is not built here; install g\+\+"):
            call()
