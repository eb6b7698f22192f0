"""`dfs info`: what it reports, and its command line. Its counts: test_operations, models/test_multi_exit."""

import json

import pytest

from dfs_engine.cli import main
from dfs_engine.evaluation import info

TINY = {"width": 10}


def test_report():
    report = info.run(info.InfoConfig(model="vgg7_64", num_classes=3, beta="0.25,0.75", batch_size=2, options=TINY))
    result = json.loads(json.dumps(report.to_json()))
    assert result["model"] == "vgg7_64"
    assert len(result["exits"]) == 6
    assert {tuple(row) for row in result["exits"]} == {
        ("parameters", "operations", "parameters_alone", "operations_alone")
    }
    rows = {(row["variant"], row["beta"]): row for row in result["training"]}
    assert list(rows) == [("dense", None), *((v, beta) for v in ("detach", "split", "dfs") for beta in (0.25, 0.75))]
    one = info.run(info.InfoConfig(model="vgg7_64", num_classes=3, beta="0.25", options=TINY)).training[-1]
    assert rows["dfs", 0.25]["backward"] == 2 * one.flops.backward
    headings, table = report.training_table()
    assert len(headings) == len(table[0])
    assert table[0] == [
        "dense",
        "",
        *(f"{rows['dense', None][key] / 1e6:.2f}" for key in ("forward", "backward")),
        "1.000",
    ]


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_backward_grows_with_beta(reference):
    report = info.run(info.InfoConfig(model="vgg7_64", options=TINY, reference=reference))
    backward = [row.flops.backward for row in report.training if row.variant == "dfs"]
    assert backward == sorted(backward)
    assert backward[-1] < report.training[0].flops.backward


def test_command(capsys, tmp_path):
    file = tmp_path / "info.json"
    line = ["info", "msdnet_cifar", "--num-classes", "100", "--beta", ".5", "--options", "{dropout: 0.1}"]
    assert main([*line, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "56.43" in printed
    assert "340.64" in printed
    result = json.loads(file.read_text())
    assert result["options"] == {"dropout": 0.1}
    assert [row["variant"] for row in result["training"]] == ["dense", "detach", "split", "dfs"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["msdnet_cifer"], "Did you mean 'msdnet_cifar'?"),
        (["vgg7_64", "--beta", "1.5"], "beta: expected comma-separated numbers in [0, 1], got '1.5'"),
        (["vgg7_64", "--batch_size", "0"], "batch_size: expected a number >= 1, got 0"),
        (["vgg7_64", "--options", "{widht: 3}"], "widht"),
        (["vgg7_64", "--exit_gradient", "both"], "exit_gradient: expected one of own, whole"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_input(capsys, line, message):
    with pytest.raises(SystemExit) as caught:
        main(["info", *line])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_vgg7_beside_the_papers_formula():
    """docs/published.md on the paper's 14.29 %: every convolution and linear layer counted by hand, at beta 0.5."""
    report = info.run(info.InfoConfig(model="vgg7_64", num_classes=100, beta="0.5"))
    steps = {row.variant: row.flops.forward + row.flops.backward for row in report.training}
    widths, sizes = [3, 64, 64, 128, 128, 256, 256], [32, 32, 16, 16, 8, 8]
    convs = [2 * 9 * into * out * side**2 for into, out, side in zip(widths[:-1], widths[1:], sizes, strict=True)]
    heads = [2 * 100 * width for width in widths[1:]]
    dense = 3 * sum(convs) - convs[0] + 3 * sum(heads)  # forward, grad_weight, grad_input, but not of the image
    saved = sum(convs[1:]) // 2 + sum(heads[:-1]) // 2  # half of grad_input of what reads a split feature
    assert steps["dense"] == dense
    assert steps["dfs"] == dense - saved
    assert round(saved / dense, 3) == 0.165
    assert round(dense / (dense - saved), 2) == 1.20
    for num_convs, percent in ((6, 14.29), (13, 15.58)):  # vgg7_64, vgg16_64: what the paper states
        assert round(100 * (num_convs - 1) / (6 * num_convs - 1), 2) == percent


def test_resnet18_beside_the_papers_table():
    """docs/published.md: 0.7 to 2.4 % fewer operations than the table has, exit by exit."""
    exits = info.run(info.InfoConfig(model="resnet18", num_classes=100, beta="0.5")).to_json()["exits"]
    table = [169.62, 300.22, 431.05, 559.75]
    below = [100 * (1 - row["operations_alone"] / 1e6 / paper) for row, paper in zip(exits, table, strict=True)]
    assert [round(percent, 1) for percent in below] == [2.4, 1.3, 0.9, 0.7]
