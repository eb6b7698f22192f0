"""`dfs bench gradients` compares before it times, and keeps slower cases in its table."""

import json

import pytest

from dfs_engine.benchmarks import gradients
from dfs_engine.benchmarks.gradients import BenchGradientsConfig, ExitGradientsOf, gradients_section, run
from dfs_engine.benchmarks.results import Measurements

TINY = {"options": {"width": 8}, "batch_size": 4, "image_size": 16, "rounds": 2, "progress": False}


@pytest.fixture
def forms():
    try:
        import torchjd  # noqa: F401
    except ModuleNotFoundError:
        return "autograd,dfs"
    return "autograd,torchjd,dfs"


def test_every_case_is_timed_and_stays_in_the_table(forms, tmp_path):
    path = tmp_path / "results" / "gradients_vgg7_64.csv"
    path.parent.mkdir()
    config = BenchGradientsConfig(**TINY, forms=forms, exit_gradients="own,whole", allocators="stock", output=str(path))
    report = run(config)
    cases = {(row.backend_used, row.mode, row.layout) for row in report.rows}
    assert cases == {
        (form, routing, layout)
        for form in forms.split(",")
        for routing in ("own", "whole")
        for layout in ("nchw", "channels_last")
    }
    assert {stats.n for row in report.rows for stats in row.timings.values()} == {2}
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    # At beta = 0.5 each layer of dfs costs 0.75 of a product where autograd computes two, but for the first and last.
    ratios = [row["ratios"]["autograd"]["flops"] for row in found["rows"] if row["form"] == "dfs"]
    assert all(ratio > 1.4 for ratio in ratios)
    assert [one.metrics for one in Measurements.read(path)] == [one.metrics for one in report.rows]
    lines = list(gradients_section(path))
    assert len([line for line in lines if line.startswith(("| autograd", "| torchjd", "| **dfs**"))]) == len(cases)
    assert not list(gradients_section(tmp_path / "results" / "none.csv"))


def test_nothing_is_timed_where_the_gradients_differ(monkeypatch):
    results = ExitGradientsOf.results

    def wrong(self):
        found = results(self)
        return [1.01 * row for row in found] if self.case.form == "dfs" else found

    monkeypatch.setattr(ExitGradientsOf, "results", wrong)
    monkeypatch.setattr(gradients, "measure_phases", lambda *args, **options: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match="bench gradients: expected dfs/own/channels_last/stock in float64"):
        run(BenchGradientsConfig(**TINY, forms="dfs"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": "autograd,jax"}, "forms: expected"),
        ({"exit_gradients": "half"}, "exit_gradients: expected"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"beta": 2.0}, "beta: expected"),
        ({"allocators": "slow"}, "allocators: expected"),
    ],
)
def test_errors_name_the_flag(options, message):
    with pytest.raises(ValueError, match=message):
        BenchGradientsConfig(**options)
