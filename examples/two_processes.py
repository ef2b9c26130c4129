"""A stage in a process of its own: states and labels go one way over a link, and no stage waits for a later one.

python examples/two_processes.py        # or, over machines, the same `work` under torchrun
"""

import socket

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hbll
from hbll.data import digits
from hbll.distributed import Worker
from hbll.models.mlp import SkipBlock

STAGES, EPOCHS = (3, 4), 5


def work(rank: int, port: int) -> None:
    """What each process does; the first one reads the batches, and has the whole network in the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(STAGES))
    torch.manual_seed(0)  # the same weights in every process
    data = digits()
    batches = DataLoader(TensorDataset(data.train.inputs, data.train.labels), batch_size=64, shuffle=True)
    network = hbll.Chain(embed=nn.Linear(64, 64), blocks=[SkipBlock(64) for _ in range(7)], head=nn.Linear(64, 10))
    rule = hbll.make_rule("stream", network, stage=STAGES, copies=True)  # of later blocks and the head, for each stage
    worker = Worker(rule)
    optimizer = torch.optim.AdamW(worker.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for x, y in batches if worker.stage == 1 else [(None, None)] * len(batches):
            optimizer.zero_grad()
            worker.backward(x, y)
            optimizer.step()
    worker.finish()
    owned = sum(parameter.numel() for parameter in worker.parameters())
    print(f"stage {worker.stage}: {owned} parameters, {worker.bytes_sent} bytes sent\n", end="", flush=True)
    worker.gather()
    if rank == 0:
        with torch.no_grad():
            right = (network(data.test.inputs).argmax(1) == data.test.labels).float().mean()
        print(f"{right:.1%} of the test digits")
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port,), nprocs=len(STAGES))
