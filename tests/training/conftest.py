"""Runs small enough to repeat: 3 epochs of 5 steps of a narrow VGG with dropout, on augmented synthetic images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.data import DataConfig
from dfs_engine.models import MultiExitModel, create_model
from dfs_engine.training.config import TrainConfig


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_config(tmp_path):
    def make(**changes) -> TrainConfig:
        data = DataConfig(
            name="synthetic", synthetic_train=38, synthetic_test=11, crop_padding=2, flip=True, image_size=16
        )
        config = TrainConfig(
            data=data,
            epochs=3,
            batch_size=8,
            eval_batch_size=4,
            run_dir=tmp_path / "run",
            tensorboard=False,
            device="cpu",
        )
        return replace(config, **changes)

    return make


@pytest.fixture
def make_model():
    def make(variant: str = "dfs", width: int = 4, dropout: float = 0.3, **options) -> MultiExitModel:
        torch.manual_seed(0)
        model = create_model("vgg7_64", variant=variant, width=width, **options)
        for exit in model.exits:
            # Random draws in the forward pass, which a resumed run has to repeat.
            exit.register_forward_hook(lambda module, _, logits: F.dropout(logits, dropout, module.training))
        return model

    return make


@pytest.fixture
def tree():
    def read(folder: Path) -> dict[str, bytes]:
        """Every file of a folder, with its content."""
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read
