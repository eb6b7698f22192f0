"""The `dfs` command: it reads flags into a config, calls what does the work, and prints.

Exit status: 0 success, 1 the work failed (a breach, a loss that is not finite, a full disk), 2 wrong input, 130 and 143
stopped by Ctrl-C and SIGTERM.
Only the subcommand that is called gets imported, so that `dfs doctor` works where half of the installation is missing.
"""

import contextlib
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse.typing import Path_fc

from dfs_engine.cli.parser import Parser, normalise
from dfs_engine.runtime.extras import explained

# Raised for what the user gave; anything else is a defect and keeps its traceback.
_INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    summary: str
    """One line of `dfs --help`."""
    description: str
    """What its own --help teaches first."""
    examples: str
    """What its own --help ends with."""
    add_flags: Callable[[Parser], None]
    run: Callable[[Any, list[str]], int]
    """(parsed flags, command line) -> exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dfs argv...`; returns its exit status."""
    with _input_errors():
        line = normalise(sys.argv[1:] if argv is None else argv) or ["--help"]
    is_main_process = int(os.environ.get("RANK", 0)) == 0  # set by torchrun and accelerate launch
    logging.basicConfig(level=logging.INFO if is_main_process else logging.ERROR, format="%(message)s", force=True)
    for chatty in ("accelerate", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        values = _parse(line)
        return _COMMANDS[line[0]].run(values, line)
    except MemoryError as error:
        _fail(str(error) or "the memory does not suffice", 1)
    except KeyboardInterrupt as error:
        if is_main_process:
            print(f"dfs: {error or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)


def _parse(line: list[str]) -> Any:
    parser = Parser(
        prog="dfs",
        description="Trains networks with several exits by Deep Feature Surgery, and measures them."
        " `dfs COMMAND --help` explains a command and its flags.",
        examples="  dfs train --config digits_vgg7_dfs    # real data that needs no files; about 2 minutes on 2 cores\n"
        "  dfs doctor                            # what works on this machine",
    )
    subcommands = parser.add_subcommands(title="commands", description=None, metavar="")
    for name, command in _COMMANDS.items():
        subparser = Parser(description=command.description, examples=command.examples)
        subcommands.add_subcommand(name, subparser, help=command.summary)
        if name in line[:1]:
            with _input_errors():
                command.add_flags(subparser)
    values = parser.parse_args(line)
    with _input_errors():
        values = parser.instantiate(values)
    return values[values.subcommand]


@contextlib.contextmanager
def _input_errors(*more: type[Exception]) -> Iterator[None]:
    """Turns an exception about the user's input into one line and exit status 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(explained(error), 2)
    except _INPUT_ERRORS + more as error:
        _fail(str(error), 1 if isinstance(error, ChildProcessError) else 2)


def _fail(message: str, status: int) -> NoReturn:
    print(f"dfs: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def _config(config_class: type, values: Any) -> Any:
    return config_class(**{item.name: values[item.name] for item in fields(config_class)})


def _add_json(parser: Parser) -> None:
    # Path_fc: a file that can be created; checked before the work, so that no result is lost after it.
    parser.add_argument(
        "--json", type=Path_fc, default=None, metavar="FILE", help="Write the result to FILE as JSON too."
    )


def _write_json(path: Path_fc | None, result: Any) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Numbers are flushed right; a row named "ensemble" is bold."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "ensemble" else None)
    print(title)  # not the table's: it would wrap at the table's width
    Console().print(table)


def _print_accuracy(metrics: dict[str, Any], title: str) -> None:
    from dfs_engine.evaluation.metrics import TITLES, table

    headings = [f"{TITLES[metric]} %" if metric in TITLES else metric for metric in metrics["ensemble"]]
    rows = [(name, *(f"{share:.2f}" for share in shares), f"{loss:.4f}") for name, *shares, loss in table(metrics)]
    _print_table(title, ("exit", *headings), rows)


def _print_further(results: dict[str, dict[str, Any]]) -> None:
    for name, metrics in results.items():
        _print_accuracy(metrics, f"{name}, {metrics['num_samples']} samples")


def _train_flags(parser: Parser) -> None:
    from dfs_engine.cli.recipes import list_recipes
    from dfs_engine.training.config import TrainConfig

    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of these flags, or the name of a recipe that comes with the package; flags after it override"
        f" it. Recipes: {', '.join(list_recipes())}.",
    )
    parser.add_class_arguments(TrainConfig)
    _add_json(parser)


def _train(values: Any, line: list[str]) -> int:
    from tqdm.contrib.logging import logging_redirect_tqdm

    if values.resume and values.run_dir is not None and not values.config:
        saved = values.run_dir / "config.yaml"
        if saved.is_file():
            values = _parse([line[0], "--config", str(saved), *line[1:]])
    with _input_errors(RuntimeError):
        from dfs_engine.training.config import TrainConfig
        from dfs_engine.training.report import counted
        from dfs_engine.training.trainer import Trainer

        trainer = Trainer(_config(TrainConfig, values))
    with _input_errors():
        try:
            with logging_redirect_tqdm():
                result = trainer.fit()
        except (FloatingPointError, OSError) as error:
            _fail(str(error), 1)
    if trainer.accelerator.is_main_process:
        epochs = counted(trainer.progress.epoch, "epoch")
        _print_accuracy(result.metrics, f"Test results after {epochs} on {trainer.data.description}")
        _print_further(result.further_metrics)
        print(f"run folder: {result.run_dir} (accuracy_per_exit.png, metrics.csv, model.safetensors, ...)")
        print(f"to measure these weights again: dfs eval {shlex.quote(str(result.run_dir))}")
        written = {"run_dir": str(result.run_dir), "metrics": result.metrics, "further": result.further_metrics}
        _write_json(values.json, {**written, "epochs": result.rows})
    trainer.accelerator.end_training()
    return 0


def _eval_flags(parser: Parser) -> None:
    from dfs_engine.training.evaluate import EvalConfig

    parser.add_argument("path", type=Path, help="A run folder, or the model.safetensors of one.")
    parser.add_class_arguments(EvalConfig, skip={"path"})
    _add_json(parser)


def _eval(values: Any, line: list[str]) -> int:
    from dfs_engine.data.config import is_option_of
    from dfs_engine.data.normalization import Normalization
    from dfs_engine.training import evaluate
    from dfs_engine.training.weights import read_description

    with _input_errors(RuntimeError):
        # The data of the run are the defaults, which this command line's flags override.
        trained_on = read_description(values.path)["data"]
        by_eval = ("mean", "std")  # which belong together: a flag for one of them must not meet the run's other
        is_named = any(word.partition("=")[0] == "--data.name" for word in line)
        dataset = values.data.name if is_named else trained_on.get("name", values.data.name)
        flags = [
            f"--data.{field}={value}"
            for field, value in trained_on.items()
            if value is not None and field not in by_eval and is_option_of(field, dataset)
        ]
        values = _parse([line[0], *flags, *line[1:]])
        result = evaluate.run(_config(evaluate.EvalConfig, values))
    model, epoch = result["model"], "unknown" if result["epoch"] is None else result["epoch"]
    _print_accuracy(result, f"{model['name']}, {model['variant']}, epoch {epoch}, on {result['data']}")
    _print_further(result["further"])
    if result["normalization"] is not None:
        print(f"images normalised by {Normalization(**result['normalization'])}")
    _write_json(values.json, result)
    return 0


def _convert_flags(parser: Parser) -> None:
    from dfs_engine.training.convert import ConvertConfig

    parser.add_argument("source", type=Path, help="A published checkpoint, or a run folder or weight file of dfs.")
    parser.add_argument("output", type=Path, help="The file or run folder to write.")
    parser.add_class_arguments(ConvertConfig, skip={"source", "output"})
    _add_json(parser)


def _convert(values: Any, _line: list[str]) -> int:
    from dfs_engine.training import convert

    with _input_errors(RuntimeError):
        result = convert.run(_config(convert.ConvertConfig, values))
    print(
        f"{result['output']}: {result['num_tensors']} tensors of {result['model']['name']}, {result['format']} format"
    )
    if result["left_out"]:
        print(f"left out, because no part of the model: {', '.join(result['left_out'])}")
    for note in result["notes"]:
        print(note)
    _write_json(values.json, result)
    return 0


def _validate_flags(parser: Parser) -> None:
    from dfs_engine.validate import ValidateConfig

    parser.add_class_arguments(ValidateConfig)
    _add_json(parser)


def _validate(values: Any, _line: list[str]) -> int:
    from dfs_engine import validate

    with _input_errors(RuntimeError):
        report = validate.run(_config(validate.ValidateConfig, values))
    print(report.table())
    _write_json(values.json, report.to_json())
    return 0 if report.ok else 1


def _info_flags(parser: Parser) -> None:
    from dfs_engine.evaluation.info import InfoConfig

    parser.add_argument("model", type=str, help="A model's name, as of `dfs train --model.name`.")
    parser.add_class_arguments(InfoConfig, skip={"model"})
    _add_json(parser)


def _info(values: Any, _line: list[str]) -> int:
    from dfs_engine.evaluation import info

    with _input_errors(RuntimeError):
        report = info.run(_config(info.InfoConfig, values))
    model, batch_size = report.config.model, report.config.batch_size
    _print_table(
        f"{model}: what an image costs that leaves at an exit, in millions; a multiply-add is one operation. "
        "Alone: without the exits before it",
        *report.exit_table(),
    )
    _print_table(
        f"{model}: a training step, batch size {batch_size}, in millions of FLOPs; a multiply-add is two",
        *report.training_table(),
    )
    _write_json(values.json, report.to_json())
    return 0


def _doctor_flags(parser: Parser) -> None:
    parser.add_argument(
        "--recalibrate",
        action="store_true",
        help="Measure anew which kernels are the faster ones here, and keep that. Let nothing else run meanwhile.",
    )
    _add_json(parser)


def _doctor(values: Any, _line: list[str]) -> int:
    from dfs_engine.runtime import doctor

    report = doctor.report(values.recalibrate)
    print(doctor.format_report(report))
    _write_json(values.json, report)
    return 0


def _bench_flags(parser: Parser) -> None:
    from dfs_engine.benchmarks.ops import BenchOpsConfig
    from dfs_engine.benchmarks.plot import BenchPlotConfig
    from dfs_engine.benchmarks.train import BenchTrainConfig
    from dfs_engine.benchmarks.tune import BenchTuneConfig

    subcommands = parser.add_subcommands(title="commands", description=None, metavar="")
    for name, config_class, summary, description, examples in (
        (
            "train",
            BenchTrainConfig,
            "time training steps",
            "Times forward, backward and step of a model in all its variants, interleaved in one process.",
            "  dfs bench train --model vgg7_64 --batch-size 100 --variants dense,byot,detach,split,dfs\n"
            "  dfs bench train --variants dense,byot,dfs --batch-size 25,50,100,200,400 --output train.csv\n"
            "  dfs bench train --variants dfs --layouts channels_last --compile off --breakdown",
        ),
        (
            "ops",
            BenchOpsConfig,
            "time single ops",
            "Times forward and backward of single ops on the shapes of VGG, ResNet, MSDNet, ViT and BERT, interleaved.",
            "  dfs bench ops --quick\n  dfs bench ops --ops conv2d --shapes 'vgg7/*' --beta .1,.5,.9 --output ops.csv",
        ),
        (
            "plot",
            BenchPlotConfig,
            "draw the measurements",
            "Draws what `dfs bench train` and `dfs bench ops` measured, from their CSV files.",
            "  dfs bench plot\n  dfs bench plot --results train.csv",
        ),
        (
            "tune",
            BenchTuneConfig,
            "choose the Triton kernels' launches for this GPU",
            "Measures, on the GPU at hand, every launch of the Triton kernels against stock operators, and writes the"
            " table by which `auto` decides on it. Training never measures. Interrupted, it goes on where it was.",
            "  dfs bench tune --dry_run\n  dfs bench tune --dtypes bf16 --shapes 'vgg16/*' --batch_size 256\n"
            "  dfs bench tune --max_seconds 600 --output h100.json",
        ),
    ):
        subparser = Parser(description=description, examples=examples)
        subcommands.add_subcommand(name, subparser, help=summary)
        subparser.add_class_arguments(config_class)
        _add_json(subparser)


def _bench(values: Any, _line: list[str]) -> int:
    import importlib

    name = values.subcommand
    module = importlib.import_module(f"dfs_engine.benchmarks.{name}")
    config_class = getattr(module, f"Bench{name.capitalize()}Config")
    with _input_errors(RuntimeError):
        report = module.run(_config(config_class, values[name]))
    print(report.table())
    _write_json(values[name].json, report.to_json())
    return 0


_COMMANDS = {
    "train": Command(
        "train a multi-exit model",
        "Trains a multi-exit model and writes a run folder: resolved config, metrics.csv, accuracy_per_exit.png,"
        " TensorBoard events, checkpoint, model.safetensors. The weights kept are the last ones, never those that did"
        " best on the test images. On several GPUs: torchrun --nproc_per_node N -m dfs_engine train ...",
        "  dfs train --config digits_vgg7_dfs\n"
        "  dfs train --config my_recipe.yaml --model.beta 0.3\n"
        "  dfs train --data.name cifar10 --data.root DIR --model.beta 0.3 --epochs 3 --precision bf16\n"
        "  dfs train --resume --run_dir runs/first",
        _train_flags,
        _train,
    ),
    "eval": Command(
        "measure saved weights, exit by exit",
        "Measures every exit and the ensemble (the mean of all exits' logits) of saved weights on test images.",
        "  dfs eval runs/first\n  dfs eval model.safetensors --data.root DIR --json result.json",
        _eval_flags,
        _eval,
    ),
    "convert": Command(
        "read or write a checkpoint of the published code",
        "Converts a checkpoint of the published Deep Feature Surgery code (VGG, ResNet18, MSDNet, ViT, BERT) to a run"
        " folder or weight file of dfs, or a run folder or weight file to a checkpoint that the published code loads;"
        " SOURCE says which. Every key and shape is checked before anything is written. A published checkpoint does not"
        " say which model it is of: give the --model flags that it was trained with. Its beta is the dns_ratio in its"
        " name; a VGG's tensors tell it. Pickled files are read as tensors alone, so that they cannot run code."
        " Adapters of feature distillation are kept in a file beside the weights.",
        "  dfs convert vgg7_64_cifar100-dns_ratio-0.5.pth runs/published --model.name vgg7_64\n"
        "  dfs eval runs/published --data.name cifar100 --data.root DIR\n"
        "  dfs convert runs/published published.pth",
        _convert_flags,
        _convert,
    ),
    "validate": Command(
        "check every op of this package against PyTorch in float64",
        "Compares every op, backend, dtype, layout and slice with reference PyTorch in float64 on this machine."
        " Exit status 1 if any is beyond its tolerance.",
        "  dfs validate --quick\n  dfs validate --dtypes fp32 --backends cpp --json validate.json",
        _validate_flags,
        _validate,
    ),
    "info": Command(
        "count parameters and operations of a model, exit by exit",
        "Counts each exit's cumulative parameters and operations, and the FLOPs of a training step in every variant at"
        " several beta.",
        "  dfs info msdnet_cifar --num_classes 100\n"
        "  dfs info vgg7_64 --beta .5 --reference false --json info.json\n"
        "  dfs info msdnet_cifar --options '{growth: 6}'",
        _info_flags,
        _info,
    ),
    "doctor": Command(
        "show versions, threads, and which kernels this machine can use",
        "Prints versions, CPU features, threads, which backends are there and why one is not, and which kernels this"
        " machine is faster with.",
        "  dfs doctor\n  dfs doctor --json doctor.json\n  dfs doctor --recalibrate",
        _doctor_flags,
        _doctor,
    ),
    "bench": Command(
        "time training steps and single ops against PyTorch",
        "Times training steps and single ops. Variants are timed in turns, so that a busy machine is unfair to none.",
        "  dfs bench train --model vgg7_64 --batch-size 100 --variants dense,detach,split,dfs\n"
        "  dfs bench ops --quick\n  dfs bench plot\n  dfs bench tune --dry_run",
        _bench_flags,
        _bench,
    ),
}
