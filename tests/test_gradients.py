import pytest
import torch
import torch.nn.functional as F

from dfs_engine.gradients import ExitGradients, exit_gradients, gramian, gramian_by_block, rows_by_block, weighted_sum
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


def twins(**options):
    """A `dfs` VGG and the published formulation of it, of the same weights, with batch norms that are not neutral."""
    options = {"num_classes": 5, "width": 6, "dtype": torch.float64, **options}
    ours, stock = (create_model("vgg7_64", variant=variant, **options) for variant in ("dfs", "detach"))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_apart_gradients_are_autograds_with_exact_zeros_where_nothing_was_computed(
    beta, exit_gradient, reference, mode
):
    ours, stock = twins(beta=beta, exit_gradient=exit_gradient, reference=reference)
    for model in (ours, stock):
        getattr(model, mode)()
    images, target = torch.randn(3, 3, 10, 14, dtype=torch.float64), torch.randint(5, (3,))
    gradients = ExitGradients(ours)
    with gradients.apart():
        losses = losses_of(ours, images, target)
    gradients.add(losses)
    parameters, whole = list(stock.parameters()), []
    for index, loss in enumerate(losses_of(stock, images, target)):
        expected = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        expected = [torch.zeros_like(p) if g is None else g for g, p in zip(expected, parameters, strict=True)]
        own = [torch.zeros_like(parameter) for parameter in parameters]
        for piece, gradient in zip(gradients.pieces, gradients.rows[index], strict=True):
            if gradient is not None:
                piece.of(own[piece.column]).copy_(gradient)
        for (name, _), found, wanted in zip(ours.named_parameters(), own, expected, strict=True):
            torch.testing.assert_close(found, wanted, msg=lambda text, at=(index, name): f"{at}: {text}")
        whole.append(torch.cat([g.flatten() for g, head in zip(expected, gradients.is_head, strict=True) if not head]))
    for (name, buffer), wanted in zip(ours.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, msg=lambda text, name=name: f"{name}: {text}")
    vectors = torch.stack(whole)
    torch.testing.assert_close(gradients.gramian(), vectors @ vectors.T)


def test_apart_holds_the_parts_alone():
    """Of the layer that makes f, exit k holds the rows of f-, and a deeper exit those of f+."""
    model, _ = twins(beta=1 / 3)
    gradients = ExitGradients(model)
    with gradients.apart():
        losses = losses_of(model, torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.randint(5, (3,)))
    gradients.add(losses)
    column = next(i for i, p in enumerate(gradients.parameters) if p is model.blocks[1].conv.weight)
    held = {
        (exit, tuple(piece.rows))
        for exit, row in enumerate(gradients.rows)
        for piece, gradient in zip(gradients.pieces, row, strict=True)
        if piece.column == column and gradient is not None and gradient.shape == (piece.rows.width, 6, 3, 3)
    }
    assert held == {(1, (2, 6)), *((exit, (0, 2)) for exit in range(2, 6))}
    number_of = {id(parameter): number for number, parameter in enumerate(gradients.parameters)}
    assert gradients.num_reaching()[number_of[id(model.blocks[1].conv.weight)]] == 5
    assert gradients.num_reaching()[number_of[id(model.exits[2].linear.weight)]] == 1


def test_apart_weighted_sums_are_those_of_whole_gradients():
    model, _ = twins(beta=0.4)
    images, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
    weights, head_weights = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    grads = []
    for apart in (True, False):
        model.eval()
        gradients = ExitGradients(model)
        for part in (slice(3), slice(3, 4)):  # accumulated
            if apart:
                with gradients.apart():
                    losses = losses_of(model, images[part], target[part])
            else:
                losses = losses_of(model, images[part], target[part])
            gradients.add(losses)
        gradients.write(weights, head_weights)
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*grads)


def test_passes_within_and_without_apart_do_not_mix(model):
    gradients = ExitGradients(model)
    images, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
    gradients.add(losses_of(model, images, target))
    with gradients.apart():
        losses = losses_of(model, images, target)
    with pytest.raises(RuntimeError, match="all passes of a step within"):
        gradients.add(losses)
    assert model.fork.leaves is None


def test_a_layer_that_somebody_has_replaced_is_not_taken_apart():
    """Its gradients are whole, and right."""
    model, stock = twins()
    for one in (model, stock):
        torch.nn.utils.parametrizations.weight_norm(one.blocks[1].conv)
    images, target = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.randint(5, (3,))
    gradients = ExitGradients(model)
    with gradients.apart():
        losses = losses_of(model, images, target)
    gradients.add(losses)
    gradients.write(torch.ones(6))
    sum(losses_of(stock, images, target)).backward()
    for (name, parameter), wanted in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, msg=lambda text, name=name: f"{name}: {text}")


FAMILIES = {
    "vgg7_64": {"width": 4},
    "msdnet_cifar": {"channels": 4, "growth": 2, "head_width": 6, "dropout": 0.0},
    "resnet18": {},
}


@pytest.mark.parametrize("variant", ["dense", "detach", "dfs"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_by_block_are_those_of_whole_backwards(name, variant):
    model = create_model(name, num_classes=3, variant=variant, dtype=torch.float64, **FAMILIES[name])
    model.blocks[1].requires_grad_(False)
    images, target = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.randint(3, (2,))
    parameters = list(model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    expected = exit_gradients(losses_of(model, images, target), trained)
    columns = {id(parameter): index for index, parameter in enumerate(trained)}
    seen = []
    for block, rows in rows_by_block(model, lambda: losses_of(model, images, target)):
        for index, parameter in enumerate(block):
            seen.append(id(parameter))
            for row, whole in zip(rows, expected, strict=True):
                found, wanted = row[index], whole[columns[id(parameter)]]
                assert (found is None) == (wanted is None), names[id(parameter)]
                if found is not None:
                    torch.testing.assert_close(found, wanted)
    heads = {id(p) for index in range(model.num_exits) for p in model.exit_parameters(index)}
    assert sorted(seen) == sorted(set(map(id, trained)) - heads)
    gradients = ExitGradients(model)
    gradients.add(losses_of(model, images, target))
    found = gramian_by_block(model, lambda: losses_of(model, images, target))
    torch.testing.assert_close(found, gradients.gramian())
