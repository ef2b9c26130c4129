"""DiLoCo in two processes. Oracle: both replicas and the outer optimizer by hand in one, in float64."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hbll.distributed.diloco import DiLoCo

STEPS, EVERY, RATE, MOMENTUM = 8, 3, 0.7, 0.9

PROCESS = """
import os
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from hbll.distributed.diloco import DiLoCo

rank, folder, steps, every = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(minutes=2)
)
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
model[2].bias.requires_grad_(False).zero_()
inner = torch.optim.AdamW(model.parameters(), lr=0.05)
outer = DiLoCo(model.parameters(), every=every)
met = []
for step in range(steps):
    if step == 4:  # as if it had been stopped between two meetings and taken up again
        state = outer.state_dict()
        torch.save(state, f"{folder}/{rank}.state")
        here = [p.detach().clone() for p in model.parameters()]
        outer = DiLoCo(model.parameters(), every=every)  # which sets all to the first one's
        for p, own in zip(model.parameters(), here):
            p.data.copy_(own)
        outer.load_state_dict(torch.load(f"{folder}/{rank}.state"))
    x, y = torch.load(f"{folder}/{rank}.batches")[step]
    inner.zero_grad()
    F.cross_entropy(model(x), y).backward()
    inner.step()
    met.append(outer.step())
torch.save(([p.detach() for p in model.parameters()], met), f"{folder}/{rank}.found")
print("done", flush=True)
sys.stdin.read()  # until the other has ended as well
os._exit(0)  # gloo's threads may stumble over each other at the end
"""


def by_hand(batches):
    """The parameters of both replicas after all steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[2].bias.requires_grad_(False).zero_()
    replicas = [copy.deepcopy(model) for _ in range(2)]
    inner = [torch.optim.AdamW(replica.parameters(), lr=0.05) for replica in replicas]
    anchor = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in anchor]
    for step in range(STEPS):
        for replica, optimizer, seen in zip(replicas, inner, batches, strict=True):
            x, y = seen[step]
            optimizer.zero_grad()
            F.cross_entropy(replica(x), y).backward()
            optimizer.step()
        if (step + 1) % EVERY == 0:
            for i, a in enumerate(anchor):
                both = [list(replica.parameters())[i].detach() for replica in replicas]
                gradient = a - (both[0] + both[1]) / 2
                # Nesterov's momentum: v <- m v + g,  a <- a - r (g + m v).
                velocity[i] = MOMENTUM * velocity[i] + gradient
                a -= RATE * (gradient + MOMENTUM * velocity[i])
                for replica in replicas:
                    list(replica.parameters())[i].data.copy_(a)
    return [[p.detach() for p in replica.parameters()] for replica in replicas]


def test_two_processes_are_what_one_computes_by_hand(tmp_path):
    torch.manual_seed(5)
    batches = [
        [(torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(STEPS)] for _ in range(2)
    ]
    for rank, seen in enumerate(batches):
        torch.save(seen, tmp_path / f"{rank}.batches")
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path, str(STEPS), str(EVERY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    said = [process.stdout.readline() for process in processes]
    errors = [process.communicate()[1] for process in processes]
    assert said == ["done\n", "done\n"], "\n".join(errors)
    for rank, expected in enumerate(by_hand(batches)):
        found, met = torch.load(tmp_path / f"{rank}.found")
        assert met == [False, False, True, False, False, True, False, False]
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    one, other = (torch.load(tmp_path / f"{rank}.found")[0] for rank in range(2))
    assert not torch.equal(one[0], other[0])  # they have gone apart since they met


def test_meetings_are_at_whole_steps():
    with pytest.raises(ValueError, match="every must be at least 1; got 0"):
        DiLoCo([], every=0)
