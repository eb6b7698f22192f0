"""`dfs convert`: files of the published code, both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfs_engine import create_model, to_official_state_dict
from dfs_engine.cli import main
from dfs_engine.training import load_model


@pytest.fixture
def published():
    """A model of the published size and its published tensors."""
    model = create_model("vgg7_64", num_classes=7, beta=0.3)
    for name, buffer in model.named_buffers():
        buffer.add_(torch.rand(buffer.shape).to(buffer.dtype) if "running" in name else 5)
    return model, to_official_state_dict(model)


def write(path, tensors, epoch=None):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif epoch is None:
        torch.save(tensors, path)
    else:  # as the published script does after every epoch
        state = {"epoch": epoch, "arch": "vgg7", "state_dict": tensors, "best_acc1": 1.5, "optimizer": {"state": {}}}
        torch.save(state, path)


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("output", ["run", "ours.safetensors"])
def test_there_and_back(published, tmp_path, capsys, suffix, output):
    model, tensors = published
    write(tmp_path / f"published{suffix}", tensors)
    line = ["convert", str(tmp_path / f"published{suffix}"), str(tmp_path / output)]
    assert main([*line, "--model.beta", "0.3", "--json", str(tmp_path / "out.json")]) == 0
    loaded, description = load_model(tmp_path / output)
    assert loaded.get_config() == model.get_config()
    assert description["converted_from"] == f"published{suffix}"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert f"{len(loaded.state_dict())} tensors of vgg7_64, dfs format" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["model"] == model.get_config()

    assert main(["convert", str(tmp_path / output), str(tmp_path / f"back{suffix}")]) == 0
    back = read(tmp_path / f"back{suffix}")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in back.items())
    assert "54 tensors of vgg7_64, official format" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"width": 4}),
        ("msdnet_cifar", {"growth": 2, "channels": 2}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 3, "start_block": 1}),
        ("bert", {"config": {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}}),
    ],
)
def test_every_family(tmp_path, name, options):
    """num_classes is found in the checkpoint."""
    model = create_model(name, num_classes=7, **options)
    tensors = to_official_state_dict(model)
    torch.save(tensors, tmp_path / "published.pth")
    flags = ["--model.name", name, "--model.options", json.dumps(options)]
    assert main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), *flags]) == 0
    loaded, _ = load_model(tmp_path / "run")
    assert loaded.get_config() == model.get_config()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "back.pth")]) == 0
    back = read(tmp_path / "back.pth")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in back.items())


def test_a_training_checkpoint_with_adapters(published, tmp_path, capsys):
    _, tensors = published
    tensors["adaptation_layers.0.2.weight"] = torch.zeros(3, 2)
    write(tmp_path / "latest.pth.tar", tensors, epoch=11)
    assert main(["convert", str(tmp_path / "latest.pth.tar"), str(tmp_path / "run"), "--model.beta", "0.3"]) == 0
    assert "left out, because no part of the model: adaptation_layers.0.2.weight" in capsys.readouterr().out
    assert load_model(tmp_path / "run")[1]["epoch"] == 12


def test_converted_weights_are_measured(published, tmp_path, capsys):
    write(tmp_path / "published.pth", published[1])
    assert main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), "--model.beta", "0.3"]) == 0
    data = ["--data.name", "synthetic", "--data.synthetic_test", "3", "--data.image_size", "8"]
    classes = ["--data.synthetic_classes", "7"]
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu", "--num_threads", "1", *data, *classes]) == 0
    printed = capsys.readouterr().out
    assert "vgg7_64, dfs, epoch unknown, on" in printed
    assert "images normalised by mean 0.4914 0.4822 0.4465, std 0.2023 0.1994 0.201 (published)" in printed


def test_an_output_that_is_there(published, tmp_path, capsys):
    write(tmp_path / "published.pth", published[1])
    line = ["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), "--model.beta", "0.3"]
    assert main(line) == 0
    with pytest.raises(SystemExit):
        main(line)
    assert "Add --overwrite to replace it" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 0


class Stranger:
    """What a pickle could bring along."""


@pytest.mark.parametrize(
    ("content", "flags", "output", "message"),
    [
        (None, [], "run", "source: expected a file or a run folder, got"),
        ({"weight": Stranger()}, [], "run", "source: expected a file of tensors alone"),
        (torch.ones(2), [], "run", "source: expected a state_dict in"),
        (
            {"conv1.weight": torch.ones(2)},
            [],
            "run",
            "expected a checkpoint of vgg7_64, got one without classifers.5.fc",
        ),
        (
            "published",
            [],
            "run",
            "misfits (22): feature_extractors.1.conv_p.weight (ours: blocks.1.conv.weight), of shape",
        ),
        ("published", ["--num_classes", "9"], "run", "of shape (7, 19) and not (9, 32)"),
        ("published", ["--num_classes", "0"], "run", "num_classes: expected an integer >= 1, got 0"),
        ("published", ["--model.name", "vgg16_64"], "run", "got one without classifers.12.fc"),
        ("published", ["--model.beta", "0.3"], "run.pth", "output: expected a run folder, or a file that ends in"),
        ("ours", [], "back", "output: expected a published checkpoint to end in .pth, .pt, .tar, .bin, .safetensors"),
        ("broken", [], "run", "source: expected a whole safetensors file, got"),
    ],
)
def test_wrong_input_writes_nothing(published, tmp_path, capsys, content, flags, output, message):
    source = tmp_path / "source.pth"
    if content == "published":
        torch.save(published[1], source)
    elif content == "ours":
        torch.save(published[1], tmp_path / "published.pth")
        source = tmp_path / "ours.safetensors"
        assert main(["convert", str(tmp_path / "published.pth"), str(source), "--model.beta", "0.3"]) == 0
    elif content == "broken":
        source = tmp_path / "broken.safetensors"
        source.write_bytes(b"not one")
    elif content is not None:
        torch.save(content, source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(source), str(tmp_path / output), *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
