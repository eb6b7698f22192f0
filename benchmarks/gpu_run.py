"""A run of gpu_check.py: its files, the time that is left, and stages that may fail or take too long by themselves."""

import contextlib
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dfs_engine.benchmarks import gpu_contests
from dfs_engine.benchmarks.measure import Environment

# A stage with less time than this does not start.
_LEAST = 5.0


class OutOfTimeError(BaseException):
    """The stage's time is used up. No `Exception`, so that nothing that goes on after errors goes on after it."""


class Budget:
    """Seconds that are left, for the run and for the stage that runs."""

    def __init__(self, seconds: float, begin: float | None = None) -> None:
        self._end = (time.monotonic() if begin is None else begin) + seconds
        self._stage_end = self._end

    def begin(self, share: float) -> None:
        """Gives a stage its share of what is left."""
        now = time.monotonic()
        self._stage_end = now + share * (self._end - now)

    def left_in_all(self) -> float:
        """Of the run."""
        return self._end - time.monotonic()

    def left(self) -> float:
        """Of the stage."""
        return self._stage_end - time.monotonic()

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Raises OutOfTimeError inside the block when the stage's time is over, as soon as Python gets to run."""

        def stop(*_: object) -> None:
            raise OutOfTimeError

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def device_is_lost() -> bool:
    """Whether this process can no longer use the GPU: after a kernel's illegal access every call fails."""
    if gpu_contests.DEVICE != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Run:
    """One run: its files, its time, whether it may launch this project's kernels, and whether anything has failed.

    Whatever is found is appended to a file at once: a run that is killed keeps it, and one into the same folder adds.
    """

    def __init__(self, output: Path, seconds: float, stamp: Environment, begin: float | None = None) -> None:
        self.output, self.budget, self.stamp = output, Budget(seconds, begin), stamp
        self.failed = self.stock_only = False
        output.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Prints, and appends to the summary."""
        print(text, flush=True)
        with (self.output / "summary.txt").open("a") as file:
            file.write(text + "\n")

    def fail(self, text: str) -> None:
        self.failed = True
        self.say(f"FAILED: {text}")

    def stage(self, name: str, work: Callable[["Run"], None], share: float = 1.0) -> None:
        """Runs one stage within its time; an error in it is reported and does not keep the others from running."""
        self.budget.begin(share)
        begin = time.monotonic()
        self.say(f"\n== {name}, {max(self.budget.left(), 0):.0f} s")
        if self.budget.left() < _LEAST:
            self.say("skipped: no time is left")
            return
        try:
            with self.budget.enforced():
                work(self)
        except OutOfTimeError:
            self.say("stopped: its time was used up; what it had measured is written")
        except Exception as error:
            (self.output / f"{name}_error.log").write_text(traceback.format_exc())
            self.fail(f"{type(error).__name__}: {str(error)[:2000]}")
        self.say(f"-- {name}: {time.monotonic() - begin:.0f} s")
        with contextlib.suppress(RuntimeError):  # where the device is lost
            torch.cuda.empty_cache()

    def command(
        self, log: str, command: list[str], seconds: float, folder: Path, **variables: str
    ) -> tuple[int | None, str]:
        """(exit status, or None when it ran too long; output), which also goes to a file."""
        path = self.output / log
        with path.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | variables,
                start_new_session=True,
            )
            try:
                status = process.wait(seconds)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                status = None
        return status, path.read_text(errors="replace")
