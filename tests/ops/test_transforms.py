"""torch.func's transforms: an error that names the op, and the remedies that it names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from dfs_engine import create_model, ops
from dfs_engine.nn import Fork
from dfs_engine.partition import partition

SLICE = {"start": 1, "stop": 4}
ROUTE = {"num_shared": 3, "exit_start": 3}
IMAGE = (2, 6, 5, 4)
VECTOR = (6,)
# name -> shapes of input and parameter, the call, and the op that it counts as
CALLS: dict[str, tuple[list[tuple[int, ...]], Callable[..., Tensor], str]] = {
    "linear": ([(3, 6), (4, 6)], lambda x, w, **o: ops.partitioned_linear(x, w, **SLICE, **o), "partitioned_linear"),
    "conv2d": (
        [IMAGE, (3, 6, 3, 3)],
        lambda x, w, **o: ops.partitioned_conv2d(x, w, **SLICE, **o),
        "partitioned_conv2d",
    ),
    "norm_linear": (
        [(3, 6), (4, 6)],
        lambda x, w, **o: ops.partitioned_norm_linear(x, None, None, w, **SLICE, **o),
        "partitioned_norm_linear",
    ),
    "norm_act": (
        [IMAGE, VECTOR],
        lambda x, w, **o: ops.norm_act(x, w, None, None, None, **ROUTE, **o).shared,
        "norm_act",
    ),
    "norm_relu": ([IMAGE, VECTOR], lambda x, w, **o: ops.norm_relu(x, w, None, None, None, **o), "norm_act"),
}
TRANSFORMS: dict[str, Callable] = {
    "grad": lambda loss, x, w: grad(loss, argnums=(0, 1))(x, w),
    "jacrev": lambda loss, x, w: jacrev(loss, argnums=1)(x, w),
    "jvp": lambda loss, x, w: jvp(loss, (x, w), (x, w)),
    "hessian": lambda loss, x, w: hessian(loss, argnums=1)(x, w),
    "vmap": lambda loss, x, w: vmap(loss, in_dims=(0, None))(torch.stack([x, 2 * x]), w),
    "per-sample": lambda loss, x, w: vmap(grad(loss, argnums=1), in_dims=(0, None))(torch.stack([x, 2 * x]), w),
}


def loss_of(name: str, **options) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: CALLS[name][1](x, w, **options).square().sum()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chosen", ["aten", "cpp", None])
def test_an_op_says_what_to_do(name, transform, chosen):
    shapes, _, op = CALLS[name]
    message = rf"^{op}: torch\.func's transforms .* Use backend='reference' .* variant='detach'"
    with pytest.raises(RuntimeError, match=message):
        TRANSFORMS[transform](loss_of(name, backend=chosen), *(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_partition_says_what_to_do(transform):
    def loss(x: Tensor, w: Tensor) -> Tensor:
        return (partition(x, 0.5).shared * w).sum()

    with pytest.raises(RuntimeError, match=r"^partition: torch\.func's transforms .* variant='detach'"):
        TRANSFORMS[transform](loss, torch.randn(IMAGE), torch.randn(()))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_remedy_for_an_op_works(name, transform):
    """For first gradients they are the op's own; the other transforms run."""
    x, w = (torch.randn(shape) for shape in CALLS[name][0])
    found = TRANSFORMS[transform](loss_of(name, backend="reference"), x, w)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    expected = torch.autograd.grad(loss_of(name)(*leaves), leaves)
    if transform == "grad":
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if transform in ("jacrev", "per-sample"):
        torch.testing.assert_close(found if transform == "jacrev" else found[0], expected[1], rtol=1e-4, atol=1e-4)


def test_the_remedy_for_a_fork_and_a_model_works():
    """Gradients of each sample alone, by `vmap`."""
    (deeper,), _ = vmap(Fork(0.5, "detach", dim=0))(torch.randn(3, 6))
    assert deeper.shape == (3, 6)
    model = create_model("vgg7_64", width=4, num_classes=3, variant="dfs").eval()
    twin = create_model("vgg7_64", width=4, num_classes=3, variant="detach").eval()
    twin.load_state_dict(model.state_dict())
    images, parameters = torch.randn(2, 3, 16, 16), dict(twin.named_parameters())

    def loss(parameters: dict, image: Tensor) -> Tensor:
        return sum(logits.square().sum() for logits in functional_call(twin, parameters, (image[None],)))

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for index, image in enumerate(images):
        model.zero_grad()
        sum(logits.square().sum() for logits in model(image[None])).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key][index], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_dropout_is_stock_under_a_transform(p):
    input = torch.rand(50) + 0.5
    found = grad(lambda x: ops.dropout(x, p).sum())(input)
    assert set(found.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}
    with pytest.raises(RuntimeError, match=r"^dropout: torch\.func's transforms"):
        grad(lambda x: ops.dropout(x, p, backend="cpp").sum())(input)
