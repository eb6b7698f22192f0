"""The contract of every registered model, and the engine's promise: `dfs` trains exactly as `detach` does."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F

from dfs_engine import create_model, list_models
from dfs_engine.evaluation import info
from dfs_engine.evaluation.flops import count_flops
from dfs_engine.models import VARIANTS
from dfs_engine.validate.tolerances import Tolerance, assert_close, gradient_scale

BETAS = [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1]
TINY_BERT = {
    "vocab_size": 20,
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 17,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
    "initializer_range": 0.2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
# Small enough for a test: (model options, batch, image size or tokens), the size the smallest that leaves one pixel at
# the end.
SMALL: dict[str, tuple[dict, int, int]] = {
    "vgg7_64": ({"width": 6}, 4, 16),
    "vgg16_64": ({"width": 4}, 3, 32),
    "resnet18": ({"width": 6}, 4, 8),
    "resnet34": ({"width": 4}, 4, 8),
    "resnet50": ({"width": 4}, 4, 8),
    # Average: with its small first weights a class token learns nothing in twenty steps.
    "vit_tiny_patch16_224": (
        {"img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 15, "num_heads": 3, "start_block": 1}
        | {"global_pool": "avg"},
        3,
        16,
    ),
    # Channels that froze at two forks meet in one concatenation, a scale is dropped behind it.
    "msdnet_cifar": (
        {"num_exits": 4, "base": 1, "step": 1, "channels": 6, "growth": 5, "num_scales": 2, "head_width": 8,
         "dropout": 0.0}, 4, 8
    ),
    "msdnet_cifar_lin_grow": (
        {"num_exits": 3, "channels": 6, "growth": 4, "num_scales": 2, "head_width": 8, "dropout": 0.0}, 4, 8
    ),
    "msdnet_imagenet": (
        {"num_exits": 3, "base": 1, "step": 1, "channels": 6, "growth": 4, "num_scales": 2, "bottleneck": False,
         "dropout": 0.0}, 4, 32
    ),
    "bert": ({"config": TINY_BERT}, 4, 6),
}  # fmt: skip

# Small and narrow, these are chaotic: two runs of stock `detach` that differ by one rounding part, too.
CHAOTIC = ("resnet34", "resnet50")


def make(name: str, state: dict | None = None, dtype: torch.dtype = torch.float64, **options):
    model = create_model(name, num_classes=5, dtype=dtype, **SMALL[name][0], **options)
    if state is not None:
        model.load_state_dict(state)
    return model


def batch(
    name: str, dtype: torch.dtype = torch.float64, num_images: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _, default, size = SMALL[name]
    num_images = default if num_images is None else num_images
    if name == "bert":
        return torch.randint(TINY_BERT["vocab_size"], (num_images, size)), torch.randint(5, (num_images,))
    return torch.randn(num_images, 3, size, size, dtype=dtype), torch.randint(5, (num_images,))


def loss_of(logits: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cross_entropy(exit_logits, target) for exit_logits in logits]).sum()


def step(model, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, every parameter's gradient and every buffer after one forward and backward."""
    model.zero_grad()
    logits = model(input)
    loss_of(logits, target).backward()
    results = {f"logits[{index}]": value for index, value in enumerate(logits)}
    results |= {f"grad of {name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
    return results | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(actual: dict, expected: dict, tolerance: Tolerance | None = None) -> None:
    assert list(actual) == list(expected)
    cancelled = gradient_scale(value for name, value in expected.items() if name.startswith("grad of "))
    for name, value in actual.items():
        scale = cancelled if name.startswith("grad of ") else 0.0
        if name.endswith("key.bias"):  # softmax does not see what is added to all scores: nothing but rounding
            scale = 100 * cancelled
        assert_close(
            name,
            value.to(expected[name].dtype) if value.is_floating_point() else value.double(),
            expected[name],
            tolerance,
            scale=scale,
        )


@pytest.fixture(params=sorted(SMALL))
def name(request):
    return request.param


def test_every_registered_model_is_tested():
    others = {"distilbert", "electra", "roberta"}  # in test_huggingface.py
    assert set(list_models()) <= others | set(SMALL)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_features_and_gradients(name, variant):
    model = make(name, variant=variant)
    input, target = batch(name)
    logits, features = model(input, return_features=True)
    assert model.num_exits == len(logits) == len(features)
    assert model.num_classes == 5
    assert model.variant == variant
    assert len(model.example_input(2)) == 2
    assert all(exit_logits.shape == (len(input), 5) for exit_logits in logits)
    loss_of(logits, target).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("shallow", ["vgg7_64", "resnet18", "vit_tiny_patch16_224", "bert"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_dfs_split_and_detach_are_one(shallow, beta, reference, exit_gradient):
    compare_variants(shallow, beta, reference, exit_gradient)


@pytest.mark.parametrize("deep", ["vgg16_64", "resnet34", "resnet50"])
@pytest.mark.parametrize(
    ("beta", "reference", "exit_gradient"),
    [(0.5, True, "own"), (0.3, False, "own"), (0.7, True, "whole"), (0, True, "own"), (1, True, "own")],
)
def test_deep_dfs_split_and_detach_are_one(deep, beta, reference, exit_gradient):
    # Over so many batch norms of few values rounding grows: of two stock formulations, too.
    tolerance = Tolerance(1e-8, 1e-8) if deep in CHAOTIC else None
    compare_variants(deep, beta, reference, exit_gradient, tolerance)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_msdnet_dfs_split_and_detach_are_one(beta, reference, exit_gradient):
    compare_variants("msdnet_cifar", beta, reference, exit_gradient)


@pytest.mark.parametrize("msdnet", ["msdnet_cifar_lin_grow", "msdnet_imagenet"])
@pytest.mark.parametrize(
    ("beta", "reference", "exit_gradient"), [(0.5, True, "whole"), (0.3, False, "own"), (0.7, True, "own")]
)
def test_other_msdnets_dfs_split_and_detach_are_one(msdnet, beta, reference, exit_gradient):
    compare_variants(msdnet, beta, reference, exit_gradient)


def compare_variants(name, beta, reference, exit_gradient, tolerance=None):
    """In float64, which `aten` alone of the backends computes in."""
    options = {"beta": beta, "reference": reference, "exit_gradient": exit_gradient}
    detach = make(name, variant="detach", **options)
    state, images = copy.deepcopy(detach.state_dict()), batch(name)
    expected = step(detach, *images)
    for others in ({"variant": "split"}, {"variant": "dfs", "backend": "aten"}):
        assert_same(step(make(name, state, **others, **options), *images), expected, tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dfs_in_channels_last(name, layout):
    detach = make(name, variant="detach")
    input, target = batch(name)
    if input.dim() != 4:
        pytest.skip("tokens have no layout")
    model = make(name, detach.state_dict(), backend="aten").to(memory_format=layout)
    assert_same(step(model, input.to(memory_format=layout), target), step(detach, input, target))


# In fp32 a whole model meets kinks: where an activation lies within rounding of ReLU's zero, or two pixels within
# rounding of each other in a max pool, the gradient jumps, in stock PyTorch just as here. A batch of 16 keeps batch
# norms over one pixel well-conditioned. Roundings add up over the depth, and stock batch norm in channels_last begins
# with 1e-6 (in NCHW 4e-8).
FP32_SEED, FP32_BATCH = 0, 16
# Over the 13 layers of vgg16_64 the kinks alone reach 1e-2 on most seeds, for stock `detach` as well, on one thread
# more than on two; over the 50 of resnet50 rounding grows a hundredfold.
DEEP_FP32 = dict.fromkeys(SMALL, Tolerance(1e-4, 1e-4)) | {
    "vgg16_64": Tolerance(2e-2, 2e-2),
    "resnet50": Tolerance(1e-2, 1e-2),
}


@pytest.mark.parametrize("beta", [0.3, 0.5, 1])
def test_dfs_in_fp32_against_fp64(name, beta, backend):
    """On some seed no kink is hit, and every logit and gradient is close; a wrong kernel is wrong on every seed."""
    failures = []
    for seed in range(16):
        torch.manual_seed(seed)
        truth = make(name, variant="detach", beta=beta)
        state = {
            key: value.float() if value.is_floating_point() else value.clone()
            for key, value in truth.state_dict().items()
        }
        truth.load_state_dict(state)
        input, target = batch(name, torch.float32, FP32_BATCH)
        expected = step(truth, input.double() if input.is_floating_point() else input, target)
        model = make(name, state, torch.float32, variant="dfs", beta=beta, backend=backend)
        try:
            assert_same(step(model, input, target), expected, DEEP_FP32[name])
        except AssertionError as error:
            failures.append(f"seed {seed}: {error}")
        else:
            return
    pytest.fail("\n".join(failures))


def gradient(loss: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(loss, feature, retain_graph=True, allow_unused=True)
    return torch.zeros_like(feature) if grad is None else grad


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_which_loss_reaches_which_channels(name, variant, reference, exit_gradient):
    """Loss by loss: exit k trains f_k's exit part only, deeper exits its shared part only; exactly zero else."""
    model = make(name, variant=variant, reference=reference, exit_gradient=exit_gradient, beta=0.5)
    input, target = batch(name)
    logits, features = model(input, return_features=True)
    losses = [F.cross_entropy(exit_logits, target) for exit_logits in logits]
    is_whole = variant == "dense" or (exit_gradient == "whole" and reference)
    for index, feature in enumerate(features[:-1]):
        k = round(0.5 * feature.size(model.fork.dim))
        own, deeper, shallower = (
            [gradient(loss, feature).movedim(model.fork.dim, 1) for loss in some]
            for some in (losses[index : index + 1], losses[index + 1 :], losses[:index])
        )
        assert own[0][:, k:].any()
        assert own[0][:, :k].any() == is_whole
        for grad in deeper:
            assert grad[:, :k].any()
            assert grad[:, k:].any() == (variant == "dense")
        assert not any(grad.any() for grad in shallower)
    assert gradient(losses[-1], features[-1]).movedim(model.fork.dim, 1)[:, 0].any()  # the last exit is never split


# At which twenty steps lower the loss without leaving the region where two runs stay together.
LEARNING_RATES = dict.fromkeys(SMALL, 0.003) | {"vit_tiny_patch16_224": 0.05, "bert": 0.1}


def train(model, batches, lr: float, num_steps: int = 20) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for index in range(num_steps):
        loss = loss_of(model(batches[index % 2][0]), batches[index % 2][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("dtype", "relative"),
    # fp32: a kink (see above) met on the way sends two runs apart: `split`, all stock, by up to 8e-3 here.
    [(torch.float64, 1e-9), (torch.float32, 3e-2)],
    ids=["fp64", "fp32"],
)
@pytest.mark.parametrize("calm", [name for name in SMALL if name not in CHAOTIC])
def test_twenty_training_steps_give_the_same_losses(calm, dtype, relative, backend):
    if dtype is torch.float64 and backend != "aten":
        pytest.skip("no kernel computes in float64")
    if dtype is torch.float32:
        torch.manual_seed(FP32_SEED)
    detach = make(calm, dtype=dtype, variant="detach")
    dfs = make(calm, detach.state_dict(), dtype, backend=backend)
    batches = [batch(calm, dtype, FP32_BATCH) for _ in range(2)]
    expected = train(detach, batches, LEARNING_RATES[calm])
    assert train(dfs, batches, LEARNING_RATES[calm]) == pytest.approx(expected, rel=relative)
    # That it learns, not how much: the two batches take turns, and one may be the harder one.
    assert min(expected) < 0.97 * expected[0]
    if dtype is torch.float64:
        for (key, value), other in zip(dfs.state_dict().items(), detach.state_dict().values(), strict=True):
            scale = 1.0 if key.endswith("key.bias") else 0.0  # see assert_same
            assert_close(key, value.double(), other.double(), Tolerance(1e-9, 1e-9), scale=scale)


def test_one_state_dict_moves_between_all_variants(name):
    state = make(name, variant="dense").state_dict()
    input, _ = batch(name)
    outputs = []
    for variant in VARIANTS:
        model = make(name, variant=variant).eval()
        assert list(model.state_dict()) == list(state)
        model.load_state_dict(state)
        outputs.append(model(input))
    for index, expected in enumerate(outputs[0]):
        for other in outputs[1:]:
            assert_close(f"logits[{index}]", other[index], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_round_trip(name, variant):
    options = {"beta": 0.3, "reference": False, "exit_gradient": "whole", "backend": "aten"}
    model = make(name, variant=variant, **options)
    config = model.get_config()
    assert config == json.loads(json.dumps(config))
    recorded = {"init": "published"} if name.startswith("vgg") else {}
    assert config == {"name": name, "num_classes": 5, "variant": variant, **options, **recorded, **SMALL[name][0]}
    again = create_model(**config)
    assert again.get_config() == config
    again.double().load_state_dict(model.state_dict())
    input, target = batch(name)
    assert_same(step(again, input, target), step(model, input, target))


def test_defaults(name):
    config = create_model(name, **SMALL[name][0]).get_config()
    chosen = {key: config[key] for key in ("beta", "variant", "reference", "exit_gradient", "backend", "num_classes")}
    assert chosen == {
        "beta": 0.5,
        "variant": "dfs",
        "reference": True,
        "exit_gradient": "whole" if name.startswith(("vit", "msdnet")) else "own",
        "backend": None,
        "num_classes": 10,
    }


def test_exit_and_reached_parameters(name):
    model = make(name)
    every = set(model.parameters())
    assert (
        set(model.reached_parameters(model.num_exits - 1))
        | {p for index in range(model.num_exits) for p in model.exit_parameters(index)}
        == every
    )
    logits = model(batch(name)[0])
    for index in (0, model.num_exits // 2, model.num_exits - 1):
        reached = set(model.reached_parameters(index))
        assert set(model.exit_parameters(index)) <= reached
        grads = torch.autograd.grad(logits[index].square().sum(), list(every), retain_graph=True, allow_unused=True)
        with_gradient = {p for p, grad in zip(every, grads, strict=True) if grad is not None and grad.any()}
        assert with_gradient <= reached


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_and_single_batches_in_evaluation(name, variant):
    model = make(name, variant=variant).eval()
    input, _ = batch(name)
    for num_images in (0, 1):
        logits = model(input[:num_images])
        assert [tuple(value.shape) for value in logits] == [(num_images, 5)] * model.num_exits
        loss = torch.stack([value.sum() for value in logits]).sum()
        loss.backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_grad_and_copies(name, variant):
    model = make(name, variant=variant).eval()
    input, _ = batch(name)
    expected = model(input)
    with torch.no_grad():
        silent = model(input)
    with torch.inference_mode():
        fast = model(input)
    assert not any(value.requires_grad for value in [*silent, *fast])
    for other in (silent, fast, copy.deepcopy(model)(input), pickle.loads(pickle.dumps(model))(input)):
        for index, value in enumerate(other):
            assert_close(f"logits[{index}]", value, expected[index])


def test_second_backward_is_bitwise_the_same(name, backend):
    model = make(name, dtype=torch.float32, backend=backend)
    input, target = batch(name, torch.float32)
    loss = loss_of(model(input), target)
    parameters = list(model.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_a_real_step_computes_what_dfs_info_counts(name, reference):
    options = {"reference": reference, "num_classes": 5}
    config = info.InfoConfig(model=name, beta="0.3", batch_size=2, options=SMALL[name][0], **options)
    rows = info.run(config).training
    assert [row.variant for row in rows] == list(VARIANTS)
    for row in rows:
        beta = {} if row.beta is None else {"beta": row.beta}
        model = create_model(name, variant=row.variant, **beta, **options, **SMALL[name][0])
        assert count_flops(model, model.example_input(2)) == row.flops
    flops = {row.variant: row.flops for row in rows}
    assert flops["dfs"].backward < flops["detach"].backward
    # A normalisation fills the channels that read as zero, so that behind it nothing can be left out.
    reads_less = not reference and not name.startswith("vit")
    reads_less |= name == "bert"  # whose last layer computes the first token alone
    assert (flops["dfs"].forward < flops["detach"].forward) == reads_less


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "vgg7"}, ValueError, r"model: expected one of .*, got 'vgg7'\. Did you mean 'vgg7_64'\?"),
        ({"variant": "detached"}, ValueError, r"variant: expected one of .*Did you mean 'detach'\?"),
        ({"backend": "at"}, ValueError, r"backend: expected one of reference, aten, cpp, triton, got 'at'"),
        ({"exit_gradient": "both"}, ValueError, "exit_gradient: expected one of own, whole"),
        ({"beta": 2}, ValueError, r"beta: expected a number in \[0, 1\], got 2"),
        ({"beta": "0.5"}, TypeError, r"beta: expected a number in \[0, 1\], got '0\.5' of type str"),
        ({"num_classes": 0}, ValueError, "num_classes: expected a positive integer, got 0"),
        ({"num_classes": True}, ValueError, "num_classes: expected a positive integer, got True"),
        ({"widht": 3}, TypeError, "widht"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        create_model(**{"name": "vgg7_64", **arguments})


def test_a_backend_that_is_not_there_raises_when_the_model_runs(name):
    model = make(name, backend="triton")
    with pytest.raises(
        RuntimeError, match="backend 'triton' was requested, but the triton backend computes on cuda tensors"
    ):
        model(batch(name)[0])


def test_list_models_takes_a_pattern():
    assert list_models("vgg16*") == ["vgg16_64"]
    assert {"vit_tiny_patch16_224", "vit_base_patch16_224"} < set(list_models("vit_*"))
    assert list_models("vit_tiny_patch16_224") == ["vit_tiny_patch16_224"]
    assert list_models("nothing*") == []
