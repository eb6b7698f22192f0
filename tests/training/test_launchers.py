"""What several processes, and those who start them, may ask of a run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dfs_engine.models import create_model
from dfs_engine.training.build import accelerator_for, synchronise_batch_norms
from dfs_engine.training.trainer import Trainer

GPUS = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
CPUS = SimpleNamespace(num_processes=2, device=torch.device("cpu"))


@pytest.mark.parametrize("family", ["vgg7_64", "resnet18"])
def test_synchronised_batch_norms_keep_names_and_gradients(family):
    """Without processes to talk to, SyncBatchNorm normalises as the stock layer does."""
    options = {"num_classes": 3, "dtype": torch.float64} | ({"width": 4} if family == "vgg7_64" else {})
    model, stock = create_model(family, **options), create_model(family, variant="detach", **options)
    stock.load_state_dict(model.state_dict())
    names = list(model.state_dict())
    synchronise_batch_norms(model, GPUS)
    assert list(model.state_dict()) == names
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(type(norm) is nn.SyncBatchNorm for norm in norms)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for each in (model, stock):
        sum(logits.square().sum() for logits in each(images)).backward()
    gradients = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=name)


def test_synchronised_batch_norms_need_gpus_and_batch_norms():
    model = create_model("vgg7_64", width=4)
    with pytest.raises(ValueError, match="sync_batch_norm: expected 2 processes with a GPU each, got the CPU"):
        synchronise_batch_norms(model, CPUS)
    synchronise_batch_norms(model, SimpleNamespace(num_processes=1, device=torch.device("cpu")))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    none = SimpleNamespace(name="bert", modules=lambda: [nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="sync_batch_norm: expected a model with batch norms, got bert"):
        synchronise_batch_norms(none, GPUS)


def test_one_process_has_nothing_to_synchronise(make_config, make_model):
    Trainer(make_config(sync_batch_norm=True, epochs=1), model=make_model()).fit()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launchers_that_shard_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"accelerate launch: expected MULTI_GPU or MULTI_CPU, got {name}"):
        accelerator_for("cpu", "fp32")


def test_wandb_offline(make_config, make_model, monkeypatch):
    """A resumed run goes on as the same one."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_config(wandb=True, epochs=1)
    Trainer(config, model=make_model()).fit()
    folder = config.run_dir / "wandb"
    identity = (folder / "id.txt").read_text()
    assert list(folder.glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    Trainer(replace(config, resume=True, epochs=2), model=make_model()).fit()
    assert (folder / "id.txt").read_text() == identity
    assert {path.name.split("-")[-1] for path in folder.glob("offline-run-*")} == {identity}
