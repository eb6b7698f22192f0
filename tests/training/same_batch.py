"""One of two processes of test_distributed.py: `python same_batch.py RANK STORE FAMILY`. Not a test module."""

import copy
import datetime
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dfs_engine import create_model
from dfs_engine.methods import exit_losses
from dfs_engine.models.multi_exit import MultiExitModel

NUM_STEPS, BATCH, NUM_CLASSES = 4, 6, 3
BERT = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make(family: str) -> tuple[MultiExitModel, list[Tensor]]:
    """A model, and a batch for each step."""
    if family == "bert":
        model = create_model(family, num_classes=NUM_CLASSES, config=BERT, dtype=torch.float64)
        return model, list(torch.randint(30, (NUM_STEPS, BATCH, 8)))
    model = create_model(family, num_classes=NUM_CLASSES, width=4, dtype=torch.float64)
    return model, list(torch.randn(NUM_STEPS, BATCH, 3, 16, 16, dtype=torch.float64))


def train(model: nn.Module, batches: list[Tensor], targets: Tensor) -> Tensor:
    """The losses of each exit in each step."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = []
    for batch, target in zip(batches, targets, strict=True):
        optimizer.zero_grad()
        losses = exit_losses(model(batch), target)
        losses.sum().backward()
        optimizer.step()
        steps.append(losses.detach())
    return torch.stack(steps)


def sharded(model: MultiExitModel) -> MultiExitModel:
    """FSDP2: half of every block's, every exit's and of what else there is in each process."""
    for part in (*model.blocks, *model.exits):
        fully_shard(part)
    return fully_shard(model)


def main(rank: int, store: str, family: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(minutes=3)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    torch.manual_seed(0)  # the same model and batches in both processes
    model, batches = make(family)
    targets = torch.randint(NUM_CLASSES, (NUM_STEPS, BATCH))
    untrained = copy.deepcopy(model).eval()
    alone = train(copy.deepcopy(model), batches, targets)
    for several in (sharded(copy.deepcopy(model)), DistributedDataParallel(model)):
        together = train(several, batches, targets)
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=0.0)
    without_steps = exit_losses(untrained(batches[-1]), targets[-1])
    assert not torch.allclose(alone[-1], without_steps, rtol=1e-3), "the steps have to change the weights"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
