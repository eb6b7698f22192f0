"""How fast the kernels are here and now: the fastest of several calls, in two halves that must agree.

Anything else that runs makes a call slower, never faster. Hence minima; kernels in turns, so that a pause meets all of
them; and two halves, some tenths of a second apart, which an unlucky minimum does not survive. They agree where the
fastest time of every kernel in one is within 10 % of its fastest time in the other. A steady load is seen by neither,
if it is heavy enough to slow every call alike: so this thread must have had a CPU for most of the time, too. The load
average would not do: it looks back a minute, at the build of the extension before the first run, say.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dfs_engine.runtime.calibration import answers
from dfs_engine.runtime.calibration.answers import Question

VERSION = 6  # of the questions, their shapes below, and the kernels: answers to another version do not count

Call = Callable[..., object]  # of the kernel's name

_AGREEMENT = 1.10
_CPU_SHARE = 0.8  # waiting for other threads counts only where they sleep meanwhile; a second process takes half
_ROUNDS, _SECONDS = 4, 6.0

_ROWS_INPUTS_OUTPUTS = ((1576, 192, 768), (2048, 384, 1536))  # ViT-Ti and BERT
# Images, channels, pixels a side. Strided: a batch as large as training's.
_STRIDED = {answers.LARGE_IMAGES: (32, 64, 32), answers.SMALL_IMAGES: (32, 256, 8)}
# Large enough that the transformation of the weights, which is the same for any batch, does not decide.
# Images, channels read and made, pixels a side; the narrow ones are an MSDNet's, read from four times as many.
_HALF = {answers.PLAIN_3X3: ((16, 64, 64, 32), (32, 128, 128, 16)), answers.NARROW_3X3: ((32, 128, 32, 16),)}


def measure(
    asked: Mapping[Question, Sequence[str]], rounds: int = _ROUNDS, seconds: float = _SECONDS
) -> tuple[dict[Question, dict[str, float]], dict[Question, str]]:
    """Asks every question twice.

    Args:
        asked: the kernels to compare with ATen's, by question.
        rounds: calls of each kernel on each shape, in each half.
        seconds: for all of it; what is not answered then has failed. On a busy machine one call may take a hundred
            times as long as it should.

    Returns:
        Speed over ATen's by kernel, where the halves agree; and why there is none, of the other questions.
    """
    halves: list[dict[Question, dict[str, float]]] = [{}, {}]
    failed: dict[Question, str] = {}
    with _undisturbed():
        for times in halves:
            deadline = _clock() + seconds / 2
            for question, kernels in asked.items():
                if question in failed:
                    continue
                result = _fastest(question, ("aten", *kernels), rounds, deadline)
                if isinstance(result, str):
                    failed[question] = result
                else:
                    times[question] = result
    speedups = {}
    for question, first, second in ((q, halves[0][q], halves[1][q]) for q in asked if q not in failed):
        if any(max(first[k], second[k]) > _AGREEMENT * min(first[k], second[k]) for k in first):
            failed[question] = "the two halves of the measurement disagreed"
        else:
            best = {kernel: min(first[kernel], second[kernel]) for kernel in first}
            speedups[question] = {kernel: best["aten"] / best[kernel] for kernel in asked[question]}
    return speedups, failed


_clock, _cpu_clock = time.perf_counter, time.thread_time


def _fastest(question: Question, kernels: Sequence[str], rounds: int, deadline: float) -> dict[str, float] | str:
    """Seconds by kernel, summed over the shapes of the question's class; or why there are none."""
    total = dict.fromkeys(kernels, 0.0)
    calls = _calls(question)
    started, cpu_started = _clock(), _cpu_clock()
    for call in calls:
        fastest = dict.fromkeys(kernels, float("inf"))
        for _ in range(rounds):
            for kernel in kernels:
                if _clock() > deadline:
                    return "the machine is slow or busy: there was no time left to measure it"
                before = _clock()
                call(kernel=kernel)
                fastest[kernel] = min(fastest[kernel], _clock() - before)
        for kernel in kernels:
            total[kernel] += fastest[kernel]
    share = (_cpu_clock() - cpu_started) / max(_clock() - started, 1e-9)
    if share < _CPU_SHARE:
        return f"the machine was busy: the measurement had a CPU for {100 * share:.0f} % of its time only"
    return total


def _calls(question: Question) -> list[Call]:
    """What is timed: the question's operator on shapes of its class."""
    op = getattr(torch.ops.dfs_engine, question.op).kernel
    if question in answers.LINEAR:
        return [_linear(op, question.op, *sizes) for sizes in _ROWS_INPUTS_OUTPUTS]
    if question in answers.STRIDED:
        num_images, channels, size = _STRIDED[question.shape]
        x, grad = _images(num_images, channels, size), _images(num_images, 2 * channels, size // 2)
        weight_size, geometry = (2 * channels, channels, 3, 3), ((2, 2), (1, 1), (1, 1), 1)
        return [functools.partial(op, grad, x, weight_size, *geometry, False)]
    return [_half(op, question.op, *sizes) for sizes in _HALF[question.shape]]


def _linear(op: Callable, name: str, rows: int, inputs: int, outputs: int) -> Call:
    x, weight, grad = (
        torch.ones(size, dtype=torch.float32) for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    if name == "linear":
        return functools.partial(op, x, weight, None)
    if name == "linear_grad_input":
        return functools.partial(op, grad, weight, 0, inputs)
    return functools.partial(op, grad, x, False)


def _half(op: Callable, name: str, num_images: int, in_channels: int, out_channels: int, size: int) -> Call:
    x, grad = (_images(num_images, channels, size).bfloat16() for channels in (in_channels, out_channels))
    weight = torch.ones(out_channels, in_channels, 3, 3, dtype=torch.bfloat16)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    if name == "conv2d":
        return functools.partial(op, x, weight, None, *geometry)
    if name == "conv2d_grad_input":
        return functools.partial(op, grad, weight, x.shape, *geometry, 0, in_channels // 2, True)
    return functools.partial(op, grad, x, weight.shape, *geometry, False)


def _images(num_images: int, channels: int, size: int) -> torch.Tensor:
    ones = torch.ones(num_images, channels, size, size, dtype=torch.float32)
    return ones.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever the caller's default device and autocast are."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield
