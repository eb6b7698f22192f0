import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from dfs_engine.data import DataConfig
    from dfs_engine.models import create_model
    from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig
    from dfs_engine.training.trainer import Trainer

    folder, reference, beta, epochs, resume, micro, method = sys.argv[1:]
    torch.manual_seed(0)
    model = create_model("vgg7_64", width=4, beta=float(beta), reference=reference == "True")
    config = TrainConfig(
        data=DataConfig(name="synthetic", synthetic_train=48, synthetic_test=11, image_size=16),
        optim=OptimConfig(lr=0.01, clip_grad=1.0, ema_decay=0.5 * (method == "joint")), method=method,
        micro_batch_size=int(micro) or None,
        epochs=int(epochs), batch_size=16, run_dir=Path(folder) / "run", device="cpu", tensorboard=False, num_threads=1,
        resume=resume == "True",
    )
    trainer = Trainer(config, model=model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # its statistics are each process's own, so only without them equal one process's
            module.train = lambda mode=True: None
    reductions = []
    if trainer.accelerator.num_processes > 1:
        def counted(_state, bucket):
            reductions.append(bucket.index())
            return allreduce_hook(None, bucket)

        trainer.model.register_comm_hook(None, counted)
    result = trainer.fit()
    rank = trainer.accelerator.process_index
    state = {"weights": model.state_dict(), "rows": result.rows, "metrics": result.metrics}
    state |= {"average": trainer.ema and trainer.ema.module.state_dict(), "reductions": len(reductions)}
    state["learned"] = trainer.raw_method.state_dict()
    state["unused"] = trainer.accelerator.ddp_handler and trainer.accelerator.ddp_handler.find_unused_parameters
    torch.save(state, Path(folder) / f"rank{rank}.pt")
    trainer.accelerator.end_training()
"""


def launch(folder, num_processes, *, reference=True, beta=0.5, epochs=2, resume=False, micro=0, method="joint"):
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += [str(script), str(folder), str(reference), str(beta), str(epochs), str(resume), str(micro), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(num_processes)]


@pytest.mark.slow
def test_two_processes_agree_with_each_other_and_with_one_and_resume(tmp_path):
    first, second = launch(tmp_path / "two", 2)
    (alone,) = launch(tmp_path / "one", 1)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(value, alone["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["num_samples"] == 11
    assert first["unused"] is False
    for ours, theirs in zip(first["rows"], alone["rows"], strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    # In pieces of 3, 3 and 2 of its 8 samples, each process still reduces its gradients once a step.
    pieces, other = launch(tmp_path / "pieces", 2, micro=3)
    assert pieces["reductions"] == first["reductions"] == 6  # 2 epochs of 3 steps
    for part in ("weights", "average"):
        for name, value in pieces[part].items():
            assert torch.equal(value, other[part][name]), name
            torch.testing.assert_close(value, alone[part][name], rtol=1e-4, atol=1e-5, msg=name)
    longer, _ = launch(tmp_path / "two", 2, epochs=3, resume=True)
    assert [row["epoch"] for row in longer["rows"]] == [1, 2, 3]


@pytest.mark.slow
def test_two_processes_fuse_what_one_does(tmp_path):
    first, second = launch(tmp_path / "two", 2, method="meta_gf")
    (alone,) = launch(tmp_path / "one", 1, method="meta_gf")
    for part in ("weights", "learned"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
            torch.testing.assert_close(value, alone[part][name], rtol=1e-3, atol=1e-4, msg=name)
    for ours, theirs in zip(first["rows"], alone["rows"], strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_parameters_without_gradient(tmp_path, beta):
    first, second = launch(tmp_path, 2, reference=False, beta=beta, epochs=1)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


@pytest.mark.parametrize("family", ["vgg7_64", "bert"])
def test_two_processes_fed_the_same_batches_have_the_losses_of_one(tmp_path, family):
    """Batch norms are in evaluation mode: nothing but the mean of two equal gradients is exchanged."""
    if family == "bert":
        pytest.importorskip("transformers")
    script = Path(__file__).with_name("same_batch.py")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    commands = [[sys.executable, str(script), str(rank), str(tmp_path / "store"), family] for rank in range(2)]
    ranks = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
