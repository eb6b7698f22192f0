import subprocess
import sys
import textwrap

import pytest
import torch

SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    from dfs_engine.data import DataConfig
    from dfs_engine.models import create_model
    from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig
    from dfs_engine.training.trainer import Trainer

    folder, reference, beta, epochs, resume = sys.argv[1:]
    torch.manual_seed(0)
    model = create_model("vgg7_64", width=4, beta=float(beta), reference=reference == "True")
    config = TrainConfig(
        data=DataConfig(name="synthetic", synthetic_train=48, synthetic_test=11, image_size=16),
        optim=OptimConfig(lr=0.01),
        epochs=int(epochs), batch_size=16, run_dir=Path(folder) / "run", device="cpu", tensorboard=False, num_threads=1,
        resume=resume == "True",
    )
    trainer = Trainer(config, model=model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # its statistics are each process's own, so only without them equal one process's
            module.train = lambda mode=True: None
    result = trainer.fit()
    rank = trainer.accelerator.process_index
    state = {"weights": model.state_dict(), "rows": result.rows, "metrics": result.metrics}
    state["unused"] = trainer.accelerator.ddp_handler and trainer.accelerator.ddp_handler.find_unused_parameters
    torch.save(state, Path(folder) / f"rank{rank}.pt")
    trainer.accelerator.end_training()
"""


def launch(folder, num_processes, *, reference=True, beta=0.5, epochs=2, resume=False):
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += [str(script), str(folder), str(reference), str(beta), str(epochs), str(resume)]
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
    longer, _ = launch(tmp_path / "two", 2, epochs=3, resume=True)
    assert [row["epoch"] for row in longer["rows"]] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_parameters_without_gradient(tmp_path, beta):
    first, second = launch(tmp_path, 2, reference=False, beta=beta, epochs=1)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
