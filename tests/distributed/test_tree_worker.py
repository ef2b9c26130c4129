"""The tree over processes. Oracle: the same rule in one process, to the last bit where blocks are evaluated one by one."""

from itertools import combinations, pairwise

import pytest
from tests.launching import launched
from tests.networks import mlp

import hbll
from hbll.distributed import TreeWorker
from hbll.distributed.cost import by_tree, equal, estimate
from hbll.distributed.schedules import subtrees
from hbll.distributed.simulate import Network, messages
from hbll.distributed.tree import levels
from hbll.tree import Tree

PROCESS = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tests.networks import KINDS, Noise, batches, masked
import hbll
from hbll.distributed import TreeWorker
from hbll.distributed.tree import levels
from hbll.losses import IGNORED

rank, cases = int(sys.argv[1]), eval(sys.argv[4])
torch.set_num_threads(1)
LIMIT = timedelta(minutes=1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=4, timeout=LIMIT)
MESHES = {n: DeviceMesh("cpu", torch.arange(n).view(-1, 1), mesh_dim_names=("stage", "data")) for n in (2, 3, 4)}


def everywhere(thing, mesh):
    found = [None] * len(mesh.mesh)
    dist.all_gather_object(found, thing, group=mesh.get_group("stage"))
    return found


def made(kind, name, nodes, options):
    if kind == "masked":
        network = masked(nodes)[0]
        network.embed.requires_grad_(options.get("embed", True))
    else:
        network = KINDS[kind][0](nodes)[0]
    if "engine" not in options and kind != "masked":
        for n, block in enumerate(network.blocks, 1):
            network.blocks[n - 1] = nn.Sequential(block, Noise(n))
    options = {"engine": "loop"} | {key: value for key, value in options.items() if key != "embed"}
    return hbll.make_rule(name, network, **options)


def checked(kind, name, nodes, options, sizes, optimizer_of):
    same = torch.equal if options.get("engine") != "batched" else (
        lambda a, b: torch.allclose(a, b, rtol=1e-9, atol=1e-12))
    rule, apart = made(kind, name, nodes, options), made(kind, name, nodes, options)
    seen = batches(3, "mlp" if kind == "masked" else kind, sizes=(4, 4, 2))
    world, mesh = len(sizes), MESHES[len(sizes)]
    worker = TreeWorker(apart, mesh, sizes=sizes)
    alone = optimizer_of(list(rule.parameters()))
    optimizer = optimizer_of(list(worker.parameters()))
    for x, y in seen:
        expected = rule(x, y)
        alone.zero_grad()
        expected.loss.backward()
        alone.step()
        optimizer.zero_grad()
        step = worker.backward(x if rank == 0 else None, y if rank == world - 1 else None)
        optimizer.step()
        found = everywhere((step.loss.item(), step.work, step.span, step.reports), mesh)
        losses, work, spans, reports = zip(*found)
        assert abs(sum(losses) - expected.loss.item()) <= 1e-12 * abs(expected.loss.item())
        if options.get("engine") != "batched":  # where a call over all nodes waits for the last of them
            assert (sum(work), max(spans)) == (expected.work, expected.span)
        for n, report in expected.reports.items():
            for field in ("error", "divergence"):
                values = [getattr(r[n], field) for r in reports if n in r and getattr(r[n], field) is not None]
                assert values == ([] if getattr(report, field) is None else values[:1]), (n, field)
                for value in values:
                    assert same(torch.tensor(value).double(), torch.tensor(getattr(report, field)).double())
        if rank == world - 1:
            assert same(step.label_loss, expected.label_loss)
    gradients = [p.grad for module in rule.own(worker.stages[0]) for p in module.parameters()]
    assert any(g is not None and g.abs().max() > 0 for g in gradients)  # of which the next asserts would tell nothing
    for n in worker.stages:
        for mine, other in zip(apart.own(n), rule.own(n), strict=True):
            for (key, p), q in zip(mine.named_parameters(), other.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None) and (p.grad is None or same(p.grad, q.grad)), (n, key)
                assert same(p, q), (n, key)
    for n in set(range(1, len(apart.stages) + 1)) - set(worker.stages):
        assert all(p.device.type == "meta" for module in apart.own(n) for p in module.parameters())
    owners = [place for place, size in enumerate(sizes) for _ in range(size)]
    crossing = [c for l in levels(owners) for c in (*l.boundaries, *l.priors, *l.answers, *l.credit)]
    assert sum(everywhere(worker.messages_sent, mesh)) == len(seen) * len(crossing)
    with torch.no_grad():
        scores = rule.network(seen[0][0])
    read = worker.predict(seen[0][0] if rank == 0 else None, seen[0][1])
    assert (read is None) == (rank < world - 1)
    assert read is None or (same(read[0], scores) and torch.equal(read[1], seen[0][1]))
    worker.finish()
    worker.gather()
    if rank == 0:
        for (key, value), other in zip(apart.state_dict().items(), rule.state_dict().values(), strict=True):
            assert same(value, other), key


for case in cases:
    kind, name, nodes, options, sizes, descent = case
    if rank < len(sizes):
        try:
            checked(kind, name, nodes, options, sizes, {
                "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
                "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            }[descent])
        except Exception as error:
            error.add_note(f"in {case}")
            raise

# Two replicas of two processes: gradients are the mean of two batches'.
replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
for mesh, sizes in ((replicas, None), (None, (3, 4))):
    rule, apart = (made("mlp", "tree", 8, {"engine": "loop"}) for _ in range(2))
    worker = TreeWorker(apart, mesh, sizes=sizes)
    assert worker.stages == ((1, 2, 3), (4, 5, 6, 7))[rank // 2]
    halves = batches(2)
    for average in (False, True):  # the same batch twice, averaged once
        worker.backward(*halves[rank % 2], scale=1.5, average=average)
    for x, y in halves:
        rule(x, y).loss.backward()
    for n in worker.stages:
        for mine, other in zip(apart.own(n), rule.own(n), strict=True):
            for p, q in zip(mine.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p.grad, 1.5 * q.grad, rtol=1e-12, atol=1e-14)
    worker.gather()
    if rank == 0:
        assert all(torch.equal(p, q) for p, q in zip(apart.parameters(), rule.parameters(), strict=True))

# Lower precision on the wire: close, in less than half of the bytes.
(x, y), = batches(1, sizes=(64,))
exact, rounded = (TreeWorker(made("mlp", "tree", 8, {"engine": "loop"}), wire=w) for w in (None, torch.bfloat16))
for worker in (exact, rounded):
    worker.backward(x, y)
assert rounded.bytes_sent < 0.5 * exact.bytes_sent, (rounded.bytes_sent, exact.bytes_sent)
pairs = [(p.grad, q.grad) for p, q in zip(exact.parameters(), rounded.parameters(), strict=True)]
assert all((p - q).norm() <= 0.05 * p.norm() for p, q in pairs)
assert not all(torch.equal(p, q) for p, q in pairs)

# A weight of two processes.
network = KINDS["mlp"][0](8)[0]
network.blocks[6].linear.weight = network.blocks[0].linear.weight
try:
    TreeWorker(hbll.make_rule("tree", network))
except ValueError as error:
    assert "stages 1 and 7 share a weight" in str(error), error
else:
    raise AssertionError("a weight of two processes")

# Of labels that are all left out nothing is learned.
worker = TreeWorker(made("transformer", "paper", 8, {}))
(x, y), = batches(1, "transformer")
assert worker.backward(x, torch.full_like(y, IGNORED)).loss == 0
assert not any(p.grad is not None and p.grad.any() for p in worker.parameters())

# A context that is trained, which the first process sees.
class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 6)

    def forward(self, x):
        return self.linear(x), {"mask": self.linear(x), "tables": {"one": (torch.ones(6),)}}


network = masked(8)[0]
network.embed = Taught().double()
worker = TreeWorker(hbll.make_rule("tree", network))
if rank == 0:
    try:
        worker.backward(*batches(1)[0])
    except ValueError as error:
        assert "freeze them, or train in one process" in str(error)
    else:
        raise AssertionError("a context that is trained")

# A larger batch than the first ends all processes.
worker = TreeWorker(made("mlp", "paper", 8, {}))
for size in (4, 64):
    (x, y), = batches(1, sizes=(size,))
    worker.backward(x, y)
"""


def test_processes_as_one(tmp_path):
    cases = [
        ("mlp", "paper", 8, {}, (3, 4), "adamw"),
        ("mlp", "paper", 8, {"boundary": "prior", "inversion": "exact"}, (2, 5), "sgd"),
        ("transformer", "tree", 8, {"variance": 10.0}, (5, 2), "adamw"),
        ("transformer", "paper", 8, {"engine": "batched"}, (2, 5), "sgd"),
        ("convolutional", "tree", 8, {"stage": (2, 1, 3, 1)}, (1, 3), "sgd"),
        ("masked", "tree", 8, {"embed": False}, (4, 3), "sgd"),
        ("mlp", "tree", 8, {"boundary": "posterior", "label_variance": 0.5}, (1, 4, 2), "adamw"),
        ("convolutional", "paper", 8, {"inversion": "exact", "iterations": 2}, (2, 1, 4), "adamw"),
        ("transformer", "tree", 12, {}, (3, 6, 2), "sgd"),
        ("masked", "paper", 9, {}, (1, 2, 5), "sgd"),
        ("mlp", "paper", 16, {}, (1, 2, 4, 8), "sgd"),
        ("transformer", "paper", 8, {"scope": "triplet", "inversion": "none"}, (2, 2, 1, 2), "adamw"),
        ("convolutional", "tree", 5, {"scope": "block"}, (1, 1, 1, 1), "adamw"),
    ]
    codes, said = launched(PROCESS, 4, repr(cases), path=tmp_path)
    assert codes == [1] * 4
    assert "ValueError: what is handed to the process of stages 4 to 5 takes" in said[0], said[0]
    assert "let the largest batch come first" in said[0]
    for text in said[1:]:
        last = text.strip().splitlines()[-1]
        assert "ConnectionError: " in last, text
        assert "ended, or did not answer in time" in last


def ways_to_own(stages, processes):
    """The owners of stages, for every way to give each of so many processes some consecutive ones."""
    for cuts in combinations(range(1, stages), processes - 1):
        sizes = [b - a for a, b in pairwise((0, *cuts, stages))]
        yield [place for place, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize(("stages", "processes"), [(4, 2), (7, 1), (7, 2), (7, 3), (10, 4), (7, 7)])
def test_messages_are_those_of_the_cost_model(stages, processes):
    tree = Tree(stages + 1)
    for owners in ways_to_own(stages, processes):
        owner = dict(enumerate([0, *owners, owners[-1]]))
        found = {(c.what, c.node, c.source, c.to) for level in levels(owners) for c in crossing(level)}
        assert len(found) == sum(len(crossing(level)) for level in levels(owners))
        of_prior = messages(subtrees(owners, posterior=False))
        assert len(found) == sum(map(len, of_prior.values()))
        # With targets as boundaries the model has them come from a node's owner; who has found one needs no message.
        of_posterior = messages(subtrees(owners, posterior=True))
        sent = {(op.stage + 1, process) for op, to in of_posterior.items() if op.kind == "T" for process in to}
        spared = [(n, process) for n, process in sent if owner[tree.right(n)] == process]
        assert len(found) == sum(map(len, of_posterior.values())) - len(spared)


def crossing(level):
    return [*level.boundaries, *level.priors, *level.answers, *level.credit]


def test_as_many_messages_as_are_priced():
    sizes = by_tree(equal(15), 4, 3, posterior=False).sizes
    owners = [place for place, size in enumerate(sizes) for _ in range(size)]
    priced = estimate(by_tree(equal(15), 4, 3, posterior=False), Network())
    assert priced.messages == sum(len(crossing(level)) for level in levels(owners))


@pytest.mark.parametrize(
    ("name", "options", "sizes", "message"),
    [
        ("stream", {}, None, "for paper and tree, not for Stream"),
        ("tree", {"scope": "tree"}, None, "take scope 'block' or 'triplet', or one process"),
        ("tree", {"rim": 0.3}, None, "rim= are trained end to end"),
        ("paper", {"noise": 0.1}, None, "leave noise= out"),
        ("paper", {}, None, "the rule has 3 stages, and there are 8 processes: start 3 or fewer"),
        ("paper", {}, (2, 2), r"the rule has 3 stages: sizes are to add up to them; got \(2, 2\)"),
        ("paper", {}, (3, 0), r"sizes are to add up to them; got \(3, 0\)"),
        ("paper", {}, (1, 1, 1), "the rule's stages are for 3 processes, and there are 8: start 3, or a multiple"),
    ],
)
def test_what_cannot_be_one_sentence_says(name, options, sizes, message, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 8)
    with pytest.raises(ValueError, match=message):
        TreeWorker(hbll.make_rule(name, mlp(4)[0], **options), sizes=sizes)


def test_other_rules_are_told_which_can():
    with pytest.raises(ValueError, match=r"by hbll\.distributed\.TreeWorker, for paper and tree"):
        hbll.make_rule("paper", mlp(4)[0]).check_apart()
