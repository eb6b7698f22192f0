"""`dfs bench plot`: the paper's figures and the roofline, drawn from the benchmarks' CSV files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dfs_engine.benchmarks.options import check_least
from dfs_engine.benchmarks.results import Measurement, Measurements, csv_files

# variant -> (name in the figures, colour)
_METHODS = {
    "byot": ("BYOT", "#d55e00"),
    "dense": ("DSN (dense)", "#0072b2"),
    "detach": ("DFS, published form (detach)", "#999999"),
    "split": ("DFS, two stock calls (split)", "#cc79a7"),
    "dfs": ("DFS (this engine)", "#009e73"),
}
_PAPER_METHODS = ("byot", "dense", "dfs")
_PARTS = {"forward": "#56b4e9", "backward": "#e69f00", "other": "#bbbbbb"}
_OP_MARKERS = {"conv2d": "o", "linear": "s"}
_PHASE_COLOURS = {"forward": "#56b4e9", "backward": "#e69f00", "grad_input": "#009e73", "grad_weight": "#cc79a7"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPlotConfig:
    """What `dfs bench plot` draws, and from what. Each PNG file is written beside its CSV file.

    Attributes:
        results: A CSV file of `dfs bench train` or `dfs bench ops`, or a folder of them.
        beta: The split variants' beta, in figures that do not compare several.
        batch_size: Batch size in the figure of forward, backward and the rest. Default: 100 where that was measured,
            else the largest.
    """

    results: Path = Path("benchmarks/results")
    beta: float = 0.5
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_least(self, {"batch_size": 1})


@dataclass(frozen=True, slots=True)
class PlotReport:
    """The files drawn."""

    files: list[Path]

    def table(self) -> str:
        """One line a file."""
        return "\n".join(map(str, self.files)) or "No figure can be drawn from these measurements."

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        return {"files": [str(file) for file in self.files]}


def run(config: BenchPlotConfig) -> PlotReport:
    """Draws every figure that the measurements suffice for.

    Raises:
        FileNotFoundError, ValueError: no measurements there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for file in csv_files(config.results):
        measurements = Measurements.read(file)
        for name, title, draw in _figures(measurements, config):
            figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
            draw(axes)
            axes.set_title(title, fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
            stamp = measurements[-1].stamp
            machine = f"{stamp['device_name']}, {stamp['num_threads']} threads"
            figure.supxlabel(machine, fontsize=7, color="#666666")
            drawn.append(file.with_name(f"{file.stem}_{name}.png"))
            figure.savefig(drawn[-1], dpi=150)
            pyplot.close(figure)
    return PlotReport(drawn)


Figure = tuple[str, str, Callable[[Any], None]]


def _figures(measurements: Measurements, config: BenchPlotConfig) -> Iterator[Figure]:
    """(name, title, what draws it) of each figure."""
    for dtype in measurements.distinct("dtype"):
        of_dtype = measurements.of(dtype=dtype)
        train = of_dtype.of(suite="train")
        for model in train.distinct("model"):
            yield from _train_figures(train.of(model=model), config, f"{model}_{dtype}", f"{model}, {dtype}")
        ops = of_dtype.of(suite="ops")
        for op in _OP_MARKERS:
            of_op = ops.of(op=op)
            if len(of_op.distinct("beta")) > 1:
                title = f"{op}, {dtype}: backward against the dense one, each in its best layout"
                yield f"{op}_{dtype}_backward_beta", title, partial(_ops_beta, rows=of_op)
        peak = ops.of(op="machine")
        if any(ops.of(op=op) for op in _OP_MARKERS) and peak:
            # Bandwidth is of no dtype.
            bandwidth = measurements.of(op="machine", dtype="")
            title = f"Roofline, {dtype}: roofs are the best stock matrix product and a copy, on this machine"
            draw = partial(_roofline, rows=ops, peak=peak, bandwidth=bandwidth, beta=config.beta)
            yield f"{dtype}_roofline", title, draw


def _train_figures(train: Measurements, config: BenchPlotConfig, name: str, subject: str) -> Iterator[Figure]:
    sizes = sorted({row.batch_size for row in train})
    betas = train.distinct("beta")
    beta = config.beta if config.beta in betas or not betas else betas[0]
    best = {
        (variant, size): values
        for variant in _METHODS
        for size in sizes
        if (values := train.of(variant=variant, batch_size=size, beta=(None, beta)).fastest()) is not None
    }
    if len(sizes) > 1:
        title = f"Training throughput, {subject}, beta {beta:g}"
        yield f"{name}_throughput", title, partial(_throughput, best=best)
    size = config.batch_size or (100 if 100 in sizes else sizes[-1])
    bars = {variant: values for (variant, of_size), values in best.items() if of_size == size}
    if bars:
        title = f"One training step, {subject}, batch {size}, beta {beta:g}, each in its best form"
        yield f"{name}_parts", title, partial(_parts, bars=bars)
    if len(betas) > 1:
        of_size = train.of(batch_size=size)
        title = f"Backward of a training step, {subject}, batch {size}"
        yield f"{name}_backward_beta", title, partial(_train_beta, rows=of_size, betas=betas)


def _throughput(axes: Any, best: dict[tuple[str, int], Measurement]) -> None:
    for variant in _PAPER_METHODS:
        label, colour = _METHODS[variant]
        points = [(size, values["step"]) for (of, size), values in best.items() if of == variant]
        if points:
            sizes = [size for size, _ in points]
            axes.plot(sizes, [size / step.median for size, step in points], "o-", color=colour, label=label)
            slow, fast = [size / step.p80 for size, step in points], [size / step.p20 for size, step in points]
            axes.fill_between(sizes, slow, fast, color=colour, alpha=0.15)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second (median; band p20 to p80)")
    axes.set_ylim(bottom=0)


def _parts(axes: Any, bars: dict[str, Measurement]) -> None:
    bottoms = [0.0] * len(bars)
    for part, colour in _PARTS.items():
        heights = []
        for values in bars.values():
            rest = ("loss", "update") if part == "other" else (part,)
            heights.append(sum(values[phase].median for phase in rest) * 1e3)
        axes.bar(range(len(bars)), heights, bottom=bottoms, color=colour, label=part, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for index, total in enumerate(bottoms):
        axes.text(index, total, f"{total:.0f}", ha="center", va="bottom", fontsize=9)
    labels = [_METHODS[variant][0].replace(", ", ",\n").replace(" (", "\n(") for variant in bars]
    axes.set_xticks(range(len(bars)), labels, fontsize=8)
    axes.set_ylabel("ms (sum of medians)")
    axes.margins(y=0.12)


def _train_beta(axes: Any, rows: Measurements, betas: list[float]) -> None:
    dense = rows.of(variant="dense").fastest("backward")
    for variant in ("detach", "split", "dfs"):
        label, colour = _METHODS[variant]
        of_beta = [(beta, rows.of(variant=variant, beta=beta).fastest("backward")) for beta in betas]
        points = [(beta, values) for beta, values in of_beta if values is not None]
        if not points:
            continue
        measured = [(beta, values["backward"].median * 1e3) for beta, values in points]
        axes.plot(*zip(*measured, strict=True), "o-", color=colour, label=label)
        if variant == "dfs" and dense:
            per_flop = dense["backward"].median / dense["flops_backward"].median
            allowed = [(beta, per_flop * values["flops_backward"].median * 1e3) for beta, values in points]
            axes.plot(*zip(*allowed, strict=True), ":", color=colour, label="what FLOPs alone imply, from dense")
    if dense:
        axes.axhline(dense["backward"].median * 1e3, color=_METHODS["dense"][1], ls="--", label=_METHODS["dense"][0])
    axes.set_xlabel("beta, the share of channels that deeper exits train")
    axes.set_ylabel("backward, ms (median)")
    axes.set_ylim(bottom=0)


def _ops_beta(axes: Any, rows: Measurements) -> None:
    betas = rows.distinct("beta")
    for index, model in enumerate(rows.distinct("model")):
        label = f"{model}, one line a shape"
        for shape in rows.of(model=model).distinct("shape"):
            of_shape = rows.of(model=model, shape=shape)
            dense = of_shape.of(variant="dense").fastest("backward")
            points = [(beta, _own(of_shape.of(beta=beta)).fastest("backward")) for beta in betas]
            ratios = [(b, own["backward"].median / dense["backward"].median) for b, own in points if own and dense]
            if ratios:
                axes.plot(*zip(*ratios, strict=True), "o-", ms=3, lw=1, color=f"C{index}", label=label)
                label = "_"  # not in the legend
    axes.plot(betas, [(1 + beta) / 2 for beta in betas], "k:", label="what FLOPs alone imply")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xlabel("beta")
    axes.set_ylabel("time of this engine's backward / dense")
    axes.set_ylim(bottom=0)


def _own(rows: Measurements) -> Measurements:
    """This engine's kernels, where they were measured, else its aten backend."""
    return rows.of(backend_used="cpp") or rows.of(variant="dfs")


def _roofline(axes: Any, rows: Measurements, peak: Measurements, bandwidth: Measurements, beta: float) -> None:
    roof = peak[0]["peak"].median
    slope = bandwidth[0]["bandwidth"].median
    intensities: list[float] = []
    for op, marker in _OP_MARKERS.items():
        of_op = _own(rows.of(op=op, beta=beta))
        subjects = sorted({(row.model, row.shape) for row in of_op})
        for phase, colour in _PHASE_COLOURS.items():
            points = []
            for model, shape in subjects:
                values = of_op.of(model=model, shape=shape).fastest(phase)
                if values:
                    flops = values[f"flops_{phase}"].median
                    points.append((flops / values["bytes"].median, flops / values[phase].median / 1e9))
            if points:
                style = {"color": colour, "marker": marker, "alpha": 0.8, "label": f"{op} {phase}", "s": 28}
                axes.scatter(*zip(*points, strict=True), **style)
                intensities += [x for x, _ in points]
    span = [min([*intensities, 1.0]), max([*intensities, 2 * roof / slope])]
    ridge = roof / slope
    xs = [span[0], min(max(ridge, span[0]), span[1]), span[1]]
    axes.plot(xs, [min(roof, slope * x) / 1e9 for x in xs], "k-", lw=1)
    axes.text(span[1], roof / 1e9, f"{roof / 1e9:.0f} GFLOP/s", ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"FLOP per byte of input, output and weight (memory roof {slope / 1e9:.0f} GB/s)")
    axes.set_ylabel("GFLOP/s (median)")
