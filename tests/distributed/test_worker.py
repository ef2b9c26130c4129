"""Stages in processes of their own. Oracle: the same rule in one process, to the last bit."""

import os
import subprocess
import sys

import pytest

PROCESS = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from tests.networks import KINDS, batches
import hbll
from hbll.distributed import Worker

rank, world, kind, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[4], sys.argv[5]
options = eval(sys.argv[6])
torch.set_num_threads(1)
LIMIT = timedelta(minutes=1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world, timeout=LIMIT)


def made():
    network, x, y = KINDS[kind][0](8)
    for n, block in enumerate(network.blocks, 1):
        network.blocks[n - 1] = nn.Sequential(block, Noise(n))
    torch.manual_seed(0)
    rule = hbll.make_rule(name, network, example=x, engine="loop", **options) if "copies" in options or name in (
        "greedy", "solo") else hbll.make_rule(name, network, example=x, **options)
    return rule, batches(9, kind, sizes=(4, 4, 2))


class Noise(nn.Module):
    # Drawn by number and use, as a dropout that is seeded by stage.
    def __init__(self, number):
        super().__init__()
        self.number, self.uses = number, 0

    def forward(self, state):
        self.uses += 1
        draw = torch.Generator().manual_seed(1000 * self.number + self.uses)
        return state * (1 + 0.1 * torch.randn(state.shape, generator=draw, dtype=state.dtype))


def optimizer_of(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


# In one process: an optimizer for every stage, which steps where the stage has learned.
rule, seen = made()
optimizers = [optimizer_of([p for m in rule.own(n) for p in m.parameters()]) for n in range(1, len(rule.stages) + 1)]
given, losses = list(seen), {}
while given or rule.in_flight:
    step = rule(*(given.pop(0) if given else (None, None)))
    for optimizer in optimizers:
        optimizer.zero_grad()
    step.loss.backward()
    for n, report in step.reports.items():
        losses.setdefault(n, []).append(report.error)
    for n, optimizer in enumerate(optimizers, 1):
        if n in step.reports:
            optimizer.step()

# In processes.
apart, _ = made()
worker = Worker(apart)
optimizer = optimizer_of(list(worker.parameters()))
found = []
for x, y in seen:
    optimizer.zero_grad()
    first = worker.stage == 1
    found.append(worker.backward(x if first else None, y if first else None).reports[worker.stage].error)
    optimizer.step()
worker.finish()
assert found == losses[worker.stage], (worker.stage, found, losses[worker.stage])
assert all(p.device.type == "meta" for n in range(1, world + 1) if n != worker.stage
           for m in apart.own(n) for p in m.parameters())
for mine, alone in zip(apart.own(worker.stage), rule.own(worker.stage), strict=True):
    for (key, value), other in zip(mine.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(value, other), (worker.stage, key)
worker.gather()
if rank == 0:
    for (key, value), other in zip(apart.state_dict().items(), rule.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
dist.barrier()
dist.destroy_process_group()
"""


def launched(script, world, *arguments, path):
    """The processes' exit codes and what they wrote on stderr."""
    command = [sys.executable, "-c", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["src", ".", *sys.path])}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(path / "store"), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    ended = [process.communicate(timeout=120)[1] for process in started]
    return [process.returncode for process in started], ended


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("mlp", "stream", {"stage": (3, 4), "copies": True, "refresh": 1}),
        ("mlp", "stream", {"stage": (2, 1, 3, 1), "copies": True, "refresh": 2, "readout_depth": 2}),
        ("mlp", "stream", {"stage": (2, 5), "copies": True, "refresh": 3, "meet": "original", "spine": "last"}),
        ("transformer", "stream", {"stage": (2, 2, 3), "copies": True}),
        ("transformer", "solo", {"stage": (3, 4), "refresh": 2}),
        ("convolutional", "stream", {"stage": (2, 2, 3), "copies": True, "refresh": 2}),
        ("convolutional", "greedy", {"stage": (3, 4)}),
    ],
)
def test_the_same_as_in_one_process(kind, name, options, tmp_path):
    world = len(options["stage"])
    codes, said = launched(PROCESS, world, kind, name, repr(options), path=tmp_path)
    assert codes == [0] * world, "\n".join(said)
