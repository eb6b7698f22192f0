"""What this machine is: for the report of `dfs doctor`, the header of a benchmark, the key of a calibration."""

import os
import platform
from pathlib import Path

import torch


def cpu_model() -> str:
    """The CPU's marketing name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_and_instructions() -> str:
    """As in "AMD EPYC, AVX512": one name stands for several chips, which differ in what torch found on them."""
    return f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def num_cores() -> int:
    """Cores that this process may run on: fewer than the machine's inside a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(owner: str, device: str) -> None:
    """Raises RuntimeError, in the name of a command, where `device` is "cuda" and torch sees none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"{owner}: expected a CUDA device, got device='cuda' where torch sees none. "
            "Run it on a machine with an NVIDIA GPU and a CUDA build of torch, or with device='cpu'."
        )
