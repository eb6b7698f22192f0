"""Everything that needs a GPU: are the kernels right, and what are they worth? docs/gpu.md says how to use it.

    python benchmarks/gpu_check.py [--stages tests,ops,steps] [--seconds 345] [--output DIR] [--scale 0.25] [--dry-run]

Needs torch, triton and numpy; runs in a checkout that is not installed. What a missing package or the time does not
allow is left out, and said. Every result is written when it is there: a run that is killed keeps what it had measured,
and one into the same DIR adds to it. Files: summary.txt, ops.csv, steps.csv, steps_tuned.csv, graphs.csv, the GPU's
tuned table, profiles, and a log of each tool that was run.
"""

import argparse
import os
import sys
import time
from pathlib import Path

_BEGIN = time.monotonic()  # importing torch is part of the time
ROOT = Path(__file__).resolve().parents[1]
# As a script, this file's folder would come first, and its measure.py, plot.py, train.py hide others of that name.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from dfs_engine.benchmarks import gpu_contests  # noqa: E402
from dfs_engine.benchmarks.gpu_run import Run, device_is_lost  # noqa: E402
from dfs_engine.benchmarks.gpu_stages import (  # noqa: E402
    ON_REQUEST,
    STAGES,
    STOCK_ONLY,
    launches_work,
    report_environment,
)
from dfs_engine.benchmarks.measure import environment  # noqa: E402
from dfs_engine.benchmarks.step_models import scale_batches  # noqa: E402
from dfs_engine.checks import split_choices  # noqa: E402
from dfs_engine.runtime.machine import check_device  # noqa: E402

_SECONDS = 870.0
# Share of the time that may go before the first stage.
_ENVIRONMENT = 0.1


def shares(stages: list[str]) -> dict[str, float]:
    """Of the time that is left when a stage begins, so that a slow one leaves the others theirs; the last takes all."""
    weights = [STAGES[name].weight for name in stages]
    return {name: weights[index] / sum(weights[index:]) for index, name in enumerate(stages)}


def listing(stages: list[str], seconds: float) -> str:
    """What the stages would do, and what they take where everything is done."""
    lines, left = [], seconds
    for name, share in shares(stages).items():
        plan = STAGES[name].plan()
        lines.append(f"{name}: {share * left:.0f} s, of {sum(needed for _, needed in plan):.0f} s for all of it")
        lines += [f"  {needed:4.0f} s  {what}" for what, needed in plan]
        left -= share * left
    return "\n".join(lines)


def go_on_without_kernels(run: Run, stages: list[str], scale: float) -> None:
    """In a new process that takes this one's place: only then is the device given back."""
    run.fail("a kernel has ended this process's use of the GPU (--stages sanitizer says which); on by stock ones alone")
    options = {
        "--stages": ",".join(stages), "--seconds": max(run.budget.left_in_all(), 0.0), "--output": run.output,
        "--scale": scale,
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *words, "--stock-only"])


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 when there is no GPU or something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_check", metavar="DIR")
    parser.add_argument(
        "--stages",
        default="",
        help=f"of {', '.join(STAGES)}, comma-separated, in this order; default all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for everything; default %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="batch sizes times this, for a smaller GPU")
    parser.add_argument("--stock-only", action="store_true", help="without this project's kernels, by stock ones")
    parser.add_argument("--dry-run", action="store_true", help="only list the stages and their cases; needs no GPU")
    parser.add_argument("--one-pass", action="store_true", help="only launch every kernel once, for memcheck")
    options = parser.parse_args(arguments)
    try:
        named = split_choices("--stages", options.stages, STAGES) if options.stages else []
    except ValueError as error:
        parser.error(str(error))
    stages = named or [name for name in STAGES if name not in ON_REQUEST]
    scale_batches(options.scale)
    if options.dry_run:
        print(listing(stages, options.seconds))
        return 0
    try:
        check_device("gpu_check", gpu_contests.DEVICE)
    except RuntimeError as error:
        print(f"{error} --dry-run lists what it would do.", file=sys.stderr)
        return 1
    if options.one_pass:
        print(f"one pass: {gpu_contests.one_pass()} results, all finite")
        return 0
    run = Run(options.output, options.seconds, environment(gpu_contests.DEVICE), _BEGIN)
    run.stage("environment", report_environment, _ENVIRONMENT)
    run.stock_only = options.stock_only or not launches_work(run)
    if run.stock_only:
        stages = [name for name in stages if name in STOCK_ONLY]
    for index, (name, share) in enumerate(shares(stages).items()):
        run.stage(name, STAGES[name].work, share)
        if device_is_lost() and not run.stock_only:
            go_on_without_kernels(run, stages[index:], options.scale)
    run.say(f"\n{'FAILED' if run.failed else 'ok'} after {time.monotonic() - _BEGIN:.0f} s; files in {run.output}")
    return int(run.failed or run.stock_only)


if __name__ == "__main__":
    sys.exit(main())
