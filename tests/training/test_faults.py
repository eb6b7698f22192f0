"""What ends a run from outside: signals, a full disk, another process, too little memory. What was saved stays."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import zlib
from dataclasses import replace

import filelock
import pytest
import torch
import yaml

from dfs_engine.cli import main
from dfs_engine.models.weights import load_model
from dfs_engine.training import checkpoint, journal, report
from dfs_engine.training.config import OptimConfig
from dfs_engine.training.signals import Interrupted
from dfs_engine.training.trainer import Trainer

TINY = [
    *("--data.name", "synthetic", "--data.synthetic_train", "8", "--data.synthetic_test", "3"),
    *("--data.image_size", "8", "--batch_size", "2", "--epochs", "2", "--num_threads", "1", "--device", "cpu"),
    *("--tensorboard", "false", "--model.options", "{width: 4}"),
]


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal():
    """A shell starts its background jobs with SIGINT ignored, and a run leaves what is ignored as it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fails(capsys, status, *line):
    """Runs the command; returns its last line on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(line)
    error = capsys.readouterr().err
    assert caught.value.code == status, error
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("dfs: error: ")
    return last


def weights(trainer):
    return {name: value.clone() for name, value in trainer.raw_model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# Signals ------------------------------------------------------------------------------------------------------------


def at_call(monkeypatch, owner, name, number, action):
    """Calls `action` before the call of that number, counted from 1."""
    function, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda signum: signum.name)
@pytest.mark.parametrize(
    ("name", "number", "saved_at"),
    [
        ("train_step", 2, 2),  # in the middle of an epoch
        ("train_step", 5, 5),  # in its last step: before the evaluation
        ("evaluate", 1, 5),
        ("_save_checkpoint", 1, 5),
    ],
)
def test_a_signal_saves_at_the_next_boundary(
    make_config, make_model, tmp_path, monkeypatch, signum, name, number, saved_at
):
    whole = Trainer(make_config(run_dir=tmp_path / "whole", epochs=2), model=make_model())
    expected = whole.fit()
    config = make_config(epochs=2)
    trainer = Trainer(config, model=make_model())
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, name, number, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(Interrupted) as caught:
            trainer.fit()
    assert signal.getsignal(signum) is before
    assert caught.value.signum == signum
    assert f"stopped by {signum.name} after step {saved_at} (epoch 1)" in str(caught.value)
    assert "resume=True" in str(caught.value)
    assert checkpoints(config.run_dir) == [f"step-{saved_at:08d}"]
    torch.manual_seed(99)
    resumed = Trainer(replace(config, resume=True), model=make_model())
    result = resumed.fit()
    assert_same(weights(resumed), weights(whole))
    assert [row["train_loss"] for row in result.rows] == [row["train_loss"] for row in expected.rows]
    assert result.metrics == expected.metrics
    assert checkpoints(config.run_dir) == ["step-00000010"]


def test_a_second_signal_stops_at_once(make_config, make_model, monkeypatch, tree):
    config = make_config()
    trainer = Trainer(config, model=make_model())

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    at_call(monkeypatch, Trainer, "train_step", 7, twice)
    with pytest.raises(Interrupted, match=r"stopped by SIGINT after step 6 \(epoch 2\).*step-00000005"):
        trainer.fit()
    assert checkpoints(config.run_dir) == ["step-00000005"]


def test_a_second_signal_while_saving_leaves_the_checkpoint_before(make_config, make_model, monkeypatch):
    config = make_config()
    trainer = Trainer(config, model=make_model())

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_call(monkeypatch, checkpoint, "_complete", 2, twice)
    with pytest.raises(Interrupted, match="step-00000005"):
        trainer.fit()
    assert checkpoints(config.run_dir) == ["step-00000005"]
    checkpoint.latest(config.run_dir, trainer.raw_model.get_config())


def test_an_ignored_signal_stays_ignored(make_config, make_model, monkeypatch):
    """As under nohup, and behind a shell's `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_call(monkeypatch, Trainer, "train_step", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        Trainer(make_config(epochs=1), model=make_model()).fit()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_resume(capsys, tmp_path, monkeypatch, signum, status):
    run_dir = tmp_path / "a run"
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "train_step", 3, lambda: os.kill(os.getpid(), signum))
        assert main(["train", *TINY, "--run_dir", str(run_dir)]) == status
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith(f"dfs: stopped by {signum.name} after step 3 (epoch 1). The last good checkpoint is")
    assert last.endswith(f"Go on with: dfs train --resume --run_dir '{run_dir}'")
    assert main(["train", "--resume", "--run_dir", str(run_dir)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_of_a_terminal_reaches_the_whole_group(tmp_path, workers):
    """The data loader's workers are in the group too, and must neither die of it nor print."""
    line = [*TINY, "--epochs", "1000", "--run_dir", str(tmp_path / "run"), "--data.num_workers", str(workers)]
    command = [sys.executable, "-m", "dfs_engine", "train", *line, "--log_every_steps", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = []
    for text in process.stderr:
        lines.append(text)
        if "step 2/" in text:
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert rest.count("saving after this step") == 1
    assert checkpoints(tmp_path / "run")


DISTRIBUTED = """
import os, signal, sys
from dfs_engine.cli import main
from dfs_engine.training.trainer import Trainer

step = Trainer.train_step
def signalled(self, *batch):
    losses = step(self, *batch)
    if self.progress.step == 3 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # one of them alone: the other has to hear of it
    return losses
Trainer.train_step = signalled
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_processes_agree_on_the_step(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [*TINY, "--epochs", "50", "--run_dir", str(tmp_path / "run")]
    done = subprocess.run([*launch, str(script), "train", *line], capture_output=True, text=True, timeout=300)
    assert "stopped by SIGTERM after step 4 (epoch 1)" in done.stderr, done.stderr[-3000:]
    assert "exitcode  : 143" in done.stderr.replace("exitcode : ", "exitcode  : ")
    assert "torchrun --nproc_per_node 2 -m dfs_engine train --resume --run_dir" in done.stderr
    assert checkpoints(tmp_path / "run") == ["step-00000004"]
    more = ["train", "--resume", "--run_dir", str(tmp_path / "run"), "--epochs", "2"]
    done = subprocess.run([*launch, "-m", "dfs_engine", *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoints(tmp_path / "run") == ["step-00000008"]


# A full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def largest_file():
    """Limits the size of every file that this process writes, as a full disk does: the write fails where it stands."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_anywhere_leaves_the_checkpoint_before(make_config, make_model, largest_file, monkeypatch):
    monkeypatch.setattr(report, "plot_metric", lambda *_, **__: None)  # the largest file, before all others
    config = make_config(epochs=1)
    first = Trainer(config, model=make_model())
    first.fit()
    good = config.run_dir / "checkpoints" / "step-00000005"
    sizes = {path.name: path.stat().st_size for path in config.run_dir.rglob("*") if path.is_file()}
    assert {"optimizer.bin", "random_states_0.pkl", "manifest.json", "model.safetensors", "metrics.csv"} < set(sizes)
    limits = sorted({part for size in sizes.values() if size for part in (1, size // 2, size - 1, size + 200)})
    where = set()
    resumed = replace(config, resume=True, epochs=2)
    for limit in limits:
        trainer = Trainer(resumed, model=make_model())
        largest_file(limit)
        try:
            trainer.fit()
            break
        except OSError as error:
            message = str(error)
        finally:
            largest_file(resource.RLIM_INFINITY)
        where.add(message.split("expected to write ")[1].split(", got")[0].removeprefix(str(config.run_dir)))
        assert "of the disk are free" in message
        assert f"The last good checkpoint is {good}" in message
        assert checkpoints(config.run_dir) == [good.name]
        assert not list(config.run_dir.rglob("*.partial"))
        checkpoint.latest(config.run_dir, trainer.raw_model.get_config())
        load_model(config.run_dir, model=make_model())
    assert limit > 2000
    assert where == {"/config.yaml", "/model.safetensors", "/checkpoints/.step-00000010.partial"}
    assert trainer.progress.epoch == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json"])
def test_each_file_of_a_checkpoint_may_fail(make_config, make_model, largest_file, name):
    """At every 97th byte of it."""
    config = make_config(epochs=1)
    trainer = Trainer(config, model=make_model())
    trainer.fit()
    good = config.run_dir / "checkpoints" / "step-00000005"
    size = (good / name).stat().st_size
    description = {
        "model": {},
        "config": {},
        "progress": {},
        "padding": "x" * 50_000 if name == "manifest.json" else "",
    }
    num_failed = 0
    for limit in range(0, size, 97):
        try:
            largest_file(limit)
            checkpoint.save(trainer.accelerator, config.run_dir, step=6, description=description)
        except OSError:
            largest_file(resource.RLIM_INFINITY)
            num_failed += 1
            assert checkpoints(config.run_dir) == [good.name]
    assert num_failed == len(range(0, size, 97))


def test_a_full_disk_is_status_1_and_one_line(capsys, tmp_path, largest_file):
    run_dir = tmp_path / "run"
    assert main(["train", *TINY, "--epochs", "1", "--run_dir", str(run_dir)]) == 0
    largest_file(3000)
    error = fails(capsys, 1, "train", "--resume", "--run_dir", str(run_dir), "--epochs", "2")
    largest_file(resource.RLIM_INFINITY)
    assert "training stopped after step" in error
    assert error.endswith(f"Go on with: dfs train --resume --run_dir {run_dir}")
    assert checkpoints(run_dir) == ["step-00000004"]
    assert main(["train", "--resume", "--run_dir", str(run_dir), "--epochs", "2"]) == 0


def test_a_full_disk_under_tensorboard(make_config, make_model, largest_file):
    """It writes in a thread of its own, whose error must neither be printed nor lost."""
    config = make_config(tensorboard=True, epochs=1)
    trainer = Trainer(config, model=make_model())

    def fill():
        largest_file(10)

    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", printed.append)
        patch.setattr(journal, "write_text", lambda *_: fill())  # before TensorBoard's own file
        with pytest.raises(OSError, match="training stopped after step 0"):
            trainer.fit()
    largest_file(resource.RLIM_INFINITY)
    assert not printed


def test_what_a_killed_process_left_goes_with_the_next_checkpoint(make_config, make_model):
    config = make_config(epochs=1)
    left = config.run_dir / "checkpoints" / ".step-00000003.partial"
    left.mkdir(parents=True)
    (left / "optimizer.bin").write_bytes(b"half")
    Trainer(replace(config, resume=False, run_dir=config.run_dir / "other"), model=make_model()).fit()
    (config.run_dir / "checkpoints").rename(config.run_dir / "other" / "left")
    for path in (config.run_dir / "other" / "left").iterdir():
        path.rename(config.run_dir / "other" / "checkpoints" / path.name)
    Trainer(replace(config, resume=True, run_dir=config.run_dir / "other", epochs=2), model=make_model()).fit()
    assert checkpoints(config.run_dir / "other") == ["step-00000010"]


# The run folder ----------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_run_folder_is_one_process_s(make_config, make_model, capsys):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    environment = config.run_dir / "environment.yaml"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(config.run_dir / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        content = yaml.safe_load(environment.read_text())
        assert content["process"]["pid"] == os.getpid()
        content["process"] = {"pid": holder.pid, "host": "here"}
        environment.write_text(yaml.safe_dump(content))
        for resume in ([], ["--resume"]):
            error = fails(capsys, 2, "train", *TINY, "--run_dir", str(config.run_dir), *resume)
            assert "run_dir: expected a folder that no run is writing to" in error
            assert f"process {holder.pid} on here writes to" in error
        environment.unlink()
        with pytest.raises(BlockingIOError, match="another process writes to"):
            Trainer(replace(config, resume=True), model=make_model())
    finally:
        holder.kill()
        holder.communicate()
    Trainer(replace(config, resume=True), model=make_model()).fit()  # the lock died with its process


def test_the_lock_is_held_while_training_and_given_back(make_config, make_model, monkeypatch):
    config = make_config(epochs=1)
    refused = []

    def second():
        with pytest.raises(BlockingIOError) as caught:
            Trainer(replace(config, run_dir=config.run_dir), model=make_model())
        refused.append(str(caught.value))

    at_call(monkeypatch, Trainer, "train_step", 2, second)
    Trainer(config, model=make_model()).fit()
    assert f"process {os.getpid()} on" in refused[0]
    filelock.FileLock(config.run_dir / ".lock").acquire(timeout=0).lock.release()


def test_a_run_that_went_on_meanwhile(make_config, make_model):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    waiting = Trainer(replace(config, resume=True, epochs=2), model=make_model())
    Trainer(replace(config, resume=True, epochs=2), model=make_model()).fit()
    with pytest.raises(FileExistsError, match="got another run's checkpoint in it"):
        waiting.fit()
    two = [Trainer(replace(config, run_dir=config.run_dir / "fresh"), model=make_model()) for _ in range(2)]
    two[0].fit()
    with pytest.raises(FileExistsError, match="got another run's checkpoint in it"):
        two[1].fit()


def test_a_run_folder_that_is_none(capsys, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("text")
    for path in (file, file / "run", file / "run" / "deeper"):
        for resume in ([], ["--resume"]):
            error = fails(capsys, 2, "train", *TINY, "--run_dir", str(path), *resume)
            assert f"run_dir: expected a folder, got {path}, where {file} is a file" in error
    assert file.read_text() == "text"
    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        error = fails(capsys, 2, "train", *TINY, "--run_dir", str(tmp_path / "new" / "run"))
    assert f"run_dir: expected a folder that can be written, got {tmp_path / 'new' / 'run'}" in error
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere" / "further")
    error = fails(capsys, 1, "train", *TINY, "--run_dir", str(link))
    assert f"run_dir: expected a folder that can be written, got {link}" in error


# Files that are not what they should be ----------------------------------------------------------------------------


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


@pytest.fixture
def saved_run(make_config, make_model):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    return config, config.run_dir / "checkpoints" / "step-00000005"


def resume(config, make_model, **changes):
    return Trainer(replace(config, resume=True, **changes), model=make_model())


def forge(folder, name, content):
    """A file, and its size and checksum in the manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = [len(content), zlib.crc32(content)]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("form", ["torch", "pickle", "garbage", "empty", "another"])
def test_a_forged_file_runs_no_code(saved_run, make_model, tmp_path, monkeypatch, name, form):
    config, folder = saved_run
    trap = tmp_path / "trap"
    monkeypatch.setenv("TRAP", str(trap))
    file = tmp_path / "forged"
    if form == "torch":
        torch.save({"state": {}, "param_groups": Trap(), "random_state": Trap()}, file)
    elif form == "another":
        torch.save({"something": 1}, file)
    else:
        file.write_bytes({"pickle": pickle.dumps(Trap()), "garbage": b"PK\x03\x04 nonsense", "empty": b""}[form])
    forge(folder, name, file.read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint: expected .*No code in a file is run"):
        resume(config, make_model)
    assert not trap.exists()
    assert form not in ("torch", "pickle") or pickle.loads(pickle.dumps(Trap())) is None
    assert form not in ("torch", "pickle") or trap.exists(), "the trap works"


def test_a_file_that_the_manifest_does_not_list(saved_run, make_model):
    config, folder = saved_run
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint: expected the files that .* lists, got pytorch_model.bin too"):
        resume(config, make_model)


def test_a_manifest_without_the_weights(saved_run, make_model):
    config, folder = saved_run
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["optimizer.bin"]
    (folder / "optimizer.bin").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"checkpoint: expected .*optimizer\.bin"):
        resume(config, make_model)


@pytest.mark.parametrize("key", ["files", "model", "config", "progress"])
@pytest.mark.parametrize("value", ["missing", None, [], "text"], ids=str)
def test_a_manifest_without_its_keys(saved_run, make_model, key, value):
    config, folder = saved_run
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[key] = value
    if value == "missing":
        del manifest[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"checkpoint: expected .*manifest.json with .*got no {key}"):
        resume(config, make_model)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("progress", {}),
        ("progress", {"epoch": -1}),
        ("progress", {"step": "many"}),
        ("progress", {"loss_sums": [1.0]}),
        ("progress", {"more": 1}),
        ("config", {}),
        ("config", {"optim": None}),
        ("config", {"optim": {"lr": "high"}}),
        ("config", {"epochs": None}),
        ("files", {"optimizer.bin": None}),
        ("files", {"../../config.yaml": [1, 1]}),
    ],
    ids=str,
)
def test_a_manifest_with_nonsense(saved_run, make_model, section, value):
    config, folder = saved_run
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[section] = manifest[section] | value if value else {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((ValueError, TypeError), match=r"expected"):
        resume(config, make_model)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"model": null}', '{"model": {}}', "{not json"])
def test_weights_with_an_empty_description(capsys, tmp_path, text):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, path, metadata={"dfs_engine": text})
    error = fails(capsys, 2, "eval", str(path))
    assert "path: expected" in error
    assert str(path) in error


# Resuming as another run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"name": "adamw"}, {"decay_norm_and_bias": False}, {"ema_decay": 0.9}], ids=str)
def test_another_optimizer_is_refused(capsys, tmp_path, change):
    run_dir = tmp_path / "run"
    assert main(["train", *TINY, "--epochs", "1", "--run_dir", str(run_dir)]) == 0
    ((name, value),) = change.items()
    line = ["train", "--resume", "--run_dir", str(run_dir), f"--optim.{name}", str(value).lower()]
    assert f"optim.{name}: expected " in fails(capsys, 2, *line)


def test_the_optimizer_s_settings_are_those_of_now(saved_run, make_model, caplog):
    config, _ = saved_run
    trainer = resume(config, make_model, optim=OptimConfig(weight_decay=0.25, momentum=0.5), epochs=2)
    (group,) = trainer.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.25, 0.5)
    assert "another optim.weight_decay: 0.25, was 0.0005" in caplog.text
    assert "another optim.momentum: 0.5, was 0.9" in caplog.text
    assert len(trainer.optimizer.state_dict()["state"]) > 0
    trainer.fit()


def test_another_schedule_length_says_what_changes(saved_run, make_model, caplog):
    config, _ = saved_run
    resume(config, make_model, epochs=2)
    assert "resume: going on with another epochs: 2, was 1" in caplog.text
    assert "the next step's learning rate is 0.05; by the run's schedule: 0" in caplog.text
    caplog.clear()
    resume(config, make_model)
    assert "resume: going on" not in caplog.text
    assert "learning rate" not in caplog.text


def test_fewer_epochs_than_the_run_has_begun(make_config, make_model):
    config = make_config(epochs=2)
    Trainer(config, model=make_model()).fit()
    with pytest.raises(ValueError, match="epochs: expected at least 2, which the run to resume has begun, got 1"):
        Trainer(replace(config, resume=True, epochs=1), model=make_model())


# Memory ------------------------------------------------------------------------------------------------------------


def too_much(*_):
    torch.empty(2**50, dtype=torch.uint8)


def too_much_on_cuda(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def too_much_in_python(*_):
    raise MemoryError


@pytest.mark.parametrize("too_much", [too_much, too_much_on_cuda, too_much_in_python])
def test_memory_that_does_not_suffice_names_the_batch_size(capsys, tmp_path, monkeypatch, too_much):
    run_dir = tmp_path / "run"
    line = ["train", *TINY, "--run_dir", str(run_dir)]
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "train_step", 6, too_much)
        error = fails(capsys, 1, *line)
    assert "batch_size: expected a batch that fits into memory, got 2 (" in error
    assert "--micro_batch_size 1" in error
    assert "The last good checkpoint is" in error
    assert main(["train", "--resume", "--run_dir", str(run_dir)]) == 0


def test_memory_that_does_not_suffice_to_evaluate(capsys, tmp_path, monkeypatch):
    from dfs_engine.training import evaluate

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, evaluate, "run_model", 1, too_much)
        error = fails(capsys, 1, "train", *TINY, "--run_dir", str(run_dir))
    assert "eval_batch_size: expected a batch that fits into memory, got 256 (" in error
    assert main(["train", *TINY, "--run_dir", str(tmp_path / "other")]) == 0
    with monkeypatch.context() as patch:
        at_call(patch, evaluate, "run_model", 1, too_much)
        error = fails(capsys, 1, "eval", str(tmp_path / "other"), "--device", "cpu")
    assert " batch_size: expected a batch that fits into memory, got 256 (" in error
