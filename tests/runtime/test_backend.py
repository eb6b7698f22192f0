"""An explicit request works or raises; the automatic choice says once why it falls back."""

import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dfs_engine import create_model, ops
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import calibration


def random(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size).to(dtype)


def convolve_4(dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    weight = random(2, 4, 1, 1, dtype=dtype)
    return ops.partitioned_conv2d(random(1, 4, 3, 3, dtype=dtype), weight, start=0, stop=2, **options)


def multiply_4(dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    weight = random(3, 4, dtype=dtype)
    return ops.partitioned_linear(random(2, 4, dtype=dtype), weight, start=0, stop=2, **options)


CALLS = {"partitioned_conv2d": convolve_4, "partitioned_linear": multiply_4}


def normalise_4(dtype: torch.dtype, **options) -> torch.Tensor:
    parameters = (None, None, random(3, 4, dtype=dtype))
    return ops.partitioned_norm_linear(random(2, 4, dtype=dtype), *parameters, start=0, stop=2, **options)


def produce_4(dtype: torch.dtype, **options) -> torch.Tensor:
    z = random(2, 4, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    parameters = (None, None, None, None)
    return ops.norm_act(z, *parameters, num_shared=2, exit_start=2, **options).full


def activate_4(dtype: torch.dtype, **options) -> torch.Tensor:
    z = random(2, 4, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return ops.norm_relu(z, None, None, None, None, **options)


DROP = {"dropout": lambda dtype, **options: ops.dropout(random(2, 4, dtype=dtype), **options)}
# (what is called, the op that it counts as), on tensors of a dtype
TYPED = {
    **{name: (call, name) for name, call in (CALLS | DROP).items()},
    "partitioned_norm_linear": (normalise_4, "partitioned_norm_linear"),
    "norm_act": (produce_4, "norm_act"),
    "norm_relu": (activate_4, "norm_act"),
}
NO_KERNEL = [
    *((name, "cpp", torch.float64) for name in TYPED),
    *((name, "triton", torch.float64) for name in TYPED if name != "dropout"),
    *((name, "cpp", torch.float16) for name in ("norm_act", "norm_relu", "dropout")),
]
MISSING = "the C++ extension dfs_engine._C is not built for this torch"


@pytest.fixture(autouse=True)
def _no_request_in_force():
    with backends.use_backend(None):
        yield


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(backends, "_extension_missing", MISSING)
    monkeypatch.setattr(backends, "_said", set())


@pytest.mark.parametrize("op", CALLS)
def test_explicit_request_is_the_one_that_runs(op, backend):
    for name in (backend, "reference"):
        CALLS[op](backend=name)
        assert backends.last_used(op).partition(":")[0] == name


def convolve(channels: int, kernel: int, dtype: torch.dtype = torch.float32, stride: int = 1, **options) -> None:
    input, weight = torch.randn(2, channels, 6, 5, dtype=dtype), torch.randn(17, channels, kernel, kernel, dtype=dtype)
    input = input.contiguous(memory_format=torch.channels_last)
    ops.partitioned_conv2d(input, weight, stride=stride, start=0, stop=2, **options)


@pytest.mark.parametrize("backend", [None, "auto"])
@pytest.mark.parametrize("is_faster", [True, False])
def test_automatic_convolution_takes_our_kernels_where_they_have_something_of_their_own(
    backend, is_faster, monkeypatch
):
    monkeypatch.setattr(calibration, "wins", lambda: calibration.Wins(False, False, is_faster, False, False))
    ours = "cpp" if backends.unavailable_reason("cpp") is None else "aten"
    for arguments, expected in (
        ((16, 3), ours),
        ((15, 3), "aten"),
        ((16, 1), "aten"),
        ((16, 5), "aten"),
        ((16, 3, torch.float32, 2), ours if is_faster else "aten"),
        ((16, 3, torch.float64), "aten"),
        ((4, 1, torch.bfloat16), ours),
    ):
        convolve(*arguments, backend=backend)
        assert backends.last_used("partitioned_conv2d").partition(":")[0] == expected, arguments


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_automatic_linear_takes_what_the_calibration_found(own, onednn, monkeypatch):
    monkeypatch.setattr(calibration, "wins", lambda: calibration.Wins(own, onednn, not own, False, False))
    CALLS["partitioned_linear"]()
    is_ours = (own or onednn) and backends.unavailable_reason("cpp") is None
    assert backends.last_used("partitioned_linear").partition(":")[0] == ("cpp" if is_ours else "aten")


@pytest.mark.parametrize(("name", "backend", "dtype"), NO_KERNEL, ids=str)
@pytest.mark.parametrize("way", ["argument", "use_backend"])
def test_a_dtype_without_a_kernel_is_refused(name, backend, dtype, way, monkeypatch):
    monkeypatch.setattr(backends, "unavailable_reason", lambda *_: None)  # whatever this machine has
    call, op = TYPED[name]
    number = str(dtype).removeprefix("torch.")
    message = (
        rf"^{op}: backend '{backend}' was requested, but it has no kernel for {number}, only for float32, .*'aten'"
    )
    argument, in_force = (backend, None) if way == "argument" else (None, backend)
    with backends.use_backend(in_force), pytest.raises(RuntimeError, match=message):
        call(dtype=dtype, backend=argument)


@pytest.mark.parametrize("name", [name for name in TYPED if name != "dropout"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_automatic_choice_says_aten_where_there_is_no_kernel(name, dtype):
    call, op = TYPED[name]
    call(dtype=dtype)
    has_kernel = dtype in backends.KERNEL_DTYPES["cpp"][op] and backends.unavailable_reason("cpp") is None
    assert backends.last_used(op).partition(":")[0] == ("cpp" if has_kernel else "aten")


def test_a_model_without_a_kernel_for_its_dtype_is_refused_when_it_runs():
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    model = create_model("vgg7_64", width=4, backend="cpp", dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"backend 'cpp' was requested, but it has no kernel for float64.*the model"):
        model(model.example_input(2))
    model = create_model("vgg7_64", width=4, backend="cpp")
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(RuntimeError, match=r"norm_act: backend 'cpp' was requested.*float16"),
    ):
        model(model.example_input(2))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_explicit_request_that_is_not_there_raises(op, backend, no_extension):
    reason = MISSING if backend == "cpp" else "the triton backend computes on cuda tensors, got cpu"
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: backend '{backend}' was requested, but {reason}")):
        CALLS[op](backend=backend)
    with backends.use_backend(backend), pytest.raises(RuntimeError, match=re.escape(reason)):
        CALLS[op]()


def test_cpp_does_not_compute_on_another_device():
    reason = "the cpp backend computes on cpu tensors, got meta"
    assert backends.unavailable_reason("cpp", "meta") == reason
    with pytest.raises(RuntimeError, match=reason):
        ops.partitioned_linear(
            torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta"), start=0, stop=2, backend="cpp"
        )


def test_a_gpu_is_judged_by_its_own_compute_capability(monkeypatch):
    """Of two in one machine, whichever is the current one."""
    gpus = [SimpleNamespace(name="New", major=9, minor=0), SimpleNamespace(name="Old", major=7, minor=5)]
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(backends, "_has_triton", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpus[device.index or 0])
    reason = "the triton backend needs compute capability 8.0, and Old has 7.5"
    assert backends.unavailable_reason("triton", "cuda") is None
    assert backends.unavailable_reason("triton", torch.device("cuda", 1)) == reason
    for index, expected in enumerate(("triton", "aten")):
        chosen = backends.select("norm_act", torch.device("cuda", index), torch.float32, wins=lambda _: True)
        assert chosen == expected
    with pytest.raises(RuntimeError, match=reason):
        backends.select("norm_act", torch.device("cuda", 1), torch.float32, "triton")


@pytest.mark.parametrize("op", CALLS)
def test_automatic_fallback_says_once_why(op, no_extension, caplog):
    with caplog.at_level(logging.WARNING):
        CALLS[op]()
        CALLS[op]()
    assert backends.last_used(op) == "aten"
    assert [record.getMessage() for record in caplog.records] == [f"backend: using aten, because {MISSING}."]


@pytest.mark.parametrize("name", ["atem", "", 3])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="backend: expected one of reference, aten, cpp, triton, got"):
        CALLS["partitioned_linear"](backend=name)
    with pytest.raises(ValueError, match="expected one of"), backends.use_backend(name):
        pass
    with pytest.raises(ValueError, match="expected one of"):
        backends.unavailable_reason(name)


def test_suggestion_and_unknown_op():
    with pytest.raises(ValueError, match=r"Did you mean 'aten'\?"):
        backends.check_backend("atem")
    with pytest.raises(ValueError, match=r"op: expected one of .*, got 'conv3d'"):
        backends.last_used("conv3d")


def test_use_backend_nests_yields_to_the_argument_and_is_undone():
    op = "partitioned_linear"
    with backends.use_backend("reference"):
        with backends.use_backend("aten"):
            CALLS[op]()
            assert backends.last_used(op) == "aten"
            CALLS[op](backend="reference")
            assert backends.last_used(op) == "reference"
        assert backends.requested() == "reference"
        with pytest.raises(KeyError), backends.use_backend("aten"):
            raise KeyError
        assert backends.requested() == "reference"
    assert backends.requested() is None


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    preamble = "import torch; from dfs_engine import ops; from dfs_engine.runtime import backend\n"
    environment = os.environ | environment
    return subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True, env=environment)


CALL = "ops.partitioned_linear(torch.ones(2, 4), torch.ones(3, 4), start=0, stop=2)\n"


def test_environment_variable():
    done = run(f"{CALL}print(backend.last_used('partitioned_linear'))", DFS_BACKEND="aten")
    assert done.stdout == "aten\n", done.stderr


def test_environment_variable_is_an_explicit_request():
    double = CALL.replace("4)", "4).double()")
    done = run(double, DFS_BACKEND="cpp")
    assert done.returncode == 1
    assert "partitioned_linear: backend 'cpp' was requested, but" in done.stderr


def test_environment_variable_that_is_misspelt():
    done = run(CALL, DFS_BACKEND="attn")
    assert done.returncode == 1
    assert "backend: expected one of reference, aten, cpp, triton, got 'attn'. Did you mean 'aten'?" in done.stderr


def test_an_unknown_instruction_set_is_refused():
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    done = run("", DFS_CPU="avx3")
    assert done.returncode == 1
    assert "DFS_CPU: expected one of baseline, avx2, avx512, got 'avx3'. Did you mean 'avx" in done.stderr
