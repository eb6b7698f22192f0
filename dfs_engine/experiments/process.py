"""One run in a process of its own: if that dies, the others go on.

Its process is forked from one that has imported what training needs, so that it starts at once, and that has neither
threads nor a GPU. What it prints goes to log.txt in the run's folder.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from dfs_engine.experiments.record import Outcome
from dfs_engine.training.config import TrainConfig

LOG_FILE = "log.txt"
# What a run imports sooner or later; of those that take seconds.
_PRELOADED = ["dfs_engine.experiments.one_run", "torch._dynamo", "matplotlib.figure"]


class RunProcess:
    """Trains by `config`, in its run_dir, from the beginning or from the checkpoint that is there."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._receiver, sender = context.Pipe(duplex=False)
        # Not a daemon: those may have no processes of their own, as data loaders do.
        self._process = context.Process(target=_main, args=(config, sender))
        self._process.start()
        sender.close()  # the other end is the child's alone, whose death then shows

    def wait(self, seconds: float) -> Outcome | None:
        """None: it still runs."""
        if not self._receiver.poll(seconds):
            return None
        try:
            outcome: Outcome | None = self._receiver.recv()
        except EOFError:
            outcome = None
        self._process.join()
        return outcome or Outcome(status="failed", error=self._death())

    def stop(self) -> None:
        """The first time lets it save and end, the second time it ends at once."""
        self._process.terminate()

    def _death(self) -> str:
        code = self._process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        memory = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
        return f"its process died ({how}{memory}); see {LOG_FILE}"


def _main(config: TrainConfig, sender: Any) -> None:
    assert config.run_dir is not None
    os.setpgrp()  # Ctrl-C is the comparison's, which sends it on once
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    _log_to(config.run_dir)
    from dfs_engine.experiments.one_run import train

    sender.send(train(config))
    sender.close()


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _log_to(run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
