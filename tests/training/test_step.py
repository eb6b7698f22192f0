"""One optimizer step against plain PyTorch: soft targets, accumulation, clipping, the average of the weights."""

import contextlib
import copy
import logging
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dfs_engine.data import DataConfig
from dfs_engine.data.mixup import Mixup
from dfs_engine.inference.evaluate import EvalConfig
from dfs_engine.inference.evaluate import run as run_evaluation
from dfs_engine.methods import ByotConfig, Joint
from dfs_engine.models.weights import read_description
from dfs_engine.training.batches import micro_batches
from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig
from dfs_engine.training.step import OptimizerStep
from dfs_engine.training.trainer import Trainer

PLAIN_SGD = OptimConfig(lr=0.1, momentum=0.0, weight_decay=0.0)


@pytest.fixture
def frozen_norms():
    """Batch norms that take their statistics as they are, so that a sample's loss is its own."""

    def freeze(model):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True: None
        return model

    return freeze


@pytest.fixture
def first_step(make_config, make_model, frozen_norms):
    """Takes a step and gives (weights before, batch, trainer after it); the weights in float64."""

    def step(**changes):
        changes = {"optim": PLAIN_SGD, "channels_last": False} | changes
        trainer = Trainer(make_config(**changes), model=frozen_norms(make_model(dropout=0.0)))
        before = copy.deepcopy(trainer.raw_model).double()
        images, target = next(iter(trainer.train_loader))
        batch = images.double(), target.clone()
        trainer.model.train()
        trainer.train_step(images, target)
        return before, batch, trainer

    return step


def assert_is_sgd_step(before, trainer, lr=0.1):
    """That the trainer's weights are `before` less lr times the gradient that lies there."""
    for name, parameter in before.named_parameters():
        expected = (parameter - lr * parameter.grad).float()
        actual = trainer.raw_model.get_parameter(name)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def joint_loss(model, images, target, **options):
    return sum(F.cross_entropy(logits, target, **options) for logits in model(images))


def test_label_smoothing_is_cross_entropys(first_step):
    before, batch, trainer = first_step(label_smoothing=0.1)
    joint_loss(before, *batch, label_smoothing=0.1).backward()
    assert_is_sgd_step(before, trainer)


@pytest.mark.parametrize("clip_grad", [0.1, 1e3])
def test_clipping_is_torchs_of_all_weights_together(first_step, clip_grad):
    before, batch, trainer = first_step(optim=replace(PLAIN_SGD, clip_grad=clip_grad))
    joint_loss(before, *batch).backward()
    norm = torch.nn.utils.clip_grad_norm_(before.parameters(), clip_grad)
    assert (norm > clip_grad) == (clip_grad == 0.1)
    assert_is_sgd_step(before, trainer)


@pytest.mark.parametrize("micro_batch_size", [3, 1, 4, 100], ids=lambda size: f"micro{size}")
def test_accumulated_step_is_that_of_the_whole_batch(first_step, micro_batch_size):
    """8 samples in pieces of 3, 3 and 2; in equal ones; and in a single one. Clipped, smoothed and mixed as a whole."""
    data = DataConfig(name="synthetic", synthetic_train=38, synthetic_test=11, image_size=16, mixup=1.0)
    optim = replace(PLAIN_SGD, clip_grad=0.5)
    before, (images, target), trainer = first_step(
        micro_batch_size=micro_batch_size, data=data, label_smoothing=0.2, optim=optim
    )
    images, shares = Mixup(data, 10, seed=0)(images, target, step=0)
    joint_loss(before, images, shares.double(), label_smoothing=0.2).backward()
    torch.nn.utils.clip_grad_norm_(before.parameters(), 0.5)
    assert_is_sgd_step(before, trainer)


class ScaledLoss:
    """As much of an accelerator as a step needs, with fp16's loss scaling by torch's own scaler."""

    process_index = 0

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def unwrap_model(self, model):
        return model

    def no_sync(self, module):
        return contextlib.nullcontext()

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def unscale_gradients(self, optimizer):
        self.scaler.unscale_(optimizer.optimizer)


class ScaledOptimizer:
    """What accelerate makes of an optimizer under fp16."""

    def __init__(self, optimizer, scaler):
        self.optimizer, self.scaler = optimizer, scaler

    def zero_grad(self, set_to_none):
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("clip_grad", [None, 0.1])
@pytest.mark.parametrize("overflows", [False, True])
def test_under_fp16_clips_what_was_unscaled_and_skips_what_overflows(make_model, clip_grad, overflows):
    config = TrainConfig(precision="fp16", optim=OptimConfig(clip_grad=clip_grad), micro_batch_size=3)
    model = make_model(dropout=0.0).eval()
    before = copy.deepcopy(model).double()
    accelerator = ScaledLoss()
    optimizer = ScaledOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), accelerator.scaler)
    step = OptimizerStep(config, accelerator, model, Joint(), optimizer)
    images, target = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    if overflows:
        model.blocks[2].conv.weight.register_hook(lambda grad: grad * float("inf"))
    step(images, target, 0)
    joint_loss(before, images.double(), target).backward()
    if clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(before.parameters(), clip_grad)
    if overflows:
        before.zero_grad(set_to_none=False)
    for name, parameter in before.named_parameters():
        expected = (parameter - 0.1 * parameter.grad).float()
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-4, atol=1e-6, msg=name)
    assert accelerator.scaler.get_scale() == (512.0 if overflows else 1024.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_trains_and_resumes_with_everything_on(make_config, make_model, precision):
    data = replace(make_config().data, mixup=0.8, cutmix=1.0, color_jitter=0.4)
    optim = OptimConfig(name="adamw", lr=1e-3, clip_grad=1.0, ema_decay=0.9)
    config = make_config(precision=precision, device="auto", data=data, optim=optim, label_smoothing=0.1, epochs=1)
    config = replace(config, micro_batch_size=3)
    Trainer(config, model=make_model()).fit()
    result = Trainer(replace(config, resume=True, epochs=2), model=make_model()).fit()
    assert len(result.rows) == 2
    assert result.rows[-1]["train_loss"] < 100


def test_accumulation_keeps_the_count_of_steps_and_the_losses(make_config, make_model, frozen_norms, tmp_path):
    """38 samples: four batches of 8 and one of 6, in pieces of 5 and less."""
    rows, weights = [], []
    for size in (None, 5):
        config = make_config(run_dir=tmp_path / str(size), micro_batch_size=size, epochs=2, optim=PLAIN_SGD)
        trainer = Trainer(config, model=frozen_norms(make_model(dropout=0.0)))
        rows.append(trainer.fit().rows)
        weights.append(trainer.raw_model.state_dict())
    for whole, pieces in zip(*rows, strict=True):
        for name in ("epoch", "step", "lr"):
            assert whole[name] == pieces[name]
        assert pieces["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)
    assert rows[0][-1]["step"] == 10
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_micro_batches_of_tokens_and_of_images():
    tokens = {"input_ids": torch.arange(10).view(5, 2), "mask": torch.ones(5, 2)}
    target = torch.arange(5)
    parts = list(micro_batches(tokens, target, 2))
    assert [len(part_target) for _, part_target in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["input_ids"] for part, _ in parts]), tokens["input_ids"])
    (whole,) = micro_batches(torch.ones(5, 3), target, None)
    assert torch.equal(whole[0], torch.ones(5, 3))


def test_byot_learns_from_mixed_and_smoothed_labels(first_step):
    data = DataConfig(name="synthetic", synthetic_train=16, synthetic_test=4, image_size=16, cutmix=1.0)
    before, (images, target), trainer = first_step(
        method="byot", byot=ByotConfig(lam=0.0), data=data, label_smoothing=0.1, micro_batch_size=3
    )
    images, shares = Mixup(data, 10, seed=0)(images, target, step=0)
    shares = shares.double()
    *shallow, deepest = before(images)
    loss = F.cross_entropy(deepest, shares, label_smoothing=0.1)
    taught = (deepest.detach() / 3).softmax(1)
    for logits in shallow:
        loss = (
            loss
            + 0.7 * F.cross_entropy(logits, shares, label_smoothing=0.1)
            + 0.3 * F.cross_entropy(logits / 3, taught)
        )
    loss.backward()
    assert_is_sgd_step(before, trainer)


@pytest.mark.parametrize("warmup", [False, True])
def test_average_is_the_loop_by_hand(make_config, make_model, warmup):
    """timm's: the first step's weights start it; under warm-up at most 1 - t ** (-2/3) is kept at step t."""
    optim = OptimConfig(lr=0.1, ema_decay=0.7, ema_warmup=warmup)
    trainer = Trainer(make_config(epochs=1, optim=optim), model=make_model())
    average = {}
    step = trainer.train_step

    def observed(images, target):
        losses = step(images, target)
        number = trainer.progress.step + 1
        decay = min(0.7, 1 - number ** (-2 / 3)) if warmup else 0.7
        for name, value in trainer.raw_model.state_dict().items():
            weight = value.double()
            average[name] = weight if number == 1 else decay * average[name] + (1 - decay) * weight
        return losses

    trainer.train_step = observed
    trainer.fit()
    trained = trainer.raw_model.state_dict()
    for name, value in trainer.ema.module.state_dict().items():
        if value.is_floating_point():  # counters are copied
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6, msg=name)
            assert not torch.equal(value, trained[name]), name
        else:
            assert torch.equal(value, trained[name]), name


def test_average_is_what_gets_evaluated_and_exported(make_config, make_model):
    config = make_config(epochs=1, optim=OptimConfig(lr=0.1, ema_decay=0.9))
    trainer = Trainer(config, model=make_model())
    result = trainer.fit()
    exported = load_file(config.run_dir / "model.safetensors")
    for name, value in trainer.ema.module.state_dict().items():
        assert torch.equal(exported[name], value), name
    assert any(not torch.equal(exported[name], value) for name, value in trainer.raw_model.state_dict().items())
    assert read_description(config.run_dir)["weights"] == "ema"
    again = run_evaluation(EvalConfig(path=config.run_dir, data=config.data, device="cpu", batch_size=4))
    assert again["exits"] == result.metrics["exits"]


def test_average_runs_in_the_precision_of_the_run(make_config, make_model):
    config = make_config(epochs=1, precision="bf16", optim=OptimConfig(ema_decay=0.5))
    trainer = Trainer(config, model=make_model())
    seen = []
    trainer.ema.module.exits[1].register_forward_hook(lambda module, _input, made: seen.append((module.training, made)))
    trainer.fit()
    assert seen
    assert not any(training for training, _ in seen)
    assert {made.dtype for _, made in seen} == {torch.bfloat16}
    assert {value.dtype for value in trainer.ema.module.parameters()} == {torch.float32}


class CrashError(Exception):
    """What the test interrupts a run with."""


@pytest.mark.parametrize("crash", [8, 5])
def test_everything_on_resumes_bit_for_bit(make_config, make_model, tmp_path, crash):
    data = DataConfig(
        name="synthetic",
        synthetic_train=38,
        synthetic_test=11,
        image_size=16,
        crop_padding=2,
        flip=True,
        color_jitter=0.4,
        mixup=0.8,
        cutmix=1.0,
        mixup_mode="elem",
    )
    optim = OptimConfig(name="adamw", lr=1e-2, clip_grad=0.5, ema_decay=0.8, ema_warmup=True, warmup_epochs=1)
    options = {
        "data": data,
        "optim": optim,
        "label_smoothing": 0.1,
        "micro_batch_size": 3,
        "checkpoint_every_steps": 3,
        "epochs": 2,
    }
    whole = Trainer(make_config(run_dir=tmp_path / "whole", **options), model=make_model())
    whole.fit()
    config = make_config(**options)
    crashed = Trainer(config, model=make_model())
    step = crashed.train_step

    def crashing(images, target):
        if crashed.progress.step == crash:
            raise CrashError
        return step(images, target)

    crashed.train_step = crashing
    with pytest.raises(CrashError):
        crashed.fit()
    torch.manual_seed(99)
    resumed = Trainer(replace(config, resume=True), model=make_model())
    assert 0 < resumed.progress.step <= crash
    resumed.fit()
    for one, other in ((whole.raw_model, resumed.raw_model), (whole.ema.module, resumed.ema.module)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    for mine, theirs in zip(whole.progress.rows, resumed.progress.rows, strict=True):
        assert {k: v for k, v in mine.items() if "second" not in k} == {
            k: v for k, v in theirs.items() if "second" not in k
        }


def test_resume_refuses_another_average(make_config, make_model):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    with pytest.raises(ValueError, match=r"optim\.ema_decay: expected 0\.0 as in the run to resume, got 0\.9"):
        Trainer(replace(config, resume=True, optim=OptimConfig(ema_decay=0.9)), model=make_model())


def test_resume_may_cut_the_batch_otherwise(make_config, make_model, caplog):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    with caplog.at_level(logging.WARNING):
        Trainer(replace(config, resume=True, micro_batch_size=2, epochs=2), model=make_model()).fit()
    assert "micro_batch_size" in caplog.text


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimConfig(clip_grad=0.0), r"optim\.clip_grad: expected a number > 0, got 0\.0\. Leave it out"),
        (lambda: OptimConfig(clip_grad=float("inf")), r"optim\.clip_grad: expected a number > 0, got inf"),
        (lambda: OptimConfig(ema_decay=1.0), r"optim\.ema_decay: expected a number in \[0, 1\), got 1\.0"),
        (lambda: OptimConfig(ema_warmup=True), r"optim\.ema_warmup: expected optim\.ema_decay > 0"),
        (lambda: TrainConfig(label_smoothing=1.0), r"label_smoothing: expected a number in \[0, 1\), got 1\.0"),
        (lambda: TrainConfig(micro_batch_size=0), r"micro_batch_size: expected a number >= 1, got 0"),
        (
            lambda: TrainConfig(micro_batch_size=4, method="byot"),
            r"micro_batch_size: expected none with method=byot and byot\.lam=0\.03, got 4.*set byot\.lam to 0",
        ),
        (lambda: DataConfig(mixup=-1.0), r"data\.mixup: expected a number >= 0, got -1\.0"),
        (lambda: DataConfig(cutmix=float("inf")), r"data\.cutmix: expected a number >= 0, got inf"),
        (lambda: DataConfig(mixup_prob=1.5), r"data\.mixup_prob: expected a number in \[0, 1\], got 1\.5"),
        (lambda: DataConfig(mixup_mode="pairs"), r"data\.mixup_mode: .* Did you mean 'pair'"),
    ],
)
def test_wrong_values_name_field_and_remedy(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["label_smoothing", "data.mixup", "data.cutmix"])
@pytest.mark.parametrize("num_classes", [1, 2])
def test_soft_labels_need_classes_and_mixing_needs_images(make_config, tiny_bert, monkeypatch, name, num_classes):
    from dfs_engine.data import DataSplits
    from dfs_engine.models import create_model

    group, _, field = name.rpartition(".")
    config = make_config(model=ModelConfig(name="bert"))
    config = replace(config, **({"data": replace(config.data, **{field: 0.1})} if group else {field: 0.1}))
    model = create_model("bert", num_classes=num_classes, pretrained=str(tiny_bert))
    data = DataSplits([0] * 9, [0] * 3, num_classes, [], "nothing")
    if num_classes == 2 and not group:
        Trainer(config, model=model, data=data)
        return
    why = "a regression" if num_classes == 1 else "bert, which reads tokens"
    with pytest.raises(ValueError, match=rf"{name}: expected 0 for {why}.*got 0\.1"):
        Trainer(config, model=model, data=data)
    assert not config.run_dir.exists()


def test_average_without_timm_names_it(make_config, make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "timm.utils")
    with pytest.raises(ModuleNotFoundError, match=r"timm.*dfs_engine\[vision\]"):
        Trainer(make_config(optim=OptimConfig(ema_decay=0.9)), model=make_model())
