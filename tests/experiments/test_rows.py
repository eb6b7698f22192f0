import pytest

from dfs_engine.experiments.rows import Row, grid, list_row_files, read_rows, values_of, with_flags
from dfs_engine.training.build import build_method, build_model
from dfs_engine.training.config import ModelConfig, TrainConfig


def test_flags_change_the_recipe_and_nothing_else():
    recipe = TrainConfig(model=ModelConfig(options={"width": 4, "init": "torch"}), epochs=7)
    flags = {"model.beta": "0.25", "optim.lr": "3e-2", "method": "byot", "byot.alpha": 0.5, "model.options.width": 8}
    config = with_flags(recipe, flags)
    assert (config.model.beta, config.optim.lr, config.method, config.byot.alpha) == (0.25, 0.03, "byot", 0.5)
    assert config.model.options == {"width": 8, "init": "torch"}
    assert recipe.model.options["width"] == 4
    assert values_of(config, ["optim.lr", "model.options.width"]) == {"optim.lr": 0.03, "model.options.width": 8}
    back = {"model.beta": 0.5, "optim.lr": 0.1, "method": "joint", "byot.alpha": 0.3, "model.options.width": 4}
    assert with_flags(config, back) == recipe


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"model.bata": 0.5}, "rows: a: .*'model.bata'. Did you mean 'model.beta'"),
        ({"beta": 0.5}, "rows: a: expected an option"),
        ({"model.beta": 2}, "rows: a: .*beta"),
        ({"epochs": "many"}, "rows: a: .*epochs"),
        ({"method": "jiont"}, "rows: a: .*Did you mean 'joint'"),
    ],
)
def test_a_flag_that_train_refuses_names_the_row(flags, expected):
    with pytest.raises(ValueError, match=expected):
        Row("a", flags).config(TrainConfig())


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text("dense: {model: {variant: dense}, seeds: 2}\ndfs:\nsteep: {model.beta: .1, byot: {alpha: .2}}\n")
    assert read_rows(str(path)) == [
        Row("dense", {"model.variant": "dense"}, 2),
        Row("dfs", {}),
        Row("steep", {"model.beta": 0.1, "byot.alpha": 0.2}),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- dense", "expected NAME: {FLAG"),
        ("dense: 3", "dense: expected {FLAG"),
        ("a/b: {}", "which make folders, got 'a/b'"),
        ("a: {seed: 3}", "expected no seed, .*`seeds`"),
        ("a: {run_dir: x}", "expected no run_dir"),
        ("a: {seeds: 0}", "seeds: expected a number >= 1, got 0"),
        ("a: [", "expected YAML in"),
    ],
)
def test_a_wrong_list_says_how_it_should_be(text, expected, tmp_path):
    (tmp_path / "rows.yaml").write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_rows(str(tmp_path / "rows.yaml"))


def test_a_list_that_is_not_there():
    with pytest.raises(ValueError, match="Did you mean 'methods'"):
        read_rows("method")
    with pytest.raises(ValueError, match="nothing there"):
        read_rows("no/such.yaml")


@pytest.mark.parametrize("name", list_row_files())
def test_every_list_of_the_package_builds(name):
    recipe = TrainConfig(model=ModelConfig(options={"width": 4}))
    configs = {row.name: row.config(recipe) for row in read_rows(name)}
    assert len({str(config) for config in configs.values()}) == len(configs)
    assert configs["dense"].model.variant == "dense"
    for config in configs.values():
        build_method(config, build_model(config.model, 10, device="meta"))


def test_grid_names_what_differs():
    rows = grid(["joint", "byot"], ["dense", "dfs"], betas=[0.3, 0.5])
    assert [row.name for row in rows] == [
        *("dense", "dfs-beta0.3", "dfs-beta0.5"),
        *("dense+byot", "dfs-beta0.3+byot", "dfs-beta0.5+byot"),
    ]
    assert rows[4].flags == {"method": "byot", "model.variant": "dfs", "model.beta": 0.3}
    assert [row.name for row in grid(["joint"], ["dfs"], ["resnet18", "vgg7_64"])] == ["resnet18-dfs", "vgg7_64-dfs"]
