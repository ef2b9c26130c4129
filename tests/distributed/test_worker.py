"""Stages in processes of their own. Oracle: the same rule in one process, to the last bit."""

import pytest
from tests.launching import launched

PROCESS = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from tests.networks import KINDS, Noise, batches
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
worker.drain()
worker.finish()  # which drains once more, and finds nothing to end
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
    for (key, value), other in zip(apart.named_buffers(), rule.buffers(), strict=True):  # some are in no state_dict
        assert torch.equal(value, other), key
dist.barrier()
dist.destroy_process_group()
"""


REPLICAS = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from tests.networks import KINDS, batches
import hbll
from hbll.distributed import Replica, Worker

rank, world = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
LIMIT = timedelta(minutes=1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world, timeout=LIMIT)


def refused(sentence, call):
    try:
        call()
    except ValueError as error:
        assert sentence in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {sentence}")


def made(name, **options):
    network, x, y = KINDS["mlp"][0](8)
    torch.manual_seed(0)
    return hbll.make_rule(name, network, example=x, **options), x, y


# Two replicas of two stages: the mean over their halves of a batch is that of one process on the whole.
for name, options in (("stream", {"stage": (3, 4), "copies": True, "refresh": 1}), ("dgl", {"stage": (3, 4)})):
    norms = name == "dgl"  # whose batch norms see half of the batch: then both halves are the same
    rule, x, y = made(name, **options)
    alone, _, _ = made(name, **options | ({"states": "chain"} if name == "stream" else {}))
    worker = Worker(rule)
    half = slice(2 * worker.replica, 2 * worker.replica + 2)
    mine = (x[:2], y[:2]) if norms else (x[half], y[half])
    whole = (x[:2], y[:2]) if norms else (x, y)
    step = worker.backward(*mine)
    alone(*whole).loss.backward()
    own = [p for m in alone.own(worker.stage) for p in m.parameters()]
    for p, q in zip(worker.parameters(), own, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    found = worker.predict(*mine)
    assert (found is None) == (worker.stage == 1)
    if found is not None:
        alone.eval()
        rule.eval()
        with torch.no_grad():
            state = alone.network.embed(mine[0])
            for block in alone.network.blocks:
                state = block(state)
        torch.testing.assert_close(found[0], alone.network.head(state), rtol=1e-12, atol=1e-12)
        assert torch.equal(found[1], mine[1])
    worker.finish()

# Micro-batches of a step are averaged once, after the last one: until then gradients are this process's own.
(many, labels), = batches(1, sizes=(8,))
STAGES = {"stage": (3, 4), "copies": True}


def averaged_once(worker, own, first, size):
    # Of a replica that learns from two micro-batches from sample first on; own: its modules of a rule.
    mine, whole = (made("stream", states="chain", **STAGES)[0] for _ in range(2))
    parts = [slice(first, first + size), slice(first + size, first + 2 * size)]
    (mine(many[parts[0]], labels[parts[0]]).loss / 2).backward()
    whole(many, labels).loss.backward()
    for part, average, expected in ((parts[0], False, mine), (parts[1], True, whole)):
        worker.backward(many[part], labels[part], scale=0.5, average=average)
        for p, q in zip(worker.parameters(), (p for m in own(expected) for p in m.parameters()), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


worker = Worker(made("stream", **STAGES)[0])
averaged_once(worker, lambda rule: rule.own(worker.stage), 4 * worker.replica, 2)
worker.finish()
averaged_once(Replica(made("stream", states="chain", **STAGES)[0]), lambda rule: [rule], 2 * rank, 1)

# Where an epoch ends replicas go by one's running statistics; until then each has those of its own share.
def statistics(worker, module):
    own = {name: value.tolist() for name, value in module.named_buffers() if "running_mean" in name}
    found = [None] * world
    dist.all_gather_object(found, (getattr(worker, "stage", 0), own))
    mine, *others = [held for stage, held in found if stage == getattr(worker, "stage", 0)]
    assert mine
    return all(other == mine for other in others)


def normed(name, **options):
    network, x, _ = KINDS["mlp"][0](8)
    width = network.embed(x).shape[1]
    for n in (1, 5):
        network.blocks[n] = nn.Sequential(network.blocks[n], nn.BatchNorm1d(width, dtype=x.dtype))
    return hbll.make_rule(name, network, **options)


worker = Worker(normed("greedy", stage=(3, 4)))
for worker, module, place in ((worker, worker.module, worker.replica), (Replica(normed("bp")), None, rank)):
    module = module or worker.rule
    worker.backward(many[2 * place : 2 * place + 2], labels[2 * place : 2 * place + 2])
    assert not statistics(worker, module)
    worker.drain()
    assert statistics(worker, module)
    worker.close()

# A batch no label of which counts moves nothing.
for name in ("dgl", "predsim", "cff"):
    worker = Worker(made(name, stage=(3, 4))[0])
    assert worker.backward(many, torch.full_like(labels, -100)).loss == 0
    assert all(p.grad is None for p in worker.parameters())
    # Where another replica has some it counts for nothing in their mean.
    own = labels if worker.replica else torch.full_like(labels, -100)
    worker.backward(many, own)
    alone = made(name, stage=(3, 4))[0]
    alone(many, labels).loss.backward()
    for p, q in zip(worker.parameters(), (p for m in alone.own(worker.stage) for p in m.parameters()), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(2 * p.grad, q.grad, rtol=1e-12, atol=1e-12)
    worker.finish()

# A stage of which nothing is trained has nothing to average.
rule, x, y = made("greedy", stage=(3, 4))
for module in rule.own(1):
    module.requires_grad_(False)
worker = Worker(rule)
worker.backward(x, y)
assert all((p.grad is None) == (worker.stage == 1) for p in worker.parameters())
worker.finish()

# Half precision on the link rounds states and leaves labels.
rule, x, y = made("greedy", stage=(3, 4))
alone, _, _ = made("greedy", stage=(3, 4))
worker = Worker(rule, wire=torch.bfloat16)
step = worker.backward(x, y)
if worker.stage == 2:
    state = alone.stages[0](alone.network.embed(x)).detach()
    rounded = state.to(torch.bfloat16).to(state.dtype)
    assert not torch.equal(rounded, state)
    expected = nn.functional.cross_entropy(alone.network.head(alone.stages[1](rounded)), y)
    torch.testing.assert_close(step.loss, expected.detach())
# A batch larger than the first one does not fit the link.
if worker.stage == 1:
    refused("let the largest batch come first", lambda: worker.backward(torch.cat(40 * [x]), torch.cat(40 * [y])))
worker.finish()

refused("the rule's stages are for 3 processes, and there are 4: start 3, or a multiple",
        lambda: Worker(made("greedy", stage=(2, 2, 3))[0]))
refused("give copies=True, or readout='solo'", lambda: Worker(made("stream", stage=(3, 4))[0]))
refused("by Scan the loss of a stage reaches other stages", lambda: Worker(made("scan", stage=(3, 4))[0]))
refused("rim and spine_share are of all stages at once",
        lambda: Worker(made("stream", stage=(3, 4), copies=True, rim=0.1)[0]))
tied = made("greedy", stage=(3, 4))[0]
tied.network.blocks[6].linear.weight = tied.network.blocks[0].linear.weight
refused("stages 1 and 2 share a weight", lambda: Worker(tied))
unbuilt = KINDS["mlp"][0](8)[0]
refused("are made by an example", lambda: Worker(hbll.make_rule("dgl", unbuilt, stage=(3, 4))))
dist.barrier()

# A stage that ends is missed, in a sentence that names it.
worker = Worker(made("greedy", stage=(3, 4))[0])
worker.backward(x, y)
dist.barrier()
if worker.stage == 1:
    sys.stdout.flush()
    __import__("os")._exit(0)
try:
    worker.backward()
except ConnectionError as error:
    assert str(error).startswith("stage 1 ended, or did not answer in time"), str(error)
else:
    raise AssertionError("the loss of stage 1 was not noticed")
__import__("os")._exit(0)
"""


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


def test_replicas_refusals_and_lost_stages(tmp_path):
    codes, said = launched(REPLICAS, 4, path=tmp_path)
    assert codes == [0] * 4, "\n".join(said)
