"""What a run says of itself: lines in words, and a plot whose title and axes fit what they show."""

import pytest

from dfs_engine.cli import main
from dfs_engine.training import report

pytest.importorskip("matplotlib")


def model(variant):
    return {"name": "vgg7_64", "variant": variant, "beta": 0.5}


def test_a_dense_model_has_no_beta():
    assert report.title(model("dense")) == "vgg7_64 (dense)"
    assert report.title(model("split")) == "vgg7_64 (split, beta 0.5)"


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("value", [0.0, -20.0, 100.0], ids=["zero", "below", "all"])
def test_axes_of_the_plot(tmp_path, monkeypatch, epochs, value):
    """Whole epochs on one axis, on the other nothing that a per cent cannot be; every exit is there."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), path.touch()))
    named = {"exit1": value, "exit2": 60.0, "ensemble": 50.0}
    row = {f"test_pearson_{name}": share for name, share in named.items()}
    rows = [{"epoch": epoch, **row} for epoch in range(1, epochs + 1)]
    report.plot_metric(tmp_path / "plot.png", rows, "pearson", title="a title")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "a title"
    assert [text.get_text().split(":")[0] for text in axes.get_legend().get_texts()] == ["exit 1", "exit 2", "ensemble"]
    first, last = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if first <= tick <= last] == list(range(1, epochs + 1))
    lowest, highest = axes.get_ylim()
    assert min(value, 50.0) > lowest >= min(0.0, value) - 2
    assert max(value, 60.0) < highest <= 101


def test_a_run_says_in_words_what_it_does(tmp_path, capsys):
    line = ["train", "--data.name", "synthetic", "--data.synthetic_train", "6", "--data.synthetic_test", "3"]
    line += ["--data.image_size", "8", "--batch_size", "2", "--epochs", "1", "--num_threads", "1", "--device", "cpu"]
    line += ["--data.max_train", "4", "--tensorboard", "false", "--model.variant", "dense", "--log_every_steps", "1"]
    assert main([*line, "--run_dir", str(tmp_path / "a run")]) == 0
    out, log = capsys.readouterr()
    said = log.splitlines()
    heads = ["data", "training", "machine", "results", "epoch 1, step 1/2", "epoch 1, step 2/2", "epoch 1/1"]
    assert [text.split(":")[0] for text in said] == heads
    assert said[1].startswith(
        "training: vgg7_64 (dense) with 6 exits for 1 epoch of 4 samples in batches of 2, on synth"
    )
    assert said[2].endswith(", 1 thread, fp32, backend stock")
    assert said[3] == f"results: {tmp_path / 'a run'}"
    assert "(" not in said[0].split("training images: ")[1]
    assert "after 1 epoch on synthetic" in out
    assert f"dfs eval '{tmp_path / 'a run'}'" in out
