"""The recipes in `configs/` are what `dfs train` reads, build what they name, and have the published numbers."""

import itertools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dfs_engine.cli.parser import Parser
from dfs_engine.inference import evaluate
from dfs_engine.methods import section_of
from dfs_engine.training.build import build_method, build_model, build_optimizer
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.schedules import Schedule
from dfs_engine.training.trainer import Trainer

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NUM_CLASSES = {"cifar100": 100, "image_folder": 1000, "mnli": 3, "stsb": 1}

# What the published code trains with: (epochs, batch, lr, weight decay, schedule, milestones).
CIFAR_RESNET = (300, 500, 0.1, 5e-4, "multistep", (250, 280, 295))
CIFAR_VGG = (300, 500, 0.1, 1e-4, "multistep", (270, 280, 295))
PUBLISHED = {
    "cifar100_msdnet_dfs": CIFAR_RESNET,
    "cifar100_resnet18_byot": CIFAR_RESNET,
    "cifar100_resnet18_dfs": CIFAR_RESNET,
    "cifar100_resnet18_dsn": CIFAR_RESNET,
    "cifar100_vgg7_dfs": CIFAR_VGG,
    "cifar10_resnet18_dfs": CIFAR_RESNET,
    "cifar10_vgg7_dense": CIFAR_VGG,
    "cifar10_vgg7_dfs": CIFAR_VGG,
    "imagenet_msdnet_dfs": (90, 256, 0.1, 0.0, "multistep", (70, 80, 85)),
    "imagenet_vit_tiny_dfs": (60, 1024, 5e-5 * (1024 / 256) ** 0.5, 0.0, "cosine", ()),
}


def parse(line):
    parser = Parser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig)
    values = parser.instantiate(parser.parse_args(line))
    del values["config"]
    return TrainConfig(**vars(values))


def load(name):
    return parse(["--config", str(CONFIGS[0].parent / f"{name}.yaml")])


def of_every_recipe(test):
    return pytest.mark.parametrize("name", [path.stem for path in CONFIGS])(test)


@of_every_recipe
def test_recipe_builds(name, tiny_bert):
    config = load(name)
    assert config.data.name == "image_folder" or config.data.name in name or name == "glue_bert_dfs"
    model_config = config.model
    if model_config.name == "bert":
        model_config = replace(model_config, pretrained=str(tiny_bert))
    model = build_model(model_config, NUM_CLASSES.get(config.data.name, 10), device="meta")
    build_method(config, model)
    build_optimizer(torch.nn.Linear(2, 2), config.optim)
    last_step = config.epochs * 7 - 1
    assert 0 < Schedule(config.optim, 7, config.epochs)(last_step) < config.optim.lr


@of_every_recipe
def test_commands_of_the_header_parse(name):
    """One for each way to start it; a loop's variable stands for one of its values."""
    path = CONFIGS[0].parent / f"{name}.yaml"
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    commands = re.findall(r"dfs train (?:--\S+ \S+ ?)+", "\n".join(header))
    values = re.findall(r"for beta in (.*); do", "\n".join(header))
    betas = values[0].split() if values else ["0.5"]
    for command in commands:
        for beta in betas:
            words = shlex.split(command.replace("$beta", beta))[2:]
            assert words[:2] == ["--config", name]
            config = parse(["--config", str(path), *words[2:]])
            assert "$beta" not in command or (config.model.beta == float(beta) and beta in str(config.run_dir))
    assert commands or name == "digits_vgg7_dfs"  # `make train` is that one's


@of_every_recipe
def test_saved_config_reads_back(name, tmp_path):
    """As a run folder has it, and as `dfs eval` takes its data section for flags."""
    config = load(name)
    saved = config.to_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    assert (
        parse([f"--data.{key}={value}" for key, value in saved["data"].items() if value is not None]).data
        == config.data
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    config = load(name)
    optim = config.optim
    expected = PUBLISHED[name]
    found = (config.epochs, config.batch_size, optim.lr, optim.weight_decay, optim.schedule, optim.milestones)
    assert found == (*expected[:2], pytest.approx(expected[2]), *expected[3:])
    assert (optim.gamma, optim.warmup_epochs, optim.decay_norm_and_bias) == (0.1, 0, True)
    if "cifar" in name:
        assert (config.data.mean, config.data.crop_padding, config.data.flip) == ("published", 4, True)
        assert optim.momentum == 0.9
        assert config.data.autoaugment == ("msdnet" not in name)


# MSDNet's own recipe, and the rows that were trained by it; the options of each that are not the method's default.
MSDNET = (300, 64, 0.1, 1e-4, "multistep", (150, 225))
MSDNET_ROWS = {
    "joint": (MSDNET, {}),
    "ge": (MSDNET, {}),
    "pcgrad": (MSDNET, {"reduction": "port", "include_heads": True}),
    "cagrad": (MSDNET, {"c": 0.5, "scale": "mean", "include_heads": True}),
    "nash_mtl": (MSDNET, {}),
    "meta_gf": (
        MSDNET,
        {
            "leak_momentum": True,
            "freeze_v_after_first_epoch": True,
            "aux_weights": (1.0, 1.0, 0.6, 0.6, 0.75, 0.9, 1.0),
        },
    ),
    "bdl1": (MSDNET, {}),
    "bdl2": (MSDNET, {}),
    "wpn": ((300, 1024, 0.8, 1e-4, "cosine", ()), {}),
    "dr_mgf": (MSDNET, {}),
}


@pytest.mark.parametrize("method", MSDNET_ROWS)
def test_rows_of_msdnet(method):
    config = load(f"cifar100_msdnet_{method}")
    (epochs, batch, lr, decay, schedule, milestones), changed = MSDNET_ROWS[method]
    optim, data = config.optim, config.data
    assert (config.epochs, config.batch_size, optim.lr, optim.weight_decay) == (epochs, batch, lr, decay)
    assert (optim.schedule, optim.milestones, optim.momentum) == (schedule, milestones, 0.9)
    assert (data.mean, data.crop_padding, data.flip, data.autoaugment) == ("cifar100", 4, True, False)
    assert data.val_fraction == (0.0 if method in ("bdl1", "bdl2", "wpn") else 0.1)
    assert (config.method, config.model.variant) == (method, "dense")
    if method != "joint":
        section = getattr(config, section_of(method))
        assert section == type(section)(**changed)
    model = build_model(config.model, 100, device="meta")
    num_millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert num_millions == pytest.approx(3.07 if method in ("bdl1", "bdl2") else 7.36, abs=0.01)
    assert {layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}


def test_vit_is_the_published_one():
    config = load("imagenet_vit_tiny_dfs")
    optim, data = config.optim, config.data
    assert (optim.name, optim.adam_beta1, optim.adam_beta2, optim.clip_grad) == ("adamw", 0.9, 0.999, 1.0)
    assert (config.label_smoothing, config.precision) == (0.1, "fp16")
    assert (data.color_jitter, data.crop_pct, data.flip, data.autoaugment) == (0.4, 0.9, True, None)
    model = build_model(config.model, 1000, device="meta")
    assert model.num_exits == 6
    vits = [model.blocks[0].vit, *(exit.tail for exit in model.exits)]
    blocks = [*vits[0].blocks, *(block.block for block in model.blocks[1:])]
    assert [block.attn.attn_drop.p for block in blocks] == [0.1] * 12
    assert [exit.tail.head_drop.p for exit in model.exits] == [0.1] * 6
    assert model.fork.exit_gradient == "whole"


def test_vit_trains_by_its_recipe(tmp_path):
    """A smaller one, on 8 images and without its pretrained weights, with timm's additions and in pieces."""
    generator = np.random.default_rng(0)
    for split, label, index in itertools.product(("train", "val"), ("ant", "bee"), range(4)):
        path = tmp_path / "data" / split / label / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (250, 240, 3), dtype=np.uint8)).save(path)
    config = load("imagenet_vit_tiny_dfs")
    options = config.model.options | {"pretrained": False, "depth": 8, "embed_dim": 24, "num_heads": 2}
    config = replace(
        config,
        model=replace(config.model, options=options),
        data=replace(config.data, root=str(tmp_path / "data"), mixup=0.8, cutmix=1.0),
        optim=replace(config.optim, ema_decay=0.9),
        precision="bf16",  # fp16 needs a GPU
        batch_size=4,
        micro_batch_size=3,
        epochs=1,
        run_dir=tmp_path / "run",
        device="cpu",
        tensorboard=False,
    )
    result = Trainer(config).fit()
    assert result.rows[0]["step"] == 2
    assert 0.5 < result.rows[0]["train_loss_exit2"] < 1.5  # two classes: about ln 2
    again = evaluate.run(evaluate.EvalConfig(path=tmp_path / "run", data=config.data, device="cpu", precision="bf16"))
    assert again["exits"] == result.metrics["exits"]


def test_glue_is_the_published_one():
    config = load("glue_bert_dfs")
    assert (config.optim.name, config.optim.adam_eps, config.epochs, config.batch_size) == ("adamw", 1e-6, 3, 32)
