"""Shared by all tests: a fresh seed that can be repeated, few threads, poisoned memory, the backends."""

import logging
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import calibration


def pytest_addoption(parser):
    parser.addoption(
        "--seed", type=int, default=None, help="seed of every test's random inputs (default: the commit's)"
    )


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = seed_of_commit()


def seed_of_commit() -> int:
    """Of the last commit that touched the package: others with each, and the same for everyone who tests it.

    Outside a checkout a fresh one. In a copy of the tree below a checkout (`make test-oldest`) the checkout's.
    """
    code = [":/csrc", ":/dfs_engine", ":/kernels"]
    command = ["git", "-C", str(Path(__file__).parents[1]), "log", "-1", "--format=%H", "--", *code]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return int(commit[:8], 16) % 2**31 if commit else random.SystemRandom().randrange(2**31)


def pytest_report_header(config):
    return f"random inputs: --seed {config.option.seed} repeats this run"


@pytest.fixture
def fresh_calibration(tmp_path, monkeypatch):
    """As in a new process on a machine of which nothing is known; what this process runs on comes back afterwards."""
    monkeypatch.setenv("DFS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration.table, "entries", list)
    monkeypatch.setattr(calibration, "_current", None)


@pytest.fixture(autouse=True)
def _reseed_and_use_one_thread(request):
    # Tests are small: more threads would only wait for each other, for long where the machine is shared.
    torch.set_num_threads(1)
    seed = request.config.option.seed
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _own_log():
    """`dfs` logs to the standard error of its test, which is closed after it."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.fixture
def poison():
    """Every `torch.empty` and `at::empty` is NaN, so that an element nobody wrote shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=("aten", "cpp"))
def backend(request):
    """Each CPU backend by explicit request."""
    reason = backends.unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def exact_dtype(backend) -> torch.dtype:
    """In which a backend's results are compared with an oracle: float64, which no kernel computes in, or float32."""
    return torch.float64 if backend == "aten" else torch.float32


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder that transformers saved: a BERT with random weights, and its tokenizer, whose words are w0 ... w39."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{index}" for index in range(40))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
