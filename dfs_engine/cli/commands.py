"""The `dfs` command: it reads flags into a config, calls what does the work, and prints.

Exit status: 0 success, 1 the work failed (a breach, a loss that is not finite, a full disk), 2 wrong input, 130 and 143
stopped by Ctrl-C and SIGTERM.
Only the subcommand that is called gets imported, so that `dfs doctor` works where half of the installation is missing.
"""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dfs_engine.cli.command import Command, add_commands, fail, input_errors, write_json
from dfs_engine.cli.parser import Parser, normalise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dfs argv...`; returns its exit status."""
    with input_errors():
        line = normalise(sys.argv[1:] if argv is None else argv) or ["--help"]
    is_main_process = int(os.environ.get("RANK", 0)) == 0  # set by torchrun and accelerate launch
    logging.basicConfig(level=logging.INFO if is_main_process else logging.ERROR, format="%(message)s", force=True)
    for chatty in ("accelerate", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        values = _parse(line)
        return _COMMANDS[line[0]](values, line)
    except MemoryError as error:
        fail(str(error) or "the memory does not suffice", 1)
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
    add_commands(parser, _COMMANDS, line)
    values = parser.parse_args(line)
    with input_errors():
        values = parser.instantiate(values)
    return values[values.subcommand]


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

    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of these flags, or the name of a recipe that comes with the package; flags after it override"
        f" it. Recipes: {', '.join(list_recipes())}.",
    )


def _train(command: Command, values: Any, line: list[str]) -> int:
    from tqdm.contrib.logging import logging_redirect_tqdm

    if values.resume and values.run_dir is not None and not values.config:
        saved = values.run_dir / "config.yaml"
        if saved.is_file():
            values = _parse([line[0], "--config", str(saved), *line[1:]])
    with input_errors(RuntimeError):
        from dfs_engine.training.report import counted
        from dfs_engine.training.trainer import Trainer

        trainer = Trainer(command.config_of(values))
    with input_errors():
        try:
            with logging_redirect_tqdm():
                result = trainer.fit()
        except (FloatingPointError, OSError) as error:
            fail(str(error), 1)
    if trainer.accelerator.is_main_process:
        epochs = counted(trainer.progress.epoch, "epoch")
        _print_accuracy(result.metrics, f"Test results after {epochs} on {trainer.data.description}")
        _print_further(result.further_metrics)
        print(f"run folder: {result.run_dir} (accuracy_per_exit.png, metrics.csv, model.safetensors, ...)")
        print(f"to measure these weights again: dfs eval {shlex.quote(str(result.run_dir))}")
        written = {"run_dir": str(result.run_dir), "metrics": result.metrics, "further": result.further_metrics}
        write_json(values.json, {**written, "epochs": result.rows})
    trainer.accelerator.end_training()
    return 0


def _eval(command: Command, values: Any, line: list[str]) -> int:
    from dfs_engine.data.config import is_option_of
    from dfs_engine.data.normalization import Normalization
    from dfs_engine.training import evaluate
    from dfs_engine.training.weights import read_description

    with input_errors(RuntimeError):
        # The data of the run are the defaults, which this command line's flags override.
        trained_on = read_description(values.path)["data"]
        by_eval = ("mean", "std")  # which belong together: a flag for one of them must not meet the run's other
        is_named = any(word.partition("=")[0] == "--data.name" for word in line)
        dataset = values.data.name if is_named else trained_on.get("name", values.data.name)
        flags = [
            f"--data.{option}={value}"
            for option, value in trained_on.items()
            if value is not None and option not in by_eval and is_option_of(option, dataset)
        ]
        values = _parse([line[0], *flags, *line[1:]])
        result = evaluate.run(command.config_of(values))
    model, epoch = result["model"], "unknown" if result["epoch"] is None else result["epoch"]
    _print_accuracy(result, f"{model['name']}, {model['variant']}, epoch {epoch}, on {result['data']}")
    _print_further(result["further"])
    if result["normalization"] is not None:
        print(f"images normalised by {Normalization(**result['normalization'])}")
    write_json(values.json, result)
    return 0


def _show_converted(result: dict[str, Any]) -> dict[str, Any]:
    print(
        f"{result['output']}: {result['num_tensors']} tensors of {result['model']['name']}, {result['format']} format"
    )
    if result["left_out"]:
        print(f"left out, because no part of the model: {', '.join(result['left_out'])}")
    for note in result["notes"]:
        print(note)
    return result


def _show_exported(result: dict[str, Any]) -> dict[str, Any]:
    print(f"{result['folder']}: {result['model']['name']}, {result['num_exits']} exits, {result['format']} format")
    rows = [(name, f"{size / 2**20:.2f}") for name, size in result["files"].items()]
    _print_table("Files", ("file", "MiB"), rows)
    print(f"largest difference from the model's logits: {result['largest_difference']:.2g}")
    return result


def _show_table(report: Any) -> Any:
    print(report.table())
    return report.to_json()


def _show_costs(report: Any) -> Any:
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
    return report.to_json()


def _doctor_flags(parser: Parser) -> None:
    parser.add_argument(
        "--recalibrate",
        action="store_true",
        help="Measure anew which kernels are the faster ones here, and keep that. Let nothing else run meanwhile.",
    )


def _doctor(_command: Command, values: Any, _line: list[str]) -> int:
    from dfs_engine.runtime import doctor

    report = doctor.report(values.recalibrate)
    print(doctor.format_report(report))
    write_json(values.json, report)
    return 0


_BENCH = {
    "train": Command(
        "time training steps",
        "Times forward, backward and step of a model in all its variants, interleaved in one process.",
        "  dfs bench train --model vgg7_64 --batch-size 100 --variants dense,byot,detach,split,dfs\n"
        "  dfs bench train --variants dense,byot,dfs --batch-size 25,50,100,200,400 --output train.csv\n"
        "  dfs bench train --variants dfs --layouts channels_last --compile off --breakdown",
        "dfs_engine.benchmarks.train:BenchTrainConfig",
        _show_table,
    ),
    "ops": Command(
        "time single ops",
        "Times forward and backward of single ops on the shapes of VGG, ResNet, MSDNet, ViT and BERT, interleaved.",
        "  dfs bench ops --quick\n  dfs bench ops --ops conv2d --shapes 'vgg7/*' --beta .1,.5,.9 --output ops.csv",
        "dfs_engine.benchmarks.ops:BenchOpsConfig",
        _show_table,
    ),
    "plot": Command(
        "draw the measurements",
        "Draws what `dfs bench train` and `dfs bench ops` measured, from their CSV files.",
        "  dfs bench plot\n  dfs bench plot --results train.csv",
        "dfs_engine.benchmarks.plot:BenchPlotConfig",
        _show_table,
    ),
    "tune": Command(
        "choose the Triton kernels' launches for this GPU",
        "Measures, on the GPU at hand, every launch of the Triton kernels against stock operators, and writes the"
        " table by which `auto` decides on it. Training never measures. Interrupted, it goes on where it was.",
        "  dfs bench tune --dry_run\n  dfs bench tune --dtypes bf16 --shapes 'vgg16/*' --batch_size 256\n"
        "  dfs bench tune --max_seconds 600 --output h100.json",
        "dfs_engine.benchmarks.tune:BenchTuneConfig",
        _show_table,
    ),
}
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
        "dfs_engine.training.config:TrainConfig",
        more_flags=_train_flags,
        run=_train,
    ),
    "eval": Command(
        "measure saved weights, exit by exit",
        "Measures every exit and the ensemble (the mean of all exits' logits) of saved weights on test images.",
        "  dfs eval runs/first\n  dfs eval model.safetensors --data.root DIR --json result.json",
        "dfs_engine.training.evaluate:EvalConfig",
        run=_eval,
        places={"path": (Path, "A run folder, or the model.safetensors of one.")},
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
        "dfs_engine.training.convert:ConvertConfig",
        _show_converted,
        places={
            "source": (Path, "A published checkpoint, or a run folder or weight file of dfs."),
            "output": (Path, "The file or run folder to write."),
        },
    ),
    "export": Command(
        "write a model as torch.export or ONNX files, whole or in stages",
        "Writes saved weights as files that run without this package: torch.export's (.pt2) or ONNX. One graph has all"
        " exits; with --staged there is one for each exit, so that whoever runs them can stop behind any of them."
        " Batches may have any number of samples, sentences any number of tokens. Needs no flags of the model, whatever"
        " its variant. What was written is run once and compared with the model.",
        "  dfs export runs/first\n  dfs export runs/first --format onnx --staged --output served",
        "dfs_engine.inference.export:ExportConfig",
        _show_exported,
        places={"path": (Path, "A run folder, or the model.safetensors of one.")},
    ),
    "validate": Command(
        "check every op of this package against PyTorch in float64",
        "Compares every op, backend, dtype, layout and slice with reference PyTorch in float64 on this machine."
        " Exit status 1 if any is beyond its tolerance.",
        "  dfs validate --quick\n  dfs validate --dtypes fp32 --backends cpp --json validate.json",
        "dfs_engine.validate:ValidateConfig",
        _show_table,
    ),
    "info": Command(
        "count parameters and operations of a model, exit by exit",
        "Counts each exit's cumulative parameters and operations, and the FLOPs of a training step in every variant at"
        " several beta.",
        "  dfs info msdnet_cifar --num_classes 100\n"
        "  dfs info vgg7_64 --beta .5 --reference false --json info.json\n"
        "  dfs info msdnet_cifar --options '{growth: 6}'",
        "dfs_engine.evaluation.info:InfoConfig",
        _show_costs,
        places={"model": (str, "A model's name, as of `dfs train --model.name`.")},
    ),
    "doctor": Command(
        "show versions, threads, and which kernels this machine can use",
        "Prints versions, CPU features, threads, which backends are there and why one is not, and which kernels this"
        " machine is faster with.",
        "  dfs doctor\n  dfs doctor --json doctor.json\n  dfs doctor --recalibrate",
        more_flags=_doctor_flags,
        run=_doctor,
    ),
    "bench": Command(
        "time training steps and single ops against PyTorch",
        "Times training steps and single ops. Variants are timed in turns, so that a busy machine is unfair to none.",
        "  dfs bench train --model vgg7_64 --batch-size 100 --variants dense,detach,split,dfs\n"
        "  dfs bench ops --quick\n  dfs bench plot\n  dfs bench tune --dry_run",
        subcommands=_BENCH,
    ),
}
