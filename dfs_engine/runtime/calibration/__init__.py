"""Which kernels are the faster ones on this machine: this project's or ATen's.

ATen's `linear` goes to MKL, which may run at a third of an AMD CPU's peak; oneDNN's product, which ATen does not use
there, may be faster, and so may this project's own. oneDNN's weight gradient of a strided convolution may run at a
third of the peak of a CPU with AVX2. A bfloat16 convolution by Winograd's algorithm in float beats oneDNN's where
bfloat16 instructions do twice as much as float ones, if there are enough channels, and loses where they do sixteen
times as much.

Where an answer comes from: `kept.py` (measured on this machine before, in a file), else `table.py` (shipped: a machine
that is in it measures nothing), else `measure.py` (measured now, in a second or two). A measurement that does not
repeat, because the machine is busy, say, is not kept: this process then takes ATen's kernels, the better tested ones,
and the next one measures again. `dfs doctor` tells all this, and `dfs doctor --recalibrate` measures everything anew.
"""

import datetime
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dfs_engine.runtime.calibration import answers, kept, measure, table
from dfs_engine.runtime.calibration.answers import Answer, Question

logger = logging.getLogger(__name__)


class Wins(NamedTuple):
    """Where this project's kernels are the faster ones.

    Attributes:
        linear: our matrix product in linear layers.
        onednn_linear: oneDNN's product instead, in forward and grad_input of linear layers with many rows.
        conv_grad_weight: our matrix product in the float32 weight gradient of convolutions that Winograd does not take,
            such as strided ones; neither 1x1 nor grouped ones, nor with fewer than 16 channels.
        half_conv: Winograd on bfloat16 images; without meaning where the CPU has no bfloat16 instructions.
        half_conv_narrow: the same where the convolution reads or makes fewer than 64 channels.
    """

    linear: bool
    onednn_linear: bool
    conv_grad_weight: bool
    half_conv: bool
    half_conv_narrow: bool

    @property
    def in_linear(self) -> bool:
        """Whether linear layers run anything but ATen's product."""
        return self.linear or self.onednn_linear


class _Rule(NamedTuple):
    """How one of `Wins` follows from answers."""

    kernel: str
    questions: tuple[Question, ...]
    combine: Callable[[Iterable[float]], float]


_RULES = {
    # One answer serves all passes of a layer: the speedup of their sum, if they take equal times.
    "linear": _Rule("gemm", answers.LINEAR, statistics.harmonic_mean),
    "onednn_linear": _Rule("onednn", answers.LINEAR[:2], statistics.harmonic_mean),
    # The worst, because it serves all sizes, and none may lose.
    "conv_grad_weight": _Rule("gemm", answers.STRIDED, min),
    "half_conv": _Rule("winograd", answers.HALF, statistics.harmonic_mean),
    "half_conv_narrow": _Rule("winograd", answers.HALF_NARROW, statistics.harmonic_mean),
}


@dataclass(frozen=True)
class Calibration:
    """What this process runs on, and why.

    Attributes:
        wins: in force.
        speedups: by the names of `Wins`: over ATen's kernels (`onednn_linear`: over the faster of ATen's and ours);
            None where it is not known.
        origins: by the names of `Wins`: where that comes from, in words.
        answers: what was known or measured.
        failed: what could not be measured now, and why.
    """

    wins: Wins
    speedups: dict[str, float | None]
    origins: dict[str, str]
    answers: dict[Question, Answer]
    failed: dict[Question, str]


_current: Calibration | None = None


def wins() -> Wins:
    """Which kernels of the cpp backend are the faster ones here, measured when it is first asked.

    Where nothing can be measured, while torch.compile traces or tensors are fake: all. What is decided then is no more
    than that the cpp backend serves an op, which asks again when it runs.
    """
    if torch.compiler.is_compiling():
        return Wins(*[True] * len(Wins._fields))
    if _current is None and type(torch.empty(0, device="cpu")) is not torch.Tensor:
        return Wins(*[True] * len(Wins._fields))
    return settled().wins


def settled() -> Calibration:
    """As `wins`, with where every answer came from."""
    return recalibrate(everything=False) if _current is None else _current


def recalibrate(everything: bool = True) -> Calibration:
    """Decides anew.

    Args:
        everything: forget what is kept and measure all, in the table or not. False: measure what is not known.
    """
    global _current
    asked = answers.questions()
    in_table = answers.those_asked(asked, table.known(table.this_machine()))
    in_file = {} if everything else answers.those_asked(asked, kept.read())
    known = {**in_table, **in_file}
    missing = {question: kernels for question, kernels in asked.items() if everything or question not in known}
    failed: dict[Question, str] = {}
    error = None
    if missing:
        speedups, failed = measure.measure(missing)
        today = datetime.date.today().isoformat()
        in_file |= {question: Answer(speedup, today) for question, speedup in speedups.items()}
        known |= in_file
        try:
            kept.write(in_file)
        except OSError as caught:
            error = caught
    sources = {question: _source(question, known, in_file, failed, error) for question in asked}
    _current = _decide(asked, known, failed, sources)
    for name in Wins._fields:
        logger.debug("%s: %s, %s", name, _current.speedups[name], _current.origins[name])
    return _current


def _source(
    question: Question,
    known: Mapping[Question, Answer],
    in_file: Mapping[Question, Answer],
    failed: Mapping[Question, str],
    error: OSError | None,
) -> str:
    """Where the answer to a question comes from, in words."""
    if question in in_file:
        day = in_file[question].measured
        return f"measured on {day}, kept in {kept.file()}" if error is None else f"measured now, not kept: {error}"
    if question in known:
        asked_again = f"; asked again without an answer, because {failed[question]}" if question in failed else ""
        return f"the table of known machines, measured on {known[question].measured}{asked_again}"
    return f"by default: measured now, not kept, because {failed[question]}"


def _decide(
    asked: Mapping[Question, Iterable[str]],
    known: dict[Question, Answer],
    failed: dict[Question, str],
    sources: Mapping[Question, str],
) -> Calibration:
    speedups: dict[str, float | None] = {}
    origins = {}
    for name, rule in _RULES.items():
        if any(rule.kernel not in asked.get(question, ()) for question in rule.questions):
            speedups[name], origins[name] = None, "never: it does not apply to this CPU, or to one thread"
            continue
        speedups[name] = None
        unknown = [question for question in rule.questions if question not in known]
        if not unknown:
            speedups[name] = rule.combine([_speedup(known[question], rule.kernel) for question in rule.questions])
            origins[name] = "; ".join(dict.fromkeys(sources[question] for question in rule.questions))
        else:
            origins[name] = sources[unknown[0]]
    # Within noise ATen's kernels stay: they are the better tested ones.
    wins = Wins(**{name: speedup is not None and speedup > 1.05 for name, speedup in speedups.items()})
    return Calibration(wins, speedups, origins, known, failed)


def _speedup(answer: Answer, kernel: str) -> float:
    """Over the fastest that would run instead."""
    replaced = answer.speedups["gemm"] if kernel == "onednn" else 1.0
    return answer.speedups[kernel] / max(1.0, replaced)
