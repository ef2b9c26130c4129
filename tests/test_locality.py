"""The audit. Oracles: which gradients of each stage's own losses are not zero, and leaks planted on purpose."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hbll import Chain, Step, audit, make_rule
from hbll.locality import locality

WIDTH, CLASSES, BATCH = 5, 3, 4
EVERY_SCOPE = pytest.mark.parametrize("scope", ["block", "triplet", "tree"])
EVERY_BOUNDARY = pytest.mark.parametrize("boundary", ["posterior", "prior"])


def network(nodes=8, block=None):
    torch.manual_seed(0)
    block = block or (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    blocks = [block() for _ in range(nodes - 1)]
    return Chain(nn.Linear(WIDTH, WIDTH), blocks, nn.Linear(WIDTH, CLASSES)).double()


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
@pytest.mark.parametrize("nodes", [3, 6, 8])
def test_reach_of_every_scope(nodes, boundary, scope):
    net = network(nodes)
    found = audit(make_rule("paper", net, boundary=boundary, scope=scope), *batch())
    assert [row.stage for row in found.rows] == list(net.tree.chain)
    for row in found.rows:
        left, j = net.tree.interval(row.stage)
        right = "head" if j == nodes else f"block {j}"
        through = {f"block {m}" for m in ancestors(net.tree, row.stage)} if scope == "tree" else {f"block {row.stage}"}
        embed = {"embed"} if left == 0 or scope == "tree" else set()
        assert set(row.reaches) == through | embed | {right}
        # Weights are transported across one arc alone, but for the tree's own backpropagation.
        near = {f"block {row.stage}", *(["embed"] if left == 0 else [])}
        assert set(row.uses) == (through | embed | {right}) - near
        assert set(row.outside) == (through | embed) - near - {right}
    assert found.local == (scope != "tree")
    assert found.shared == ()


@EVERY_SCOPE
@EVERY_BOUNDARY
def test_reach_is_where_gradients_are_not_zero(boundary, scope):
    net, (x, y) = network(8), batch()
    rule = make_rule("paper", net, boundary=boundary, scope=scope, engine="loop")
    reached = {}
    for loss in rule.losses(x, y, Step(look=True)):
        for name, module in modules(net).items():
            gradients = torch.autograd.grad(
                loss.value, list(module.parameters()), retain_graph=True, materialize_grads=True, allow_unused=True
            )
            if any(g.abs().max() > 0 for g in gradients):
                reached.setdefault(loss.stage, set()).add(name)
    assert {row.stage: set(row.reaches) for row in audit(rule, x, y).rows} == reached


@pytest.mark.parametrize("rule", ["paper", "tree"])
def test_presets_are_local_though_a_stacked_call_evaluates_many(rule):
    assert audit(make_rule(rule, network(), engine="batched"), *batch()).local
    assert audit(make_rule(rule, network(), engine="batched", stage=(2, 2, 3)), *batch()).local


def test_stages_are_near_their_right_neighbours():
    found = audit(make_rule("paper", network(), stage=(2, 2, 3)), *batch())
    assert [row.reaches for row in found.rows] == [
        ("embed", "block 1", "block 2", "block 3", "block 4"),
        ("embed", "block 3", "block 4", "head"),
        ("block 5", "block 6", "block 7", "head"),
    ]
    assert [row.uses for row in found.rows] == [("block 3", "block 4"), ("head",), ("head",)]
    assert found.local
    assert found.crossed == 4


def test_backpropagation_is_not_local():
    (row,) = audit(make_rule("bp", network()), *batch()).rows
    assert set(row.reaches) == set(row.outside) == set(modules(network()))


def test_a_rim_beside_a_rule_is():
    # Its own row, all of which is outside.
    *rows, rim = audit(make_rule("tree", network(), rim=0.3), *batch()).rows
    assert rim.stage == "rim"
    assert set(rim.reaches) == set(rim.outside) == {"embed", "block 4", "block 6", "block 7", "head"}
    assert all(row.outside == () for row in rows)


@pytest.mark.parametrize("rule", ["paper", "tree"])
def test_weights_tied_between_embed_and_head_are_named(rule):
    net = network()
    net.head = nn.Linear(WIDTH, WIDTH).double()
    net.head.weight = net.embed.weight
    found = audit(make_rule(rule, net), *batch())
    assert found.shared == (("embed", "head"),)
    assert not found.local
    leaking = {row.stage for row in found.rows if row.outside}
    # Nodes 6 and 7 train the head without reading node 0; node 2 reads it and does not predict the label. Node 1 does
    # neither, but has the embed, and so the head.
    assert leaking == {1, 2, 6, 7}
    assert "embed and head share parameters" in str(found)


def test_one_block_used_by_two_nodes_is_named():
    net = network(4)
    net.blocks[2] = net.blocks[0]
    found = audit(make_rule("paper", net), *batch())
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


@pytest.mark.parametrize(("peeking", "seen"), [(4, 7), (6, 3), (7, 1)])
def test_a_block_that_captures_another_ones_parameters(peeking, seen):
    net = network()
    net.blocks[peeking - 1] = Peeking(net.blocks[seen - 1]).double()
    found = audit(make_rule("tree", net), *batch())
    assert not found.local
    row = next(row for row in found.rows if row.stage == peeking)
    assert f"block {seen}" in row.reaches
    assert f"block {seen}" in row.outside
    # And whoever predicts through the peeking block uses the other one's weights.
    predicting = [row for row in found.rows if net.tree.right(row.stage) == peeking]
    assert len(predicting) == {4: 2, 6: 1, 7: 0}[peeking]
    for row in predicting:
        assert {f"block {peeking}", f"block {seen}"} <= set(row.uses)
        assert row.outside == (f"block {seen}",)


@pytest.mark.parametrize("rule", ["tree", "bll", "greedy"])
def test_what_a_block_reads_in_training_alone_is_found(rule):
    class PeekingInTraining(Peeking):
        def forward(self, state):
            return super().forward(state) if self.training else torch.tanh(self.linear(state))

    net = network()
    net.blocks[5] = PeekingInTraining(net.blocks[0]).double()
    made = make_rule(rule, net)
    for mode in (True, False):
        found = audit(made.train(mode), *batch())
        assert {row.stage for row in found.rows if "block 1" in row.outside} >= {6}
        assert made.training is mode


@pytest.mark.parametrize("rule", ["bp", "tree", "dgl"])
def test_parameters_that_no_part_owns_are_named(rule):
    common = nn.Linear(WIDTH, WIDTH).double()
    net = network(4)
    net.blocks[1] = Peeking(common).double()
    found = audit(make_rule(rule, net), *batch())
    assert "elsewhere" in {name for row in found.rows for name in row.outside}
    assert not found.local


@pytest.mark.parametrize("rule", ["bp", "scan", "pipeline", "dgl"])
def test_a_network_with_parameters_of_no_part_is_refused(rule):
    net = network(4)
    net.gain = nn.Parameter(torch.ones(WIDTH))
    with pytest.raises(ValueError, match=r"nor the head is made \(gain\), and no stage would train them"):
        make_rule(rule, net)
    net.gain.requires_grad_(False)
    make_rule(rule, net)


def test_a_loss_with_parameters_belongs_to_the_last_stage():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, logits, y):
            return F.cross_entropy(self.scale * logits, y, reduction="none")

    found = audit(make_rule("cff", network(4), loss=Scaled()), *batch())
    assert found.local
    assert "loss" in found.rows[-1].reaches


def test_what_is_no_rule_is_refused():
    with pytest.raises(ValueError, match="what is audited is a rule"):
        audit(None, *batch())


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
    found = audit(make_rule("paper", net), *batch())
    assert not found.local
    # Of those that predict the label, node 4 reads the embed itself.
    assert {row.stage for row in found.rows if "embed" in row.outside} == {6, 7}


def test_an_auxiliary_loss_through_the_embed_is_found():
    # The label's loss is the user's: one that regularises the embed reaches it from every node of the rim.
    net = network()

    def regularised(logits, y):
        return F.cross_entropy(logits, y, reduction="none") + net.embed.weight.square().sum()

    found = audit(make_rule("paper", net, loss=regularised), *batch())
    assert {row.stage for row in found.rows if "embed" in row.outside} == {6, 7}


def test_the_audit_gives_a_table():
    found = audit(make_rule("paper", network(4)), *batch())
    assert str(found).splitlines() == [
        "stage  loss reaches             credit uses  outside",
        "1      embed, block 1, block 2  block 2      -",
        "2      embed, block 2, head     head         -",
        "3      block 3, head            head         -",
    ]


@pytest.mark.parametrize("rule", ["tree", "bll"])
def test_the_audit_leaves_nothing_behind(rule):
    net = network(4, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh()))
    net.blocks[1].eval()
    frozen = net.blocks[2].requires_grad_(False)
    audit(make_rule(rule, net), *batch())
    assert all(p.grad is None for p in net.parameters())
    assert all(block[1].num_batches_tracked == 0 for block in net.blocks)
    assert [block.training for block in net.blocks] == [True, False, True]
    assert not any(p.requires_grad for p in frozen.parameters())


def test_convolutional_states():
    torch.manual_seed(0)
    blocks = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    rule = make_rule("tree", Chain(nn.Conv2d(1, 4, 1), blocks, head))
    assert audit(rule, torch.randn(BATCH, 1, 5, 5), torch.arange(BATCH) % CLASSES).local


def test_a_frozen_neighbour_is_used_but_not_reached():
    net = network()
    net.blocks[3].requires_grad_(False)
    found = audit(make_rule("paper", net), *batch())
    row = found.rows[2]
    assert row.uses == ("block 4",)
    assert row.reaches == ("block 3",)


def plain():
    """Six layers without the activations between them."""
    torch.manual_seed(0)
    return network(7, lambda: nn.Linear(WIDTH, WIDTH))


@pytest.mark.parametrize("feedback", ["learned", "random", "prototype"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stage_of_a_local_rule_reaches_itself_and_its_own_auxiliary(feedback, size):
    found = audit(make_rule("bll", plain(), feedback=feedback, stage=size), *batch())
    last = 6 // size
    assert [row.stage for row in found.rows] == list(range(1, last + 1))
    for k, row in enumerate(found.rows, 1):
        beside = (
            ["head"] if k == last else [f"auxiliary {k}"] if feedback != "random" else []
        )  # fixed maps learn nothing
        own = [f"block {n}" for n in range((k - 1) * size + 1, k * size + 1)]
        assert list(row.reaches) == (["embed"] if k == 1 else []) + own + beside
        assert list(row.uses) == beside
    assert found.local
    assert found.crossed == size


def test_inverted_arcs_use_the_next_blocks_weights():
    first, second, third = audit(make_rule("bll", plain(), feedback="inverted", stage=2), *batch()).rows
    assert first.reaches == ("embed", "block 1", "block 2")
    assert first.uses == first.outside == ("block 3", "block 4")
    assert second.uses == second.outside == ("block 5", "block 6", "head")
    assert third.outside == ()


def test_a_stage_that_is_the_whole_network_is_not_local():
    for rule in (make_rule("bp", plain()), make_rule("bll", plain(), stage=6)):
        found = audit(rule, *batch())
        assert not found.local
        assert found.crossed == 6


def test_a_local_stage_that_captures_another_ones_parameters():
    net = plain()
    net.blocks[2] = Peeking(net.blocks[0]).double()
    found = audit(make_rule("bll", net), *batch())
    assert [row.stage for row in found.rows if row.outside] == [3]
    assert found.rows[2].outside == ("block 1",)


def test_a_pipeline_cannot_be_audited():
    with pytest.raises(
        ValueError, match="an asynchronous pipeline cannot be audited: its credit comes from other steps"
    ):
        audit(make_rule("pipeline", network()), *batch())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("paper", "yes"),
        ("bll", "yes"),
        ("greedy", "yes"),
        ("bp", "no: crosses 7 blocks"),
        ("pipeline", "no: crosses 7 blocks"),
        ("scan", "no: crosses 7 blocks"),
        ("stream", "no: crosses 4 blocks"),  # 1, and the spine 2, 4, 7
    ],
)
def test_what_is_said_of_a_rule(name, said):
    assert locality(make_rule(name, network()), *batch()) == said
