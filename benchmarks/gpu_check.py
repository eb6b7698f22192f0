"""Everything that needs a GPU, in one run of at most ten minutes: builds, tests, memory checks, benchmarks.

    python benchmarks/gpu_check.py [--quick] [--stages tests,ops,tune] [--output DIR]

Needs torch, triton and numpy; runs in a checkout that is not installed. Without pytest it says so and does the rest.
Every stage's results are written when it ends; what the time does not allow is left out, and said. Files in DIR:
summary.txt, ops.csv, train.csv, a log of each tool that was run and, of the stage `tune`, which is run on request
alone, the GPU's tuned table.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

_BEGIN = time.monotonic()  # importing torch is part of the ten minutes
ROOT = Path(__file__).resolve().parents[1]
# As a script, this file's folder would come first, and its measure.py, plot.py, train.py hide others of that name.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from dfs_engine.benchmarks import gpu_ops, gpu_problems, gpu_steps, tune  # noqa: E402
from dfs_engine.benchmarks.measure import Environment, append_csv, environment  # noqa: E402
from dfs_engine.kernels import config as kernels  # noqa: E402
from dfs_engine.names import split_choices  # noqa: E402

# What a stage that is over may still need for its last call and its table is left.
_SECONDS, _QUICK_SECONDS = 570, 170
# Stage -> the part of all time that it may take, so that a slow one leaves some for the others; the last one the rest.
SHARES = {"build": 0.2, "tests": 0.25, "sanitizer": 0.1, "ops": 0.2, "train": 1.0}
QUICK_SHARES = {"tests": 0.4, "ops": 0.25, "train": 1.0}
STAGES = (*SHARES, "tune")
# A stage with less time than this does not start.
_LEAST = 5.0
_NO_GPU = (
    "gpu_check: torch sees no CUDA device here; run it on a machine with an NVIDIA GPU (compute capability >= 8.0)."
)


class OutOfTimeError(BaseException):
    """The stage's time is used up. No `Exception`, so that nothing that goes on after errors goes on after it."""


class Budget:
    """Seconds that are left, for the run and for the stage that runs."""

    def __init__(self, seconds: float, begin: float | None = None) -> None:
        self.seconds, self._end = seconds, (time.monotonic() if begin is None else begin) + seconds
        self._stage_end = self._end

    def begin(self, share: float) -> None:
        """Gives a stage its share of all time."""
        self._stage_end = min(self._end, time.monotonic() + share * self.seconds)

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


class Run:
    """One run: its options, its time, and what it has found so far."""

    def __init__(self, output: Path, quick: bool, seconds: float, begin: float | None = None) -> None:
        self.output, self.quick, self.budget = output, quick, Budget(seconds, begin)
        self.lines: list[str] = []
        self.stamp: Environment | None = None
        self.failed = False

    def say(self, text: str) -> None:
        """Prints, and keeps for the summary."""
        print(text, flush=True)
        self.lines.append(text)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "summary.txt").write_text("\n".join(self.lines) + "\n")

    def fail(self, text: str) -> None:
        self.failed = True
        self.say(f"FAILED: {text}")

    def stage(self, name: str, work: Callable[["Run"], None]) -> None:
        """Runs one stage within its time; an error in it is reported and does not keep the others from running."""
        self.say(f"\n== {name}")
        self.budget.begin((QUICK_SHARES if self.quick else SHARES).get(name, 1.0))
        begin = time.monotonic()
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
        torch.cuda.empty_cache()

    def command(self, log: str, command: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
        """(exit status, or None when it ran too long; output), which also goes to a file."""
        path = self.output / log
        with path.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
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


def report_environment(run: Run) -> None:
    """What this machine is, and what it can do at most."""
    from dfs_engine import doctor

    run.stamp = environment("cuda")
    run.say(str(run.stamp))
    found = doctor.report()
    (run.output / "environment.json").write_text(json.dumps(found, indent=1, default=str))
    run.say(f"GPU: {found['gpus']}\nBackends: {found['backends']}")
    run.say("; ".join(f"{name} {rate}" for name, rate in gpu_ops.machine_rates().items()))
    torch.cuda.empty_cache()  # the tests run in processes of their own


def launches_work(run: Run) -> bool:
    """Whether Triton can launch anything at all; says why not."""
    try:
        ones = torch.ones(16, 16, device="cuda")
        torch.ops.dfs_engine.linear_grad_input(ones, ones, 0, 16)
        torch.cuda.synchronize()
    except Exception as error:
        run.fail(
            f"no Triton kernel can be launched here: {type(error).__name__}: {str(error)[:1000]}\nTriton builds its "
            "launcher with a C compiler and Python's headers: install gcc and python3-dev, or set CC."
        )
        return False
    return True


def _cannot_build() -> str | None:
    """What the C++ extension's build lacks here, or None."""
    if importlib.util.find_spec("setuptools") is None:
        return "setuptools is missing"
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "there is no C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's headers are missing"
    return None


def build(run: Run) -> None:
    """The C++ extension, in place."""
    reason = _cannot_build()
    if reason is not None:
        run.say(f"skipped: {reason}; the CPU's cpp backend is not part of this run")
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output = run.command("build.log", command, run.budget.left() - 5, MAX_JOBS=str(os.cpu_count()))
    loads = subprocess.run([sys.executable, "-c", "import dfs_engine._C"], cwd=ROOT, capture_output=True, text=True)
    if loads.returncode == 0:
        run.say("built, and it loads")
    else:
        reason = "its time was used up" if status is None else (output + loads.stderr).strip()[-600:]
        run.fail(f"the extension was not built, or does not load: {reason}")


def tests(run: Run) -> None:
    """Tests marked `gpu`, and those of the kernels, on the GPU."""
    if importlib.util.find_spec("pytest") is None:
        run.say("skipped: pytest is missing; the benchmarks' own comparison with float64 is all that is checked")
        return
    # Compiling kernels takes most of the time; tests that need most of the memory are one group.
    parallel = ["-n", "6", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") is not None else []
    suites = [("tests_gpu.log", ["-m", "gpu", *map(str, _marked_files(run))])]
    if not run.quick:
        # Compiling for other GPUs needs none, and is done where there is none.
        suites.append(("tests_kernels.log", ["tests/kernels", "--ignore=tests/kernels/test_compile.py"]))
    for log, arguments in suites:
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", *parallel, *arguments]
        status, output = run.command(log, command, run.budget.left() - 2)
        last = output.strip().splitlines()[-1] if output.strip() else "no output"
        if status is None:
            run.say(f"{log}: its time was used up")
        elif status:
            run.fail(f"{log}: {last}\n{output[-3000:]}")
        else:
            run.say(f"{log}: {last}")


def _marked_files(run: Run) -> list[Path]:
    """Of tests/, which needs more packages than this as a whole, the files with tests marked `gpu` that can be read."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "mark.gpu" not in path.read_text():
            continue
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", str(path)]
        status, output = run.command("collect.log", command, run.budget.left() - 2)
        if status == 0:
            found.append(path)
        else:
            reason = next((line for line in output.splitlines() if "ModuleNotFoundError" in line), "see collect.log")
            run.say(f"{path.relative_to(ROOT)} is left out: {reason.strip().removeprefix('E').strip()}")
    return found


def sanitizer(run: Run) -> None:
    """compute-sanitizer's memcheck over one pass of every kernel."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        run.say("skipped: compute-sanitizer is not on this machine")
        return
    one_pass = [sys.executable, str(Path(__file__).resolve()), "--one-pass"]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *one_pass]
    # torch's allocator would hand out parts of one block, between which memcheck sees no border.
    status, output = run.command("memcheck.log", command, run.budget.left() - 1, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = [line for line in output.splitlines() if "ERROR SUMMARY" in line or line.startswith("one pass")]
    if status is None:
        run.say("its time was used up; see memcheck.log")
    elif status:
        run.fail(f"memcheck: {'; '.join(said)}\n{output[-2000:]}")
    else:
        run.say("memcheck: " + "; ".join(said))


def ops(run: Run) -> None:
    """Single ops."""
    assert run.stamp is not None
    measured = gpu_ops.run(run.quick, run.budget.left, run.say)
    append = run.output / "ops.csv"
    rows = []
    try:
        for row in measured:
            rows.append(row)
            append_csv(append, run.stamp, row.csv_rows())
    finally:
        run.say(gpu_ops.table(rows))


def train(run: Run) -> None:
    """Whole training steps."""
    assert run.stamp is not None
    path = run.output / "train.csv"
    for report in gpu_steps.run(run.stamp, run.quick, run.budget.left, run.say):
        append_csv(path, run.stamp, report.csv_rows(report.rows))
        run.say(report.table())
        run.say(gpu_steps.targets(report))


def tune_launches(run: Run) -> None:
    """The table of this GPU, as far as the time allows; what the table in kernels/ has is not measured again."""
    table = run.output / kernels.table_path(kernels.gpu_name() or "").name
    found = tune.run(tune.BenchTuneConfig(max_seconds=run.budget.left() - 5, output=str(table), progress=False))
    run.say(found.table())
    if found.failed:
        run.fail(f"{len(found.failed)} shape classes failed, see above")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 when there is no GPU or something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 minutes: fewer stages, tests and cases; bf16 alone")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_check", metavar="DIR")
    parser.add_argument("--stages", default="", help=f"of {', '.join(STAGES)}, comma-separated; default all but tune")
    parser.add_argument(
        "--seconds", type=float, default=None, help=f"for everything; default {_SECONDS}, with --quick {_QUICK_SECONDS}"
    )
    parser.add_argument("--one-pass", action="store_true", help="only launch every kernel once, for memcheck")
    options = parser.parse_args(arguments)
    try:
        named = split_choices("--stages", options.stages, STAGES) if options.stages else []
    except ValueError as error:
        parser.error(str(error))
    chosen = named or list(QUICK_SHARES if options.quick else SHARES)
    if not torch.cuda.is_available():
        print(_NO_GPU, file=sys.stderr)
        return 1
    if options.one_pass:
        print(f"one pass: {gpu_problems.one_pass()} results, all finite")
        return 0
    seconds = options.seconds or (_QUICK_SECONDS if options.quick else _SECONDS)
    run = Run(options.output, options.quick, seconds, _BEGIN)
    run.output.mkdir(parents=True, exist_ok=True)
    report_environment(run)
    work = {
        "build": build, "tests": tests, "sanitizer": sanitizer, "ops": ops, "train": train, "tune": tune_launches
    }  # fmt: skip
    if launches_work(run):
        for name in chosen:
            run.stage(name, work[name])
    run.say(f"\n{'FAILED' if run.failed else 'ok'} after {time.monotonic() - _BEGIN:.0f} s; files in {run.output}")
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
