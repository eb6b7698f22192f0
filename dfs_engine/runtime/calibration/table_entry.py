"""Writes this machine's entry of the table of known machines: `python -m dfs_engine.runtime.calibration.table_entry`.

For one thread: OMP_NUM_THREADS=1 before it. It replaces an entry of the same machine, refuses on a busy one, and writes
nothing unless every question was answered, more often asked than in training.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfs_engine.runtime.calibration import answers, measure, table
from dfs_engine.runtime.calibration.answers import Answer
from dfs_engine.runtime.machine import busy_reason, cpu_model

_ROUNDS, _SECONDS = 20, 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 1 the measurement did not repeat, 2 it was not started."""
    parser = argparse.ArgumentParser(prog="python -m dfs_engine.runtime.calibration.table_entry", description=__doc__)
    parser.add_argument("--output", type=Path, default=table.FILE, help="the table to write (default: the one in use)")
    parser.add_argument("--force", action="store_true", help="measure in spite of the load average")
    values = parser.parse_args(arguments)
    busy = busy_reason()
    if busy is not None and not values.force:
        return _refuse(f"expected a machine with nothing else to do, got {busy}. Wait a minute, or pass --force.", 2)
    machine = table.this_machine()
    if machine is None:
        return _refuse(
            f"expected /proc/cpuinfo with vendor, family and model, and a core for each of {torch.get_num_threads()} "
            "threads. Such a machine cannot be in the table; it is measured instead.",
            2,
        )
    speedups, failed = measure.measure(answers.questions(), _ROUNDS, _SECONDS)
    if failed:
        reasons = "; ".join(f"{' '.join(question)}: {reason}" for question, reason in failed.items())
        return _refuse(f"expected answers that repeat, got none to: {reasons}. Nothing was written. Try again.", 1)
    today = datetime.date.today().isoformat()
    entry = {
        "version": measure.VERSION,
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "machine": machine._asdict(),
        "answers": answers.to_rows({question: Answer(speedup, today) for question, speedup in speedups.items()}),
    }
    text = json.dumps({"entries": merge(_entries(values.output), entry)}, indent=1) + "\n"
    values.output.write_text(text)
    print(json.dumps(entry, indent=1))
    print(f"written to {values.output}", file=sys.stderr)
    return 0


def merge(entries: Sequence[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries with this one in place of another of its machine, in an order that does not depend on theirs."""
    others = [other for other in entries if other["machine"] != entry["machine"]]
    return sorted([*others, entry], key=lambda item: list(item["machine"].values()))


def _entries(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["entries"] if file.exists() else []


def _refuse(message: str, status: int) -> int:
    print(f"table_entry: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
