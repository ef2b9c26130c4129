"""Stages. Oracles: calling the blocks by hand, autograd, the tensor operations that really run, the specification's figures.

The counting by brute force is that of tests/test_counters.py: every operation with the depth of what it depends on.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_counters import BATCH, measure
from tests.test_counters import network as countable
from tests.test_objective import KINDS, Layer, assert_equal_gradients, gradients, mlp
from torch import nn
from torch.utils._pytree import tree_leaves

import hbll
from hbll.rule import PRESETS, Rule
from hbll.stages import Stages, fresh_copy

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])


class Residual(Layer):
    """A layer with a skip around it."""

    def forward(self, state):
        return state + super().forward(state) / 2


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
    return hbll.TreeNetwork(net.embed, parts, net.head)


def by_parameter(net, loss):
    found = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    return dict(zip(map(id, net.parameters()), found, strict=True))


class TestCuts:
    """Which blocks form which stage."""

    @given(count=st.integers(1, 40), size=st.integers(1, 45))
    def test_every_block_once_and_in_order(self, count, size):
        stages = Stages(nn.ModuleList(nn.Identity() for _ in range(count)), size, "loop")
        expected = stages_of(count, size)
        assert [list(numbers) for numbers in stages.numbers] == expected
        assert stages.nodes == tuple(range(1, len(expected) + 1))
        assert stages.tree.nodes == len(expected) + 1
        for n in range(1, count + 1):
            assert n in expected[stages.of(n) - 1]
        assert stages.size(stages.nodes) == count
        assert stages.depth(stages.nodes) == min(size, count)
        assert stages.depth([stages.nodes[-1]]) == stages.size([stages.nodes[-1]]) == len(expected[-1])

    @given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8))
    def test_a_size_for_every_stage(self, sizes):
        stages = Stages(nn.ModuleList(nn.Identity() for _ in range(sum(sizes))), sizes, "loop")
        assert [len(numbers) for numbers in stages.numbers] == sizes
        assert [n for numbers in stages.numbers for n in numbers] == list(range(1, sum(sizes) + 1))

    def test_sizes_must_add_up(self):
        with pytest.raises(ValueError, match="stages of 2, 2, 3 add up to 7 blocks; the network has 8"):
            Stages(nn.ModuleList(nn.Identity() for _ in range(8)), (2, 2, 3), "loop")

    def test_names(self):
        blocks = nn.ModuleList(nn.Identity() for _ in range(7))
        assert Stages(blocks, 3, "loop").names == ["stage 1 (blocks 1-3)", "stage 2 (blocks 4-6)", "block 7"]
        assert Stages(blocks, 1, "loop").names[:2] == ["block 1", "block 2"]

    @every_engine
    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    def test_engines_evaluate_stages_and_their_last_blocks(self, size, engine):
        net, _, _ = mlp(9)
        stages = Stages(net.blocks, size, engine)
        inputs = torch.randn(len(stages.nodes), 2, 6, dtype=torch.float64)
        which = stages_of(8, size)
        for chosen in (stages.engine, stages.last_blocks):
            for positions in chosen.partition(stages.nodes):
                outputs = chosen(tuple(stages.nodes[p] for p in positions), inputs[positions]).outputs
                for p, output in zip(positions, outputs, strict=True):
                    state = inputs[p]
                    for n in which[p] if chosen is stages.engine else which[p][-1:]:
                        state = net.blocks[n - 1](state)
                    torch.testing.assert_close(output, state)

    def test_a_fresh_copy_has_other_parameters_of_the_same_shapes(self):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))
        nn.init.constant_(block[1][0].weight, 7.0)
        before = {name: p.clone() for name, p in block.named_parameters()}
        fresh = fresh_copy(block)
        for (name, p), q in zip(fresh.named_parameters(), block.parameters(), strict=True):
            assert p is not q
            assert p.shape == q.shape
            assert torch.equal(q, before[name])
            assert not torch.equal(p, q) or name == "1.0.bias"  # which starts at zero
        assert (fresh[1][0].weight == 1).all()

    def test_a_replaced_block_is_seen(self):
        net, x, y = mlp(8)
        objective = hbll.Objective("tree", stage=2)
        objective(net, x, y)
        net.blocks[2] = Layer().double()
        step = objective(net, x, y)
        fresh = hbll.Objective("tree", stage=2)(net, x, y)
        found = gradients(net, step.loss)
        assert_equal_gradients(found, gradients(net, fresh.loss))
        assert found["blocks.2.linear.weight"].abs().max() > 0


class TestRules:
    """A rule over stages is the plain rule on a network whose blocks are the stages."""

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree", "scan", "stream"])
    @pytest.mark.parametrize("size", [2, 3, 5])
    def test_merged_blocks(self, size, preset, engine):
        net, x, y = mlp(12)  # 11 blocks: the last stage is short
        other = merged(net, size)
        ours, plain = hbll.Objective(preset, stage=size, engine=engine), hbll.Objective(preset, engine="loop")
        if preset == "stream":
            # Spines pass a stage's last block alone; with whole stages for blocks they would pass all of it.
            ours, plain = (hbll.Objective(preset, spine="none", **o) for o in ({"stage": size, "engine": engine}, {}))
        for _ in range(6):
            step, expected = ours(net, x, y), plain(other, x, y)
        assert step.trace.stages.numbers == [tuple(numbers) for numbers in stages_of(11, size)]
        found, wanted = by_parameter(net, step.loss), by_parameter(other, expected.loss)
        assert max(g.abs().max() for g in wanted.values()) > 0
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize("preset", ["tree", "scan", "stream", "pipeline"])
    @pytest.mark.parametrize("size", [7, 50])
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_stage_is_backpropagation(self, kind, size, preset):
        net, x, y = KINDS[kind][0]()
        expected = F.cross_entropy(net(x).flatten(0, -2), y.flatten())
        objective = hbll.Objective(preset, stage=size)
        step = objective(net, x, y)
        if preset == "pipeline":  # the embed's gradient is one step late
            step = objective(net, x, y)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("size", [2, 5])
    def test_every_preset_trains_with_stages(self, size, preset):
        net, x, y = mlp(16, block=Residual if preset == "scan" else Layer)
        objective = hbll.Objective(preset, stage=size).prepare(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        first = F.cross_entropy(net(x), y).item()
        for _ in range(30):
            optimizer.zero_grad()
            objective(net, x, y).loss.backward()
            optimizer.step()
        assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
        assert F.cross_entropy(net(x), y).item() < 0.99 * first

    def test_batched_is_refused_where_nothing_can_be_stacked(self):
        net, x, y = mlp(8)
        with pytest.raises(ValueError, match="no two blocks can be stacked"):
            hbll.Objective("tree", stage=4, engine="batched")(net, x, y)

    def test_a_stage_that_changes_the_shape_is_named(self):
        net, x, y = mlp(8)
        net.blocks[4] = nn.Linear(6, 7).double()
        net.blocks[5] = nn.Linear(7, 7).double()
        with pytest.raises(ValueError, match=r"stage 2 \(blocks 4-6\) changes the state's shape"):
            hbll.Objective("scan", stage=3, engine="loop")(net, x, y)

    def test_cosines_are_by_stage(self):
        net, x, y = mlp(8)
        objective = hbll.Objective("tree", stage=3)
        ours = gradients(net, objective(net, x, y).loss)
        exact = gradients(net, F.cross_entropy(net(x), y))
        reports = objective.diagnose(net, x, y)
        assert list(reports) == [1, 2, 3]
        for n, stage in enumerate(stages_of(7, 3), 1):
            names = [f"blocks.{b - 1}.linear.{part}" for b in stage for part in ("weight", "bias")]
            mine, theirs = (torch.cat([g[name].flatten() for name in names]) for g in (ours, exact))
            assert reports[n].cosine == pytest.approx((mine @ theirs / mine.norm() / theirs.norm()).item())


def run_in(net, objective, steps):
    """Fills a pipeline, without learning."""
    for _ in range(steps):
        objective(net, torch.randn(BATCH, 3), torch.tensor([0, 2]))


class TestCounters:
    """Work and span, as they really are and as the specification's table has them."""

    @every_engine
    @pytest.mark.parametrize("size", [1, 3])
    @pytest.mark.parametrize(
        ("preset", "options"),
        [
            ("paper", {}),
            ("tree", {}),
            ("tree", {"scope": "tree"}),
            ("tree", {"states": "chain"}),
            ("bp", {}),
            ("scan", {"sweeps": 2, "credit_sweeps": 1, "guess": "mean"}),
            ("scan", {"sweeps": 2, "credit_sweeps": 2, "guess": "mean", "coarse": "none"}),
            ("scan", {"sweeps": 2, "credit_sweeps": 1}),
            ("scan", {"sweeps": 1, "credit_sweeps": 0}),
            ("scan", {"sweeps": 2, "credit_sweeps": 1, "guess": "tree"}),
            ("scan", {"sweeps": 2, "credit_sweeps": 1, "guess": "star"}),
            ("scan", {"states": "chain"}),
            ("stream", {}),
            ("stream", {"spine": "last"}),
            ("stream", {"spine": "right"}),
            ("stream", {"spine": "none"}),
            ("stream", {"spine": "none", "heads": "own"}),
            ("stream", {"states": "chain"}),
            ("pipeline", {}),
        ],
    )
    def test_counts_are_what_really_runs(self, preset, options, size, engine):
        net = countable(14)  # 13 blocks: the last stage is short but for 1
        objective = hbll.Objective(preset, stage=size, engine=engine, **options).prepare(net)
        if objective.rule.states == "stream" or objective.rule.guess == "ahead":
            run_in(net, objective, 26)
        counted, measured = measure(net, objective)
        assert counted == measured

    @every_engine
    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_while_a_stream_fills(self, steps, engine):
        net, objective = countable(14), hbll.Objective("stream", stage=2, engine=engine)
        run_in(net, objective, steps)
        saved = objective.state_dict()
        run_in(net, objective, 7)  # everything is recorded now
        full = measure(net, objective)[0]
        objective.load_state_dict(saved)
        counted, measured = measure(net, objective)
        assert counted == measured
        assert counted[0] < full[0]

    @every_engine
    @pytest.mark.parametrize(("stage", "span", "work"), [(1, 10, 4.0), (3, 12, 1.5), (5, 14, 1.2)])
    def test_stream_of_the_specification(self, stage, span, work, engine):
        net, objective = countable(16), hbll.Objective("stream", stage=stage, engine=engine)
        run_in(net, objective, 15)
        step = objective(net, torch.randn(BATCH, 3), torch.tensor([0, 2]))
        assert step.span == span
        # The table takes three evaluations for every stage; the gradient in an input that is a leaf is not needed.
        assert step.work / 45 == pytest.approx(work, rel=0.1)
        assert step.work / 45 < work + 0.05

    @pytest.mark.parametrize(
        ("sizes", "jumps", "span"),
        [((2, 2, 3), "last", 6), ((2, 3, 2), "right", 6), ((3, 3, 1), "doubling", 10), ((1, 2, 4), "doubling", 8)],
    )
    def test_short_stages_with_long_spines_cost_no_span(self, sizes, jumps, span):
        net, objective = countable(8), hbll.Objective("stream", stage=sizes, spine=jumps)
        run_in(net, objective, 3)
        counted, measured = measure(net, objective)
        assert counted == measured
        assert counted[1] == span

    @every_engine
    @pytest.mark.parametrize(
        ("options", "span", "work"),
        [
            ({"stage": 1, "sweeps": 4, "credit_sweeps": 2, "guess": "mean"}, 7, 2.3),
            ({"stage": 3, "sweeps": 2, "credit_sweeps": 1, "guess": "mean"}, 12, 1.7),
            ({"stage": 3, "sweeps": 3, "credit_sweeps": 1, "guess": "mean"}, 15, 2.0),
            ({"stage": 5, "sweeps": 2, "credit_sweeps": 1, "guess": "mean"}, 20, 1.7),
            ({"stage": 3, "sweeps": 2, "credit_sweeps": 1, "guess": "tree"}, 15, 2.0),
            ({"stage": 3, "sweeps": 3, "credit_sweeps": 2, "guess": "tree"}, 21, 2.7),
        ],
    )
    def test_scan_of_the_specification(self, options, span, work, engine):
        net = countable(16)
        objective = hbll.Objective("scan", engine=engine, **options).prepare(net)
        step = objective(net, torch.randn(BATCH, 3), torch.tensor([0, 2]))
        assert step.span == span
        assert step.work / 45 == pytest.approx(work, rel=0.12)
        assert step.work / 45 < work + 0.05

    @every_engine
    @settings(max_examples=15)
    @given(
        count=st.integers(2, 12),
        size=st.integers(1, 4),
        sweeps=st.integers(1, 4),
        credit_sweeps=st.integers(0, 3),
        guess=st.sampled_from(["mean", "tree", "star"]),
    )
    def test_formula_of_scan(self, engine, count, size, sweeps, credit_sweeps, guess):
        net = countable(count + 1)
        stages = -(-count // size)
        options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps, "guess": guess}
        chosen = engine if stages > 2 else "auto"
        step = hbll.Objective("scan", engine=chosen if count % size == 0 or size == 1 else "loop", **options).prepare(
            net
        )(net, torch.randn(BATCH, 3), torch.tensor([0, 2]))
        levels = {"mean": 0, "star": 1, "tree": stages.bit_length()}[guess]  # ceil(log2(stages + 1)) of the tree
        longest = min(size, count)
        assert step.span == longest * (sweeps + credit_sweeps + 1) + levels
        # The update takes a product for every block's parameters, and one for every state inside of a stage.
        update = 2 * count - stages
        assert step.work == (sweeps + credit_sweeps) * count + update + (0 if guess == "mean" else 2 * stages)

    def test_the_rim_is_counted(self):
        net = countable(16)
        plain = hbll.Objective("scan", guess="mean", stage=3)(net, torch.randn(BATCH, 3), torch.tensor([0, 2]))
        for preset in ("paper", "tree", "scan"):
            counted, measured = measure(net, hbll.Objective(preset, stage=3, rim=0.3))
            assert counted == measured
        with_rim = hbll.Objective("scan", guess="mean", stage=3, rim=0.3)(
            net, torch.randn(BATCH, 3), torch.tensor([0, 2])
        )
        assert with_rim.work == plain.work + 3 * 4  # 8-12-14-15

    @every_engine
    @pytest.mark.parametrize("frozen", ["embed", "head", "blocks.1", "blocks"])
    @pytest.mark.parametrize("preset", ["scan", "stream"])
    def test_frozen_parts(self, preset, frozen, engine):
        net = countable(9)
        net.get_submodule(frozen).requires_grad_(False)
        objective = hbll.Objective(preset, stage=1 if engine == "batched" else 2, engine=engine)
        if preset == "stream":
            run_in(net, objective, 9)
        (work, span), (really, longest) = measure(net, objective)
        if engine == "loop" and frozen == "blocks.1" and preset == "stream":
            assert work >= really  # of a stage that is frozen in part, all products are counted
        elif frozen == "blocks" or (engine == "loop" and frozen == "blocks.1"):
            assert work >= really
            assert span >= longest
        else:
            assert (work, span) == (really, longest)


class TestAudit:
    """Rows are stages; the modules in them are blocks."""

    @staticmethod
    def rows(preset, **options):
        net, x, y = mlp(8)
        objective = hbll.Objective(preset, stage=3, **options).prepare(net)
        found = hbll.audit(net, objective, x, y)
        return found, {row.node: row for row in found.rows}

    @staticmethod
    def names(*blocks):
        return tuple(f"block {b}" if isinstance(b, int) else b for b in blocks)

    @pytest.mark.parametrize("preset", ["paper", "tree"])
    def test_trees(self, preset):
        # Stages 1-3, 4-6 and 7; the tree over them has 2 at the top, then 1 and 3.
        found, rows = self.rows(preset)
        assert [(n, row.left, row.right) for n, row in rows.items()] == [(1, 0, 2), (2, 0, 4), (3, 2, 4)]
        assert rows[1].reaches == self.names("embed", 1, 2, 3, 4, 5, 6)
        assert rows[1].uses == self.names(4, 5, 6)
        assert rows[2].reaches == self.names("embed", 4, 5, 6, "head")
        assert rows[3].reaches == self.names(7, "head")
        assert found.local

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

    def test_scan_without_credit_sweeps(self):
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
        _, rows = self.rows("stream", spine="none")
        assert rows[1].uses == ("head",)
        assert rows[1].reaches == self.names("embed", 1, 2, 3, "head")

    def test_greedy_stages_stay_within_themselves(self):
        found, rows = self.rows("stream", spine="none", heads="own")
        assert rows[1].reaches == self.names("embed", 1, 2, 3)
        assert rows[2].reaches == self.names(4, 5, 6)
        assert rows[3].reaches == self.names(7, "head")
        assert found.local

    def test_the_rim_has_a_row_of_its_own(self):
        _, rows = self.rows("scan", rim=0.3)
        assert rows["rim"].reaches == self.names("embed", 4, 6, 7, "head")

    @pytest.mark.parametrize(
        ("preset", "options"), [("scan", {"guess": "tree"}), ("stream", {}), ("scan", {"guess": "mean"})]
    )
    def test_nothing_that_a_rule_keeps_is_changed(self, preset, options):
        net, x, y = mlp(8)
        objective = hbll.Objective(preset, stage=2, **options).prepare(net)
        for _ in range(2):
            objective(net, x, y)
        before = tree_leaves(copy.deepcopy(objective.state_dict()))
        assert any(isinstance(leaf, torch.Tensor) for leaf in before)
        hbll.audit(net, objective, x + 1, y)
        objective.diagnose(net, x + 1, y)
        for now, then in zip(tree_leaves(objective.state_dict()), before, strict=True):
            assert torch.equal(now, then) if isinstance(then, torch.Tensor) else now == then
        assert objective.training


class TestRim:
    """The loss that keeps short paths alive: the mean of the label's loss at the rim's exits."""

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree", "scan", "stream", "bp", "pipeline"])
    @pytest.mark.parametrize(("nodes", "stage"), [(8, 1), (7, 2), (3, 1)])
    def test_autograd_of_its_definition(self, nodes, stage, preset, engine):
        net, x, y = mlp(nodes)
        if nodes == 3 or preset == "bp":
            engine = "auto"
        plain = hbll.Objective(preset, stage=stage, engine=engine)
        with_rim = hbll.Objective(preset, stage=stage, engine=engine, rim=0.3)
        for _ in range(3):
            without, step = plain(net, x, y), with_rim(net, x, y)
        rim = {8: (4, 6, 7), 7: (3, 5, 6), 3: (1, 2)}[nodes]  # floor of the middle, again and again
        state, exits = net.embed(x), []
        for n in rim:
            state = net.blocks[n - 1](state)
            exits.append(F.cross_entropy(net.head(state), y))
        expected = without.loss + 0.3 * sum(exits) / len(exits)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    def test_label_variance_divides_it(self):
        net, x, y = mlp(8)
        values = [hbll.Objective("bp", rim=r, label_variance=v)(net, x, y).loss.item() for r, v in [(0.3, 1), (0.3, 4)]]
        assert values[1] == pytest.approx(values[0] / 4)


class TestOptions:
    """What cannot be is refused by one sentence that names it."""

    @pytest.mark.parametrize(
        ("option", "choices"),
        [
            ("states", "tree, chain, scan, stream"),
            ("boundary", "posterior, prior"),
            ("credit", "arcs, exact, scan, spine, late"),
            ("scope", "block, triplet, tree"),
            ("inversion", "none, taylor, exact"),
            ("family", "gaussian, bernoulli, categorical"),
            ("guess", "ahead, mean, tree, star"),
            ("coarse", "skip, none"),
            ("spine", "doubling, right, last, none"),
            ("heads", "shared, own"),
            ("engine", "auto, loop, batched"),
        ],
    )
    def test_choices(self, option, choices):
        with pytest.raises(ValueError, match=f"^{option} is one of {choices}; got 'nonsense'$"):
            Rule(**{option: "nonsense"})

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"step": 0.0}, "step must be positive; got 0.0"),
            ({"variance": -1.0}, "variance must be positive"),
            ({"label_variance": 0.0}, "label_variance must be positive"),
            ({"spine_share": 0.0}, "spine_share must be positive"),
            ({"spine_share": float("nan")}, "spine_share must be positive"),
            ({"spine_share": 1.01}, "spine_share is at most 1; got 1.01"),
            ({"stage": 0}, "stage must be at least 1; got 0"),
            ({"stage": (2, 0, 1)}, r"stage must be at least 1; got \(2, 0, 1\)"),
            ({"stage": ()}, "stage must be at least 1"),
            ({"iterations": 0}, "iterations must be at least 1"),
            ({"sweeps": 0}, "sweeps must be at least 1; got 0"),
            ({"noise": -0.1}, "noise must not be negative"),
            ({"rim": -0.1}, "rim must not be negative; got -0.1"),
            ({"credit_sweeps": -1}, "credit_sweeps must not be negative; got -1"),
            ({"inversion": "exact", "family": "bernoulli"}, "exact inversion is for Gaussian states"),
            ({"states": "scan"}, "take boundary='prior'"),
            ({"states": "stream", "credit": "spine"}, "take boundary='prior'"),
            ({"credit": "spine"}, "take boundary='prior'"),
            ({"boundary": "prior", "credit": "exact"}, "take states='chain'"),
            ({"states": "scan", "boundary": "prior", "credit": "exact"}, "take states='chain'"),
            ({"states": "stream", "boundary": "prior", "credit": "arcs"}, "take credit='spine' or 'late'"),
            ({"states": "stream", "boundary": "prior", "credit": "scan"}, "take credit='spine' or 'late'"),
            ({"states": "chain", "boundary": "prior", "credit": "late"}, "take states='stream'"),
            ({"states": "scan", "boundary": "prior", "credit": "scan", "scope": "tree"}, "take scope='triplet'"),
            ({"states": "stream", "boundary": "prior", "credit": "spine", "scope": "tree"}, "take scope='triplet'"),
            ({"states": "chain", "boundary": "prior", "credit": "scan", "scope": "tree"}, "take scope='triplet'"),
            ({"states": "chain", "boundary": "prior", "path": "rim"}, "states='chain', credit='exact' only"),
            ({"states": "scan", "boundary": "prior", "credit": "scan", "path": 3}, "states='chain', credit='exact'"),
        ],
    )
    def test_values_and_combinations(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            Rule(**options)

    @pytest.mark.parametrize(
        "options", [{"spine_share": 1.0}, {"sweeps": 1}, {"credit_sweeps": 0}, {"tolerance": 0}, {"stage": 1}]
    )
    def test_limits_are_allowed(self, options):
        rule = hbll.Objective("scan", **options).rule
        assert all(getattr(rule, name) == value for name, value in options.items())
