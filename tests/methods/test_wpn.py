import copy

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.methods import Joint, create_method
from dfs_engine.methods.wpn import allocate
from dfs_engine.models import create_model, list_models


def slow_meta_gradient(model, method, optimizer, train, meta):
    """d(meta loss) / d(weights), (n, K), without a gradient of gradients: each loss's own gradient, one after another.

    The tried step is linear in the weights, so that ``dM / dW[i, k] = -lr / n <dM / d theta', d CE_k(i) / d theta>``.
    """
    twin = copy.deepcopy(model).train()
    parameters = list(twin.parameters())
    (input, target), (meta_input, meta_target) = train, meta
    logits = twin(input)
    losses = torch.stack([F.cross_entropy(exit_logits, target, reduction="none") for exit_logits in logits], 1)
    net = [value.clone().requires_grad_() for value in method.net.values]
    weights = method.weights(logits, target, net)
    own = [
        [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in row] for row in losses
    ]
    (group,) = optimizer.param_groups
    direction = []
    for place, (parameter, original) in enumerate(zip(parameters, model.parameters(), strict=True)):
        gradient = sum(
            weights[i, k].detach() * own[i][k][place]
            for i in range(len(own))
            for k in range(len(logits))
            if own[i][k][place] is not None
        ) / len(own)
        move = gradient + group["weight_decay"] * parameter
        buffer = optimizer.state[original].get("momentum_buffer")
        if buffer is not None:
            move = move + group["momentum"] * buffer
        direction.append(move)
    with torch.no_grad():
        for parameter, move in zip(parameters, direction, strict=True):
            parameter -= group["lr"] * move
    meta_logits = twin(meta_input)
    p, num_exits, left = method.config.target_p_index / 20, len(logits), list(range(len(meta_target)))
    total = sum(p**k for k in range(1, num_exits + 1))
    meta_loss = 0
    for k, exit_logits in enumerate(meta_logits):
        surest = sorted(left, key=lambda i, z=exit_logits: -z[i].softmax(0).max().item())
        count = len(left) if k == num_exits - 1 else int(len(meta_target) * p ** (k + 1) / total)
        chosen, left = surest[:count], [i for i in left if i not in surest[:count]]
        if chosen:
            meta_loss = meta_loss + F.cross_entropy(exit_logits[chosen], meta_target[chosen])
    after = torch.autograd.grad(meta_loss, parameters, allow_unused=True)
    by_weight = torch.zeros_like(weights)
    for i in range(len(own)):
        for k in range(num_exits):
            products = [(a * b).sum() for a, b in zip(after, own[i][k], strict=True) if a is not None and b is not None]
            by_weight[i, k] = -group["lr"] / len(own) * sum(products)
    return torch.autograd.grad(weights, net, by_weight), net


def gradients_of_the_net(step, method, train, meta):
    """What its optimizer would have been given, which does nothing with it here."""
    found = []
    method.net.adam_step = lambda gradients, **_: found.extend(gradients)
    method._learn(step, train, meta)
    del method.net.adam_step
    return found


def halves_of(inputs, target):
    middle = len(target) // 2
    return (inputs[:middle], target[:middle]), (inputs[middle:], target[middle:])


def assert_learns(step, model, method, inputs, target):
    """That the net moves, in the second batch, by Adam on the slow gradient, and the model by the weighted loss."""
    with torch.no_grad():
        for value in method.net.values:  # so that the weights differ from 1 by more than a little
            value.mul_(3)
    for _ in range(2):
        a, b = halves_of(inputs, target)
        for train, meta in ((a, b), (b, a)):
            slow, _ = slow_meta_gradient(model, method, step.optimizer, train, meta)
            found = gradients_of_the_net(step, method, train, meta)
            assert len(found) == 4
            for one, other in zip(found, slow, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
                assert other.abs().max() > 0
            method.net.adam_step(found, lr=1e-3, weight_decay=0.1)
            twin = copy.deepcopy(model)
            weights = method.weights(twin(train[0]), train[1], list(method.net.values)).detach()
            losses = [F.cross_entropy(z, train[1], reduction="none") for z in twin(train[0])]
            twin.zero_grad()
            sum((weights[:, k] * loss).mean() for k, loss in enumerate(losses)).backward()
            step.update(*train)
            for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


@pytest.mark.parametrize("variant", ["dense", "detach"])
@pytest.mark.parametrize("dimension", ["col", "row", "mat"])
def test_a_step_of_the_toy_is_the_formula(toy, make_step, dimension, variant):
    model, inputs, target = toy(variant)
    method = create_method("wpn", model, constraint_dimension=dimension, hidden=7)
    step = make_step(model, method, lr=0.3, momentum=0.9, weight_decay=0.05)
    assert_learns(step, model, method, inputs, target)


@pytest.mark.parametrize("reads", ["confidence", "both"])
def test_the_net_may_read_confidences(toy, make_step, reads):
    model, inputs, target = toy()
    method = create_method("wpn", model, input=reads, hidden=7)
    assert_learns(make_step(model, method, lr=0.3, momentum=0.0), model, method, inputs, target)


SMALL = {
    "vgg7_64": {"width": 2},
    "resnet18": {"width": 4},
    "msdnet_cifar": {"channels": 4, "growth": 4, "num_exits": 3, "dropout": 0.0},
    "vit_tiny_patch16_224": {
        "img_size": 32, "depth": 3, "embed_dim": 12, "num_heads": 3, "start_block": 1, "patch_size": 16
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", ["dense", "detach", "split"])
@pytest.mark.parametrize("family", SMALL)
def test_in_every_family_with_and_without_surgery(make_step, family, variant):
    if not list_models(family):
        pytest.skip(f"no model {family}")
    model = create_model(family, num_classes=4, dtype=torch.float64, variant=variant, **SMALL[family])
    images, target = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randint(4, (6,))
    step = make_step(model, create_method("wpn", model, hidden=5), lr=0.1)
    method = step.raw_method
    a, b = halves_of(images, target)
    slow, _ = slow_meta_gradient(model, method, step.optimizer, a, b)
    before, buffers = [value.clone() for value in method.net.values], copy.deepcopy(dict(model.named_buffers()))
    found = gradients_of_the_net(step, method, a, b)
    for one, other in zip(found, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-10)
    assert all(torch.equal(one, other) for one, other in zip(method.net.values, before, strict=True))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_epsilon_0_is_sgd_on_each_half(toy, make_step):
    model, inputs, target = toy()
    twin = copy.deepcopy(model)
    step = make_step(model, create_method("wpn", model, epsilon=0.0), lr=0.2, momentum=0.9, weight_decay=0.01)
    plain = make_step(twin, Joint(), lr=0.2, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        losses = step(inputs, target, 0)
        parts = [plain(*half, 0) * len(half[1]) / 9 for half in halves_of(inputs, target)]
        torch.testing.assert_close(losses, sum(parts))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), msg=name)


def test_a_batch_of_one_and_the_interval(toy, make_step):
    model, inputs, target = toy()
    method = create_method("wpn", model, meta_interval=3)
    step = make_step(model, method, lr=0.2)
    changes = []
    for _ in range(3):
        before = next(iter(method.net.values)).clone()
        step(inputs, target, 0)
        changes.append(not torch.equal(before, next(iter(method.net.values))))
    assert method.num_steps == 6
    assert changes == [True, True, False]  # steps 0 and 3
    step(inputs[:1], target[:1], 0)
    assert method.num_steps == 6


def test_allocation():
    torch.manual_seed(0)
    confidence = torch.rand(23, 4)
    exits = allocate(confidence, 0.75)
    shares = [0.75**k for k in range(1, 5)]
    counts = [int(23 * share / sum(shares)) for share in shares[:3]]
    assert [int((exits == k).sum()) for k in range(3)] == counts
    left = torch.ones(23, dtype=torch.bool)
    for k in range(3):
        mine = exits == k
        assert confidence[mine, k].min() >= confidence[left & ~mine, k].max()
        left &= ~mine


def test_what_it_refuses(toy):
    model, *_ = toy("dfs")
    with pytest.raises(ValueError, match=r"model\.variant: expected dense, detach or split with method=wpn, got dfs"):
        create_method("wpn", model)
    with pytest.raises(ValueError, match=r"wpn\.constraint_dimension: expected one of row, col, mat, got 'column'"):
        create_method("wpn", toy()[0], constraint_dimension="column")
    with pytest.raises(ValueError, match="expected joint for a regression, got wpn"):
        create_method("wpn", create_model("vgg7_64", width=2, num_classes=1, variant="dense"))
