"""Two runs of test_elastic.py under torchrun: "whole", and "killed", in which one process or another kills itself.

A random moment is the so-manieth call of a Python function while the run trains, evaluates and saves: whatever it does.
"""

import functools
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from dfs_engine.data import DataConfig
from dfs_engine.models import create_model
from dfs_engine.training import report
from dfs_engine.training.config import OptimConfig, TrainConfig
from dfs_engine.training.trainer import Trainer

FOLDER, NUM_KILLS, SEED = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def make_trainer(name):
    torch.manual_seed(0)
    model = create_model("vgg7_64", width=4, num_classes=10)
    for exit in model.exits:
        # Each process's own random draws, which a restarted run has to repeat.
        exit.register_forward_hook(lambda module, _, logits: F.dropout(logits, 0.3, module.training))
    data = DataConfig(name="synthetic", synthetic_train=48, synthetic_test=11, image_size=16, crop_padding=2, flip=True)
    config = TrainConfig(
        data=data,
        optim=OptimConfig(lr=0.01, ema_decay=0.5),
        epochs=4,
        batch_size=8,
        checkpoint_every_steps=2,
        run_dir=FOLDER / name,
        device="cpu",
        num_threads=1,
        tensorboard=False,
    )
    return Trainer(config, model=model)


def with_calls(function, at_call):
    """What `function` returns; `at_call` is told the number of each call, from 1."""
    number = 0

    def count(_frame, event, _argument):
        nonlocal number
        if event == "call":
            number += 1
            at_call(number)

    sys.setprofile(count)
    try:
        return function()
    finally:
        sys.setprofile(None)


def run_whole():
    """Leaves the number of its calls."""
    numbers = [0]
    with_calls(make_trainer("whole").fit, lambda number: numbers.__setitem__(0, number))
    (FOLDER / f"calls{RANK}").write_text(str(numbers[0]))


def run_killed():
    """Leaves the steps of each attempt."""
    draw = random.Random(f"{SEED} {ATTEMPT}")
    victim, share = draw.randrange(2), draw.uniform(0, 0.9 / NUM_KILLS)
    moment = 1 + int(share * int((FOLDER / f"calls{RANK}").read_text()))

    def kill(number):
        if ATTEMPT < NUM_KILLS and victim == RANK and number == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    step = Trainer.train_step

    @functools.wraps(step)
    def noted(self, *batch):
        losses = step(self, *batch)
        with (FOLDER / f"steps{RANK}").open("a") as file:
            file.write(json.dumps([ATTEMPT, self.progress.step + 1]) + "\n")
        return losses

    Trainer.train_step = noted
    trainer = make_trainer("killed")
    with_calls(trainer.fit, kill)
    trainer.accelerator.end_training()


report.plot_metric = lambda *_, **__: None  # it would make most of the calls
if ATTEMPT == 0:
    run_whole()
run_killed()
