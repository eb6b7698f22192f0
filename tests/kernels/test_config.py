"""Which configurations a launch gets, what happens when one does not fit, and the input precision."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from triton.runtime.errors import OutOfResources

from dfs_engine.kernels import config
from dfs_engine.kernels.config import Config

HALF = torch.bfloat16
OPS = ("linear_grad_input", "linear_grad_weight")
TILE = Config(16, 32, 16, 4, 2)


def tiles(m: int, n: int, chosen: Config) -> int:
    return -(-m // chosen.block_m) * -(-n // chosen.block_n)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", config.TYPE_NAMES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (100, 17, 33), (4096, 768, 768), (2**20, 64, 576), (768, 384, 50_000)])
def test_candidates_are_known_configurations_best_first(op, dtype, shape):
    known = {variant.config for variant in config.variants(op) if variant.dtype == config.TYPE_NAMES[dtype]}
    found = config.candidates(op, *shape, dtype)
    assert found
    assert {candidate._replace(split=1) for candidate in found} <= known
    sizes = [candidate.block_m * candidate.block_n for candidate in found]
    assert sizes == sorted(sizes, reverse=True)
    assert config.candidates(op, *shape, dtype) == found


def test_few_large_tiles_give_way_to_more_small_ones():
    (large, *_), (small, *_) = (config.candidates("linear_grad_input", m, 768, 768, HALF) for m in (2**16, 512))
    assert large.block_m * large.block_n > small.block_m * small.block_n


def test_a_tile_does_not_stick_out_far():
    first = config.candidates("linear_grad_input", 2**18, 40, 64, HALF)[0]
    assert first.block_n <= 64


def test_a_slice_of_few_columns_more_than_a_tile_takes_narrower_ones():
    """288 live channels of MSDNet: two tiles of 256 columns would multiply 224 columns of nothing."""
    first = config.candidates("linear_grad_input", 2**18, 288, 2592, HALF)[0]
    assert 288 / (-(-288 // first.block_n) * first.block_n) >= 0.75


# Weight gradients of VGG's deep and first layers, of a transformer's, and one that makes a single tile.
LONG_SUMS = [
    (512, 4608, 50_176),
    (512, 4608, 401_408),
    (64, 576, 2**21),
    (768, 3072, 50_432),
    (64, 27, 2**22),
    (9, 9, 2**20),
]


@pytest.mark.parametrize("op", ["linear_grad_weight", "conv2d_grad_weight"])
@pytest.mark.parametrize("shape", LONG_SUMS, ids=str)
def test_a_long_sum_is_split_into_full_waves_of_programs(op, shape, monkeypatch):
    monkeypatch.setattr(config, "_num_sms", lambda device=None: 132)
    m, n, k = shape
    found = config.candidates(op, m, n, k, HALF)
    for candidate in found:
        waves = tiles(m, n, candidate) * candidate.split / 132
        assert waves / math.ceil(waves) >= 0.9
        assert k // candidate.split >= 4 * candidate.block_k
        assert set(found) <= set(config.tunable(op, m, n, k, HALF))


def test_a_short_sum_or_a_full_gpu_is_not_split(monkeypatch):
    monkeypatch.setattr(config, "_num_sms", lambda device=None: 132)
    for op, *shape in (
        ("linear_grad_input", 256, 256, 2**17),
        ("linear_grad_weight", 256, 256, 64),
        ("linear_grad_weight", 2**13, 2**13, 2**13),
    ):
        assert all(candidate.split == 1 for candidate in config.candidates(op, *shape, HALF)), op


@pytest.mark.parametrize("op", OPS)
def test_what_tuning_tries_is_bounded(op):
    for shape in itertools.product((1, 64, 700, 9000), (1, 64, 700, 9000), (1, 3000, 2**24)):
        tried = config.tunable(op, *shape, HALF)
        assert len(set(tried)) == len(tried)
        assert len(tried) <= 12 * len({chosen._replace(split=1) for chosen in tried})


def test_forced_configurations_nest_and_are_undone():
    before = config.candidates(OPS[0], 9, 9, 9, HALF)
    with config.forced(OPS[0], TILE):
        with config.forced(OPS[0], TILE, TILE):
            assert config.candidates(OPS[0], 9, 9, 9, HALF) == (TILE, TILE)
        assert config.candidates(OPS[0], 9, 9, 9, HALF) == (TILE,)
        assert config.candidates(OPS[1], 9, 9, 9, HALF) != (TILE,)
    assert config.candidates(OPS[0], 9, 9, 9, HALF) == before


def test_an_op_may_define_its_own(monkeypatch):
    monkeypatch.setattr(config, "_defined", {})
    config.define("own", half=(TILE,))
    assert config.candidates("own", 9, 9, 9, HALF) == (TILE,)
    assert config.candidates("own", 9, 9, 9, torch.float32) == config.candidates("other", 9, 9, 9, torch.float32)
    assert {variant.config for variant in config.variants("own") if variant.dtype == "bf16"} == {TILE}


def test_the_next_configuration_is_tried_and_the_last_failure_says_why():
    tried = []

    def run(chosen: Config) -> str:
        tried.append(chosen)
        if chosen.num_stages > 1:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return "done"

    small = TILE._replace(num_stages=1)
    assert config.launch("op", [TILE, small], run) == "done"
    assert tried == [TILE, small]
    with pytest.raises(config.NoConfigFits, match=r"op: no configuration fits this GPU: \(16, 32.*shared memory"):
        config.launch("op", [TILE], run)


def test_another_error_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        config.launch("op", [TILE, TILE], lambda _: 1 // 0)


def pretend(monkeypatch, *gpus: tuple[str, int]) -> None:
    """That this machine has these, by name and number of multiprocessors; the first one is the current one."""

    def properties(device: torch.device | None = None):
        name, count = gpus[0 if device is None or device.index is None else device.index]
        return SimpleNamespace(name=name, multi_processor_count=count)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A tuned table of a GPU that this machine pretends to have."""
    gpu = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(config, "TABLES", tmp_path)
    keys = {
        wins: config.table_key(OPS[0], *shape, HALF) for wins, shape in {True: (100, 64, 64), False: (8, 8, 8)}.items()
    }
    entries = {
        key: {"config": list(TILE), "triton_us": 1.0 if wins else 3.0, "aten_us": 2.0} for wins, key in keys.items()
    }
    config.table_path(gpu).write_text(json.dumps({"gpu": gpu, "entries": entries}))
    assert config.table_path(gpu).name == "nvidia-h100-80gb-hbm3.json"
    monkeypatch.setattr(config, "_tables", config.read_tables())
    pretend(monkeypatch, (gpu, 132), ("NVIDIA GeForce RTX 3050", 16))


def test_the_tuned_table_comes_first_and_decides_for_auto(table):
    first, *rest = config.candidates(OPS[0], 128, 60, 70, HALF)  # the shape class of 100, 64, 64
    assert first == TILE
    assert rest
    assert config.prefers_triton(OPS[0], 128, 60, 70, HALF)
    assert not config.prefers_triton(OPS[0], 8, 8, 8, HALF)  # measured, and lost
    assert not config.prefers_triton(OPS[0], 1024, 64, 64, HALF)  # not measured
    assert not config.prefers_triton(OPS[1], 128, 60, 70, HALF)
    assert not config.prefers_triton(OPS[0], 128, 60, 70, torch.float64)
    assert not config.prefers_triton(OPS[0], 0, 60, 70, HALF)
    assert TILE in {variant.config for variant in config.variants(OPS[0]) if variant.dtype == "bf16"}
    assert TILE not in {variant.config for variant in config.variants(OPS[0]) if variant.dtype == "fp16"}


def test_each_gpu_of_a_machine_has_its_own_table_and_number_of_multiprocessors(table):
    current, other = torch.device("cuda", 0), torch.device("cuda", 1)
    assert config.gpu_name() == config.gpu_name(torch.device("cuda")) == config.gpu_name(current)
    assert config.gpu_name(other) == "NVIDIA GeForce RTX 3050"
    assert config.gpu_name(torch.device("cpu")) is None
    question = (OPS[0], 128, 60, 70, HALF)
    assert config.prefers_triton(*question, device=current)
    assert not config.prefers_triton(*question, device=other)
    assert TILE not in config.candidates(*question, device=other)
    assert config.candidates(*question) == config.candidates(*question, device=current)
    # A grid of tiles that leaves the larger one idle fills the smaller one.
    large, small = (config.candidates(OPS[0], 512, 768, 768, HALF, device=device)[0] for device in (other, current))
    assert large.block_m * large.block_n > small.block_m * small.block_n


@pytest.mark.parametrize("op", [*OPS, "conv2d_grad_weight", "norm_linear_grad_input", "norm_act"])
def test_many_rows_are_one_class(op):
    """A table that was tuned at one batch size serves the larger ones, once the GPU is full."""

    def key(rows: int, weights: int = 64) -> str:
        sizes = (weights, 64, rows) if op.endswith("grad_weight") else (rows, weights, 64)
        return config.table_key(op, *sizes, HALF)

    assert key(2**16) == key(70_000) == key(2**24) == key(3 * 2**29)
    assert len({key(2**power) for power in range(17)}) == 17
    assert len({key(2**16, weights) for weights in (64, 2**16, 2**17)}) == 3


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_the_table_is_read_while_torch_compile_traces(is_dynamic, dtype, monkeypatch):
    """Symbolic sizes make one graph for each shape class."""
    entry = {"config": list(TILE), "triton_us": 1.0, "aten_us": 2.0}
    key = config.table_key("conv2d_grad_input", 128, 64, 64, dtype, "3x3s1x1d1x1")
    monkeypatch.setattr(config, "_tables", {"GPU": {key: entry}})
    monkeypatch.setattr(config, "gpu_name", torch.compiler.assume_constant_result(lambda device: "GPU"))

    def prefers(rows: torch.Tensor) -> torch.Tensor:
        geometry = config.convolution((3, 3), (1, 1), (1, 1))
        return rows + config.prefers_triton("conv2d_grad_input", rows.size(0), 64, 64, dtype, geometry)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(prefers, backend=counter, fullgraph=True, dynamic=is_dynamic)
    for num_rows, expected in ((100, 1), (128, 1), (170, 1), (60, 0), (90, 0)):
        assert compiled(torch.zeros(num_rows)).eq(expected).all(), num_rows
    assert counter.frame_count == (2 if is_dynamic else 5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 11, 12, 90, 91, 181, 182, 2**31 - 1, 2**31, 3 * 2**33])
def test_a_class_is_the_nearest_power_of_two(size):
    assert config._nearest_power(size) == 2 ** round(math.log2(size))


def test_without_a_table_nothing_is_preferred(monkeypatch):
    monkeypatch.setattr(config, "_tables", {})
    assert not config.prefers_triton(OPS[0], 128, 64, 64, HALF)


def test_precision_follows_torch_until_it_is_set(monkeypatch):
    monkeypatch.setattr(config, "_input_precision", None)
    for owner, op in (
        (torch.backends.cuda.matmul, "linear_grad_input"),
        (torch.backends.cudnn.conv, "conv2d_grad_input"),
    ):
        previous = owner.fp32_precision
        for value in ("tf32", "ieee"):
            owner.fp32_precision = value
            assert config.precision(op) == value
        owner.fp32_precision = previous
    for value in config.PRECISIONS:
        config.set_input_precision(value)
        assert {config.precision(op) for op in ("linear", "conv2d_grad_weight")} == {value}
    with pytest.raises(ValueError, match="input_precision: expected one of ieee, tf32, tf32x3, got 'tf23'"):
        config.set_input_precision("tf23")
    config.set_input_precision(None)
    assert config.precision() == "ieee"
