"""What this machine is: for the report of `dfs doctor`, the header of a benchmark, the key of a calibration."""

import os
import platform
from pathlib import Path

import torch


def cpuinfo() -> dict[str, str]:
    """What Linux tells of the first CPU, as in {"vendor_id": "AuthenticAMD", "flags": "fpu vme"}; elsewhere empty."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_model() -> str:
    """The CPU's marketing name where the system tells it, else its architecture."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_and_instructions() -> str:
    """As in "AMD EPYC, AVX512": one name stands for several chips, which differ in what torch found on them."""
    return f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def num_cores() -> int:
    """Cores that this process may run on: fewer than the machine's inside a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_reason() -> str | None:
    """Why a measurement should wait, as in "a load average of 3.1 on 2 cores"; None: nothing else seems to run.

    The load average counts what wanted to run in the last minute, on all cores of the machine.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on this system
        return None
    cores = os.cpu_count() or 1
    return f"a load average of {load:.1f} on {cores} cores" if load > max(0.5, cores / 4) else None


def check_device(owner: str, device: str) -> None:
    """Raises RuntimeError, in the name of a command, where `device` is "cuda" and torch sees none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"{owner}: expected a CUDA device, got device='cuda' where torch sees none. "
            "Run it on a machine with an NVIDIA GPU and a CUDA build of torch, or with device='cpu'."
        )
