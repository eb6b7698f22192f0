import copy

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.methods import create_method
from dfs_engine.methods.meta_gf import loss_weights
from dfs_engine.models import create_model, list_models
from dfs_engine.nn import Fork
from dfs_engine.training.config import OptimConfig, TrainConfig


def run_epoch(step, batches, epoch=0):
    """As the trainer calls the hooks."""
    method, step.epoch = step.raw_method, epoch
    losses = []
    for step.phase in range(method.num_phases):
        method.begin_phase(step)
        losses += [step(*batch, 0) for batch in batches]
        method.end_phase(step)
    return losses


def forward(weights, x):
    """The toy's logits, of {name: tensor}."""
    logits = []
    for i in range(3):
        x = torch.tanh(x @ weights[f"blocks.{i}.linear.weight"].T + weights[f"blocks.{i}.linear.bias"])
        logits.append(x @ weights[f"exits.{i}.weight"].T + weights[f"exits.{i}.bias"])
    return logits


class SlowMetaGF:
    """The three steps of an epoch for the toy of 3 exits, number by number."""

    def __init__(self, weights, epochs, aux=0.1, lr=0.2, momentum=0.9, ema_old=0.9, r=(1.0, 1.0, 1.0)):
        self.theta, self.epochs = {name: value.detach().clone() for name, value in weights.items()}, epochs
        self.aux, self.lr, self.momentum, self.ema_old, self.r = aux, lr, momentum, ema_old, r
        self.exits_of = {n: [k for k in range(3) if k >= int(n.split(".")[1])] for n in weights if "blocks" in n}
        self.v = {(k, n): torch.ones((), dtype=torch.float64) for n, ks in self.exits_of.items() for k in ks}
        self.adam = torch.optim.Adam(self.v.values(), lr=0.1)

    def epoch(self, epoch, batches):
        own = []
        for k in range(3):
            theta = {name: value.clone().requires_grad_() for name, value in self.theta.items()}
            optimizer = torch.optim.SGD(theta.values(), lr=self.lr, momentum=self.momentum)
            for x, y in batches:
                losses = [F.cross_entropy(z, y) for z in forward(theta, x)]
                others = sum(self.r[j] * losses[j] for j in range(3) if j != k)
                optimizer.zero_grad()
                (losses[k] + self.aux * others).backward()
                optimizer.step()
            own.append({name: value.detach() for name, value in theta.items()})
        before = {key: value.clone() for key, value in self.v.items()}
        for group in self.adam.param_groups:
            group["lr"] = 0.1 if epoch < self.epochs / 2 else 0.01
        for value in self.v.values():
            value.requires_grad_()
        for x, y in batches:
            losses = [F.cross_entropy(z, y) for z in forward(self.fused(own), x)]
            m = (0.45, 0.9)
            tau = [min(m[k], 0.01 + m[k] * epoch / self.epochs) for k in range(2)]
            self.adam.zero_grad()
            (tau[0] * losses[0] + tau[1] * losses[1] + losses[2]).backward()
            self.adam.step()
        with torch.no_grad():
            self.theta = {name: value.detach().clone() for name, value in self.fused(own).items()}
            for key, value in self.v.items():
                value.requires_grad_(False)
                value.copy_((1 - self.ema_old) * value + self.ema_old * before[key])

    def fused(self, own):
        fused = {}
        for name in self.theta:
            if name in self.exits_of:
                shares = {k: torch.sigmoid(self.v[k, name]) for k in self.exits_of[name]}
                fused[name] = sum(s * own[k][name] for k, s in shares.items()) / sum(shares.values())
            else:
                fused[name] = own[int(name.split(".")[1])][name]
        return fused


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_epochs_of_the_toy_are_the_formula(toy, make_step, micro_batch_size):
    model, inputs, target = toy()
    other = torch.randn(5, 5, dtype=torch.float64), torch.randint(4, (5,))
    batches = [(inputs, target), other]
    slow = SlowMetaGF(dict(model.named_parameters()), 3, aux=0.3, r=(1.0, 0.5, 0.25))
    method = create_method("meta_gf", model, aux=0.3, aux_weights=(1.0, 0.5, 0.25))
    optim = OptimConfig(lr=0.2, momentum=0.9, weight_decay=0.0)
    step = make_step(model, method, TrainConfig(optim=optim, epochs=3, micro_batch_size=micro_batch_size))
    for epoch in range(3):
        run_epoch(step, batches, epoch)
        slow.epoch(epoch, batches)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, slow.theta[name], msg=name)
        for name, values in zip(method.shared, method.fusion.values, strict=True):
            expected = torch.stack([slow.v[k, name] for k in slow.exits_of[name]])
            torch.testing.assert_close(values.flatten(), expected, msg=name)
            assert (values != 1).all()


@pytest.mark.parametrize("variant", ["dense", "dfs"])
def test_equal_v_gives_the_mean(vgg, make_step, variant):
    model, images, target = vgg(variant)
    method = create_method("meta_gf", model, meta_lr=0.0)
    step = make_step(model, method, lr=0.1)
    run_epoch(step, [(images, target)])
    for name, parameter in model.named_parameters():
        reached = [k for k in range(6) if (k == int(name.split(".")[1])) or ("blocks" in name and k > int(name[7]))]
        own = [method.own_of(k)[name] for k in reached]
        assert len({*map(torch.Tensor.data_ptr, own)}) == len(own)
        torch.testing.assert_close(parameter, sum(own) / len(own), msg=name)
        if len(own) > 1:
            assert not torch.equal(own[0], own[-1])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_gradient_of_v_by_differences(vgg, make_step, granularity):
    model, images, target = vgg("dense")
    method = create_method("meta_gf", model, granularity=granularity, temperature=0.5)
    step = make_step(model, method, lr=0.5)
    run_epoch(step, [(images, target)])
    found = []
    method.fusion.adam_step = lambda gradients, **_: found.extend(gradients)
    step(images, target, 0)

    def loss():
        fused = method.fused(list(method.fusion.values))
        logits = torch.func.functional_call(model, fused, (images,))
        weights = loss_weights(6, step.epoch, step.epochs)
        return sum(w * F.cross_entropy(z, target) for w, z in zip(weights, logits, strict=True))

    with torch.no_grad():
        for index in (0, len(found) // 2, len(found) - 1):
            value = list(method.fusion.values)[index]
            for place in (0, value.numel() - 1):
                ends = []
                for sign in (1, -1):
                    value.view(-1)[place] += sign * 1e-4
                    ends.append(loss())
                    value.view(-1)[place] -= sign * 1e-4
                slope = (ends[0] - ends[1]) / 2e-4
                torch.testing.assert_close(found[index].flatten()[place], slope, rtol=1e-3, atol=1e-8)


SMALL = {
    "resnet18": {"width": 4},
    "msdnet_cifar": {"channels": 4, "growth": 4, "num_exits": 3, "dropout": 0.0},
    "vit_tiny_patch16_224": {
        "img_size": 32, "depth": 3, "embed_dim": 12, "num_heads": 3, "start_block": 1, "patch_size": 16
    },
    "bert": {"config": {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}},
    "vgg7_64": {"width": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_every_family_with_surgery_by_stock_layers_and_by_this_engines(make_step, family):
    if not list_models(family):
        pytest.skip(f"no model {family}")
    if family == "bert":
        pytest.importorskip("transformers")
    input = torch.randint(20, (4, 7)) if family == "bert" else torch.randn(4, 3, 32, 32, dtype=torch.float64)
    batch, results = (input, torch.randint(4, (4,))), []
    for variant in ("detach", "dfs"):
        torch.manual_seed(0)
        model = create_model(family, num_classes=4, dtype=torch.float64, variant=variant, **SMALL[family]).eval()
        model.train = lambda mode=True, model=model: model  # no dropout, whose draws differ
        method = create_method("meta_gf", model, aux=0.2)
        run_epoch(make_step(model, method, lr=0.05), [batch, batch])
        results.append((dict(model.named_parameters()), list(method.fusion.values)))
    (detach, v), (dfs, w) = results
    for name, parameter in dfs.items():
        torch.testing.assert_close(parameter, detach[name], rtol=1e-6, atol=1e-9, msg=name)
    for one, other in zip(v, w, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert any((one != 1).any() for one in v)


def test_the_loss_of_an_exits_pass(toy):
    model, inputs, target = toy()
    losses = [F.cross_entropy(z, target) for z in model(inputs)]
    method = create_method("meta_gf", model, aux=0.2, scale_by_tau=True)
    method.exit = 1
    method._tau = loss_weights(3, 1, 10)
    torch.testing.assert_close(method(model(inputs), target), 0.1 * (losses[1] + 0.2 * (losses[0] + losses[2])))
    seven = create_model("msdnet_cifar", num_classes=4, channels=4, growth=4)
    assert create_method("meta_gf", seven).aux_weights == (1.0, 1.0, 0.6, 0.6, 0.75, 0.9, 1.0)
    assert loss_weights(7, 10, 10) == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
    assert loss_weights(7, 0, 10) == pytest.approx([0.01] * 6 + [1.0])


def test_quirks(toy, make_step):
    model, inputs, target = toy()
    batches, moved = [(inputs, target)], {}
    for quirk in ("none", "freeze_v_after_first_epoch", "leak_momentum"):
        twin = copy.deepcopy(model)
        options = {} if quirk == "none" else {quirk: True}
        method = create_method("meta_gf", twin, **options)
        step = make_step(twin, method, TrainConfig(optim=OptimConfig(lr=0.2), epochs=9))
        v = []
        for epoch in range(2):
            run_epoch(step, batches, epoch)
            v.append([value.clone() for value in method.fusion.values])
        frozen = all(torch.equal(one, other) for one, other in zip(*v, strict=True))
        assert frozen == (quirk == "freeze_v_after_first_epoch")
        moved[quirk] = twin.blocks[0].linear.weight.detach()
    assert not torch.equal(moved["none"], moved["leak_momentum"])


def test_what_is_not_finite_stops(toy, make_step):
    model, inputs, target = toy()
    step = make_step(model, create_method("meta_gf", model))
    run_epoch(step, [(inputs, target)])
    before = [value.clone() for value in step.raw_method.fusion.values]
    inputs[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="exit 1 nan"):
        step(inputs, target, 0)
    assert all(torch.equal(one, other) for one, other in zip(before, step.raw_method.fusion.values, strict=True))


def test_what_it_refuses(toy):
    model, *_ = toy()
    with pytest.raises(ValueError, match=r"meta_gf\.aux_weights: expected 3 numbers, one for each exit, got \[1\.0"):
        create_method("meta_gf", model, aux_weights=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"meta_gf\.granularity: expected one of tensor, channel, got 'layer'"):
        create_method("meta_gf", model, granularity="layer")
    model.fork = Fork(1.0, "detach")
    with pytest.raises(ValueError, match=r"method: expected joint with beta=1.*got meta_gf"):
        create_method("meta_gf", model)
