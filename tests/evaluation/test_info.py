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
        (["vgg7_64", "--batch_size", "0"], "batch_size: expected a positive integer, got 0"),
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
