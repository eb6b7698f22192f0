"""Builds the C++ extension when it can, and installs in pure Python when it cannot.

Environment:
    DFS_NO_EXT=1   skip the extension
    DEBUG=1        -O0 -g
"""

import glob
import os
import shutil
import sys
from typing import Any

from setuptools import setup

PACKAGES = [
    "dfs_engine",
    "dfs_engine.cli",
    "dfs_engine.data",
    "dfs_engine.evaluation",
    "dfs_engine.experiments",
    "dfs_engine.inference",
    "dfs_engine.methods",
    "dfs_engine.models",
    "dfs_engine.nn",
    "dfs_engine.ops",
    "dfs_engine.runtime",
    "dfs_engine.runtime.calibration",
    "dfs_engine.training",
    "dfs_engine.validate",
    "dfs_engine.kernels",
    "dfs_engine.benchmarks",
    "dfs_engine.configs",
]
# `kernels` at top level would shadow the PyPI package of that name, which transformers probes for.
PACKAGE_DIR = {f"dfs_engine.{folder}": folder for folder in ("kernels", "benchmarks", "configs")}


def flag(name: str) -> bool:
    return os.environ.get(name) == "1"


def extension() -> dict[str, Any]:
    """Arguments of `setup` that build dfs_engine._C, or none of them, with the reason printed once."""
    if flag("DFS_NO_EXT"):
        reason = "DFS_NO_EXT=1"
    elif shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        reason = "no C++ compiler was found (install g++, or set CXX)"
    else:
        try:
            from torch.utils.cpp_extension import BuildExtension, CppExtension
        except ImportError as error:
            reason = f"torch is not importable in the build environment ({error}); use --no-build-isolation"
        else:
            # Without -fopenmp in both steps at::parallel_for runs on one thread and says nothing.
            optimise = ["-O0", "-g"] if flag("DEBUG") else ["-O3"]
            module = CppExtension(
                "dfs_engine._C",
                sorted(glob.glob("csrc/*.cpp")),
                depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/kernels/*.inc")),
                extra_compile_args=["-std=c++20", "-fopenmp", "-Wall", "-Wno-psabi", *optimise],
                extra_link_args=["-fopenmp"],
            )
            module.optional = True

            class OptionalBuild(BuildExtension):
                """A failing compiler leaves a working pure-Python install, and says so; no library of other sources."""

                def build_extensions(self) -> None:
                    try:
                        super().build_extensions()
                    except Exception as error:
                        say(f"the compiler failed: {error}")
                        self.extensions = []
                        for stale in glob.glob("dfs_engine/_C.*.so") + glob.glob("dfs_engine/_C.*.pyd"):
                            os.remove(stale)

            return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}
    say(reason)
    return {}


def say(reason: str) -> None:
    print(
        f"dfs_engine: installing without the C++ extension: {reason}. The `aten` backend serves all ops.",
        file=sys.stderr,
    )


setup(packages=PACKAGES, package_dir=PACKAGE_DIR, **extension())
