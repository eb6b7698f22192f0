"""The table of machines whose answers are known, `table.json` beside this file.

    {"entries": [{
        "version": 6,                   measure.VERSION: an entry of another one does not count
        "cpu": "AMD EPYC",              for people
        "torch": "2.15.0",              for people
        "machine": {                    what has to match
            "vendor": "AuthenticAMD", "family": 25, "model": 17,
            "instructions": "avx512",   what the C++ kernels run on here
            "bfloat16": "avx512",       the bfloat16 instructions of the CPU: amx, avx512 or none
            "threads": 2                the power of two that the number of threads does not exceed
        },
        "answers": [{
            "op": "linear", "dtype": "fp32", "shape": "1024 rows or more",
            "speedups": {"gemm": SPEED OVER ATEN'S, "onednn": SPEED OVER ATEN'S},
            "measured": "2026-11-25"
        }]
    }]}

Vendor, family and model are the CPUID's, because marketing names stand for several chips and several names for one.
`python -m dfs_engine.runtime.calibration.table_entry` writes the entry of the machine it runs on.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfs_engine.runtime.calibration import answers, measure
from dfs_engine.runtime.calibration.answers import Answer, Question
from dfs_engine.runtime.machine import cpuinfo, num_cores

FILE = Path(__file__).with_name("table.json")


class Machine(NamedTuple):
    """What two machines with the same answers have in common; see the module."""

    vendor: str
    family: int
    model: int
    instructions: str
    bfloat16: str
    threads: int


def this_machine() -> Machine | None:
    """This process's machine, or None where the system does not tell the CPU, or where threads have to share cores."""
    from dfs_engine import _C

    cpu, threads = cpuinfo(), torch.get_num_threads()
    if threads > num_cores() or not {"vendor_id", "cpu family", "model"} <= cpu.keys():
        return None
    flags = cpu.get("flags", "").split()
    bfloat16 = "amx" if "amx_bf16" in flags else "avx512" if "avx512_bf16" in flags else "none"
    return Machine(
        cpu["vendor_id"], int(cpu["cpu family"]), int(cpu["model"]), _C.instruction_set(), bfloat16, _class(threads)
    )


def _class(threads: int) -> int:
    return 1 << (threads - 1).bit_length()


@functools.cache
def entries() -> list[dict[str, Any]]:
    """All that is in the table."""
    return json.loads(FILE.read_text())["entries"]


def known(machine: Machine | None) -> dict[Question, Answer]:
    """The answers for this machine; none: it is not in the table."""
    for entry in entries():
        if machine is not None and entry["version"] == measure.VERSION and entry["machine"] == machine._asdict():
            return answers.from_rows(entry["answers"])
    return {}
