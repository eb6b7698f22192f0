"""Processes that are killed: torchrun starts all of them again, and the run ends as if nothing had happened."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfs_engine.training import checkpoint
from dfs_engine.training.files import read_tensors

EVERY = 2  # steps between checkpoints, in killed_run.py
SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.parametrize(
    "num_kills",
    [pytest.param(1, id="1-kill"), pytest.param(10, id="10-kills", marks=pytest.mark.slow)],
)
def test_a_killed_process_costs_one_restart_and_no_epoch(tmp_path, num_kills):
    seed = str(random.randrange(10**6))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", str(num_kills), str(SCRIPT), str(tmp_path), str(num_kills), seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-5000:]}"
    assert_same_end(tmp_path / "whole", tmp_path / "killed", seed)
    for rank in range(2):
        steps = [json.loads(line) for line in (tmp_path / f"steps{rank}").read_text().splitlines()]
        assert {step for _, step in steps} == set(range(1, 25))
        done_before = 0
        for attempt in range(num_kills + 1):
            own = [step for number, step in steps if number == attempt]
            if own:
                assert own == list(range(own[0], own[-1] + 1))
                assert done_before - EVERY < own[0] <= done_before + 1, (seed, attempt)
                done_before = max(own[-1], done_before)
        assert steps[-1][0] == num_kills  # restarts


def assert_same_end(whole: Path, killed: Path, seed: str) -> None:
    """Weights, average and optimizer bit for bit, and what the epochs were measured to be."""
    ends = [checkpoint.last(folder) for folder in (whole, killed)]
    assert ends[0].name == ends[1].name == "step-00000024"
    for name in ("model.safetensors", "model_1.safetensors"):
        one, other = (read_tensors(folder / name, name) for folder in ends)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), f"seed {seed}: {name}, {key}"
    one, other = (torch.load(folder / "optimizer.bin", weights_only=True) for folder in ends)
    for key, state in one["state"].items():
        assert torch.equal(state["momentum_buffer"], other["state"][key]["momentum_buffer"]), f"seed {seed}: {key}"
    rows, others = (list(csv.DictReader((folder / "metrics.csv").open())) for folder in (whole, killed))
    assert len(rows) == len(others) == 4
    for row, other in zip(rows, others, strict=True):
        for key in row.keys() - {"seconds", "samples_per_second"}:
            assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-12), f"seed {seed}: {key}"
