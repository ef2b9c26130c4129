"""Data-parallel training as docs/method.md has it. Oracle: the mean of what two processes find each for itself."""

import os
import subprocess
import sys

PROCESS = """
import copy
import importlib.util
import os
import sys
import warnings
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing averages
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
# Without a wrapper nothing averages: said, and nothing else.
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    make("bp")(*batch())
assert any("not called by what averages their gradients" in str(warning.message) for warning in said)


def averaged(name):
    # The mean over the processes of what each finds for itself, as the parameters are ordered.
    alone = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.autograd.grad(alone(*own).loss, list(alone.parameters()), materialize_grads=True)
    both = joined(found)
    dist.all_reduce(both)
    return both / 2


# Parameters that are spread over processes: sharded as one the rule works, block by block it is refused.
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(rank + 1)
own = batch()
for name in ("bp", "tree", "scan", "stream"):
    sharded = make(name)
    fully_shard(sharded, mesh=mesh)
    sharded(*own).loss.backward()
    found = [torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor() for p in sharded.parameters()]
    torch.testing.assert_close(joined(found), averaged(name))
    by_blocks = make(name)
    for block in by_blocks.network.blocks:
        fully_shard(block, mesh=mesh)
    try:
        by_blocks(*own)
    except ValueError as refusal:
        assert "shard the rule as one, fully_shard(rule)" in str(refusal)
    else:
        raise AssertionError("it was not refused")

if importlib.util.find_spec("accelerate"):
    launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= launched | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # as its launcher does
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    rule = make("tree")
    prepared, optimizer = accelerator.prepare(rule, torch.optim.SGD(rule.parameters(), lr=0.1))
    assert isinstance(prepared, DistributedDataParallel)
    accelerator.backward(prepared(*own).loss)
    torch.testing.assert_close(joined(p.grad for p in rule.parameters()), averaged("tree"))

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
