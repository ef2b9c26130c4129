"""The audit. Oracles: which gradients of each node's own losses are not zero, and leaks planted on purpose."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hbll
from hbll.bll import BLL
from hbll.cuts import SequentialNetwork
from hbll.local.backpropagation import Backpropagation
from hbll.locality import locality
from hbll.recipes import RECIPES

WIDTH, CLASSES, BATCH = 5, 3, 4
EVERY_SCOPE = pytest.mark.parametrize("scope", ["block", "triplet", "tree"])
EVERY_BOUNDARY = pytest.mark.parametrize("boundary", ["posterior", "prior"])


def network(nodes=8, block=None):
    torch.manual_seed(0)
    block = block or (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    blocks = [block() for _ in range(nodes - 1)]
    return hbll.TreeNetwork(nn.Linear(WIDTH, WIDTH), blocks, nn.Linear(WIDTH, CLASSES)).double()


def batch():
    torch.manual_seed(1)
    return torch.randn(BATCH, WIDTH, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def modules(net):
    blocks = {f"block {n}": block for n, block in enumerate(net.blocks, 1)}
    return {"embed": net.embed, **blocks, "head": net.head}


def ancestors(tree, n):
    """The nodes whose blocks the tree evaluates to get to node n."""
    left = tree.left(n)
    return {n} | (ancestors(tree, left) if left else set())


@EVERY_SCOPE
@EVERY_BOUNDARY
@pytest.mark.parametrize("nodes", [2, 3, 6, 8])
def test_reach_of_every_scope(nodes, boundary, scope):
    net = network(nodes)
    found = hbll.audit(net, hbll.Objective("paper", boundary=boundary, scope=scope), *batch())
    assert [row.node for row in found.rows] == list(net.tree.chain)
    for row in found.rows:
        n, right = row.node, "head" if row.right == nodes else f"block {row.right}"
        assert (row.left, row.right) == net.tree.interval(n)
        expected = {f"block {n}", right}
        if row.left == 0 or scope == "tree":
            expected.add("embed")
        if scope == "tree":
            expected |= {f"block {m}" for m in ancestors(net.tree, n)}
        assert set(row.reaches) == expected
        # Weights are transported across one arc alone.
        assert row.uses == (right,)
        triple = {f"block {n}", right, *(["embed"] if row.left == 0 else [])}
        assert set(row.outside) == expected - triple
    assert found.local == (scope != "tree" or nodes == 2)
    assert found.shared == ()


@EVERY_SCOPE
@EVERY_BOUNDARY
def test_reach_is_where_gradients_are_not_zero(boundary, scope):
    net, (x, y) = network(8), batch()
    objective = hbll.Objective("paper", boundary=boundary, scope=scope, engine="loop")
    trace = objective(net, x, y).trace
    reached = {n: set() for n in net.tree.chain}
    for nodes, term in trace.terms:
        for name, module in modules(net).items():
            gradients = torch.autograd.grad(
                term, list(module.parameters()), retain_graph=True, materialize_grads=True, allow_unused=True
            )
            if any(g.abs().max() > 0 for g in gradients):
                for n in nodes:
                    reached[n].add(name)
    assert {row.node: set(row.reaches) for row in hbll.audit(net, objective, x, y).rows} == reached


@pytest.mark.parametrize("preset", ["paper", "tree"])
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_presets_are_local_whatever_the_engine(preset, engine):
    assert hbll.audit(network(), hbll.Objective(preset, engine=engine), *batch()).local


def test_backpropagation_is_not_local():
    found = hbll.audit(network(), hbll.Objective("bp"), *batch())
    assert not found.local
    assert set(found.rows[-1].reaches) == set(modules(network()))


@pytest.mark.parametrize("preset", ["paper", "tree"])
def test_weights_tied_between_embed_and_head_are_named(preset):
    net = network()
    net.head = nn.Linear(WIDTH, WIDTH).double()
    net.head.weight = net.embed.weight
    found = hbll.audit(net, hbll.Objective(preset), *batch())
    assert found.shared == (("embed", "head"),)
    assert not found.local
    leaking = {row.node for row in found.rows if row.outside}
    # Nodes 6 and 7 train the head without reading node 0, nodes 1 and 2 read node 0 and do not predict the label.
    assert leaking == {1, 2, 6, 7}
    assert "embed and head share parameters" in str(found)


def test_one_block_used_by_two_nodes_is_named():
    net = network(4)
    net.blocks[2] = net.blocks[0]
    found = hbll.audit(net, hbll.Objective("paper"), *batch())
    assert found.shared == (("block 1", "block 3"),)
    assert not found.local


class Peeking(nn.Module):
    """A block that also uses the parameters of another without owning them."""

    def __init__(self, other):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.hidden = [other]

    def forward(self, state):
        return torch.tanh(self.linear(state) + self.hidden[0](state))


@pytest.mark.parametrize("preset", ["paper", "tree"])
@pytest.mark.parametrize(("peeking", "seen"), [(1, 7), (5, 2), (7, 3)])
def test_a_block_that_captures_another_ones_parameters(preset, peeking, seen):
    net = network()
    net.blocks[peeking - 1] = Peeking(net.blocks[seen - 1]).double()
    found = hbll.audit(net, hbll.Objective(preset), *batch())
    assert not found.local
    row = next(row for row in found.rows if row.node == peeking)
    assert f"block {seen}" in row.reaches
    assert f"block {seen}" in row.outside
    # And whoever predicts through the peeking block uses the other one's weights.
    for row in found.rows:
        if row.right == peeking:
            assert {f"block {peeking}", f"block {seen}"} <= set(row.uses)


def test_a_head_that_captures_the_embed():
    net = network()

    class Head(nn.Module):
        def __init__(self, embed):
            super().__init__()
            self.linear = nn.Linear(WIDTH, CLASSES)
            self.hidden = (embed,)

        def forward(self, state):
            return self.linear(self.hidden[0](state))

    net.head = Head(net.embed).double()
    found = hbll.audit(net, hbll.Objective("paper"), *batch())
    assert not found.local
    assert {row.node for row in found.rows if "embed" in row.uses} == {4, 6, 7}


def test_an_auxiliary_loss_through_the_embed_is_found():
    # The label's loss is the user's: one that regularises the embed reaches it from every node of the rim.
    net = network()

    def regularised(logits, y):
        return F.cross_entropy(logits, y, reduction="none") + net.embed.weight.square().sum()

    found = hbll.audit(net, hbll.Objective("paper", loss=regularised), *batch())
    assert {row.node for row in found.rows if "embed" in row.outside} == {6, 7}


def test_the_audit_leaves_no_gradient_and_gives_a_table():
    net = network(4)
    found = hbll.audit(net, hbll.Objective("paper"), *batch())
    assert all(p.grad is None for p in net.parameters())
    header, *lines = str(found).splitlines()
    assert "node" in header
    assert "outside" in header
    assert len(lines) == 3
    assert lines[0].split()[:3] == ["1", "0", "2"]
    assert "label" in lines[1]


def test_convolutional_states():
    torch.manual_seed(0)
    blocks = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    net = hbll.TreeNetwork(nn.Conv2d(1, 4, 1), blocks, head)
    found = hbll.audit(net, hbll.Objective("tree"), torch.randn(BATCH, 1, 5, 5), torch.arange(BATCH) % CLASSES)
    assert found.local


def test_a_frozen_neighbour_is_used_but_not_reached():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(7)]
    network = hbll.TreeNetwork(nn.Linear(3, 4), blocks, nn.Linear(4, 2))
    blocks[3].requires_grad_(False)
    found = hbll.audit(network, hbll.Objective("paper"), torch.randn(5, 3), torch.randint(2, (5,)))
    row = next(row for row in found.rows if row.node == 3)
    assert row.uses == ("block 4",)
    assert row.reaches == ("block 3",)
    assert not any(p.requires_grad for p in blocks[3].parameters())


def plain():
    """Six layers without the activations between them."""
    torch.manual_seed(0)
    return SequentialNetwork(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)), nn.Linear(WIDTH, CLASSES)).double()


def local_audit(rule, net=None):
    net = net or plain()
    return hbll.audit(net, rule.prepare(net, batch()[0]), *batch())


@pytest.mark.parametrize("feedback", ["learned", "random", "prototype"])
@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_a_block_of_a_local_rule_reaches_itself_and_its_own_auxiliary(feedback, blocks):
    found = local_audit(BLL(feedback, blocks=blocks))
    size = 6 // blocks
    for k, row in enumerate(found.rows, 1):
        assert row.node == k
        expected = {f"layer {n}" for n in range((k - 1) * size + 1, k * size + 1)}
        if k == blocks:
            expected.add("head")
        elif feedback != "random":  # fixed maps learn nothing
            expected.add(f"auxiliary {k}")
        assert set(row.reaches) == set(row.uses) == expected
    assert found.local
    assert found.crossed == size


def test_inverted_arcs_use_the_next_blocks_weights():
    found = local_audit(BLL("inverted", blocks=3))
    assert not found.local
    assert found.rows[0].reaches == ("layer 1", "layer 2")
    assert found.rows[0].uses == found.rows[0].outside == ("layer 3", "layer 4")
    assert found.rows[1].uses == ("layer 5", "layer 6", "head")
    assert found.rows[2].outside == ()


def test_a_block_that_is_the_whole_network_is_not_local():
    for rule in (Backpropagation(), BLL(blocks=1)):
        found = local_audit(rule)
        assert not found.local
        assert found.crossed == 6


def test_a_local_block_that_captures_another_ones_parameters():
    net = plain()
    net[2] = Peeking(net[0]).double()
    found = local_audit(BLL(), net)
    assert [row.node for row in found.rows if row.outside] == [3]
    assert found.rows[2].outside == ("layer 1",)


def test_an_audit_leaves_running_statistics_alone():
    net = plain()
    net.insert(1, nn.BatchNorm1d(WIDTH).double())
    local_audit(BLL(), net)
    assert net[1].num_batches_tracked == 0
    assert net.training
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("paper", "yes"),
        ("bll", "yes"),
        ("bp", "no: crosses 7 blocks"),
        ("pipeline", "no: crosses 7 blocks"),
        ("stream", "no: crosses 4 blocks"),  # 1, and the spine 2, 4, 7
    ],
)
def test_what_is_said_of_a_rule(method, said):
    recipe = RECIPES["digits"](blocks=7, width=8)
    net, samples = recipe.initial_network(0), recipe.splits(None).train[:16]
    rule = recipe.objective(method).prepare(net, samples.inputs)
    assert locality(net, rule, samples.inputs, samples.labels) == said


def test_recurrent_rules_are_not_audited():
    recipe = RECIPES["sequential-mnist"](depth=2, width=4)
    net, x, y = recipe.network(), torch.zeros(2, 4, 196), torch.zeros(2, dtype=int)
    assert locality(net, recipe.objective("bptt"), x, y) == ""
    with pytest.raises(ValueError, match="a Backpropagation cannot be audited"):
        hbll.audit(net, recipe.objective("bptt"), x, y)
