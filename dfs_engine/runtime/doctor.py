"""What this machine and this installation can do: `dfs doctor`. Needs only torch."""

import logging
import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from dfs_engine.kernels import config as kernels
from dfs_engine.runtime import backend, calibration
from dfs_engine.runtime.calibration import answers, kept, table
from dfs_engine.runtime.machine import busy_reason, cpu_model, num_cores

logger = logging.getLogger(__name__)

PACKAGES = (
    "dfs_engine", "torch", "triton", "numpy", "torchvision", "timm", "transformers", "accelerate", "jsonargparse",
    "scikit-learn", "pyarrow", "matplotlib", "tensorboard", "safetensors",
)  # fmt: skip

ENVIRONMENT_VARIABLES = {
    "DFS_BACKEND": f"the backend of every op ({', '.join(backend.BACKENDS)}); unset: the fastest one that is there",
    "DFS_WINOGRAD": "3x3 convolutions by Winograd's algorithm: 0: none, 1: all, unset: where it is faster",
    "DFS_CPU": "baseline, avx2 or avx512: the best instruction set that the C++ kernels may use",
    "DFS_CACHE_DIR": "where calibrations of this machine are kept; unset: dfs_engine in the user's cache folder",
    "TRITON_INTERPRET": "1, before Python starts: the Triton kernels run on the CPU, slowly, in place of the C++ ones",
    "DFS_NO_EXT": "1 at install time: skip the C++ extension",
    "DEBUG": "1 at install time: compile the extension with -O0 -g",
}


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    if package == "torch":
        # The metadata of some wheels lacks the +cu or +cpu that says which build this is.
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_types() -> list[str]:
    """The kinds of device that torch can compute on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def report(recalibrate: bool = False) -> dict[str, Any]:
    """Everything that `dfs doctor` tells, as JSON-able values.

    Args:
        recalibrate: measure anew which kernels are the faster ones, and forget what was kept.
    """
    devices = device_types()
    return {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": num_cores(),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
        },
        "libraries": _libraries(),
        "extension": _extension(),
        "calibration": _calibration(recalibrate),
        "triton": _triton(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if "cuda" in devices else [],
        "backends": {
            device: {name: backend.unavailable_reason(name, device) for name in backend.BACKENDS} for device in devices
        },
        "auto": {device: {op: _automatic(op, device) for op in backend.OPS} for device in devices},
        "environment": {
            name: {"value": os.environ.get(name), "meaning": meaning} for name, meaning in ENVIRONMENT_VARIABLES.items()
        },
    }


def _libraries() -> dict[str, str | None]:
    """The OpenMP, MKL and oneDNN that torch was built with, in its own words; None: built without."""
    lines = (torch.__config__.show() + torch.__config__.parallel_info()).splitlines()

    def find(word: str) -> str | None:
        return next((line.strip(" -") for line in lines if word in line), None)

    return {"OpenMP": find("OpenMP 2"), "MKL": find("Math Kernel Library"), "oneDNN": find("MKL-DNN v")}


def _extension() -> dict[str, str]:
    """How the C++ kernels were built and what they run on; empty where they are not."""
    if backend.unavailable_reason("cpp") is not None:
        return {}
    from dfs_engine import _C

    return {"instructions": _C.instruction_set(), **_C.build_info()}


def _calibration(recalibrate: bool) -> dict[str, Any]:
    """Which of the C++ kernels are in use and how that is known; empty where they were not built."""
    if backend.unavailable_reason("cpp") is not None:
        if recalibrate:
            logger.warning("dfs doctor: nothing to calibrate, because %s.", backend.unavailable_reason("cpp"))
        return {}
    busy = busy_reason()
    if recalibrate and busy is not None:
        logger.warning(
            "dfs doctor: the machine is busy (%s). What is measured now may not be kept, or be wrong. "
            "Repeat it when nothing else runs.",
            busy,
        )
    state = calibration.recalibrate() if recalibrate else calibration.settled()
    machine = table.this_machine()
    return {
        "machine": None if machine is None else machine._asdict(),
        "in_table": bool(table.known(machine)),
        "file": str(kept.file()),
        "busy": busy,
        "kernels": {
            name: {"on": on, "speedup": state.speedups[name], "origin": state.origins[name]}
            for name, on in state.wins._asdict().items()
        },
        "answers": answers.to_rows(state.answers),
        "failed": [{**question._asdict(), "reason": reason} for question, reason in state.failed.items()],
    }


def _triton() -> dict[str, str]:
    """What `auto` on CUDA and a test of the Triton kernels without a GPU depend on."""
    return {
        "version": version_of("triton") or "not installed",
        "interpreter": "on: kernels run on the CPU" if kernels.INTERPRETED else "off: kernels need a CUDA device",
        "tested": "in the interpreter, and compiled for sm_80 and sm_90; never run on a GPU",
        "tuned for": ", ".join(kernels.read_tables()) or "no GPU; auto takes aten on CUDA (see dfs bench tune)",
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _automatic(op: str, device: str) -> str:
    """The backend that serves `op` when no argument asks for one; DFS_BACKEND counts."""
    try:
        chosen = backend.select(op, torch.device(device), torch.float32)
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"
    has_kernels = device == "cuda" and op in backend.KERNEL_DTYPES["triton"]
    is_tuned = has_kernels and backend.requested() is None and kernels.gpu_name() in kernels.read_tables()
    return "triton where this GPU's tuned table says that it wins, else aten" if is_tuned else chosen


def format_report(report: dict[str, Any]) -> str:
    """The report as text for people."""
    lines = ["Versions"]
    lines += [f"  {name:<14} {version or 'not installed'}" for name, version in report["versions"].items()]
    cpu = report["cpu"]
    lines += [
        "CPU",
        f"  model          {cpu['model']}",
        f"  capability     {cpu['capability']} (what torch's own kernels use)",
        f"  cores          {cpu['cores']} usable by this process",
        f"  threads        {cpu['threads']} intra-op, {cpu['interop_threads']} inter-op",
    ]
    lines += [f"  {name:<14} {text or 'torch was built without it'}" for name, text in report["libraries"].items()]
    lines += ["C++ kernels"]
    lines += [f"  {name:<14} {text}" for name, text in report["extension"].items()] or ["  not built"]
    lines += _calibration_lines(report["calibration"])
    lines += ["Triton kernels"]
    lines += [f"  {name:<14} {text}" for name, text in report["triton"].items()]
    lines += ["GPU"]
    lines += [
        f"  {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, CUDA {gpu['cuda']}"
        for gpu in report["gpus"]
    ] or ["  none that torch can use"]
    for device, backends in report["backends"].items():
        lines.append(f"Backends on {device}")
        lines += [
            f"  {name:<14} {'usable' if reason is None else 'not usable: ' + reason}"
            for name, reason in backends.items()
        ]
        lines += [f"  auto: {op} is served by {name}" for op, name in report["auto"][device].items()]
    lines.append("Environment variables")
    lines += [
        f"  {name:<14} {'unset' if entry['value'] is None else entry['value']} ({entry['meaning']})"
        for name, entry in report["environment"].items()
    ]
    return "\n".join(lines)


def _calibration_lines(state: dict[str, Any]) -> list[str]:
    if not state:
        return []
    lines = ["Calibration (kernels that are on where they are faster than what they replace, by which ratio)"]
    for name, entry in state["kernels"].items():
        ratio = "" if entry["speedup"] is None else f"{entry['speedup']:.2f} x; "
        lines.append(f"  {name:<16} {'on ' if entry['on'] else 'off'} {ratio}{entry['origin']}")
    if state["failed"] and state["busy"]:
        lines.append(f"  the machine      is busy: {state['busy']}")
    lines.append("  to ask again     dfs doctor --recalibrate, while nothing else runs")
    if state["in_table"]:
        lines.append(
            f"  the table        has this machine; what was asked again and kept in {state['file']} comes before it"
        )
    return lines
