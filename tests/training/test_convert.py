"""`dfs convert`: files of the published code, both ways."""

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfs_engine import create_model, to_official_state_dict
from dfs_engine.cli import main
from dfs_engine.methods import create_method
from dfs_engine.models.official import adapter_keys
from dfs_engine.models.weights import load_model, read_description, save_model
from dfs_engine.training.adapters import adapters_path, load_adapters


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
    loaded, description = load_model(tmp_path / output), read_description(tmp_path / output)
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
    flags = ["--model.name", name, "--model.options", json.dumps(options), "--model.beta", "0.5"]
    assert main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), *flags]) == 0
    loaded = load_model(tmp_path / "run")
    assert loaded.get_config() == model.get_config()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "back.pth")]) == 0
    back = read(tmp_path / "back.pth")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in back.items())


def test_a_training_checkpoint(published, tmp_path):
    _, tensors = published
    write(tmp_path / "latest.pth.tar", tensors, epoch=11)
    assert main(["convert", str(tmp_path / "latest.pth.tar"), str(tmp_path / "run"), "--model.beta", "0.3"]) == 0
    assert read_description(tmp_path / "run")["epoch"] == 12


NARROW = {"vgg7_64": {"width": 4}, "resnet18": {"width": 4}}


def with_adapters(name):
    """(published tensors with adapters, flags) of a narrow model."""
    model = create_model(name, num_classes=7, **NARROW[name])
    keys = adapter_keys(model)
    adapters = create_method("byot", model).state_dict()
    assert adapters.keys() == keys.keys()
    flags = ["--model.name", name, "--model.options", json.dumps(NARROW[name]), "--model.beta", "0.5"]
    extras = {keys[key]: value for key, value in adapters.items()}
    return to_official_state_dict(model, extras), adapters, flags


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("output", ["run", "ours.safetensors"])
def test_adapters_travel_beside_the_weights(tmp_path, capsys, name, output):
    tensors, adapters, flags = with_adapters(name)
    torch.save(tensors, tmp_path / "published.pth")
    assert main(["convert", str(tmp_path / "published.pth"), str(tmp_path / output), *flags]) == 0
    out = capsys.readouterr().out
    assert f"{len(adapters)} tensors of its adapters of feature distillation are kept beside the weights" in out
    assert "left out" not in out
    found = load_adapters(tmp_path / output)
    assert found.keys() == adapters.keys()
    assert all(torch.equal(value, adapters[key]) for key, value in found.items())
    model = load_model(tmp_path / output)
    assert not any("adapt" in key for key in model.state_dict())

    assert main(["convert", str(tmp_path / output), str(tmp_path / "back.pth")]) == 0
    back = read(tmp_path / "back.pth")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in back.items())
    assert "fresh" not in capsys.readouterr().out
    assert main(["convert", str(tmp_path / output), str(tmp_path / "bare.pth"), "--adapters", "false"]) == 0
    assert read(tmp_path / "bare.pth").keys() == {key for key in tensors if "adaptation" not in key}

    bare = {key: value for key, value in tensors.items() if "adaptation" not in key}
    torch.save(bare, tmp_path / "bare.pth")
    line = ["convert", str(tmp_path / "bare.pth"), str(tmp_path / output), *flags, "--overwrite"]
    assert main(line) == 0
    assert not adapters_path(tmp_path / output).exists()  # those of other weights


@pytest.mark.parametrize("name", NARROW)
def test_weights_without_adapters_get_fresh_ones(tmp_path, capsys, name):
    tensors, _, _ = with_adapters(name)
    model = create_model(name, num_classes=7, **NARROW[name])
    save_model(model, tmp_path)
    for output in ("one.pth", "other.pth"):
        assert main(["convert", str(tmp_path), str(tmp_path / output)]) == 0
        assert "fresh ones: the weights were trained without" in capsys.readouterr().out
    one, other = read(tmp_path / "one.pth"), read(tmp_path / "other.pth")
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in tensors.items()}
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_adapters_of_another_form(tmp_path, capsys):
    model = create_model("vgg7_64", num_classes=7, width=4)
    save_model(model, tmp_path)
    save_file(create_method("byot", model, features="exits").state_dict(), adapters_path(tmp_path))
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path), str(tmp_path / "published.pth")])
    assert re.search(
        r"adapters: expected those of the published .*, adapters\.0\.weight of shape \[256, 64\], got \[16, 4\] beside "
        r".*Add --adapters false",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "published.pth").exists()


def test_adapters_of_another_shape(tmp_path, capsys):
    tensors, _, flags = with_adapters("vgg7_64")
    tensors["adaptation_layers.1.2.weight"] = torch.zeros(3, 2)
    torch.save(tensors, tmp_path / "published.pth")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), *flags])
    assert "adapters.1.weight of shape [256, 64], got [3, 2] in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# How others wrap a state_dict.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"model": tensors, "epoch": 4},
        lambda tensors: {"state_dict": tensors, "epoch": 4},
        lambda tensors: {"epoch": 4, "model": {"state_dict": tensors}},
        lambda tensors: {"epoch": 4, "state_dict": {f"module.{key}": value for key, value in tensors.items()}},
        lambda tensors: {"epoch": 4, "model": {f"module._orig_mod.{key}": value for key, value in tensors.items()}},
        lambda tensors: {"epoch": 4, "model": {f"_orig_mod.module.{key}": value for key, value in tensors.items()}},
        lambda tensors: {  # timm's CheckpointSaver
            "epoch": 4,
            "arch": "vgg7",
            "state_dict": tensors,
            "optimizer": {"state": {}, "param_groups": []},
            "version": 2,
            "args": argparse.Namespace(model="vgg7", lr=1e-4, opt_betas=[0.9, 0.999], amp=True, resume=""),
            "metric": 71.2,
        },
    ],
    ids=["model", "state_dict", "both", "ddp", "ddp-compiled", "compiled-ddp", "timm"],
)
def test_wrapped_state_dicts(tmp_path, wrap):
    model = create_model("vgg7_64", num_classes=7, width=4)
    torch.save(wrap(to_official_state_dict(model)), tmp_path / "published.pth")
    flags = ["--model.options", "{width: 4}"]
    assert main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), *flags]) == 0
    loaded, description = load_model(tmp_path / "run"), read_description(tmp_path / "run")
    assert description["epoch"] == 5
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_averaged_weights_of_timm(tmp_path, capsys):
    models = [create_model("vgg7_64", num_classes=7, width=4) for _ in range(2)]
    last, average = (to_official_state_dict(model) for model in models)
    torch.save({"state_dict": last, "state_dict_ema": average}, tmp_path / "published.pth")
    flags = ["--model.options", "{width: 4}"]
    for output, more in (("last", []), ("ema", ["--ema"])):
        assert main(["convert", str(tmp_path / "published.pth"), str(tmp_path / output), *flags, *more]) == 0
    assert capsys.readouterr().out.count("averaged weights are left out; --ema takes them") == 1
    for model, output in zip(models, ("last", "ema"), strict=True):
        loaded = load_model(tmp_path / output).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())
    torch.save(last, tmp_path / "plain.pth")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "plain.pth"), str(tmp_path / "run"), *flags, "--ema"])
    assert "ema: expected averaged weights (state_dict_ema or model_ema) in" in capsys.readouterr().err


class Intruder:
    """A pickle that would run code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_file_runs(tmp_path, capsys):
    tensors = to_official_state_dict(create_model("vgg7_64", num_classes=7, width=4))
    content = {"state_dict": tensors, "args": argparse.Namespace(model="vgg7", hook=Intruder(tmp_path / "ran"))}
    torch.save(content, tmp_path / "published.pth")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), "--model.options", "{width: 4}"])
    assert "expected a file of tensors alone" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


TINY_BERT = {
    "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_transformers(tmp_path, capsys, file):
    """As the published fine-tuning script leaves it: `save_pretrained` of its subclass of BERT."""
    transformers = pytest.importorskip("transformers")
    model = create_model("bert", num_classes=3, config=TINY_BERT)
    folder = tmp_path / "output"
    transformers.BertConfig(**TINY_BERT, num_labels=3).save_pretrained(folder)
    tensors = to_official_state_dict(model)
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, metadata={"format": "pt"})
    line = ["convert", str(folder), str(tmp_path / "run"), "--model.beta", "0.5"]
    with pytest.raises(SystemExit):
        main(line)
    assert "model.name: expected bert of a transformers folder, got vgg7_64" in capsys.readouterr().err
    assert main([*line, "--model.name", "bert"]) == 0
    loaded = load_model(tmp_path / "run")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert loaded.get_config()["config"]["hidden_size"] == 8


# What a checkpoint does not tell.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"width": 4}),
        ("msdnet_cifar", {"growth": 2, "channels": 2}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 3, "start_block": 1}),
        ("bert", {"config": TINY_BERT}),
    ],
)
def test_beta_is_asked_for_where_tensors_do_not_tell(tmp_path, capsys, name, options):
    torch.save(to_official_state_dict(create_model(name, num_classes=7, **options)), tmp_path / "published.pth")
    line = ["convert", str(tmp_path / "published.pth"), str(tmp_path / "run")]
    line += ["--model.name", name, "--model.options", json.dumps(options)]
    with pytest.raises(SystemExit):
        main(line)
    assert f"model.beta: expected the dns_ratio that the checkpoint of {name} was" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*line, "--model.beta", "0.3"]) == 0
    assert load_model(tmp_path / "run").get_config()["beta"] == 0.3
    assert main([*line, "--overwrite", "--model.variant", "dense"]) == 0  # which has none


@pytest.mark.parametrize("beta", [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1, 0.375, 0.623])
def test_beta_of_a_vgg_is_found(tmp_path, capsys, beta):
    model = create_model("vgg7_64", num_classes=7, beta=beta, width=16)
    torch.save(to_official_state_dict(model), tmp_path / "published.pth")
    line = ["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), "--model.options", "{width: 16}"]
    assert main(line) == 0
    loaded = load_model(tmp_path / "run")
    found = loaded.get_config()["beta"]
    assert f"beta {found:g}, as its layers are split" in capsys.readouterr().out
    # So few channels do not tell others from the shorter 0.38 and 0.62.
    assert found == {0.375: 0.38, 0.623: 0.62}.get(beta, beta)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_beta_of_a_vgg_is_checked(published, tmp_path, capsys):
    torch.save(published[1], tmp_path / "published.pth")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "run"), "--model.beta", "0.5"])
    assert "misfits (22): feature_extractors.1.conv_p.weight" in capsys.readouterr().err


def test_converted_cifar_checkpoints_record_the_published_normalization(published, tmp_path):
    torch.save(published[1], tmp_path / "published.pth")
    assert main(["convert", str(tmp_path / "published.pth"), str(tmp_path / "run")]) == 0
    data = read_description(tmp_path / "run")["data"]
    assert data == {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}


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
        ("published", ["--num_classes", "9"], "run", "of shape (7, 19) and not (9, 19)"),
        ("published", ["--num_classes", "0"], "run", "num_classes: expected a number >= 1, got 0"),
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
