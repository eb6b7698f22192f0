"""Processes that are killed: torchrun starts all of them again, and the run ends as if nothing had happened."""

import csv
import datetime
import json
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
import torch.distributed as dist

from dfs_engine.runtime.files import read_tensors
from dfs_engine.training import checkpoint, elastic, run_folder

EVERY = 2  # steps between checkpoints, in killed_run.py
SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.slow  # each start of two processes takes some seconds, and there are two and more
@pytest.mark.parametrize("num_kills", [1, 10])
def test_a_killed_process_costs_one_restart_and_no_epoch(tmp_path, num_kills):
    seed = str(secrets.randbelow(10**6))  # `random` is seeded for every test
    # Not --standalone, whose meeting point takes an agent that is stopped for a while for a dead one.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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


@pytest.fixture
def agent(monkeypatch):
    """This process as one that torchrun started, which may start it again."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(minutes=1))
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "2"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    return store


def test_a_launch_knows_the_runs_that_it_began(tmp_path, agent, monkeypatch):
    for name in ("mine", "other"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    elastic.note_begin(tmp_path / "mine")
    assert elastic.has_begun(tmp_path / "mine")
    run_folder.check_usable(tmp_path / "mine", resume=False)
    with pytest.raises(FileExistsError, match="Add --resume true"):
        run_folder.check_usable(tmp_path / "other", resume=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert not elastic.has_begun(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="Add --resume true"):
        run_folder.check_usable(tmp_path / "mine", resume=False)


def test_restarts_need_a_run_folder(tmp_path, agent, monkeypatch):
    with pytest.raises(ValueError, match=r"run_dir: expected a folder with torchrun's --max-restarts=2, got none"):
        elastic.check_can_restart(None)
    elastic.check_can_restart(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    elastic.check_can_restart(None)


ORPHAN = """
import os, signal, sys, time, filelock
filelock.FileLock(sys.argv[1]).acquire()
if os.fork():
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(2)
"""


def test_the_lock_that_a_killed_process_left_to_its_workers_is_waited_for(tmp_path, agent):
    elastic.note_begin(tmp_path)
    killed = subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path / ".lock")])
    assert killed.returncode == -signal.SIGKILL
    run_folder.check_usable(tmp_path, resume=False)


def test_the_first_process_looks_for_a_lock_for_all(tmp_path, monkeypatch):
    """They would find each other's."""
    with filelock.FileLock(tmp_path / ".lock"):
        with pytest.raises(BlockingIOError):
            run_folder.check_usable(tmp_path, resume=True)
        monkeypatch.setenv("RANK", "1")
        run_folder.check_usable(tmp_path, resume=True)


def test_half_of_a_removed_checkpoint_is_not_the_last(tmp_path):
    """A process was killed between giving the new one its name and removing the one of the same step."""
    for name in ("step-00000005", "step-00000010", "step-00000010-previous"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.last(tmp_path).name == "step-00000010"
    (tmp_path / "checkpoints" / "step-00000010").rmdir()  # killed before that
    assert checkpoint.last(tmp_path).name == "step-00000010-previous"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:1"),
        dist.DistBackendError("NCCL communicator was aborted"),
    ],
)
def test_a_peer_that_died_is_said(error):
    message = r"expected every process of the run to live.*--max-restarts"
    with pytest.raises(ConnectionError, match=message), elastic.peer_deaths():
        raise error
    with pytest.raises(RuntimeError, match="other"), elastic.peer_deaths():
        raise RuntimeError("other")
