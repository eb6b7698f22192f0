"""The stages of gpu_check.py, in the order of worth: what each does, and what it would do, for `--dry-run`."""

import functools
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dfs_engine import validate
from dfs_engine.benchmarks import gpu_contests, gpu_expected, gpu_graphs, gpu_ops, gpu_steps, tune
from dfs_engine.benchmarks.gpu_run import Run
from dfs_engine.benchmarks.gpu_steps import FUSED, UNFUSED, Pair, Plan
from dfs_engine.benchmarks.measure import append_csv
from dfs_engine.benchmarks.results import Measurements
from dfs_engine.benchmarks.shapes import Shape
from dfs_engine.benchmarks.step_models import STEP_MODELS, StepModel
from dfs_engine.kernels import config as kernels
from dfs_engine.runtime import doctor
from dfs_engine.validate.problems import PROBLEMS

ROOT = Path(__file__).resolve().parents[1]
DTYPE = "bf16"
_PROFILED = "vgg16_64"
# Seconds: of a shape class to be tuned, and of an op to be compared with float64.
_CLASS_SECONDS, _OP_SECONDS = 12.0, 25.0


class Stage(NamedTuple):
    """`plan` names what `work` does, line by line, with the seconds that each takes; `weight`: of the time."""

    work: Callable[[Run], None]
    plan: Callable[[], list[tuple[str, float]]]
    weight: float


def report_environment(run: Run) -> None:
    """What this machine is, and what it can do at most."""
    run.say(str(run.stamp))
    found = doctor.report()
    (run.output / "environment.json").write_text(json.dumps(found, indent=1, default=str))
    run.say(f"GPU: {found['gpus']}\nBackends: {found['backends']}")
    run.say("; ".join(f"{name} {rate}" for name, rate in gpu_ops.machine_rates().items()))
    torch.cuda.empty_cache()  # the tests run in processes of their own


def launches_work(run: Run) -> bool:
    """Whether Triton can launch anything at all; says why not."""
    try:
        ones = torch.ones(16, 16, device=gpu_contests.DEVICE)
        torch.ops.dfs_engine.linear_grad_input(ones, ones, 0, 16).cpu()  # which waits for it
    except Exception as error:
        run.fail(
            f"no Triton kernel can be launched here: {type(error).__name__}: {str(error)[:1000]}\nTriton builds its "
            "launcher with a C compiler and Python's headers: install gcc and python3-dev, or set CC."
        )
        return False
    return True


def tests(run: Run) -> None:
    """Every op against float64; then, where pytest is, the tests marked `gpu`."""
    for index, op in enumerate(PROBLEMS):
        config = validate.ValidateConfig(
            ops=op, backends=f"{UNFUSED},{FUSED}", dtypes="bf16,fp32,fp16", device=gpu_contests.DEVICE, quick=True,
            max_seconds=run.budget.left() / (len(PROBLEMS) - index + 1), progress=False,
        )  # fmt: skip
        report = validate.run(config)
        run.say(report.table())
        if not report.ok:
            run.fail(f"{op} is wrong, see above")
    if importlib.util.find_spec("pytest") is None:
        run.say("pytest is missing: repeats, streams, CUDA graphs and offsets beyond 32 bits are not tested")
    else:
        _run_pytest(run)


def _run_pytest(run: Run) -> None:
    """Tests marked `gpu`, and those of the kernels, on the GPU."""
    # Compiling kernels takes most of the time; tests that need most of the memory are one group.
    parallel = ["-n", "6", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") is not None else []
    suites = {
        "tests_gpu.log": ["-m", "gpu", *map(str, _marked_files(run))],
        # Compiling for other GPUs needs none, and is done where there is none.
        "tests_kernels.log": ["tests/kernels", "--ignore=tests/kernels/test_compile.py"],
    }
    for log, arguments in suites.items():
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", *parallel, *arguments]
        status, output = run.command(log, command, run.budget.left() - 2, ROOT)
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
        status, output = run.command("collect.log", command, run.budget.left() - 2, ROOT)
        if status == 0:
            found.append(path)
        else:
            reason = next((line for line in output.splitlines() if "ModuleNotFoundError" in line), "see collect.log")
            run.say(f"{path.relative_to(ROOT)} is left out: {reason.strip().removeprefix('E').strip()}")
    return found


def _plan_tests() -> list[tuple[str, float]]:
    compared = [(f"{op} in bf16, fp32, fp16 by {UNFUSED} and {FUSED} against float64", _OP_SECONDS) for op in PROBLEMS]
    return [*compared, ("tests/gpu, where pytest is installed", 60.0)]


@functools.cache
def step_shapes() -> list[Shape]:
    """Of all steps that can be built here."""
    return [shape for model in STEP_MODELS.values() if model.missing() is None for shape in model.shapes()]


def _ops(choose: Callable[[list[Shape]], list[Shape]], precisions: Callable[[], Sequence[str]], weight: float) -> Stage:
    """Single ops, on the shapes that `choose` takes of the steps'."""

    def work(run: Run) -> None:
        rows = []
        try:
            for row in gpu_ops.run(choose(step_shapes()), precisions(), run.budget.left, run.say):
                rows.append(row)
                append_csv(run.output / "ops.csv", run.stamp, row.csv_rows())
        finally:
            run.say(gpu_ops.table(rows))

    def plan() -> list[tuple[str, float]]:
        shapes = choose(step_shapes())
        named = [f"{shape.op} {shape.family} {shape} in {name}" for name in precisions() for shape in shapes]
        return [(what, gpu_ops.SHAPE_SECONDS) for what in named]

    return Stage(work, plan, weight)


def _steps(list_pairs: Callable[[list[StepModel]], Plan], file: str, weight: float) -> Stage:
    """Training steps, each beside `dense` in the same mode."""

    def pairs() -> Plan:
        return list_pairs(list(STEP_MODELS.values()))

    def work(run: Run) -> None:
        chosen = [(model, pair) for model, pair in pairs() if not run.stock_only or pair.backend == UNFUSED]
        try:
            for result in gpu_steps.run(chosen, DTYPE, run.budget.left, run.say):
                append_csv(run.output / file, run.stamp, Measurements(result).csv_rows())
                run.say(str(result))
        finally:
            run.say(gpu_expected.table(run.output))

    def plan() -> list[tuple[str, float]]:
        lines = []
        for model, pair in pairs():
            what, reason = f"{model.name}, batch {model.batch}, {DTYPE}: {pair} beside dense", model.missing()
            seconds = gpu_steps.SECONDS[pair.mode]
            lines.append((what, seconds) if reason is None else (f"{what}: left out, {reason}", 0.0))
        return lines

    return Stage(work, plan, weight)


_TUNED = _steps(gpu_steps.tuned_plan, "steps_tuned.csv", 3.0)


def tuned_steps(run: Run) -> None:
    """Steps by the launches and choices of this GPU's table."""
    path, gpu = _table_path(run), kernels.gpu_name()
    if path.is_file():
        kernels.use_table(json.loads(path.read_text()))
    elif gpu not in kernels.read_tables():
        run.say(f"skipped: there is no table of {gpu}; the stage `tune` writes one")
        return
    _TUNED.work(run)


def _table_path(run: Run) -> Path:
    return run.output / kernels.table_path(kernels.gpu_name() or "").name


def tune_launches(run: Run) -> None:
    """The table of this GPU at the steps' sizes, as far as the time allows; what it has is not measured again."""
    config = _tune_config(output=str(_table_path(run)), max_seconds=run.budget.left() - 5)
    found = tune.run(config)
    run.say(found.table())
    if found.failed:
        run.fail(f"{len(found.failed)} shape classes failed, see above")


def _tune_config(**options: object) -> tune.BenchTuneConfig:
    # 1: of layers behind the first of a block, which are whole.
    return tune.BenchTuneConfig(**{"dtypes": DTYPE, "beta": f"{gpu_contests.BETA},1", "progress": False} | options)


def _plan_tune() -> list[tuple[str, float]]:
    return [(str(task), _CLASS_SECONDS) for task in tune.plan(_tune_config())]


def profile(run: Run) -> None:
    """Where the time of one model's step goes."""
    for variant in ("dfs", "dense"):
        step = gpu_steps.build(STEP_MODELS[_PROFILED], DTYPE, Pair("off", variant, FUSED))
        table = gpu_graphs.write_profile(step, run.output / f"profile_{_PROFILED}_{variant}")
        run.say(f"{_PROFILED} {variant}, eager:\n{table}")
        del step


def sanitizer(run: Run) -> None:
    """compute-sanitizer's memcheck over one pass of every kernel."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        run.say("skipped: compute-sanitizer is not on this machine")
        return
    one_pass = [sys.executable, str(Path(__file__).with_name("gpu_check.py")), "--one-pass"]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *one_pass]
    # torch's allocator would hand out parts of one block, between which memcheck sees no border.
    status, output = run.command(
        "memcheck.log", command, run.budget.left() - 1, ROOT, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    said = [line for line in output.splitlines() if "ERROR SUMMARY" in line or line.startswith("one pass")]
    if status is None:
        run.say("its time was used up; see memcheck.log")
    elif status:
        run.fail(f"memcheck: {'; '.join(said)}\n{output[-2000:]}")
    else:
        run.say("memcheck: " + "; ".join(said))


STAGES = {
    "tests": Stage(tests, _plan_tests, 2.0),
    "ops": _ops(gpu_ops.first_shapes, lambda: [DTYPE], 1.5),
    "steps": _steps(gpu_steps.plan, "steps.csv", 6.0),
    "tune": Stage(tune_launches, _plan_tune, 3.5),
    "tuned": _TUNED._replace(work=tuned_steps),
    "graphs": _steps(gpu_steps.graphs_plan, "graphs.csv", 3.0),
    "profile": Stage(profile, lambda: [(f"{_PROFILED}, {variant}", 12.0) for variant in ("dfs", "dense")], 0.7),
    "all_ops": _ops(list, lambda: gpu_ops.MEASURED, 6.0),
    "sanitizer": Stage(sanitizer, lambda: [("compute-sanitizer's memcheck over one pass of every kernel", 60.0)], 1.0),
}
ON_REQUEST = ("all_ops", "sanitizer")
# What is left of them without this project's kernels.
STOCK_ONLY = ("steps", "graphs")
