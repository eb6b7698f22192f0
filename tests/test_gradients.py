import pytest
import torch
import torch.nn.functional as F

from dfs_engine.gradients import ExitGradients, exit_gradients, gramian, weighted_sum
from dfs_engine.models import create_model


@pytest.fixture
def model():
    return create_model("vgg7_64", num_classes=5, width=4, variant="dfs", dtype=torch.float64)


def losses_of(model, images, target):
    return [F.cross_entropy(logits, target) for logits in model(images)]


def test_rows_are_those_of_separate_backwards_with_none_where_an_exit_does_not_reach(model):
    images, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
    parameters = list(model.parameters())
    reached = [list(model.reached_parameters(index)) for index in range(model.num_exits)]
    rows = exit_gradients(losses_of(model, images, target), parameters, reached)
    everything = exit_gradients(losses_of(model, images, target), parameters)
    assert len(rows) == model.num_exits
    for index, (row, other) in enumerate(zip(rows, everything, strict=True)):
        model.zero_grad()
        losses_of(model, images, target)[index].backward()
        own = {id(parameter) for parameter in reached[index]}
        for parameter, gradient, again in zip(parameters, row, other, strict=True):
            assert (gradient is None) == (parameter.grad is None) == (id(parameter) not in own)
            assert (again is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad)
                torch.testing.assert_close(again, parameter.grad)


def test_backwards_are_truncated(model):
    """The gradient of an exit does not run through blocks behind it, nor through those that nobody asks for."""
    ran = []
    for index, block in enumerate(model.blocks[1:], start=1):  # the first one's input is the image, without gradient
        block.conv.register_full_backward_hook(lambda *_, index=index: ran.append(index))
    images, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
    losses = losses_of(model, images, target)
    exit_gradients([losses[1], losses[2]], list(model.blocks[0].parameters()))
    assert sorted(ran) == [1, 1, 2]
    with pytest.raises(TypeError, match="expected a sequence of scalars, got one tensor"):
        exit_gradients(torch.stack(losses), list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gramian_and_sum_are_those_of_vectors(dtype):
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,), (2, 3, 4, 5), (7,))]
    parameters[2].data = parameters[2].data.to(memory_format=torch.channels_last)
    rows = [[torch.randn(p.shape, dtype=dtype) for p in parameters] for _ in range(3)]
    rows[0][1] = rows[1][1] = rows[0][2] = None
    for row in rows:
        row[3] = None
    rows[1][2] = rows[1][2].to(memory_format=torch.channels_last)
    vectors = torch.stack(
        [torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, parameters, strict=True)])
         for row in rows]
    ).double()  # fmt: skip
    found = gramian(rows)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, vectors @ vectors.T)
    total = weighted_sum(rows, [0.5, -2.0, 3.0], parameters)
    assert total[3] is None
    assert [gradient.stride() for gradient in total[:3]] == [parameter.stride() for parameter in parameters[:3]]
    expected = (torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64) @ vectors)[:-7]
    flat = torch.cat([gradient.flatten() for gradient in total[:3]]).double()
    torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-5)


def test_nothing_reached_is_zero():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert exit_gradients([torch.tensor(1.0), parameter.sum()], [parameter])[0] == [None]
    assert torch.equal(gramian([[None], [None]]), torch.zeros(2, 2, dtype=torch.float64))


def test_pieces_of_a_batch_add_up(model):
    model.eval()  # batch norms would see the pieces
    images, target = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    whole, pieces = ExitGradients(model), ExitGradients(model)
    whole.add(losses_of(model, images, target))
    for part in (slice(4), slice(4, 6)):
        share = len(target[part]) / 6
        pieces.add([loss * share for loss in losses_of(model, images[part], target[part])])
    torch.testing.assert_close(pieces.gramian(), whole.gramian())
    for heads in (False, True):
        torch.testing.assert_close(pieces.gramian(include_heads=heads), whole.gramian(include_heads=heads))
    weights = torch.arange(1.0, 7.0)
    grads = []
    for gradients in (whole, pieces):
        gradients.write(weights, 2 * weights)
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*grads)
    model.zero_grad()
    losses = losses_of(model, images, target)
    (torch.stack(losses) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        factor = 2 if name.startswith("exits.") else 1
        position = [n for n, _ in model.named_parameters()].index(name)
        torch.testing.assert_close(grads[0][position], factor * parameter.grad, msg=name)


def test_frozen_parameters_are_left_alone(model):
    model.blocks[0].requires_grad_(False)
    gradients = ExitGradients(model)
    gradients.add(losses_of(model, torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))))
    gradients.write(torch.ones(6))
    assert all(parameter.grad is None for parameter in model.blocks[0].parameters())
    assert all(parameter.grad is not None for parameter in model.blocks[1].parameters())
    assert gradients.rows
    gradients.clear()
    assert not gradients.rows
