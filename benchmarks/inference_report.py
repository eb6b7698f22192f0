"""What `dfs bench inference` found: as a table, as JSON, as a picture of accuracy against time."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dfs_engine.benchmarks import markdown
from dfs_engine.benchmarks.inference_config import BenchInferenceConfig
from dfs_engine.benchmarks.measure import TOTAL, Environment
from dfs_engine.benchmarks.results import Measurement, Measurements

_HEADER = (
    "dtype", "batch", "variant", "mode", "layout", "n", "per second", "p50 ms", "p95 ms", "min ms", "vs best stock",
    "vs prepared", "by operations", "accuracy",
)  # fmt: skip
_COLOURS = {"stock": "#0072b2", "model": "#999999", "prepared": "#d55e00", "early exit": "#009e73"}


@dataclass(slots=True)
class InferenceReport:
    """All rows of a run, slower ones included."""

    config: BenchInferenceConfig
    stamp: Environment
    rows: Measurements = field(default_factory=Measurements)
    description: str = ""
    has_accuracy: bool = False
    loadavg_end: float = 0.0
    picture: str = ""

    def gain(self, row: Measurement, variant: str) -> float | None:
        """How much faster a row is than the fastest of a variant at its batch size; None where that was not timed."""
        best = self.rows.of(dtype=row.dtype, shape=row.shape, variant=variant).fastest()
        return None if best is None else best[TOTAL].median / row[TOTAL].median

    def gain_by_operations(self, row: Measurement) -> float | None:
        """Of early exit over the full model, if time went with operations."""
        full = self.rows.of(dtype=row.dtype, shape=row.shape, variant="prepared").fastest()
        return None if full is None else full["operations"].median / row["operations"].median

    def table(self) -> str:
        """Markdown: conditions, then one row per case."""
        data = (
            "Early exit: thresholds from samples kept out of training; accuracy and operations on the test samples."
            if self.has_accuracy
            else "Without a run folder (--run_dir) nobody knows who would leave early."
        )
        lines = [
            f"Inference of {self.description}; cases interleaved.",
            *str(self.stamp).splitlines(),
            data,
            f"Load average at the end {self.loadavg_end:.2f}. Ratios of medians: the fastest stock form, and the "
            "prepared full model, over this row; by operations: the full model's over this row's.",
            "",
            *markdown.table(_HEADER, map(self._cells, self.rows)),
        ]
        return "\n".join([*lines, f"\n{self.picture}"] if self.picture else lines)

    def _cells(self, row: Measurement) -> list[object]:
        time = row[TOTAL]
        ratios = (self.gain(row, "stock"), self.gain(row, "prepared"), self.gain_by_operations(row))
        return [
            row.dtype, row.batch_size, row.variant, row.mode, row.layout or "-", time.n,
            f"{row['throughput'].median:.0f}", f"{time.median * 1e3:.2f}", f"{row['p95'].median * 1e3:.2f}",
            f"{time.min * 1e3:.2f}", *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{row['accuracy'].median:.2%}" if "accuracy" in row else "-",
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [
            {
                "dtype": row.dtype,
                "batch_size": row.batch_size,
                "variant": row.variant,
                "mode": row.mode,
                "layout": row.layout,
                "metrics": {name: asdict(stats) for name, stats in row.metrics.items()},
                "gain_over_best_stock": self.gain(row, "stock"),
                "gain_over_prepared": self.gain(row, "prepared"),
                "gain_by_operations": self.gain_by_operations(row),
            }
            for row in self.rows
        ]
        config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.config).items()}
        return {
            "config": config,
            "description": self.description,
            "environment": asdict(self.stamp),
            "loadavg_end": self.loadavg_end,
            "rows": rows,
        }


def draw(report: InferenceReport, path: Path) -> Path:
    """Accuracy against milliseconds a sample, one panel a batch size and dtype; returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = list(dict.fromkeys((row.dtype, row.batch_size) for row in report.rows))
    figure, panels = pyplot.subplots(1, len(runs), figsize=(4.2 * len(runs), 4.2), squeeze=False, layout="constrained")
    for axes, (dtype, size) in zip(panels[0], runs, strict=True):
        rows = report.rows.of(dtype=dtype, batch_size=size)
        for variant, colour in _COLOURS.items():
            of_variant = rows.of(variant=variant)
            chosen = of_variant if variant == "early exit" else Measurements(of_variant.ranked()[:1])
            points = [(row[TOTAL].median / size * 1e3, row["accuracy"].median * 100) for row in chosen]
            if points:
                label = {"stock": "full model, best stock form", "model": "full model, as trained"}.get(
                    variant, variant
                )
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
        axes.set_title(f"batch {size}, {dtype}", fontsize=10)
        axes.set_xlabel("ms a sample (median)")
        axes.set_ylabel("accuracy on test, %")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    stamp = report.stamp
    figure.suptitle(report.description, fontsize=10)
    figure.supxlabel(f"{stamp.device_name}, {stamp.num_threads} threads", fontsize=7, color="#666666")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
