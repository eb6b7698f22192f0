"""What other libraries expect of a module: each of their tools on each family, `dfs` as on the stock variants."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from dfs_engine import attach_exits, create_model
from dfs_engine.models import resnet
from dfs_engine.nn import NormAct2d, apply_norm_relu, conv_norm_relu, norm_act
from dfs_engine.nn.channel_order import ChannelOrder
from dfs_engine.validate.tolerances import assert_close

BERT = {
    "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "vgg7_64": {"width": 6},
    "resnet18": {"width": 6},
    "msdnet_cifar_lin_grow": {
        "num_exits": 3, "channels": 6, "growth": 4, "num_scales": 2, "head_width": 8, "dropout": 0.0
    },
    "vit_tiny_patch16_224": {
        "img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 18, "num_heads": 3, "start_block": 1
    },
    "bert": {"config": BERT},
    "attached": {},
}  # fmt: skip
NEEDS = {"vit_tiny_patch16_224": "timm", "bert": "transformers"}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


class Backbone(nn.Module):
    """Three convolutions and a linear, each of which reads what a fork has split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2)
        self.third, self.last = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.third(self.second(self.first(images)).tanh()).mean((2, 3)))


def head(channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make(family: str, variant: str = "dfs", state: dict | None = None) -> nn.Module:
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    if family == "attached":
        model: Any = attach_exits(
            Backbone().double(), ["first", "third"], variant=variant, example_input=torch.zeros(1, 3, 8, 8).double(),
            head=head,
        )  # fmt: skip
    else:
        model = create_model(family, num_classes=5, dtype=torch.float64, variant=variant, **FAMILIES[family])
    if state is not None:
        model.load_state_dict(state)
    return model


def batch(family: str) -> Tensor:
    if family == "bert":
        return torch.randint(BERT["vocab_size"], (3, 7))
    return torch.randn(3, 3, 16, 16, dtype=torch.float64)


def loss_of(model: nn.Module, input: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(logits, torch.arange(3)) for logits in model(input)]).sum()


def step(model: nn.Module, input: Tensor) -> dict[str, Tensor]:
    """Logits and the gradients of the parameters."""
    model.zero_grad()
    loss_of(model, input).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {f"logits {index}": logits.detach() for index, logits in enumerate(model(input))} | named


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rename: Callable[[str], str] = str) -> None:
    assert {rename(name) for name in found} == set(expected)
    scale = max(value.abs().max().item() for name, value in expected.items() if not name.startswith("logits"))
    for name, value in found.items():
        assert_close(name, value, expected[rename(name)], scale=scale)


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters of their own."""
    return {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def out_of_place(monkeypatch) -> None:
    """PyTorch's full backward hooks allow no writing into a layer's output, as the stock variants do to save memory."""
    monkeypatch.setattr(F, "relu", lambda input, inplace=False: torch.relu(input))

    def apply(bn: nn.Module, z: Tensor, residual: Tensor | None = None) -> Tensor:
        is_fused = isinstance(bn, NormAct2d)
        return (
            apply_norm_relu(bn, z, residual) if is_fused else torch.relu(bn(z) + (0 if residual is None else residual))
        )

    for module in (conv_norm_relu, norm_act, resnet):
        monkeypatch.setattr(module, "apply_norm_relu", apply)


@FAMILY
@pytest.mark.parametrize("variant", ["dense", "detach", "split", "dfs"])
def test_forward_and_backward_hooks_fire_on_every_layer(family, variant, request):
    model, forward, backward = make(family, variant).eval(), set(), set()
    layers = {name: module for name, module in owners(model).items() if not name.endswith(".vit")}  # see ViTStem
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: forward.add(name))
        module.register_full_backward_hook(lambda *_, name=name: backward.add(name))
    if variant != "dfs":
        request.getfixturevalue("out_of_place")
    loss_of(model, batch(family)).backward()
    assert forward == backward == set(layers)


def record(model: nn.Module, input: Tensor) -> dict[str, tuple]:
    """Of every convolution and linear: the slice that it trains, as (start, width, dim), grad_input and grad_output."""
    slices, grads = {}, {}

    def look(layer: nn.Module, inputs: tuple, _output: Tensor, name: str) -> None:
        dim = 1 if isinstance(layer, nn.Conv2d) else -1
        start, stop = getattr(layer, "start", 0), getattr(layer, "stop", inputs[0].size(dim))
        slices[name] = start, stop - start, dim, None
        if len(inputs) > 2:
            slices[name] = inputs[2].start, inputs[0].size(dim), dim, inputs[2].order

    def see(_layer: nn.Module, grad_input: tuple, grad_output: tuple, name: str) -> None:
        grads[name] = grad_input[0], grad_output[0]

    for name, module in owners(model).items():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(partial(look, name=name))
            module.register_full_backward_hook(partial(see, name=name))
    loss_of(model, input).backward()
    return {name: (slices[name], *grads[name]) for name in grads}


@FAMILY
def test_hooks_see_the_gradients_of_detach_and_of_the_live_part(family, out_of_place):
    """But where a norm is part of the product, of a last block's one token, and behind `attach_exits`' own hooks."""
    model, input = make(family, "detach").eval(), batch(family)
    found, expected = record(make(family, "dfs", model.state_dict()).eval(), input), record(model, input)
    assert set(found) == set(expected)
    num_sliced = 0
    for name in ("backbone.first", "backbone.third"):
        found.pop(name, None)
    for name, ((start, width, dim, order), grad_input, grad_output) in found.items():
        _, wanted_input, wanted_output = expected[name]
        if grad_output.shape != wanted_output.shape:
            assert family in NEEDS
            continue
        assert_close(f"grad_output of {name}", grad_output, wanted_output)
        if grad_input is None or wanted_input is None or name.endswith("qkv"):
            continue
        is_plain = grad_input.shape == wanted_input.shape
        num_sliced += width < wanted_input.size(dim)
        wanted = wanted_input if order is None else wanted_input[:, channels_of(order)]
        given = grad_input.narrow(dim, start, width) if is_plain else grad_input
        assert_close(f"grad_input of {name}", given, wanted.narrow(dim, start, width))
    assert num_sliced > 0 or family == "vit_tiny_patch16_224"


def channels_of(order: ChannelOrder) -> list[int]:
    return [channel for start, stop in order.ranges for channel in range(start, stop)]


@FAMILY
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_what_a_hook_returns_takes_effect(family, kind, out_of_place):
    results, state, input = [], None, batch(family)
    for variant in ("detach", "dfs"):
        model = make(family, variant, state).eval()
        state = state or model.state_dict()
        plain = step(model, input)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if kind == "forward":
                    module.register_forward_hook(lambda _m, _i, output: 1.5 * output)
                elif kind == "pre":
                    module.register_forward_pre_hook(lambda _m, inputs: tuple(twice(input) for input in inputs))
                else:
                    module.register_full_backward_hook(
                        lambda _m, grads, _o: tuple(None if grad is None else 1.5 * grad for grad in grads)
                    )
        results.append(step(model, input))
        assert not all(torch.equal(value, plain[name]) for name, value in results[-1].items())
    if family in ("vit_tiny_patch16_224",) and kind != "forward":
        return  # of a layer fused with the norm before it the input is another one
    assert_same(results[1], results[0])


def twice(input: Any) -> Any:
    return 2 * input if isinstance(input, Tensor) else input


def count_flops(model: nn.Module, input: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        loss_of(model, input).backward()
    return counter.get_total_flops()


@FAMILY
def test_a_hook_costs_no_flops(family):
    model, input = make(family), batch(family)
    before = count_flops(model, input)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
    assert count_flops(model, input) == before


@FAMILY
def test_checkpoint_wrappers_compute_the_blocks_again(family):
    model, input = make(family), batch(family)
    expected, calls = step(model, input), []
    wrapped = model.backbone if family == "attached" else model.blocks
    names = ["second"] if family == "attached" else [str(index) for index in range(1, len(wrapped))]
    for name in names:
        block = getattr(wrapped, name)
        block.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        setattr(wrapped, name, checkpoint_wrapper(block))
    model.zero_grad()
    loss_of(model, input).backward()
    assert sorted(calls) == sorted(2 * names)
    assert_same(step(model, input), expected, lambda name: name.replace("_checkpoint_wrapped_module.", ""))


@FAMILY
def test_fully_sharded_per_block_and_whole(family, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, input = make(family), batch(family)
    expected = step(model, input)
    mesh = init_device_mesh("cpu", (1,))
    parts = list(model.backbone.children())[:-1] if family == "attached" else [*model.blocks, *model.exits]
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in step(model, input).items()
    }
    assert_same(found, expected)


@FAMILY
def test_distributed_data_parallel(family, process_group):
    model, input = make(family), batch(family)
    expected = step(model, input)
    found = step(nn.parallel.DistributedDataParallel(model), input)
    assert_same(found, expected, lambda name: name.removeprefix("module."))


@FAMILY
def test_pruned_layers_train(family):
    """Weights that a hook sets before every call."""
    results, state, input = [], None, batch(family)
    for variant in ("detach", "dfs"):
        model = make(family, variant, state)
        state = state or copy.deepcopy(model.state_dict())
        for module in list(model.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                prune.l1_unstructured(module, "weight", 0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, input).backward()
            optimizer.step()
        results.append(dict(model.named_parameters()))
    for name, value in results[1].items():
        assert_close(name, value, results[0][name], scale=1.0)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@FAMILY
def test_parametrised_layers_train(family):
    results, state, input = [], None, batch(family)
    for variant in ("detach", "dfs"):
        model = make(family, variant, state)
        state = state or copy.deepcopy(model.state_dict())
        for module in list(model.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                parametrize.register_parametrization(module, "weight", Halved())
        results.append(step(model, input))
    assert_same(results[1], results[0])


LORA_TARGETS = {
    "vgg7_64": ["conv", "linear"],
    "resnet18": ["conv", "shortcut_conv", "linear", "pointwise1.conv"],
    "msdnet_cifar_lin_grow": ["conv", "linear"],
    "vit_tiny_patch16_224": ["qkv", "proj", "fc1"],
    "bert": ["query", "value", "pooler"],
    "attached": ["second", "last"],
}


@FAMILY
def test_lora_trains(family):
    peft = pytest.importorskip("peft")
    results, state, lora, input = [], None, None, batch(family)
    for variant in ("detach", "dfs"):
        model = make(family, variant, state).eval()
        state = state or copy.deepcopy(model.state_dict())
        settings = peft.LoraConfig(r=2, target_modules=LORA_TARGETS[family], init_lora_weights=False)
        model = peft.inject_adapter_in_model(settings, model).double()
        lora = lora or {name: value for name, value in model.state_dict().items() if "lora_" in name}
        model.load_state_dict(lora, strict=False)
        results.append(step(model, input))
    assert any("lora_A" in name for name in results[0])
    assert_same(results[1], results[0])
    assert all(value.any() for name, value in results[1].items() if "lora_" in name)


@FAMILY
def test_deep_copies_are_models_of_their_own(family):
    model, input = make(family), batch(family)
    expected = step(model, input)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(step(twin, input), expected)


@FAMILY
@pytest.mark.parametrize("variant", ["dense", "detach", "split", "dfs"])
def test_autocast(family, variant):
    """Parameters stay wide, and so do their gradients."""
    model = make(family, variant).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch(family) if family == "bert" else batch(family).float())
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert all(grad.isfinite().all() for grad in grads)


@FAMILY
def test_compiles_whole(family):
    model, input = make(family), batch(family)
    expected = step(model, input)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=family != "attached", backend="aot_eager")
    model.zero_grad()
    loss_of(compiled, input).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(name, parameter.grad, expected[name], scale=1.0)


@FAMILY
def test_exports(family):
    model, input = make(family).eval(), batch(family)
    with torch.no_grad():
        exported = torch.export.export(model, (input,))
        for found, expected in zip(exported.module()(input), model(input), strict=True):
            assert_close("logits", found, expected)


@pytest.mark.parametrize("family", ["vgg7_64", "resnet18", "msdnet_cifar_lin_grow"])
def test_sync_batch_norm_keeps_what_follows_it(family):
    def results(model):
        logits = model(input)
        total = torch.stack([exit_logits.square().sum() for exit_logits in logits]).sum()
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
        return gradients | {f"logits {index}": exit_logits for index, exit_logits in enumerate(logits)}

    model, input = make(family), batch(family)
    twin = copy.deepcopy(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # without processes to talk to
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    for training in (True, False):
        found, expected = (results(each.train(training)) for each in (converted, twin))
        for name, wanted in expected.items():
            assert_close(name, found[name], wanted, scale=1.0)
