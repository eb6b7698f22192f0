"""A short run on real digits, some of them kept out of training."""

import pytest

from dfs_engine.cli import main

TINY = [
    *("--data.name", "digits", "--batch_size", "25", "--optim.lr", "0.05", "--model.options", "{width: 4}"),
    *("--epochs", "2", "--num_threads", "1", "--device", "cpu", "--tensorboard", "false"),
]


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A run folder of VGG7 with data.val_fraction."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", *TINY, "--data.val_fraction", "0.2", "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def digits_run_without_val(tmp_path_factory):
    """The same, with no samples kept out."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", *TINY, "--run_dir", str(folder)]) == 0
    return folder
