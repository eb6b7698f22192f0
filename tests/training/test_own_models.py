"""`Trainer(config, model=...)`: exits attached to a backbone, and models of a class of one's own."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dfs_engine import attach_exits
from dfs_engine.cli import main
from dfs_engine.models import MultiExitModel
from dfs_engine.models.multi_exit import Block
from dfs_engine.models.weights import load_model, read_description, save_model
from dfs_engine.nn import ExitHead, Fork, whole
from dfs_engine.training.trainer import Trainer


class Backbone(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.first, self.second = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, num_classes)

    def forward(self, images):
        feature = self.first(self.norm(self.stem(images)).relu())
        return self.head(self.drop(self.second(feature).relu().mean((2, 3))))


def attached(at=("norm", "first"), **options):
    torch.manual_seed(0)
    return attach_exits(Backbone(**options), at, example_input=torch.randn(1, 3, 16, 16))


class OwnBlock(Block):
    def __init__(self, num_channels):
        super().__init__()
        self.conv = nn.LazyConv2d(num_channels, 3)

    def make(self, *input):
        return self.conv(whole(input)).relu()


class OwnModel(MultiExitModel):
    def __init__(self):
        blocks = [OwnBlock(4), OwnBlock(6)]
        heads = [ExitHead(4, 10, bias=True), ExitHead(6, 10, bias=True)]
        super().__init__(blocks, heads, Fork(0.5, "dfs"), num_classes=10, input_shape=(3, 16, 16))
        self(torch.zeros(1, 3, 16, 16))  # the lazy convolutions take their shapes


def own():
    torch.manual_seed(0)
    return OwnModel()


MODELS = pytest.mark.parametrize(("make", "name"), [(attached, "Backbone"), (own, "OwnModel")])


def assert_same(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


class CrashError(Exception):
    """What the tests interrupt a run with."""


@MODELS
def test_it_trains_and_resumes_exactly(make_config, tmp_path, make, name):
    whole = Trainer(make_config(run_dir=tmp_path / "whole", epochs=2), model=make())
    expected = whole.fit()
    config = make_config(epochs=2, checkpoint_every_steps=3)
    trainer = Trainer(config, model=make())
    step = trainer.train_step

    def crashing(*batch):
        if trainer.progress.step == 7:
            raise CrashError
        return step(*batch)

    trainer.train_step = crashing
    with pytest.raises(CrashError):
        trainer.fit()
    torch.manual_seed(99)
    resumed = Trainer(replace(config, resume=True), model=make())
    assert resumed.progress.step == 6
    result = resumed.fit()
    assert_same(whole.raw_model, resumed.raw_model)
    assert result.metrics == expected.metrics
    assert name in (config.run_dir / "environment.yaml").read_text()
    loaded = load_model(config.run_dir, model=make())
    assert_same(resumed.raw_model, loaded)
    assert read_description(config.run_dir)["model"] == make().get_config()


@pytest.fixture
def attached_run(make_config):
    config = make_config(epochs=1)
    Trainer(config, model=attached()).fit()
    return config


def test_the_weights_say_what_has_to_be_made_again(attached_run, capsys):
    with pytest.raises(ValueError, match=r"Backbone with exits attached at \['norm', 'first'\]. Make that model in P"):
        load_model(attached_run.run_dir)
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(attached_run.run_dir), "--device", "cpu"])
    assert caught.value.code == 2
    assert "load_model(path, model=...)" in capsys.readouterr().err.splitlines()[-1]


def test_resumed_by_the_command_it_says_where_to(attached_run, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--resume", "--run_dir", str(attached_run.run_dir), "--epochs", "2"])
    assert caught.value.code == 2
    assert "It was made in Python: make it there again, and give it as model=..." in capsys.readouterr().err


def test_another_model_is_refused(attached_run):
    other = attached(at=["first"])
    with pytest.raises(ValueError, match=r"expected a model with at=\['first'\], got .* at=\['norm', 'first'\]"):
        load_model(attached_run.run_dir, model=other)
    with pytest.raises(ValueError, match=r"expected a model with at=\['first'\]"):
        Trainer(replace(attached_run, resume=True), model=other)


def test_another_number_of_classes_is_refused_before_the_folder_is_made(make_config):
    config = make_config()
    with pytest.raises(ValueError, match=r"model: expected one of 10 classes, .* got one of 7"):
        Trainer(config, model=attached(num_classes=7))
    assert not config.run_dir.exists()


def test_tied_weights_are_saved(tmp_path):
    model = attached()
    model.backbone.second = nn.Conv2d(6, 6, 3)
    model.backbone.second.weight = model.backbone.first.weight
    save_model(model, tmp_path)
    other = attached()
    other.backbone.second = nn.Conv2d(6, 6, 3)
    other.backbone.second.weight = other.backbone.first.weight
    with torch.no_grad():
        other.backbone.first.weight.zero_()
    load_model(tmp_path, model=other)
    assert_same(model, other)
