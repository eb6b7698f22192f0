"""One rank of the DDP test in test_integration.py: `python distributed_parity.py RANK STORE`. Not a test module."""

import copy
import datetime
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from dfs_engine import create_model
from dfs_engine.validate.tolerances import assert_close


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    torch.manual_seed(0)
    model = create_model("vgg7_64", width=4, num_classes=3, dtype=torch.float64)
    images, target = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64), torch.randint(3, (2, 4))

    def backward(module: torch.nn.Module, half: int) -> None:
        torch.stack([F.cross_entropy(logits, target[half]) for logits in module(images[half])]).sum().backward()

    alone = [copy.deepcopy(model) for _ in range(2)]
    for half, copied in enumerate(alone):
        backward(copied, half)
    backward(DistributedDataParallel(model), rank)
    for parameter, *halves in zip(model.parameters(), *(copied.parameters() for copied in alone), strict=True):
        assert_close("averaged gradient", parameter.grad, (halves[0].grad + halves[1].grad) / 2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
