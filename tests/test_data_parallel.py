"""Data-parallel training as docs/method.md has it. Oracle: the mean of what two processes find each for itself."""

import os
import subprocess
import sys

PROCESS = """
import os
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import hbll

rank = int(sys.argv[1])
torch.set_num_threads(1)
LIMIT = timedelta(minutes=2)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=LIMIT)


class Residual(nn.Linear):
    def forward(self, state):
        return state + torch.tanh(super().forward(state)) / 2


class Training(nn.Module):
    def __init__(self, network, objective):
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, x, y):
        return self.objective(self.network, x, y).loss


def check(rule):
    torch.manual_seed(0)
    blocks = [Residual(6, 6) for _ in range(7)]
    network = hbll.TreeNetwork(nn.Linear(4, 6), blocks, nn.Linear(6, 3)).double()
    parallel = DistributedDataParallel(Training(network, hbll.Objective(rule, stage=2)), find_unused_parameters=True)
    alone = hbll.Objective(rule, stage=2)
    torch.manual_seed(rank)
    for _ in range(8):
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
        own = torch.autograd.grad(alone(network, x, y).loss, list(network.parameters()), materialize_grads=True)
        network.zero_grad()
        parallel(x, y).backward()
        for parameter, gradient in zip(network.parameters(), own, strict=True):
            dist.all_reduce(gradient)
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found, gradient / 2)
    assert max(gradient.abs().max() for gradient in own) > 0


for rule in ("scan", "stream", "pipeline", "tree"):
    check(rule)
print("agreed", flush=True)
sys.stdin.read()  # until the other has agreed as well
os._exit(0)  # gloo's threads may stumble over each other at the end
"""


def test_gradients_are_the_mean_over_processes(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "meeting"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    found = [process.stdout.readline() for process in processes]
    errors = [process.communicate()[1] for process in processes]
    assert found == ["agreed\n", "agreed\n"], "\n".join(errors)
