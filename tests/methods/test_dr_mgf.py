import itertools

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.methods import create_method
from dfs_engine.methods.dr_mgf import gate
from dfs_engine.models import MultiExitModel, attach_exits, create_model, list_models
from dfs_engine.models.multi_exit import Block
from dfs_engine.nn import Fork
from dfs_engine.training.config import OptimConfig, TrainConfig

CHANNELS = (3, 4, 5, 6)


class ConvBlock(Block):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(out_channels)

    def make(self, feature):
        return torch.tanh(self.norm(self.conv(feature)))


@pytest.fixture
def conv_toy():
    """(model, batches) in float64: 3 exits, 2 batches."""
    blocks = [ConvBlock(*pair) for pair in itertools.pairwise(CHANNELS)]
    exits = [
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 4))
        for width in CHANNELS[1:]
    ]
    model = MultiExitModel(blocks, exits, Fork(0.5, "dense"), num_classes=4, input_shape=(3, 5, 5)).double()
    images = torch.randn(2, 6, 3, 5, 5, dtype=torch.float64)
    return model, list(zip(images, torch.randint(4, (2, 6)), strict=True))


def run_epoch(step, batches, epoch=0):
    """As the trainer calls the hooks."""
    method, step.epoch = step.raw_method, epoch
    for step.phase in range(method.num_phases):
        method.begin_phase(step)
        for batch in batches:
            step(*batch, 0)
        method.end_phase(step)


class SlowDRMGF:
    """The steps of an epoch for the toy above, exit after exit and tensor after tensor."""

    def __init__(self, model, start, aux=0.4, lr=0.1, ema_old=0.9, average=False):
        self.theta = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers() if "num" not in name}
        self.start, self.aux, self.lr, self.ema_old, self.average = start, aux, lr, ema_old, average
        self.exits_of = {n: [k for k in range(3) if k >= int(n[7])] for n in self.theta if n.startswith("blocks")}
        shared = {n: ks for n, ks in self.exits_of.items() if len(ks) > 1}
        self.u = {
            (k, n): self.theta[n].square().sum((2, 3)).sqrt() for n, ks in shared.items() if "conv.w" in n for k in ks
        }
        self.s = {}
        for n, ks in shared.items():
            for k in ks:
                if "conv.w" in n:
                    self.s[k, n] = torch.full_like(self.u[k, n], 1e-3)
                elif "norm" in n:
                    self.s[k, n] = torch.full_like(self.theta[n], 1e-3)
        # An importance's momentum goes on from pass to pass.
        self.momenta = {key: torch.zeros_like(u) for key, u in self.u.items()}
        self.adam = torch.optim.Adam(self.s.values(), lr=0.1)

    def logits(self, weights, x):
        found = []
        for i in range(3):
            w = {
                kind: weights[f"blocks.{i}.{kind}"] for kind in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
            }
            x = F.conv2d(x, w["conv.weight"], w["conv.bias"], padding=1)
            mean, var = (self.buffers[f"blocks.{i}.norm.running_{kind}"] for kind in ("mean", "var"))
            x = torch.tanh(F.batch_norm(x, mean, var, w["norm.weight"], w["norm.bias"], training=True))
            found.append(x.mean((2, 3)) @ weights[f"exits.{i}.2.weight"].T + weights[f"exits.{i}.2.bias"])
        return found

    def p(self, k, name, u):
        return u[k, name].abs() / (1 + 1e-4 * u[k, name].abs().sum(1, keepdim=True)) ** 0.75

    def gated(self, theta, k, u):
        gated = dict(theta)
        for name, ks in self.exits_of.items():
            if (k, name) in u:
                own, others = 10 * self.p(k, name, u), [self.p(j, name, u) for j in ks if j != k]
                m = (own + sum(others)) / (10 + len(others))
                gated[name] = theta[name] / theta[name].square().sum((2, 3), keepdim=True).sqrt() * m[:, :, None, None]
        return gated

    def epoch(self, epoch, batches):
        own, statistics = {}, {}
        for k in (2, 1, 0):
            theta = {name: value.clone().requires_grad_() for name, value in self.theta.items()}
            optimizer = torch.optim.SGD(theta.values(), lr=self.lr, momentum=0.9)
            for x, y in batches:
                u = {key: value.clone().requires_grad_() for key, value in self.u.items()}
                weights = self.gated(theta, k, u) if epoch < self.start else theta
                losses = [F.cross_entropy(z, y) for z in self.logits(weights, x)]
                optimizer.zero_grad()
                (losses[k] + self.aux * sum(losses[j] for j in range(3) if j != k)).backward()
                optimizer.step()
                for key, value in u.items():
                    if value.grad is not None:
                        self.momenta[key] = 0.9 * self.momenta[key] + value.grad + 5e-5 * self.u[key]
                        self.u[key] = self.u[key] - self.lr * self.momenta[key]
            weights = self.gated(theta, k, self.u) if epoch < self.start else theta
            own[k] = {name: value.detach() for name, value in weights.items()}
            statistics[k] = {name: value.clone() for name, value in self.buffers.items()}
        for i in range(3):
            means, variances = (
                [statistics[k][f"blocks.{i}.norm.running_{kind}"] for k in range(i, 3)] for kind in ("mean", "var")
            )
            mean = sum(means) / len(means)
            square = sum(v + m**2 for m, v in zip(means, variances, strict=True)) / len(means)
            self.buffers[f"blocks.{i}.norm.running_mean"] = mean
            self.buffers[f"blocks.{i}.norm.running_var"] = square - mean**2
        before = {key: value.clone() for key, value in self.s.items()}
        for value in self.s.values():
            value.requires_grad_()
        for x, y in batches if not self.average else []:
            self.adam.zero_grad()
            sum(F.cross_entropy(z, y) for z in self.logits(self.fused(own), x)).backward()
            self.adam.step()
        with torch.no_grad():
            self.theta = {name: value.detach().clone() for name, value in self.fused(own).items()}
            for key, value in self.s.items():
                value.requires_grad_(False)
                if epoch >= self.start and not self.average:
                    value.copy_((1 - self.ema_old) * value + self.ema_old * before[key])

    def fused(self, own):
        fused = {}
        for name, start in self.theta.items():
            ks = self.exits_of.get(name, [int(name.split(".")[1])])
            if len(ks) == 1:
                fused[name] = own[ks[0]][name]
                continue
            shares = dict.fromkeys(ks, torch.ones((), dtype=torch.float64))
            for k in ks:
                if (k, name) in self.s and not self.average:
                    shares[k] = self.s[k, name].abs()
                    if (k, name) in self.u:
                        u = self.u[k, name].abs()
                        shares[k] = (u / u.sum(1, keepdim=True) * shares[k])[:, :, None, None]
            fused[name] = start + sum(shares[k] * (own[k][name] - start) for k in ks) / sum(shares.values())
        return fused


@pytest.mark.parametrize("average", [False, True])
def test_epochs_of_the_toy_are_the_formula(conv_toy, make_step, average):
    model, batches = conv_toy
    slow = SlowDRMGF(model, start=2, average=average)
    method = create_method("dr_mgf", model, start=2, average=average)
    assert method.num_phases == (3 if average else 4)
    optim = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.0)
    step = make_step(model, method, TrainConfig(optim=optim, epochs=4))
    for epoch in range(4):
        run_epoch(step, batches, epoch)
        slow.epoch(epoch, batches)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, slow.theta[name], msg=f"{epoch} {name}")
        for name, buffer in slow.buffers.items():
            torch.testing.assert_close(model.get_buffer(name), buffer, msg=f"{epoch} {name}")
    for name, values in zip(method.convs, method.importance.values, strict=True):
        torch.testing.assert_close(values, torch.stack([slow.u[k, name] for k in slow.exits_of[name]]), msg=name)
    for name, values in zip((*method.convs, *method.in_norms), method.fusion.values, strict=True):
        torch.testing.assert_close(values, torch.stack([slow.s[k, name] for k in slow.exits_of[name]]), msg=name)


def test_pieces_of_a_batch_train_the_importances_of_the_whole(conv_toy, make_step):
    """Without batch norms' statistics, which see the pieces."""
    _, batches = conv_toy
    results = []
    for size in (None, 4):
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 5, 3), torch.nn.Tanh(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(5, 4),
        )  # fmt: skip
        model = attach_exits(backbone, ["1", "3"], variant="dense", example_input=torch.randn(1, 3, 5, 5)).double()
        method = create_method("dr_mgf", model)
        assert method.convs == ["backbone.0.weight", "backbone.2.weight"]
        config = TrainConfig(optim=OptimConfig(lr=0.1), micro_batch_size=size)
        run_epoch(make_step(model, method, config), batches)
        results.append([*model.parameters(), *method.importance.values, *method.fusion.values])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


SMALL = {
    "vgg7_64": {"width": 4},
    "resnet18": {"width": 4},
    "msdnet_cifar": {"channels": 4, "growth": 4, "num_exits": 3, "dropout": 0.0},
}


@pytest.mark.parametrize("family", SMALL)
def test_every_family_of_convolutions_with_surgery(make_step, family):
    batch, results = (torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(4, (4,))), []
    for variant in ("detach", "dfs"):
        torch.manual_seed(0)
        model = create_model(family, num_classes=4, dtype=torch.float64, variant=variant, **SMALL[family])
        method = create_method("dr_mgf", model)
        run_epoch(make_step(model, method, lr=0.01), [batch, batch])
        results.append((dict(model.named_parameters()), [*method.importance.values, *method.fusion.values]))
    (detach, learned), (dfs, others) = results
    for name, parameter in dfs.items():
        torch.testing.assert_close(parameter, detach[name], rtol=1e-5, atol=1e-7, msg=name)
    for one, other in zip(learned, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_gate_of_equal_importances_is_that_importance():
    u = torch.rand(3, 4, 5, dtype=torch.float64)
    same = u[:1].expand(3, 4, 5)
    expected = u[0] / (1 + 1e-4 * u[0].sum(1, keepdim=True)) ** 0.75
    torch.testing.assert_close(gate(same, 1), expected)
    for own in range(3):
        distance = [(gate(u, own) - gate(u[k : k + 1], 0)).norm() for k in range(3)]
        assert min(range(3), key=distance.__getitem__) == own


@pytest.mark.parametrize("family", ["vit_tiny_patch16_224", "bert"])
def test_models_without_kernels_are_refused(family):
    if not list_models(family):
        pytest.skip(f"no model {family}")
    if family == "bert":
        pytest.importorskip("transformers")
        options = {"config": {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}}
    else:
        options = {"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 3, "patch_size": 4, "start_block": 1}
    model = create_model(family, num_classes=4, **options)
    with pytest.raises(ValueError, match=rf"method: expected meta_gf for {family}, got dr_mgf, which weighs exits by"):
        create_method("dr_mgf", model)
