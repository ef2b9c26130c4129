"""Data parallel: a process for every part of the batches, gradients averaged by DistributedDataParallel around the rule.

python examples/two_processes.py        # or, over machines, the same `work` under torchrun
"""

import socket

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hbll
from hbll.data import digits
from hbll.models.mlp import SkipBlock

PROCESSES = 2


def work(rank: int, port: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)  # DistributedDataParallel would hand everyone the first one's weights anyway
    data = digits()
    samples = TensorDataset(data.train.inputs, data.train.labels)
    batches = DataLoader(samples, batch_size=32, sampler=DistributedSampler(samples))
    network = hbll.Chain(embed=nn.Linear(64, 64), blocks=[SkipBlock(64) for _ in range(7)], head=nn.Linear(64, 10))
    rule = hbll.make_rule("stream", network, stage=(3, 4))
    # While a pipeline fills, late stages have no gradient yet: find_unused_parameters.
    parallel = DistributedDataParallel(rule, find_unused_parameters=True)
    hbll.train.fit(parallel, batches, torch.optim.AdamW(parallel.parameters(), lr=2e-3), epochs=5)
    with torch.no_grad():
        right = (network(data.test.inputs).argmax(1) == data.test.labels).float().mean()
    print(f"process {rank}: {right:.1%} of the test digits\n", end="", flush=True)
    del parallel  # before the group that it uses
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port,), nprocs=PROCESSES)
