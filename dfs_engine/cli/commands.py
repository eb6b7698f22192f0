"""The `dfs` command: it reads flags into a config, calls what does the work, and prints.

Exit status: 0 success, 1 the work failed (a breach, a loss that is not finite, a full disk), 2 wrong input, 130 and 143
stopped by Ctrl-C and SIGTERM.
Only the subcommand that is called gets imported, so that `dfs doctor` works where half of the installation is missing.
"""

import importlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dfs_engine.cli.command import Command, add_commands, built, fail, imported, input_errors, write_json
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
    except BrokenPipeError:  # who reads has enough, `head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return 128 + signal.SIGPIPE
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
        " it. cifar100_msdnet_METHOD and cifar100_resnet18_METHOD train rows of the paper's tables, by the settings"
        f" published for them. Recipes: {', '.join(list_recipes())}.",
    )


def _compare_flags(config: str) -> Callable[[Parser], None]:
    """Adds those of the class that `config` names, `--collect` and the recipe's."""

    def add(parser: Parser) -> None:
        _train_flags(parser)
        parser.add_class_arguments(imported(config))
        parser.add_argument(
            "--collect",
            type=Path,
            nargs="+",
            default=[],
            metavar="FOLDER",
            help="Train nothing; merge the runs of these folders, of a comparison's parts say, into the table and"
            " pictures of --output, with a copy of each run's small files.",
        )
        parser.add_class_arguments(imported("dfs_engine.training.config:TrainConfig"), skip=set(_SET_BY_COMPARE))

    return add


_SET_BY_COMPARE = ("run_dir", "resume")


def _compare(config: str) -> Callable[[Command, Any, list[str]], int]:
    """Runs the comparison that the class `config` describes."""

    def run(_command: Command, values: Any, _line: list[str]) -> int:
        from tqdm.contrib.logging import logging_redirect_tqdm

        with input_errors(RuntimeError), logging_redirect_tqdm():
            from dfs_engine.experiments import compare
            from dfs_engine.training.config import TrainConfig

            if values.collect:
                report = compare.merge(values.collect, values.output)
            else:
                recipe = built(TrainConfig, values, but=_SET_BY_COMPARE)
                work = importlib.import_module(config.split(":")[0])
                report = work.run(built(imported(config), values), recipe)
        for title, headings, rows in report.tables():
            _print_table(title, headings, rows)
        for run in report.missing:
            print(f"not in the table: {run.name}: {run.why}")
        print(f"results: {', '.join(map(str, report.files))}")
        write_json(values.json, report.to_json())
        return 0 if report.ok else 1

    return run


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


def _with_data_of(path: Path, values: Any, line: list[str]) -> Any:
    """The flags again, with the data of a run as defaults, which this command line's flags override."""
    from dfs_engine.data.config import is_option_of
    from dfs_engine.models.weights import read_description

    trained_on = read_description(path)["data"]
    not_asked = ("mean", "std")  # which belong together: a flag for one of them must not meet the run's other
    is_named = any(word.partition("=")[0] == "--data.name" for word in line)
    dataset = values.data.name if is_named else trained_on.get("name", values.data.name)
    flags = [
        f"--data.{option}={value}"
        for option, value in trained_on.items()
        if value is not None and option not in not_asked and is_option_of(option, dataset)
    ]
    return _parse([line[0], *flags, *line[1:]])


def _eval(command: Command, values: Any, line: list[str]) -> int:
    from dfs_engine.data.normalization import Normalization
    from dfs_engine.inference import evaluate
    from dfs_engine.inference.per_sample import is_per_sample_file

    with input_errors(RuntimeError):
        alone = is_per_sample_file(values.path)
        result = evaluate.run(command.config_of(values if alone else _with_data_of(values.path, values, line)))
    model, epoch = result["model"], "unknown" if result["epoch"] is None else result["epoch"]
    _print_accuracy(result, f"{model['name']}, {model['variant']}, epoch {epoch}, on {result['data']}")
    _print_further(result["further"])
    _print_exits(result)
    _print_budgets(result)
    if result["normalization"] is not None:
        print(f"images normalised by {Normalization(**result['normalization'])}")
    print(f"results: {', '.join(result['files'])}")
    write_json(values.json, result)
    return 0


def _print_exits(result: dict[str, Any]) -> None:
    """What each exit costs, and how far its confidence can be believed."""
    calibration = result["calibration"].get("test")
    if calibration is None:
        return
    columns = [
        ("operations, M", result["operations"], 1e-6, "{:.2f}"),
        ("ms", result["seconds"], 1e3, "{:.3f}"),
        ("ECE %", [each["ece"] for each in calibration], 1, "{:.2f}"),
        ("temperature", [each["temperature"] for each in calibration], 1, "{:.3f}"),
        ("ECE % at it", [each["ece_at_temperature"] for each in calibration], 1, "{:.2f}"),
    ]
    shown = [column for column in columns if column[1] and None not in column[1]]
    rows = [
        [str(index + 1), *(form.format(unit * values[index]) for _, values, unit, form in shown)]
        for index in range(result["num_exits"])
    ]
    _print_table("what a sample costs, and the calibration error", ["exit", *(column[0] for column in shown)], rows)


def _print_budgets(result: dict[str, Any]) -> None:
    if result["budgeted"] is None:
        print(f"left out: {result['left_out']}")
        return
    cost, title, unit = ("operations", "operations, M", 1e-6) if result["operations"] else ("blocks", "blocks", 1.0)
    headings = ["p", "accuracy %", f"mean {title}", "leave at each exit, %"]
    rows = [
        [
            f"{point['p']:.2f}",
            f"{point['accuracy']:.2f}",
            f"{unit * point[cost]:.2f}",
            " ".join(f"{100 * share:3.0f}" for share in point["exits"]),
        ]
        for point in result["budgeted"][3::4]
    ]
    _print_table("budgeted batch classification, thresholds from held-out samples", headings, rows)


def _predict(command: Command, values: Any, line: list[str]) -> int:
    from dfs_engine.inference import predict

    with input_errors(RuntimeError):
        result = predict.run(command.config_of(_with_data_of(values.path, values, line)))
    if result["output"] is None:
        columns = list(result["predictions"][0])
        print("\t".join(columns))
        for row in result["predictions"]:
            print("\t".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    else:
        counts = ", ".join(f"exit {index} {count}" for index, count in enumerate(result["exits"], start=1))
        skipped = f"; {result['num_skipped']} skipped, which cannot be read" if result["num_skipped"] else ""
        print(f"{result['output']}: {len(result['predictions'])} predictions ({counts}){skipped}")
    write_json(values.json, result)
    return 0


def _conflicts(command: Command, values: Any, line: list[str]) -> int:
    from dfs_engine.training import conflicts

    with input_errors(RuntimeError):
        if values.paths:
            values = _with_data_of(values.paths[0], values, line)
        report = conflicts.run(command.config_of(values))
    for one in report.measured:
        _print_table(f"{one.source}: {one.title}, on {report.data}", *conflicts.summary_table(one.pairs))
    print(
        "shared: (weight, pair of exits) in which some element gets gradient from both; disjoint: none does. "
        "The cosines are of the shared ones."
    )
    print(f"written: {', '.join(map(str, report.files))}")
    write_json(values.json, report.to_json())
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
    "gradients": Command(
        "time each exit's own gradient",
        "Times the gradient of every exit by itself, which methods such as PCGrad need, by this engine, by one call of"
        " torch.autograd.grad an exit and by torchjd, interleaved.",
        "  dfs bench gradients --model vgg7_64 --batch-size 32\n"
        "  dfs bench gradients --model msdnet_cifar --exit-gradients own,whole --forms autograd,dfs\n"
        "  dfs bench gradients --layouts channels_last --output gradients.csv",
        "dfs_engine.benchmarks.gradients:BenchGradientsConfig",
        _show_table,
    ),
    "inference": Command(
        "time inference: stock forms, our evaluation mode, early exit",
        "Times the full model in stock PyTorch and prepared by `dfs_engine.inference.prepare`, and early exit at"
        " several accuracies, interleaved. Who leaves early depends on weights and data: give the folder of a run that"
        " kept validation samples (data.val_fraction), on which the thresholds are found.",
        "  dfs bench inference --run_dir runs/first --output inference.csv\n"
        "  dfs bench inference --run_dir runs/first --batch_size 1,64 --drops 0,0.01 --compile off\n"
        "  dfs bench inference --model resnet18    # the full model alone, random weights",
        "dfs_engine.benchmarks.inference:BenchInferenceConfig",
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
_COMPARE, _SWEEP_BETA = "dfs_engine.experiments.compare:CompareConfig", "dfs_engine.experiments.sweep:SweepBetaConfig"
_SWEEP = {
    "beta": Command(
        "accuracy of every exit against beta",
        "Trains a recipe with several beta, and without surgery, and draws accuracy against beta. All that `dfs compare"
        " --help` says holds: stopped, the same command goes on; --part and --collect.",
        "  dfs sweep beta --config digits_vgg7_dfs --epochs 3 --output runs/beta\n"
        "  dfs sweep beta --config cifar10_vgg7_w16 --betas .1,.5,.9 --seeds 3 --output runs/beta --data.root DIR",
        more_flags=_compare_flags(_SWEEP_BETA),
        run=_compare(_SWEEP_BETA),
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
        "Measures every exit and the ensemble (the mean of all exits' logits) of saved weights on the test samples:"
        " accuracy, loss, calibration error and operations. Where the run kept samples out of training"
        " (data.val_fraction), also a temperature for each exit, and the accuracy for each of 40 budgets of mean"
        " operations (budgeted batch classification), whose thresholds come from those samples, never from the test."
        " Writes tables, a picture, and what every exit says of every sample, from which `dfs eval"
        " per_sample.safetensors` makes them anew.",
        "  dfs eval runs/first\n  dfs eval model.safetensors --data.root DIR --json result.json\n"
        "  dfs eval runs/first --curve flops-vs-acc.csv --time_batch_size 1\n"
        "  dfs eval runs/first/eval/per_sample.safetensors --output again",
        "dfs_engine.inference.evaluate:EvalConfig",
        run=_eval,
        places={
            "path": (
                Path,
                "A run folder, its model.safetensors, or the per_sample.safetensors of an earlier `dfs eval`.",
            )
        },
    ),
    "predict": Command(
        "classify images or texts of your own",
        "Classifies an image, a folder of images, or the texts in a file, and says of each the class, the exit taken"
        " and the probability. They are prepared as the run's test samples were. With a threshold, or with thresholds"
        " found on the samples that the run kept out of training, each leaves at the first exit that is sure enough.",
        "  dfs predict runs/first photos\n  dfs predict runs/first photo.png --threshold 0.9\n"
        "  dfs predict runs/first photos --budget 0.5 --output classes.csv\n"
        "  dfs predict runs/sst2 reviews.txt --policy entropy --accuracy 0.9 --output classes.jsonl",
        "dfs_engine.inference.predict:PredictConfig",
        run=_predict,
        places={
            "path": (Path, "A run folder, or the model.safetensors of one."),
            "input": (
                Path,
                "An image, a folder of images, or texts: a .txt file with one in each line, or a .csv, .tsv, .jsonl or"
                " .parquet file with the run's text columns.",
            ),
        },
    ),
    "compare": Command(
        "train a list of methods and variants under one recipe, into one table",
        "Trains rows under one recipe, each run in a process and a folder of its own, and writes results.md,"
        " results.csv and pictures: accuracy per exit and ensemble, mean and deviation over the seeds, time, memory,"
        " operations. Rows are a list (--rows), or all combinations of --methods, --variants, --models and --betas. The"
        " recipe is that of `dfs train`: --config and any of its flags. Stopped or killed, the same command goes on:"
        " what has ended is kept, what was in the middle resumes from its checkpoint, what failed is tried again. A run"
        " that fails is named in the table, and the others go on. Runs of another recipe or of other flags under the"
        " same name are an error before anything is trained.",
        "  dfs compare --config digits_vgg7_dfs --epochs 3 --methods joint,byot --seeds 2 --output runs/digits\n"
        "  dfs compare --config cifar10_vgg7_w16 --rows methods --seeds 3 --lr_search --output runs/methods"
        " --data.root DIR\n"
        "  dfs compare --config cifar10_vgg7_w16 --rows my_rows.yaml --part 1/3 --output runs/part1 --data.root DIR\n"
        "  dfs compare --collect runs/part1 runs/part2 runs/part3 --output runs/all",
        more_flags=_compare_flags(_COMPARE),
        run=_compare(_COMPARE),
    ),
    "sweep": Command(
        "train a recipe with several values of an option",
        "Trains a recipe with several values of one option, and draws what that does to every exit.",
        "  dfs sweep beta --config digits_vgg7_dfs --epochs 3 --output runs/beta",
        subcommands=_SWEEP,
    ),
    "conflicts": Command(
        "measure how far the exits' gradients are in conflict",
        "Compares the gradients of every two exits' losses, weight by weight, on training batches: their cosine, the"
        " share of batches in which it is negative, and whether the two share any element, which surgery's parts do"
        " not. Writes conflicts.csv and heat maps. Of several weights also how it goes; `dfs train --conflicts_every 1`"
        " records that of one run. Without a path: a new model, by the --model flags.",
        "  dfs conflicts runs/first\n"
        "  dfs conflicts runs/dense runs/dfs --batches 4 --json conflicts.json\n"
        "  dfs conflicts --model.name vgg7_64 --model.variant dense --data.name digits",
        "dfs_engine.training.conflicts:ConflictsConfig",
        run=_conflicts,
        places={"paths": (list[Path], "Run folders, or the model.safetensors of some; the first one's data are read.")},
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
