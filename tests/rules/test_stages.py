"""Rules between stages of several blocks, and other combinations of states and credit. Oracles: calling the blocks by hand,
autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.networks import KINDS, Layer, assert_equal_gradients, gradients, label_loss, mlp
from tests.oracles.meter import countable, measure
from tests.oracles.scan_step import stages
from tests.oracles.stream_step import jumps
from tests.oracles.tree_step import parents
from torch import nn

import hbll
from hbll import Chain, make_rule
from hbll.cut import cut
from hbll.losses import cross_entropy
from hbll.rules.chain import ChainStates
from hbll.rules.composed import Composed, Cut
from hbll.rules.stream import ReadoutCredit
from hbll.rules.tree import ArcCredit, TreeStates


def stages_of(count, size):
    """The stages as lists of block numbers, dealt out one block after the other."""
    found = [[]]
    for n in range(1, count + 1):
        if len(found[-1]) == size:
            found.append([])
        found[-1].append(n)
    return found


def merged(net, size):
    """The same network with every stage for one block, sharing the parameters."""
    parts = [nn.Sequential(*(net.blocks[n - 1] for n in stage)) for stage in stages_of(len(net.blocks), size)]
    return Chain(net.embed, parts, net.head)


def by_parameter(net, loss):
    found = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    return dict(zip(map(id, net.parameters()), found, strict=True))


class TestCut:
    """Which blocks form which stage, and what evaluates them."""

    @given(count=st.integers(1, 40), size=st.integers(1, 45))
    @settings(max_examples=30)
    def test_every_block_once_and_in_order(self, count, size):
        net = Chain(nn.Identity(), [nn.Identity() for _ in range(count)], nn.Identity())
        found, expected = Cut.of(net, cut(net, size), "loop", False), stages_of(count, size)
        assert [list(stage.numbers) for stage in found.stages] == expected
        assert found.nodes == tuple(range(1, len(expected) + 1))
        assert found.tree.nodes == len(expected) + 1
        assert found.size(found.nodes) == count
        assert found.depth(found.nodes) == min(size, count)
        assert found.depth([found.last]) == found.size([found.last]) == len(expected[-1])

    @pytest.mark.parametrize(("size", "engine"), [(1, "batched"), (3, "loop"), (3, "batched"), (4, "batched")])
    def test_the_engine_evaluates_stages(self, size, engine):
        net, _, _ = mlp(9)
        found = Cut.of(net, cut(net, size), engine, False)
        inputs = torch.randn(found.last, 2, 6, dtype=torch.float64)
        which = stages_of(8, size)
        for group in found.engine.groups(found.nodes, inputs):
            outputs = found.engine(group, inputs[[n - 1 for n in group]], [{}] * len(group)).outputs
            for n, output in zip(group, outputs, strict=True):
                state = inputs[n - 1]
                for block in which[n - 1]:
                    state = net.blocks[block - 1](state)
                torch.testing.assert_close(output, state)

    def test_a_replaced_block_is_seen(self):
        net, x, y = mlp(8)
        rule = make_rule("tree", net, stage=2)
        rule(x, y)
        net.blocks[2] = Layer().double()
        found = gradients(net, rule(x, y).loss)
        assert_equal_gradients(found, gradients(net, make_rule("tree", net, stage=2)(x, y).loss))
        assert found["blocks.2.linear.weight"].abs().max() > 0

    def test_batched_is_refused_where_nothing_can_be_stacked(self):
        net, x, y = mlp(8)
        with pytest.raises(ValueError, match="no two blocks can be stacked"):
            make_rule("tree", net, stage=4, engine="batched")(x, y)

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("paper", {}, r"stage 2 \(blocks 4-6\)"),
            ("tree", {}, r"stage 2 \(blocks 4-6\)"),
            ("pipeline", {"rim": 0.3}, "block 4"),
        ],
    )
    def test_what_changes_the_shape_where_it_is_called_out_of_order_is_named(self, name, options, said):
        net, x, y = mlp(8)
        net.blocks[3] = nn.Linear(6, 7).double()
        net.blocks[4] = nn.Linear(7, 7).double()
        net.blocks[5] = nn.Linear(7, 7).double()
        with pytest.raises(ValueError, match=said + r" changes the state's shape from \(4, 6\) to \(4, 7\)"):
            make_rule(name, net, stage=3, engine="loop", **options)(x, y)


class TestRules:
    """A rule over stages is the plain rule on a network whose blocks are the stages."""

    @pytest.mark.parametrize("name", ["paper", "tree", "scan", "stream"])
    @pytest.mark.parametrize(("size", "engine"), [(2, "batched"), (3, "loop"), (5, "batched")])
    def test_merged_blocks(self, size, name, engine):
        net, x, y = mlp(12)  # 11 blocks: the last stage is short
        other = merged(net, size)
        # Spines pass a stage's last block alone; with whole stages for blocks they would pass all of it.
        options = {"readout": "head"} if name == "stream" else {}
        ours = make_rule(name, net, stage=size, engine=engine, **options)
        plain = make_rule(name, other, engine="loop", **options)
        assert [list(stage.numbers) for stage in ours.stages] == stages_of(11, size)
        for _ in range(6):
            step, expected = ours(x, y), plain(x, y)
        found, wanted = by_parameter(net, step.loss), by_parameter(other, expected.loss)
        assert max(g.abs().max() for g in wanted.values()) > 0
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize("name", ["paper", "tree", "scan", "stream", "greedy", "pipeline"])
    @pytest.mark.parametrize(("kind", "size"), [("mlp", 7), ("convolutional", 50), ("transformer", 7)])
    def test_one_stage_is_backpropagation(self, kind, size, name):
        net, x, y = KINDS[kind][0]()
        expected = label_loss(net(x), y)
        rule = make_rule(name, net, stage=size, **({"scope": "triplet"} if name == "paper" else {}))
        for _ in range(2 if name == "pipeline" else 1):  # whose embed's gradient is one step late
            step = rule(x, y)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    def test_cosines_are_by_stage(self):
        net, x, y = mlp(8)
        rule = make_rule("tree", net, stage=3)
        ours = gradients(net, rule(x, y).loss)
        exact = gradients(net, F.cross_entropy(net(x), y))
        reports = rule.diagnose(x, y)
        assert list(reports) == [1, 2, 3]
        for n, stage in enumerate(stages_of(7, 3), 1):
            names = [f"blocks.{b - 1}.linear.{part}" for b in stage for part in ("weight", "bias")]
            mine, theirs = (torch.cat([g[name].flatten() for name in names]) for g in (ours, exact))
            assert reports[n].cosine == pytest.approx((mine @ theirs / mine.norm() / theirs.norm()).item())


class TestCombinations:
    """States of one rule with the credit of another."""

    @pytest.mark.parametrize(("size", "engine"), [(1, "loop"), (2, "batched")])
    def test_arcs_on_the_chains_own_states(self, size, engine):
        net, x, y = mlp(8)
        f, states = stages(net, size), [net.embed(x)]
        for stage in f:
            states.append(stage(states[-1].detach() if len(states) > 1 else states[-1]))
        targets, total = {}, 0.0
        for n, _, right in (node for level in parents(len(f) + 1) for node in level):

            def error(state, right=right):
                if right > len(f):
                    return F.cross_entropy(net.head(state), y, reduction="none")
                return (f[right - 1](state) - targets[right]).square().sum(-1) / 2

            leaf = states[n].detach().requires_grad_()
            targets[n] = (leaf - torch.autograd.grad(error(leaf).sum(), leaf)[0] / 2).detach()
            total = total + error(states[n]).mean()
        credit = ArcCredit(cross_entropy, "triplet")
        step = Composed(net, ChainStates(), credit, stage=size, engine=engine)(x, y)
        torch.testing.assert_close(step.loss.detach(), total.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, total))

    @pytest.mark.parametrize(("size", "engine"), [(1, "batched"), (2, "loop")])
    @pytest.mark.parametrize("states", ["tree", "chain"])
    def test_spines_on_states_of_others(self, states, size, engine):
        # Of the tree's states, and of the chain's if they carry their graph from stage to stage.
        net, x, y = mlp(8)
        f, found, total = stages(net, size), {0: net.embed(x)}, 0.0
        nodes = [(n, left) for level in parents(len(f) + 1) for n, left, _ in level]
        for n, left in nodes if states == "tree" else [(n, n - 1) for n in range(1, len(f) + 1)]:
            found[n] = f[n - 1](found[left].detach() if states == "tree" and left else found[left])
            state = found[n]
            for m in jumps(n, len(f), "right"):
                state = f[m - 1][-1](state)
            total = total + F.cross_entropy(net.head(state), y)
        given = TreeStates("prior", False) if states == "tree" else ChainStates(carry_gradient=True)
        step = Composed(net, given, ReadoutCredit(cross_entropy, "right"), stage=size, engine=engine)(x, y)
        torch.testing.assert_close(step.loss.detach(), total.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, total))


class TestAudit:
    """Rows are stages; the modules in them are blocks."""

    @staticmethod
    def rows(name, **options):
        net, x, y = mlp(8)
        found = hbll.audit(make_rule(name, net, stage=3, **options), x, y)
        return found, {row.stage: row for row in found.rows}

    @staticmethod
    def names(*blocks):
        return tuple(f"block {b}" if isinstance(b, int) else b for b in blocks)

    def test_scan(self):
        found, rows = self.rows("scan")
        assert rows[1].reaches == self.names(1, 2, 3)
        assert rows[2].reaches == self.names(4, 5, 6)
        assert rows[3].reaches == self.names(7, "head")
        assert rows["embed"].reaches == ("embed",)
        # Credit passes every later stage.
        assert rows[1].uses == self.names(4, 5, 6, 7, "head")
        assert rows[2].uses == self.names(7, "head")
        assert rows[3].uses == ("head",)
        assert rows[1].outside == self.names(7, "head")
        assert not found.local
        _, rows = self.rows("scan", credit_sweeps=0)
        assert rows[1].uses == rows[2].uses == rows[3].uses == ("head",)

    def test_stream(self):
        _, rows = self.rows("stream")
        assert rows[1].reaches == self.names("embed", 1, 2, 3, 6, 7, "head")
        assert rows[1].uses == self.names(6, 7, "head")
        assert rows[2].reaches == self.names(4, 5, 6, 7, "head")
        assert rows[3].reaches == self.names(7, "head")
        _, rows = self.rows("stream", spine="right")
        assert rows[1].uses == self.names(6, "head")
        assert rows[2].uses == ("head",)
        _, rows = self.rows("stream", readout="head")
        assert rows[1].uses == ("head",)
        assert rows[1].reaches == self.names("embed", 1, 2, 3, "head")

    def test_greedy_stages_stay_within_themselves(self):
        found, rows = self.rows("greedy")
        assert rows[1].reaches == self.names("embed", 1, 2, 3, "auxiliary 1")
        assert rows[2].reaches == self.names(4, 5, 6, "auxiliary 2")
        assert rows[3].reaches == self.names(7, "head")
        assert found.local


class TestRim:
    """The loss that keeps short paths alive: the mean of the label's loss at the rim's exits."""

    @pytest.mark.parametrize("name", ["paper", "tree", "scan", "stream", "bp", "pipeline"])
    @pytest.mark.parametrize(("nodes", "stage", "engine"), [(8, 1, "batched"), (7, 2, "loop"), (3, 1, "auto")])
    def test_autograd_of_its_definition(self, nodes, stage, name, engine):
        net, x, y = mlp(nodes)
        options = {} if name == "bp" else {"stage": stage, "engine": engine}
        plain, with_rim = make_rule(name, net, **options), make_rule(name, net, rim=0.3, **options)
        for _ in range(3):
            without, step = plain(x, y), with_rim(x, y)
        rim = {8: (4, 6, 7), 7: (3, 5, 6), 3: (1, 2)}[nodes]  # floor of the middle, again and again
        state, exits = net.embed(x), []
        for n in rim:
            state = net.blocks[n - 1](state)
            exits.append(F.cross_entropy(net.head(state), y))
        expected = without.loss + 0.3 * sum(exits) / len(exits)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    @pytest.mark.parametrize("name", ["paper", "stream", "pipeline"])
    def test_it_is_counted(self, name):
        net = countable(16)
        (work, _), _ = measure(make_rule(name, net, stage=3), steps=9)
        counted, measured = measure(make_rule(name, net, stage=3, rim=0.3), steps=9)
        assert counted == measured
        assert counted[0] == work + 3 * 4  # 8-12-14-15

    def test_it_is_of_the_batch_that_is_learned_from(self):
        net, _, _ = mlp(8)
        rule = make_rule("scan", net, sweeps=1, credit_sweeps=6, rim=0.3, engine="loop")
        plain = make_rule("scan", net, sweeps=1, credit_sweeps=6, engine="loop")
        for x, y in [(torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, i % 3])) for i in range(3)]:
            without, step = plain(x, y), rule(x, y)
        x, y = step.batch
        state, exits = net.embed(x), []
        for n in (4, 6, 7):
            state = net.blocks[n - 1](state)
            exits.append(F.cross_entropy(net.head(state), y))
        assert_equal_gradients(gradients(net, step.loss), gradients(net, without.loss + 0.3 * sum(exits) / 3))


class TestInPlace:
    """Blocks that change their input, which is a state that others read."""

    @staticmethod
    def network(first=False, later=False, head=False):
        blocks = [nn.Sequential(nn.ReLU(inplace=later if n else first), nn.Linear(6, 6)) for n in range(7)]
        return Chain(nn.Linear(5, 6), blocks, nn.Sequential(nn.ReLU(inplace=head), nn.Linear(6, 3)))

    @pytest.mark.parametrize(
        ("rule", "options", "places", "name"),
        [
            ("stream", {}, {"first": True}, "block 1"),
            ("stream", {"stage": (3, 4)}, {"first": True}, r"stage 1 \(blocks 1-3\)"),
            ("paper", {}, {"head": True}, "the head"),
            ("paper", {}, {"first": True}, "block 1"),
            ("tree", {"engine": "loop"}, {"later": True}, "block 4"),
            ("scan", {"guess": "mean", "engine": "loop"}, {"later": True}, "block 2"),
            ("scan", {"guess": "mean"}, {"head": True}, "a block or the head"),
        ],
    )
    def test_it_is_named_with_what_to_do(self, rule, options, places, name):
        x, y = torch.randn(4, 5), torch.arange(4) % 3
        sentence = (
            f"^{name} changes its input in place, which is a state that others read: give its first layer inplace=False"
        )
        with pytest.raises(ValueError, match=sentence):
            make_rule(rule, self.network(**places), **options)(x, y)
        assert make_rule(rule, self.network(), **options)(x, y).loss.isfinite()

    def test_a_chain_that_is_read_in_order_may(self):
        network = self.network(first=True, later=True)
        torch.testing.assert_close(network(x := torch.randn(4, 5)), network.sequential()(x))
        assert make_rule("bp", network)(x, torch.arange(4) % 3).loss.isfinite()
