"""ViT: timm's own models, whatever they are made of."""

import functools
import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dfs_engine import create_model, list_models
from dfs_engine import reference as oracle
from dfs_engine.evaluation.flops import count_flops
from dfs_engine.models import VARIANTS
from dfs_engine.validate.tolerances import TOLERANCES, Tolerance, assert_close

timm = pytest.importorskip("timm")

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 18, "num_heads": 3}
START = 1
# What timm's names differ in. `whole`: the blocks are of a kind that is not taken apart.
KINDS = {
    "plain": (NAME, {}),
    "options": (NAME, {"qk_norm": True, "init_values": 0.3, "qkv_bias": False, "mlp_ratio": 2}),
    "average": (NAME, {"global_pool": "avg"}),
    "norm-then-average": ("vit_base_patch16_gap_224", {}),
    "attention-pool": ("vit_base_patch16_siglip_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "clip": ("vit_base_patch32_clip_224", {}),
    "any-size": (NAME, {"dynamic_img_size": True}),
    "rms-norm-whole": (NAME, {"norm_layer": timm.layers.RmsNorm}),
    "parallel-whole": ("vit_small_patch16_18x2_224", {}),
    "post-norm-whole": ("vit_base_patch16_rpn_224", {}),
}
if "scale_attn_norm" in inspect.signature(timm.models.VisionTransformer).parameters:
    KINDS["attention-norm-whole"] = (NAME, {"scale_attn_norm": True})


def make(kind="plain", dtype=torch.float64, start_block=START, **options):
    name, extra = KINDS[kind]
    return create_model(name, num_classes=5, start_block=start_block, dtype=dtype, **TINY, **extra, **options)


def scatter(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Away from timm's small initial weights, zero biases and unit gains, where much would go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return model


def images(num=3, dtype=torch.float64, size=16):
    return torch.randn(num, 3, size, size, dtype=dtype)


def results(model, input, seed=0, autocast=None):
    """Logits and gradients of one training step, the same random numbers for everybody who drops something."""
    target = torch.arange(len(input)) % 5
    torch.manual_seed(seed)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = model(input)
        loss = torch.stack([F.cross_entropy(one.to(input.dtype), target) for one in logits]).sum()
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return {f"logits[{index}]": one for index, one in enumerate(logits)} | dict(zip(parameters, grads, strict=True))


def assert_same(actual, expected, tolerance=None):
    assert list(actual) == list(expected)
    largest = max(value.abs().max().item() for name, value in expected.items() if not name.startswith("logits"))
    for name, value in actual.items():
        # The gradient of a key's bias is zero but for rounding.
        assert_close(name, value, expected[name], tolerance, scale=0.0 if name.startswith("logits") else 1e-2 * largest)


def as_in_timm(state):
    """Our keys -> timm's, of everything but the exits that timm has not."""
    last = max(int(key.split(".")[1]) for key in state if key.startswith("exits"))
    renamed = {}
    for key, value in state.items():
        part, index, _, rest = key.split(".", 3)
        if part == "exits" and int(index) == last:
            renamed[rest] = value
        elif part == "blocks":
            renamed[rest if index == "0" else f"blocks.{START + int(index)}.{rest}"] = value
    return renamed


def test_published_structure():
    model, plain = create_model(NAME, num_classes=1000), timm.create_model(NAME)
    assert (model.num_exits, model.input_shape) == (6, (3, 224, 224))
    assert model.fork.exit_gradient == "whole"
    # Blocks 0..6 lie before the first exit; each exit but the last adds a LayerNorm and a Linear to timm's model.
    assert len(model.blocks[0].vit.blocks) == 7
    assert [tuple(p.shape) for p in model.exit_parameters(0)] == [(192,), (192,), (1000, 192), (1000,)]
    added = 5 * (2 * 192 + 192 * 1000 + 1000)
    assert count_parameters(model) == count_parameters(plain) + added


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["dense", "dfs"])
def test_last_exit_is_timms_own_model(kind, variant):
    name, extra = KINDS[kind]
    model = scatter(make(kind, variant=variant)).eval()
    truth = timm.create_model(name, num_classes=5, **TINY, **extra).double().eval()
    truth.load_state_dict(as_in_timm(model.state_dict()))
    input = images()
    assert_close("last logits", model(input)[-1], truth(input))


@pytest.mark.parametrize("exit_index", [0, 1])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_an_exit_written_out(exit_index, pool):
    model = scatter(make("plain" if pool == "token" else "average", variant="dense"))
    logits, features = model(images(), return_features=True)
    tail = model.exits[exit_index].tail
    norm = tail.norm if pool == "token" else tail.fc_norm
    tokens = features[exit_index]
    assert tokens.shape == (3, 5, 18)
    pooled = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
    expected = F.layer_norm(pooled, (18,), norm.weight, norm.bias, 1e-6) @ tail.head.weight.t() + tail.head.bias
    assert_close("logits", logits[exit_index], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_dfs_and_split_compute_what_detach_computes(kind, reference, exit_gradient):
    options = {"beta": 0.3, "reference": reference, "exit_gradient": exit_gradient}
    detach, input = scatter(make(kind, variant="detach", **options)), images()
    expected = results(detach, input)
    for variant in ("split", "dfs"):
        model = make(kind, variant=variant, **options)
        model.load_state_dict(detach.state_dict())
        assert_same(results(model, input), expected)


def test_detach_is_timms_block_on_the_published_formulation():
    """`detach` is the truth of all other tests; here it is written out, with timm's whole blocks."""
    model, input = scatter(make(variant="detach", exit_gradient="own", beta=0.3)), images()
    k = round(0.3 * 18)

    def written_out(input):
        feature, logits = model.blocks[0].vit.forward_features(input), []
        for block, exit in zip([*model.blocks[1:], None], model.exits, strict=True):
            is_last = block is None
            own = feature if is_last else oracle.live_slice(feature, k, 18, True, -1)
            logits.append(exit.tail.forward_head(exit.tail.norm(own)))
            feature = feature if is_last else block.block(oracle.live_slice(feature, 0, k, True, -1))
        return logits

    actual, expected = model(input), written_out(input)
    for index, pair in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"logits[{index}]", *pair)
    grads = [
        torch.autograd.grad(torch.stack([one.square().sum() for one in logits]).sum(), list(model.parameters()))
        for logits in (actual, expected)
    ]
    for (name, _), *pair in zip(model.named_parameters(), *grads, strict=True):
        assert_close(name, *pair)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_that_drops_drops_the_same(variant):
    rates = {f"{part}_rate": 0.3 for part in ("drop", "pos_drop", "proj_drop", "attn_drop", "drop_path")}
    truth = scatter(make(variant="dense" if variant == "dense" else "detach", **rates))
    model = make(variant=variant, **rates)
    model.load_state_dict(truth.state_dict())
    for module in (*truth.blocks[-1].modules(), *model.blocks[-1].modules()):
        if isinstance(module, torch.nn.Dropout):  # which in dfs's last block would draw for fewer tokens
            module.p = 0.0
    input = images()
    expected = results(truth, input)
    assert_same(results(model, input), expected)
    assert not torch.equal(results(model, input, seed=1)["logits[0]"], expected["logits[0]"])


def test_blocks_that_are_not_taken_apart_are_told_of_once(caplog):
    with caplog.at_level(logging.WARNING, "dfs_engine.models.vit"):
        for kind in ("plain", "options", "average", "attention-pool", "registers", "clip"):
            make(kind)
        make("post-norm-whole", variant="detach")
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "dfs_engine.models.vit"):
        make("post-norm-whole")
    (record,) = caplog.records
    assert "its ResPostBlock cannot be taken apart" in record.getMessage()


def test_a_layer_that_was_swapped_in_is_called():
    """E.g. a low-rank adapter around `qkv`: the block is not taken apart around it."""

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input):
            return 2 * self.inner(input)

    state, input = scatter(make()).state_dict(), images()
    outcomes = []
    for variant in ("detach", "dfs"):
        model = make(variant=variant)
        model.load_state_dict(state)
        attention = model.blocks[1].block.attn
        attention.qkv = Doubled(attention.qkv)
        outcomes.append(results(model, input))
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize(("start_block", "num_exits"), [(0, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_start_block(start_block, num_exits, variant):
    model = make(start_block=start_block, variant=variant)
    assert model.num_exits == len(model(images())) == num_exits
    assert len(model.blocks[0].vit.blocks) == start_block + 1


@pytest.mark.parametrize(
    ("start_block", "error", "message"),
    [
        (4, ValueError, r"start_block: expected 0 <= start_block < depth=4, got start_block=4\. It is the first"),
        (-1, ValueError, "start_block: expected 0 <= start_block < depth=4, got start_block=-1"),
        (True, TypeError, "start_block: expected an integer, got True"),
        (1.5, TypeError, r"start_block: expected an integer, got 1\.5"),
    ],
)
def test_bad_start_block(start_block, error, message):
    with pytest.raises(error, match=message):
        make(start_block=start_block)


@pytest.mark.parametrize("name", ["resnet18d", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"])
def test_timm_models_of_another_class_are_refused(name):
    assert timm.is_model(name)
    with pytest.raises(ValueError, match=rf"model: expected one of .*a timm VisionTransformer.*, got '{name}'"):
        create_model(name)
    assert list_models(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(list_models("*")) - set(list_models())))
def test_every_listed_vit_builds(name):
    """Whatever else timm puts into a model, stem, blocks and tail together hold all of it."""
    with torch.device("meta"):
        try:
            plain = timm.create_model(name, num_classes=5)
        except RuntimeError as error:  # timm 1.0.20 and before read values while they build
            pytest.skip(f"timm {timm.__version__} itself cannot: {error}")
        model = create_model(name, num_classes=5, start_block=0)
    own_tails = sum(p.numel() for index in range(model.num_exits - 1) for p in model.exit_parameters(index))
    assert count_parameters(model) == count_parameters(plain) + own_tails
    assert type(plain) is timm.models.VisionTransformer


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("kind", ["plain", "average"])
def test_bf16_autocast(kind, reference, backend):
    """As near to float64 as `detach` is in bf16, within a factor that rounding explains."""
    truth, input = scatter(make(kind, variant="detach", reference=reference), 0.1), images(8)
    expected = results(truth, input)
    stock, model = (
        make(kind, torch.float32, variant=variant, reference=reference, backend=backend)
        for variant in ("detach", "dfs")
    )
    noise = TOLERANCES[torch.bfloat16].rms_ratio
    for one in (stock, model):
        one.load_state_dict(truth.state_dict())
    errors = [
        {
            name: ((value.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)).item()
            for name, value in results(one, input.float(), autocast=torch.bfloat16).items()
        }
        for one in (stock, model)
    ]
    for name, error in errors[1].items():
        assert error <= 3 * errors[0][name] + noise, f"{name}: {error:.3g}, stock {errors[0][name]:.3g}"


@pytest.mark.parametrize("kind", ["plain", "average", "post-norm-whole"])
def test_compiles_as_one_graph(kind):
    model = scatter(make(kind, beta=0.3, exit_gradient="own"))
    input = images()
    expected = results(model, input)
    assert_same(results(torch.compile(model, fullgraph=True, backend="aot_eager"), input), renamed(expected))


def renamed(expected):
    """Parameters as a compiled model calls them."""
    return {
        name if name.startswith("logits") else f"_orig_mod.{name}": value for name, value in expected.items()
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_compiled_by_inductor(reference):
    model = scatter(make(dtype=torch.float32, reference=reference))
    input = images(dtype=torch.float32)
    expected = results(model, input)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_same(results(compiled, input), renamed(expected), Tolerance(1e-4, 1e-4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_blocks(variant):
    model, input = scatter(make(variant=variant)), images()
    expected = results(model, input)
    for block in model.blocks:
        forward = block.forward
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False)
    assert_same(results(model, input), expected)


def test_second_derivative_without_fused_attention():
    """timm's switch `fused_attn` holds for blocks that are taken apart as well: only the plain form has one."""
    grads = []
    state, input = scatter(make()).state_dict(), images()
    for variant in ("detach", "dfs"):
        model = make(variant=variant)
        model.load_state_dict(state)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        parameters = list(model.parameters())
        loss = torch.stack([one.square().sum() for one in model(input)]).sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        grads.append(torch.autograd.grad(torch.stack([one.square().sum() for one in first]).sum(), parameters))
    for (name, _), *pair in zip(model.named_parameters(), *grads, strict=True):
        assert_close(name, *pair, scale=1e-2 * max(grad.abs().max().item() for grad in grads[0]))


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_backward_computes_less(beta, reference, backend):
    """Exactly the columns of qkv's input gradient that nobody uses, in every block behind a fork.

    And in the last block, whose exit reads the first token, all that is behind keys and values of the others.
    """
    options = {"dtype": torch.float32, "beta": beta, "reference": reference, "backend": backend}
    counts = {
        variant: count_flops(make(variant=variant, **options), images(2, torch.float32, 16))
        for variant in ("dense", "detach", "dfs")
    }  # fmt: skip
    channels, num_tokens, num_images, num_readers = 18, 5, 2, 2
    unused = channels - round(beta * channels)
    rows, hidden = num_images * num_tokens, 4 * channels
    of_projection = 2 * rows * channels * unused
    last_query = 2 * (rows * 2 * channels**2 - num_images * channels * (2 * channels - unused))
    behind_it = 2 * (rows - num_images) * (channels**2 + 2 * channels * hidden)
    attention = 2 * 2 * num_images * num_tokens * (num_tokens - 1) * channels
    saved = (3 * num_readers - 1) * of_projection + last_query + 2 * (behind_it + attention)
    assert counts["dfs"].backward == counts["detach"].backward - saved
    of_query = 2 * (rows - num_images) * channels**2
    assert counts["dfs"].forward == counts["dense"].forward - of_query - behind_it - attention


def test_pretrained_weights_from_a_file_or_a_folder(tmp_path):
    plain = timm.create_model(NAME, **TINY)
    file = tmp_path / "pytorch_model.bin"
    torch.save(plain.state_dict(), file)
    input = images(dtype=torch.float32)
    for path in (file, str(file), tmp_path):
        model = create_model(NAME, num_classes=1000, pretrained=path, start_block=START, **TINY).eval()
        assert_close("last logits", model(input)[-1], plain.eval()(input))
        assert "pretrained" not in model.get_config()
    # Another number of classes and another resolution: the head is new, position embeddings are resampled.
    other = create_model(NAME, num_classes=7, pretrained=file, start_block=START, **(TINY | {"img_size": 32}))
    assert torch.equal(other.blocks[0].vit.patch_embed.proj.weight, plain.patch_embed.proj.weight)
    assert other.blocks[0].vit.pos_embed.shape == (1, 17, 18)
    assert [one.shape for one in other(images(2, torch.float32, 32))] == [(2, 7)] * 3


def test_pretrained_reads_nothing_on_the_meta_device_and_must_be_there(tmp_path):
    missing = tmp_path / "missing.bin"
    model = create_model(NAME, pretrained=missing, device="meta", start_block=START, **TINY)
    assert all(parameter.is_meta for parameter in model.parameters())
    for path in (missing, tmp_path):
        with pytest.raises(FileNotFoundError, match="pretrained: expected a weight file or a folder with"):
            create_model(NAME, pretrained=path, start_block=START, **TINY)


def test_exits_start_with_weights_of_their_own():
    model = make(start_block=0)
    heads = [exit.tail.head.weight for exit in model.exits]
    assert not any(torch.equal(heads[0], other) for other in heads[1:])
    assert all((exit.tail.norm.weight == 1).all() for exit in model.exits)
