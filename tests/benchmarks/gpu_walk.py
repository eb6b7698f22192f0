"""gpu_check.py on a CPU, without any optional package: a tiny model, a clock and a GPU that are made up.

    [TRITON_INTERPRET=1] python tests/benchmarks/gpu_walk.py [arguments of gpu_check.py]

With TRITON_INTERPRET=1 the Triton kernels compute, in Triton's interpreter; else this project's CPU kernels stand in.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])


class Missing:
    """Finds what the machine has, but not these."""

    names = (
        "torchvision", "timm", "transformers", "accelerate", "jsonargparse", "safetensors", "sklearn", "pyarrow", "PIL",
        "matplotlib", "tensorboard", "tqdm", "rich", "yaml", "pytest", "pandas",
    )  # fmt: skip

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.names else PathFinder.find_spec(name, path, target)


sys.meta_path = [Missing if finder is PathFinder else finder for finder in sys.meta_path]

import torch  # noqa: E402

from dfs_engine.benchmarks import (  # noqa: E402
    gpu_check,
    gpu_contests,
    gpu_graphs,
    gpu_ops,
    gpu_stages,
    gpu_steps,
    step_models,
    tune,
)
from dfs_engine.benchmarks.measure import Stats  # noqa: E402
from dfs_engine.kernels import config as kernels  # noqa: E402
from dfs_engine.validate import problems as validate_problems  # noqa: E402


def measure_device(calls, rounds, max_seconds=None):
    """Runs every call once; the first one is the slowest."""
    for call in calls.values():
        call()
    return {way: Stats.of([1e-3 / (index + 1)]) for index, way in enumerate(calls)}


def pretend() -> None:
    gpu_contests.DEVICE = "cpu"
    gpu_stages.DTYPE = "fp32"  # the interpreter multiplies bf16 wrongly
    if not kernels.INTERPRETED:
        gpu_stages.FUSED = gpu_steps.FUSED = "cpp"
        gpu_steps._EAGER, gpu_steps._COMPILED, gpu_steps._TUNED, gpu_steps._GRAPHS = (
            tuple(pair._replace(backend="cpp") if pair.backend == "triton" else pair for pair in pairs)
            for pairs in (gpu_steps._EAGER, gpu_steps._COMPILED, gpu_steps._TUNED, gpu_steps._GRAPHS)
        )
        shapes = gpu_stages.step_shapes
        # A block's calls name the backend; the products' are ops, which the dispatcher has on the CPU too.
        gpu_stages.step_shapes = lambda: [shape for shape in shapes() if shape.op != "norm_act"]
    tiny = step_models.StepModel("vgg7_64", 2, num_classes=3, options={"width": 16}, image_size=8)
    bert = step_models.STEP_MODELS["bert"]  # whose package is not there
    step_models.STEP_MODELS.clear()
    step_models.STEP_MODELS |= {"vgg7_64": tiny, "bert": bert}
    gpu_stages._PROFILED = "vgg7_64"
    gpu_steps._ROUNDS, gpu_steps._WARMUP, gpu_steps._GATE_BATCH = 2, 0, 2
    gpu_steps.SECONDS = dict.fromkeys(gpu_steps.SECONDS, 0.0)
    for module in (gpu_ops, tune):
        module.measure_device = measure_device
    gpu_ops.copy_seconds = lambda num_bytes: 1e-4
    gpu_ops.machine_rates = lambda: {"copy": "made up"}
    kernels.gpu_name = lambda device=None: "NVIDIA Made Up"
    gpu_graphs.record = lambda call: call() or call
    torch.compile = lambda model, **_: model
    # One problem of two of the ops, and two shapes to tune.
    problems = {name: list_problems()[:1] for name, list_problems in validate_problems.PROBLEMS.items()}
    for name in list(problems):
        if name in ("partition", "partitioned_linear"):
            validate_problems.PROBLEMS[name] = lambda name=name: problems[name]
        else:
            del validate_problems.PROBLEMS[name]
    tasks = tune.plan
    tune.plan = lambda config: tasks(config)[-2:]


if __name__ == "__main__":
    pretend()
    sys.exit(gpu_check.main(sys.argv[1:]))
