"""All ops through the Triton backend on a GPU: values, repeats, far offsets, streams, CUDA graphs, torch.compile."""

import itertools

import pytest
import torch
from torch import Tensor

from dfs_engine import reference
from dfs_engine.ops import conv2d, norm_act, partitioned_conv2d, partitioned_linear, partitioned_norm_linear
from dfs_engine.partition import Partition
from dfs_engine.runtime.precision import fp32_precision
from dfs_engine.validate.tolerances import TOLERANCES, Tolerance, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("ieee"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
OPS = ("linear", "norm-linear", "conv2d", "conv2d-stride", "conv2d-1x1", "depthwise", "block", "block-pool")
OP = pytest.mark.parametrize("op", OPS)
# (kernel, stride, groups) of the convolutions, on 48 channels.
GEOMETRIES = {"conv2d": (3, 1, 1), "conv2d-stride": (3, 2, 1), "conv2d-1x1": (1, 1, 1), "depthwise": (3, 2, 48)}
CHANNELS = 48


@pytest.fixture
def ieee():
    """float32 means float32: cuDNN's default is tf32."""
    with fp32_precision("ieee"):
        yield


class Problem:
    """One op with its leaves on the GPU; `beta` of the channels are live."""

    def __init__(self, op: str, dtype: torch.dtype, layout: torch.memory_format, beta: float = 0.5, batch: int = 5):
        self.op, self.live = op, Partition(CHANNELS, beta).num_shared

        def random(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            tensor = (torch.randn(size, device="cuda") * scale).to(dtype)
            return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor

        if op == "linear":
            leaves = [random(batch, 7, CHANNELS), random(65, CHANNELS, scale=CHANNELS**-0.5), random(65)]
        elif op == "norm-linear":
            norm = [random(CHANNELS), random(CHANNELS)]
            leaves = [random(batch, 7, CHANNELS), *norm, random(65, CHANNELS, scale=CHANNELS**-0.5), random(65)]
        elif op in GEOMETRIES:
            kernel, _, groups = GEOMETRIES[op]
            fan_in = CHANNELS // groups
            weight = random(96, fan_in, kernel, kernel, scale=(fan_in * kernel**2) ** -0.5)
            leaves = [random(batch, CHANNELS, 13, 10), weight, random(96)]
        else:
            parameters = [random(CHANNELS, dtype=torch.float32).abs() + 0.5 for _ in range(2)]
            leaves = [random(batch, CHANNELS, 12, 14), *parameters]
            if op == "block-pool":  # all values apart: a rounding must not make two pixels of a window equal
                ranks = torch.randperm(leaves[0].numel(), device="cuda").view_as(leaves[0])
                leaves[0] = self._apart(ranks, dtype).contiguous(memory_format=layout)
        self.leaves = [leaf.requires_grad_() for leaf in leaves]
        self.grads = [torch.randn_like(output) for output in self.outputs("aten")]

    @staticmethod
    def _apart(ranks: Tensor, dtype: torch.dtype) -> Tensor:
        """Steps of 1/8 within each 2x2 window, which every dtype can tell apart."""
        size = ranks.shape
        order = ranks.view(*size[:2], size[2] // 2, 2, size[3] // 2, 2).transpose(3, 4).flatten(4).argsort(-1)
        blocks = order.unflatten(-1, (2, 2)).transpose(3, 4).reshape(size)
        return (blocks / 8 + torch.randint(-8, 8, (*size[:2], 1, 1), device="cuda") / 4).to(dtype)

    def outputs(self, backend: str, leaves: list[Tensor] | None = None) -> list[Tensor]:
        """What carries gradient; `reference` in whatever dtype the leaves have."""
        leaves, live = leaves or self.leaves, self.live
        sliced = {"start": 0, "stop": live}
        if self.op == "linear":
            return [partitioned_linear(*leaves, **sliced, backend=backend)]
        if self.op == "norm-linear":
            return [partitioned_norm_linear(*leaves, **sliced, backend=backend)]
        if self.op in GEOMETRIES:
            kernel, stride, groups = GEOMETRIES[self.op]
            return [partitioned_conv2d(*leaves, stride, kernel // 2, 1, groups, **sliced, backend=backend)]
        options = {"pool": self.op == "block-pool", "num_shared": live, "exit_start": live}
        if backend == "reference":
            _, shared, _, exit = reference.norm_act(*leaves, None, None, **options)
        else:
            _, shared, _, exit = norm_act(*leaves, None, None, **options, backend=backend)
        return [shared, exit]

    def results(self, backend: str = "triton") -> list[Tensor]:
        """Outputs and gradients."""
        outputs = self.outputs(backend)
        return [output.detach() for output in outputs] + list(torch.autograd.grad(outputs, self.leaves, self.grads))

    def expected(self) -> list[Tensor]:
        """The same in float64, by the oracle."""
        wide = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        outputs = self.outputs("reference", wide)
        return [*outputs, *torch.autograd.grad(outputs, wide, [grad.double() for grad in self.grads])]


@OP
@DTYPE
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_equals_float64(op, dtype, layout, beta):
    problem = Problem(op, dtype, layout, beta)
    for index, (value, truth) in enumerate(zip(problem.results(), problem.expected(), strict=True)):
        assert value.shape == truth.shape
        assert_close(f"{op} {index}", value, truth, TOLERANCES[value.dtype])


@pytest.mark.parametrize("op", ["linear", *GEOMETRIES])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_under_autocast_parameters_get_gradients_of_their_own(op, layout):
    """Float32 sums, not rounded to bfloat16 on the way, in the parameter's layout."""
    problem = Problem(op, torch.float32, layout, batch=33)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = problem.outputs("triton")
    grads = [torch.randn_like(output) for output in outputs]
    _, *found = torch.autograd.grad(outputs, problem.leaves, grads)
    wide = [leaf.detach().bfloat16().double().requires_grad_() for leaf in problem.leaves]
    _, *expected = torch.autograd.grad(problem.outputs("reference", wide), wide, [grad.double() for grad in grads])
    for index, (value, truth) in enumerate(zip(found, expected, strict=True)):
        parameter = problem.leaves[1 + index]
        assert (value.dtype, value.stride()) == (torch.float32, parameter.stride())
        assert_close(f"{op} {index}", value, truth)


@OP
@DTYPE
def test_a_hundred_repeats_are_bitwise_the_same(op, dtype):
    problem = Problem(op, dtype, torch.channels_last, batch=33)
    first = problem.results()
    for _ in range(100):
        for index, (value, again) in enumerate(zip(first, problem.results(), strict=True)):
            assert torch.equal(value, again), f"{op} {index}"


@OP
def test_runs_on_the_current_stream(op):
    """The operands are written on that stream, late."""
    problem = Problem(op, torch.float32, torch.channels_last)
    expected = problem.results()
    values = [leaf.detach().clone() for leaf in problem.leaves]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        for leaf in problem.leaves:
            leaf.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for leaf, value in zip(problem.leaves, values, strict=True):
                leaf.copy_(value)
        found = problem.results()
    stream.synchronize()
    for value, truth in zip(found, expected, strict=True):
        assert torch.equal(value, truth)


@OP
@DTYPE
def test_captured_in_a_cuda_graph(op, dtype):
    problem = Problem(op, dtype, torch.channels_last)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            problem.results()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.results()
    with torch.no_grad():
        for leaf in problem.leaves:
            leaf.mul_(0.5)
    graph.replay()
    for value, truth in zip(captured, problem.results(), strict=True):
        assert torch.equal(value, truth)


@OP
def test_compiles_whole(op):
    problem = Problem(op, torch.float32, torch.channels_last)
    expected = problem.results()
    eager, problem.outputs = problem.outputs, torch.compile(problem.outputs, fullgraph=True)
    for index, (value, truth) in enumerate(zip(problem.results(), expected, strict=True)):
        assert_close(f"{op} {index}", value, truth, TOLERANCES[torch.float32])
    problem.outputs = eager


NEEDS_MEMORY = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 38 * 2**30,
    reason="the GPU has less than 38 GiB",
)


@NEEDS_MEMORY
@pytest.mark.xdist_group("memory")
class TestBeyond32BitOffsets:
    """The last rows, whose offsets need more than 31 bits, against the same rows computed alone."""

    def test_linear(self):
        rows, last = 2**25 + 64, 100
        grad = torch.randn(rows, 16, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(16, 72, device="cuda", dtype=torch.bfloat16)
        grad_input = torch.ops.dfs_engine.linear_grad_input(grad, weight, 4, 70)
        assert grad_input.numel() > 2**31
        alone = grad[-last:].double() @ weight[:, 4:70].double()
        assert_close("grad_input", grad_input[-last:], alone)
        grad_weight, grad_bias = torch.ops.dfs_engine.linear_grad_weight(grad, grad_input, True)
        assert_close("grad_weight", grad_weight, grad.float().t() @ grad_input.float(), TOLERANCES[torch.bfloat16])
        assert_close("grad_bias", grad_bias, grad.double().sum(0))

    def test_conv2d(self):
        batch, size, channels = 2**17 + 3, 16, 64
        assert batch * size**2 * channels > 2**31
        grad = torch.randn(batch, 8, size, size, device="cuda", dtype=torch.bfloat16)
        grad = grad.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(8, channels, 3, 3, device="cuda", dtype=torch.bfloat16)
        geometry = ([1, 1], [1, 1], [1, 1], 1)
        op = torch.ops.dfs_engine.conv2d_grad_input
        grad_input = op(grad, weight, [batch, channels, size, size], *geometry, 0, channels, True)
        tail = grad[-3:].double()
        alone = conv2d.aten_grad_input(tail, weight.double(), [3, channels, size, size], *geometry, 0, channels, True)
        assert_close("grad_input", grad_input[-3:], alone)
        # Only the last images count, and their sum is small enough for float64.
        grad[:-3] = 0
        weight_size = list(weight.shape)
        grad_weight, _ = torch.ops.dfs_engine.conv2d_grad_weight(grad, grad_input, weight_size, *geometry, False)
        alone, _ = conv2d.aten_grad_weight(tail, grad_input[-3:].double(), weight_size, *geometry, False)
        assert_close("grad_weight", grad_weight, alone)

    @pytest.mark.parametrize("pool", [False, True], ids=["flat", "pool"])
    def test_norm_act(self, pool):
        batch, size, channels = 2**17 + 3, 16, 64
        z = torch.randn(batch, size, size, channels, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
        assert z.numel() > 2**31
        gamma, beta, mean = (torch.rand(channels, device="cuda") + 0.5 for _ in range(3))
        out = size // 2 if pool else size
        shared = torch.randn(batch, out, out, 32, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
        average = torch.randn(batch, channels, device="cuda", dtype=torch.bfloat16)
        # In eval mode an image's results are its own.
        found = self._block(z, gamma, beta, mean, shared, average, pool)
        alone = self._block(z[-3:], gamma, beta, mean, shared[-3:], average[-3:], pool)
        assert_close("average", found[0][-3:], alone[0])
        for name, value, truth in zip(("feature", "grad_z"), found[1:], alone[1:], strict=True):
            assert torch.equal(value[-3:], truth), name
        # In training, the batch's statistics.
        made = torch.ops.dfs_engine.norm_act(z, gamma, beta, None, None, None, 1e-5, pool, True, True)
        sums = [chunk.relu().double().sum((0, 2, 3)) for chunk in z.split(2**12)]
        expected = torch.stack(sums).sum(0) / (batch * size**2)
        assert_close("mean", made[3], expected, TOLERANCES[torch.float32])

    def _block(self, z, gamma, beta, mean, shared, average, pool) -> list[Tensor]:
        made = torch.ops.dfs_engine.norm_act(z, gamma, beta, None, mean, mean, 1e-5, pool, True, True)
        feature, averages, average_hat, exact, inverse_std, _, passed = made
        saved = (None, average_hat, exact, inverse_std, passed)
        modes = (False, pool, True)
        backward = torch.ops.dfs_engine.norm_act_backward(shared, average, z, gamma, beta, *saved, *modes)
        return [averages, feature, backward[0]]


def test_ops_combine_on_one_feature():
    """A block's two parts through a convolution and a linear layer, as a network does, in both directions of memory."""
    for layout, dtype in itertools.product((torch.contiguous_format, torch.channels_last), DTYPES):
        block = Problem("block-pool", dtype, layout)
        convolution = Problem("conv2d", dtype, layout)
        head = torch.randn(10, CHANNELS, device="cuda").to(dtype)
        live = block.live

        def run(leaves, weight, head, backend, block=block, live=live):
            options = {"pool": True, "num_shared": live, "exit_start": live}
            if backend == "reference":
                full, shared, average, exit = reference.norm_act(*leaves, None, None, **options)
            else:
                full, shared, average, exit = norm_act(*leaves, None, None, **options, backend=backend)
            given = {"backend": backend}
            deeper = partitioned_conv2d(shared, weight, None, 1, 1, start=0, stop=live, full=full, **given)
            logits = partitioned_linear(exit, head, None, start=live, stop=CHANNELS, full=average, **given)
            return [deeper, logits]

        leaves = [*block.leaves, convolution.leaves[1], head.requires_grad_()]
        found = run(leaves[:3], leaves[3], leaves[4], "triton")
        grads = [torch.randn_like(output) for output in found]
        results = torch.autograd.grad(found, leaves, grads)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        truth = run(wide[:3], wide[3], wide[4], "reference")
        expected = torch.autograd.grad(truth, wide, [grad.double() for grad in grads])
        # Two ops: the second one reads what the first one rounded.
        table = TOLERANCES[dtype]
        bound = Tolerance(4 * table.max_ratio, 4 * table.rms_ratio)
        for index, (value, wanted) in enumerate(zip(results, expected, strict=True)):
            assert_close(f"{dtype} {index}", value, wanted, bound)
