"""Variants take turns, every one has the same n, and the conditions are on record."""

import csv
import dataclasses
import itertools

import pytest
import torch

from dfs_engine.benchmarks import measure as measuring
from dfs_engine.benchmarks.measure import (
    CSV_COLUMNS,
    Stats,
    append_csv,
    environment,
    measure,
    measure_phases,
    peak_memory,
)


def test_variants_take_turns_and_none_always_follows_the_same_one():
    calls = []
    names = "abc"
    result = measure({name: lambda name=name: calls.append(name) for name in names}, rounds=3, warmup=1)
    turns = ["".join(calls[index : index + 3]) for index in range(0, len(calls), 3)]
    assert turns == ["abc", "abc", "bca", "cab"]
    assert {name: stats.n for name, stats in result.items()} == dict.fromkeys(names, 3)


def test_stats_are_the_order_statistics():
    shuffled = (torch.randperm(11) + 1).tolist()
    assert Stats.of(shuffled) == Stats(median=6, min=1, p20=3, p80=9, n=11)
    assert Stats.of([5]) == Stats(5, 5, 5, 5, 1)


def test_phases_run_in_order_and_add_up_to_the_step(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    order = []
    phases = {"forward": lambda: order.append("forward"), "backward": lambda: order.append("backward")}
    result = measure_phases({"only": phases}, rounds=2, warmup=0)["only"]
    assert order == ["forward", "backward"] * 2
    assert {name: stats.median for name, stats in result.items()} == {"forward": 1, "backward": 1, "step": 2}


@pytest.mark.parametrize("head_start", [False, True])
def test_on_cuda_the_cache_is_flushed_and_idling_is_not_timed(monkeypatch, head_start):
    """Of a stream that is made up, on which an event lasts a second and idling a hundred."""
    order, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            now[0] += 1
            self.at = now[0]

        def elapsed_time(self, end):
            return (end.at - self.at) * 1000

    def idle(cycles):
        order.append("idle")
        now[0] += 100

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(8, dtype=options["dtype"]))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", idle)
    phases = {"forward": lambda: order.append("forward"), "backward": lambda: order.append("backward")}
    found = measure_phases({"only": phases}, 1, 0, device="cuda", head_start=head_start)["only"]
    assert order == ["wait", *["idle"] * head_start, "forward", "backward", "wait"]
    assert {name: stats.median for name, stats in found.items()} == {"forward": 1, "backward": 1, "step": 2}


def test_the_time_budget_ends_whole_rounds(monkeypatch):
    clock = itertools.count(step=1)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    rounds = []
    result = measure(
        {"a": lambda: None, "b": lambda: None}, 1000, 0, max_seconds=20, on_round=lambda: rounds.append(None)
    )
    assert 1 < len(rounds) < 1000
    assert {stats.n for stats in result.values()} == {len(rounds)}


@pytest.mark.parametrize(("variants", "rounds"), [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_measure_is_an_error(variants, rounds):
    with pytest.raises(ValueError, match="expected rounds >= 1 and at least one variant"):
        measure(variants, rounds)


def test_peak_memory_counts_what_is_held_at_once():
    mib = 2**20

    def call() -> None:
        for _ in range(3):
            first = torch.empty(2 * mib, dtype=torch.int8)
            second = torch.empty(3 * mib, dtype=torch.int8)
            del first, second

    held_before = torch.empty(7 * mib, dtype=torch.int8)
    assert peak_memory(call) == 5 * mib
    assert held_before.numel() == 7 * mib


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (1e6, True)])
def test_a_busy_machine_is_flagged(monkeypatch, load, busy):
    monkeypatch.setattr(measuring.os, "getloadavg", lambda: (load, 0.0, 0.0))
    stamp = environment()
    assert stamp.busy is busy
    assert ("BUSY MACHINE" in str(stamp)) is busy
    assert stamp.torch == torch.__version__


def test_csv_is_appended_in_the_agreed_columns(tmp_path):
    path = tmp_path / "new" / "ops.csv"
    stamp = dataclasses.replace(environment(), git_sha="abc", loadavg=0.5)
    append_csv(path, stamp, [{"suite": "ops", "metric": "step", "median": 1.5}])
    append_csv(path, stamp, [{"suite": "ops", "metric": "forward"}, {"suite": "ops", "metric": "backward"}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [row["metric"] for row in rows] == ["step", "forward", "backward"]
    assert rows[0]["median"] == "1.5"
    assert rows[1]["git_sha"] == "abc"
    assert rows[1]["start"] == ""


def test_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="medain"):
        append_csv(tmp_path / "x.csv", environment(), [{"medain": 1}])
