"""`dfs bench inference`: the full model in stock forms and in our evaluation mode, and early exit, taking turns."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from dfs_engine.benchmarks.inference_config import BenchInferenceConfig, InferenceCase
from dfs_engine.benchmarks.inference_report import InferenceReport, draw
from dfs_engine.benchmarks.measure import TOTAL, Stats, append_csv, cpu_threads, environment, load_average, time_phases
from dfs_engine.benchmarks.options import LAYOUTS, split_ints
from dfs_engine.benchmarks.results import Measurement, Measurements
from dfs_engine.checks import split_choices
from dfs_engine.evaluation.operations import count_operations
from dfs_engine.inference import EarlyExit, MaxProbability, find_thresholds, prepare, simulate
from dfs_engine.models import MultiExitModel, create_model
from dfs_engine.models.multi_exit import run_model
from dfs_engine.runtime.progress_bar import progress_bar

# Batches of one size, which the rounds take in turn: who leaves early depends on the samples.
_NUM_BATCHES = 32
_LOGIT_BATCH = 256
# Largest error of the prepared model's logits, in root mean squares of the stock ones.
_TOLERANCES = {"fp32": 1e-3, "bf16": 0.2}

Batch = Tensor | dict[str, Tensor]


class _Samples(NamedTuple):
    """Test data: `collate(indices)` makes a batch; `logits` of every exit and `labels` of all of them, if real."""

    size: int
    collate: Callable[[list[int]], Batch]
    labels: Tensor | None = None
    logits: list[Tensor] | None = None


class _Subject(NamedTuple):
    """What is measured.

    Attributes:
        policies: by what they may lose, with the thresholds.
        costs: operations of each exit, with all that has run by then.
    """

    model: MultiExitModel
    stock: MultiExitModel
    prepared: MultiExitModel
    test: _Samples
    policies: dict[float, Any]
    costs: list[int]
    description: str


def run(config: BenchInferenceConfig) -> InferenceReport:
    """Times everything that `config` asks for.

    Raises:
        FileNotFoundError, ValueError: the run folder or its data cannot be read, or the run kept no validation data for
            the thresholds. RuntimeError: the prepared model computes something else than the stock one (nothing is
            timed then).
    """
    with cpu_threads(config.num_threads), torch.inference_mode():
        report = InferenceReport(config=config, stamp=environment())
        with progress_bar(0, "round", config.progress) as bar:
            bar.set_description("loading")
            subject = _from_run(config, bar) if config.run_dir else _random(config)
            report.description, report.has_accuracy = subject.description, subject.test.labels is not None
            for dtype in split_choices("dtypes", config.dtypes, _TOLERANCES):
                for size in split_ints("batch_size", config.batch_size):
                    rows = _time(config, subject, dtype, size, bar)
                    report.rows += rows
                    if config.output:
                        append_csv(Path(config.output), report.stamp, rows.csv_rows())
                    torch.compiler.reset()
        report.loadavg_end = load_average()
        if config.output and report.has_accuracy:
            report.picture = str(draw(report, Path(config.output).with_suffix(".png")))
    return report


def _stock(model: MultiExitModel, device: str | None = None) -> MultiExitModel:
    """The same weights without this engine's layers: dense, or, without referencing, the published formulation."""
    config = model.get_config()
    variant = "dense" if config["reference"] else "detach"
    stock = create_model(**{**config, "variant": variant, "device": device})
    if device is None:
        stock.load_state_dict(model.state_dict())
    return stock.eval().requires_grad_(False)


def _subject(model: MultiExitModel, test: _Samples, policies: dict[float, Any], description: str) -> _Subject:
    model.eval().requires_grad_(False)
    counted = create_model(**{**model.get_config(), "variant": "dense", "device": "meta"})
    costs = [cost.operations for cost in count_operations(counted)]
    return _Subject(model, _stock(model), prepare(model), test, policies, costs, description)


def _random(config: BenchInferenceConfig) -> _Subject:
    torch.manual_seed(config.seed)
    with torch.inference_mode(False):
        model = create_model(config.model, **config.options)
        test = _Samples(max(split_ints("batch_size", config.batch_size)), lambda rows: model.example_input(len(rows)))
        return _subject(model, test, {}, f"{config.model}, random weights on random data: early exit is not measured")


def _from_run(config: BenchInferenceConfig, bar: Any) -> _Subject:
    """Loads weights and data, and finds the thresholds on those that were kept out of training."""
    from dfs_engine.inference.saved_run import SavedRun, SavedRunConfig, data_of

    assert config.run_dir is not None
    with torch.inference_mode(False):
        moved = {} if config.data_root is None else {"root": str(config.data_root)}
        data_config = data_of(config.run_dir, **moved)
        saved = SavedRun(SavedRunConfig(path=config.run_dir, data=data_config, device="cpu", batch_size=_LOGIT_BATCH))
        data, drops = saved.load_data(), config.chosen_drops
        if drops and data.val is None:
            raise ValueError(
                f"run_dir: expected a run with data.val_fraction above 0, on whose samples thresholds are found, got "
                f"{config.run_dir} without. Train with it, or give --drops '' to measure the full model alone."
            )
        epoch = saved.description["epoch"]
        description = f"{saved.model.name}{'' if epoch is None else f', epoch {epoch}'}, on {data.description}"
        subject = _subject(saved.model, _Samples(0, lambda rows: {}), {}, description)
    bar.set_description("predicting test samples")
    test = _predict(saved, subject.prepared, data.test, config)
    policies = {}
    if drops:
        bar.set_description("predicting validation samples")
        val = _predict(saved, subject.prepared, data.val, config)
        logits, labels = cast(list[Tensor], val.logits), cast(Tensor, val.labels)
        full = float((logits[-1].argmax(-1) == labels).double().mean())
        for drop in drops:
            target = max(0.0, full - drop)
            policies[drop] = find_thresholds(
                logits, labels, MaxProbability, target_accuracy=target, costs=subject.costs
            ).policy
    return subject._replace(test=test, policies=policies)


def _predict(saved: Any, model: MultiExitModel, dataset: Any, config: BenchInferenceConfig) -> _Samples:
    """Every exit's logits of a dataset."""
    count = min(len(dataset), config.max_samples or len(dataset))
    if count < len(dataset):
        dataset = Subset(dataset, range(count))
    logits, labels = [], []
    for input, target in saved.batches(dataset):
        logits.append(run_model(model, input))
        labels.append(target)
    collate = saved.loader(dataset).collate_fn
    return _Samples(
        count,
        lambda rows: collate(dataset.__getitems__(rows))[0],
        torch.cat(labels),
        [torch.cat(parts) for parts in zip(*logits, strict=True)],
    )


class _Feed:
    """The batches that all cases of a round get, in each layout."""

    def __init__(self, test: _Samples, size: int, rounds: int, reads_tokens: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        count = min(rounds, _NUM_BATCHES if size > 1 else rounds)
        draws = [torch.randperm(test.size, generator=generator)[:size] for _ in range(count)]
        draws = [
            draw if len(draw) == size else torch.randint(test.size, (size,), generator=generator) for draw in draws
        ]
        batches = [test.collate(draw.tolist()) for draw in draws]
        self.samples = torch.cat(draws)
        self.batches = {
            layout: batches
            if reads_tokens
            else [cast(Tensor, each).contiguous(memory_format=LAYOUTS[layout]) for each in batches]
            for layout in ([""] if reads_tokens else LAYOUTS)
        }
        self.turn = 0

    def next(self) -> None:
        self.turn += 1

    def batch(self, layout: str) -> Any:
        batches = self.batches[layout]
        return batches[self.turn % len(batches)]


def _time(config: BenchInferenceConfig, subject: _Subject, dtype: str, size: int, bar: Any) -> Measurements:
    """One interleaving."""
    reads_tokens = len(subject.model.input_shape) == 1
    rounds = config.rounds_of(size)
    feed = _Feed(subject.test, size, rounds, reads_tokens)
    layout = "" if reads_tokens else "channels_last"
    cases: dict[InferenceCase, Callable[[Any], Any]] = {}
    for case in config.stock_cases(reads_tokens):
        model: nn.Module = _in_layout(subject.stock, case.layout)
        if case.mode == "compile":
            bar.set_description(f"{dtype}, batch {size}: compiling {case.layout}")
            model = cast(nn.Module, torch.compile(model, dynamic=reads_tokens))
        cases[case] = _caller(model)
    cases[InferenceCase("model", "eager", layout)] = _caller(subject.model)
    cases[InferenceCase("prepared", "eager", layout)] = _caller(subject.prepared)
    for drop, policy in subject.policies.items():
        predict = EarlyExit(subject.prepared, policy)
        cases[InferenceCase("early exit", f"drop {drop:g}", layout)] = _caller(predict)
    with _precision(dtype):
        _check(cases, feed, dtype)
        bar.set_description(f"{dtype}, batch {size}: timing {len(cases)} cases")
        bar.total = (bar.total or 0) + rounds + config.warmup if hasattr(bar, "total") else None

        def on_round() -> None:
            feed.next()
            bar.update()

        times = time_phases(
            {str(case): {TOTAL: _bound(call, feed, case.layout)} for case, call in cases.items()},
            rounds,
            config.warmup,
            max_seconds=config.max_seconds,
            on_round=on_round,
        )
    shape = "x".join(map(str, (size, *subject.model.input_shape)))
    return Measurements(
        Measurement(
            suite="inference",
            model=subject.model.name,
            variant=case.variant,
            backend_used="stock" if case.variant == "stock" else "auto",
            dtype=dtype,
            shape=shape,
            mode=case.mode,
            layout=case.layout,
            beta=None,
            metrics=_metrics(case, subject, times[str(case)][TOTAL], size),
        )
        for case in cases
    )


def _in_layout(model: MultiExitModel, layout: str) -> nn.Module:
    """A model whose convolutions' weights lie as the images do; the same one for tokens."""
    if layout != "channels_last":
        return model
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def _caller(model: Any) -> Callable[[Any], Any]:
    return lambda input: model(**input) if isinstance(input, dict) else model(input)


def _bound(call: Callable[[Any], Any], feed: _Feed, layout: str) -> Callable[[], Any]:
    return lambda: call(feed.batch(layout))


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    # Without its cache of weights, which lives as long as the block: people write one around each batch.
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False):
        yield


def _check(cases: dict[InferenceCase, Callable[[Any], Any]], feed: _Feed, dtype: str) -> None:
    """That all full models compute the same."""
    full = {case: call(feed.batch(case.layout)) for case, call in cases.items() if case.variant != "early exit"}
    (first, expected), *others = full.items()
    for case, logits in others:
        for index, (found, wanted) in enumerate(zip(logits, expected, strict=True)):
            error = float((found - wanted).float().abs().max() / wanted.float().square().mean().sqrt())
            if not error <= _TOLERANCES[dtype]:
                raise RuntimeError(
                    f"bench inference: expected {case} to compute what {first} does, got logits of exit {index + 1} "
                    f"that differ by {error:.2g} of their size. Nothing is timed."
                )


def _metrics(case: InferenceCase, subject: _Subject, seconds: list[float], size: int) -> dict[str, Stats]:
    ordered = sorted(seconds)
    found = {
        TOTAL: Stats.of(seconds),
        "p95": Stats.of([ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]]),
        "throughput": Stats.of([size / Stats.of(seconds).median]),
        "operations": Stats.of([float(subject.costs[-1])]),
    }
    logits, labels = subject.test.logits, subject.test.labels
    if logits is None or labels is None:
        return found
    if case.variant == "early exit":
        drop = float(case.mode.removeprefix("drop "))
        taken = simulate(logits, subject.policies[drop])
        shares = torch.bincount(taken.exits, minlength=len(logits)).double() / len(labels)
        found["operations"] = Stats.of([float(sum(s * c for s, c in zip(shares.tolist(), subject.costs, strict=True)))])
        found |= {f"share_exit{index + 1}": Stats.of([share]) for index, share in enumerate(shares.tolist())}
        classes = taken.classes
    else:
        classes = logits[-1].argmax(-1)
    found["accuracy"] = Stats.of([float((classes == labels).double().mean())])
    return found
