"""Data-parallel training as docs/method.md has it. Oracle: the mean of what two processes find each for itself."""

import os
import subprocess
import sys

PROCESS = """
import copy
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


def batch():
    return torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))


def joined(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def make(name, **options):
    torch.manual_seed(0)
    blocks = [Residual(6, 6) for _ in range(7)]
    network = hbll.Chain(nn.Linear(4, 6), blocks, nn.Linear(6, 3)).double()
    return hbll.make_rule(name, network, example=batch()[0], **options)


def check(name, **options):
    rule = make(name, **options)
    alone = copy.deepcopy(rule)  # with the same weights, which its own gradients do not move
    parallel = DistributedDataParallel(rule, find_unused_parameters=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    torch.manual_seed(rank + 1)
    for _ in range(10):
        x, y = batch()
        own = alone(x, y)
        found = torch.autograd.grad(own.loss, list(alone.parameters()), materialize_grads=True)
        optimizer.zero_grad()
        step = parallel(x, y)
        assert torch.equal(step.loss, own.loss) and (step.work, step.span) == (own.work, own.span)
        step.loss.backward()
        mean = joined(torch.zeros_like(p) if p.grad is None else p.grad for p in rule.parameters())
        both = joined(found)
        dist.all_reduce(both)
        torch.testing.assert_close(mean, both / 2)
        optimizer.step()
        alone.load_state_dict(rule.state_dict())
    assert both.abs().max() > 0
    weights = joined(rule.parameters())
    replicas = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(replicas, weights)
    assert torch.equal(*replicas)


check("scan", stage=2, engine="loop")
check("stream", stage=2, engine="loop")
check("stream", stage=2, states="chain")
check("pipeline", stage=2, engine="loop")
check("paper")
check("bp")
check("dgl")
try:
    make("stream").backward(*batch())
except ValueError as refusal:
    assert "rule.backward does not average gradients over processes: wrap the rule" in str(refusal)
else:
    raise AssertionError("it was not refused")
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
