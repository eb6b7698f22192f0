"""The published constants from training to export: keys and shapes are those of the published checkpoints."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from dfs_engine.cli import main

PUBLISHED = json.loads((Path(__file__).parents[1] / "models" / "official_state_dicts.json").read_text())["models"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "flags", "published", "trained"),
    [
        ("cifar100_resnet18_dfs", [], "resnet18_cifar100", True),
        ("cifar100_vgg7_dfs", [], "vgg7_64_cifar100+distill", False),
        ("cifar100_vgg7_dfs", ["--method", "byot"], "vgg7_64_cifar100+distill", True),
    ],
    ids=["resnet18", "vgg7", "vgg7-byot"],
)
def test_one_epoch_and_export(tmp_path, capsys, config, flags, published, trained):
    """The shipped recipes, on images that need no files; adapters are those of the run, or fresh ones."""
    data = ["--data.name", "synthetic", "--data.synthetic_classes", "100", "--data.synthetic_train", "12"]
    data += ["--data.synthetic_test", "4", "--epochs", "1", "--batch_size", "6", "--optim.milestones", "[]"]
    line = ["train", "--config", config, *flags, *data, "--run_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*line, "--tensorboard", "false", "--num_threads", "1"]) == 0
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert record["data"]["mean"] == "published" or record["data"]["mean"] == [0.4914, 0.4822, 0.4465]
    environment = yaml.safe_load((tmp_path / "run" / "environment.yaml").read_text())
    assert environment["model"].get("init") == ("published" if "vgg" in config else None)
    if "resnet" in config:
        assert record["method"] == "byot"
        assert {key: record["byot"][key] for key in ("alpha", "temperature", "lam", "t2", "squared", "fd_skip")} == {
            "alpha": 0.3, "temperature": 3.0, "lam": 0.03, "t2": False, "squared": False, "fd_skip": False
        }  # fmt: skip
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "published.pth")]) == 0
    assert ("fresh ones" in capsys.readouterr().out) != trained
    tensors = torch.load(tmp_path / "published.pth", weights_only=True)
    assert {key: list(value.shape) for key, value in tensors.items()} == PUBLISHED[published]
    assert all(value.isfinite().all() for value in tensors.values())
