"""Stream and greedy. Oracles: the pseudo-code of the specification, transcribed with its update; autograd; brute force."""

import copy
import weakref
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.networks import (
    CLASSES,
    INPUTS,
    KINDS,
    WIDTH,
    Bounded,
    assert_equal_gradients,
    batches,
    chain_states,
    gradients,
    mlp,
)
from tests.oracles.stream_step import StreamStep, jumps
from torch import nn

from hbll import Chain, Step, make_rule
from hbll.rules.readouts import spine
from hbll.tree import Tree

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])


def passing(way):
    """The options of stream for a spine of that kind, or for none."""
    return {"readout": "head"} if way == "none" else {"spine": way}


def errors(step):
    return {n: report.error for n, report in step.reports.items()}


def own_heads(rule):
    return [readout.head for readout in rule.credit.own]


def values(losses):
    return {n: pytest.approx(loss.item()) for n, loss in losses.items()}


class TestPseudoCode:
    """Several steps of the specification's pseudo-code with a plain SGD update, to float64 rounding."""

    @pytest.mark.parametrize(
        ("kind", "size", "way", "engine", "sizes"),
        [
            ("mlp", 1, "doubling", "loop", (4,)),
            ("mlp", 1, "doubling", "batched", (4,)),
            ("mlp", 2, "doubling", "batched", (4, 2, 2)),  # batches of other sizes in flight
            ("mlp", 3, "right", "loop", (4, 3, 1)),
            ("mlp", 1, "right", "batched", (4, 3)),
            ("mlp", 1, "none", "batched", (4,)),
            ("mlp", 9, "doubling", "auto", (4, 1)),
            ("mlp", (2, 2, 3), "last", "loop", (4,)),
            ("mlp", (1, 2, 3, 1), "doubling", "batched", (4,)),
            ("convolutional", 2, "doubling", "loop", (4, 2)),
            ("transformer", 2, "doubling", "batched", (4, 4, 1)),
            ("transformer", 3, "right", "loop", (4,)),
        ],
    )
    def test_parameters_after_several_steps(self, kind, size, way, engine, sizes):
        net, _, _ = KINDS[kind][0](8)
        other = copy.deepcopy(net)
        rule, oracle = make_rule("stream", net, stage=size, **passing(way), engine=engine), StreamStep(other, size, way)
        moved = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (net, other)]
        for batch in [*batches(9, kind, sizes=sizes), (None, None), (None, None)]:  # in the end no new ones come in
            if not oracle.inputs and batch[0] is None:
                break
            step, losses = rule(*batch), oracle.losses(*batch)
            torch.testing.assert_close(step.loss.detach(), sum(losses.values()).detach())
            assert errors(step) == values(losses)
            for optimizer, value in zip(moved, (step.loss, sum(losses.values())), strict=True):
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        kept = rule.carry()["kept"]["stream"]
        assert set(kept) == set(oracle.inputs)
        for n, left in kept.items():
            torch.testing.assert_close(left["state"], oracle.inputs[n])
            assert not left["state"].requires_grad
            assert torch.equal(left["labels"], oracle.labels[n])

    @every_engine
    def test_every_gradient_while_it_fills_and_empties(self, engine):
        net, _, _ = mlp(6)
        rule, oracle = make_rule("stream", net, engine=engine), StreamStep(net, 1)
        for batch in batches(7):
            step, losses = rule(*batch), oracle.losses(*batch)
            assert_equal_gradients(gradients(net, step.loss), gradients(net, sum(losses.values())))
            assert errors(step) == values(losses)
            assert (step.label_loss is not None) == (5 in losses)
            assert 5 not in losses or step.label_loss.item() == values(losses)[5]
        while rule.in_flight:
            step, losses = rule(None, None), oracle.losses()
            assert_equal_gradients(gradients(net, step.loss), gradients(net, sum(losses.values())))
            assert errors(step) == values(losses)
        assert set(losses) == {5}
        with pytest.raises(ValueError, match="there is no mini-batch in flight"):
            rule(None, None)
        assert errors(rule(*batches(1)[0])).keys() == {1}  # and it fills again

    @pytest.mark.parametrize(
        ("kind", "size", "way", "name"),
        [
            ("mlp", 1, "doubling", "stream"),
            ("mlp", (3, 4), "last", "stream"),
            ("convolutional", 3, "right", "stream"),
            ("transformer", 2, "none", "greedy"),
            ("mlp", 1, "none", "greedy"),
        ],
    )
    def test_in_order_within_the_step(self, kind, size, way, name):
        # The states of the chain with spine credit: what the pipeline costs is then zero.
        net, x, y = KINDS[kind][0](8)
        rule = make_rule(name, net, stage=size, **passing(way), states="chain")
        losses = StreamStep(net, size, way, heads=own_heads(rule), flight=False).losses(x, y)
        step = rule(x, y)
        torch.testing.assert_close(step.loss.detach(), sum(losses.values()).detach())
        torch.testing.assert_close(step.label_loss, losses[len(rule.stages)].detach())
        assert errors(step) == values(losses)
        assert_equal_gradients(gradients(rule, step.loss), gradients(rule, sum(losses.values())))
        assert rule.carry() == {}


class TestOrder:
    """With states="chain" a stage is evaluated once the loss of the one before was walked back and its graph dropped."""

    @pytest.mark.parametrize(("name", "way"), [("greedy", "none"), ("stream", "last"), ("stream", "doubling")])
    def test_stage_by_stage(self, name, way):
        net, x, y = mlp(8)
        calls, alive = [], weakref.WeakSet()
        for n, block in enumerate(net.blocks, 1):
            block.register_forward_hook(lambda *_, n=n: calls.append(n))

        class Saved:
            def __init__(self, tensor):
                self.tensor = tensor.detach()
                alive.add(self)

        rule = make_rule(name, net, stage=2, **passing(way), states="chain")
        oracle = StreamStep(net, 2, way, heads=own_heads(rule), flight=False)
        most, stages, each = 0, [], []
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            for loss in rule.losses(x, y, Step()):
                stages.append(loss.stage)
                if loss.stage != "embed":
                    own = [n for n in (2 * loss.stage - 1, 2 * loss.stage) if n < 8]
                    assert calls == own + [min(2 * n, 7) for n in jumps(loss.stage, 4, way)]
                most = max(most, len(alive))
                loss.value.backward()
                calls.clear()
                del loss
            assert not alive
            losses = oracle.losses(x, y)
            everything = len(alive)
            for n in list(losses):
                before = len(alive)
                del losses[n]
                each.append(before - len(alive))
        assert stages == [1, "embed", 2, 3, 4]
        # What autograd keeps for one stage and its spine, and for a mean with weights.
        assert most <= max(each) + 2
        assert everything == sum(each) > 2.5 * most


class TestStates:
    """What is in flight."""

    @pytest.mark.parametrize(
        ("kind", "size", "engine"),
        [("mlp", 1, "loop"), ("mlp", 3, "batched"), ("convolutional", 1, "batched"), ("transformer", 2, "loop")],
    )
    def test_with_frozen_weights_they_are_the_chains_own(self, kind, size, engine):
        net, x, y = KINDS[kind][0](8)
        rule = make_rule("stream", net, stage=size, engine=engine)
        for batch in [*batches(3, kind), *[(x, y)] * len(rule.stages)]:
            rule(*batch)
        states = chain_states(net, x)
        tolerance = {"rtol": 0, "atol": 0} if engine == "loop" else {}
        for n, left in rule.carry()["kept"]["stream"].items():
            torch.testing.assert_close(left["state"], states[(n - 1) * size].detach(), **tolerance)
            assert torch.equal(left["labels"], y)

    def test_in_evaluation_the_batch_passes_all_stages(self):
        net, x, y = mlp(8)
        rule = make_rule("stream", net, readout="head")
        for other in batches(3):
            rule(*other)
        rule.eval()
        expected = values(StreamStep(net, 1, "none", flight=False).losses(x[:3], y[:3]))
        step = rule(x[:3], y[:3])
        assert errors(step) == expected
        with torch.no_grad():
            alone = rule(x[:3], y[:3])
        assert not alone.loss.requires_grad
        assert torch.equal(alone.loss, step.loss)


class Shifted(Bounded):
    """A bounded block with a shift, whose gradient is that of its output."""

    def __init__(self, *bounds):
        super().__init__(*bounds)
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, state):
        return super().forward(state) + self.shift


class TestErrorBound:
    """Of the credit that a spine gives, by the Jacobians of jumps and chain (docs/full-depth.md)."""

    @settings(max_examples=30)
    @given(
        blocks=st.integers(1, 12),
        kind=st.sampled_from(["doubling", "right", "last", "none"]),
        lipschitz=st.floats(0.02, 1),
        seed=st.integers(0, 1000),
    )
    def test_by_jacobians(self, blocks, kind, lipschitz, seed):
        torch.manual_seed(seed)
        chain = [Shifted(5, lipschitz) for _ in range(blocks)]
        net = Chain(nn.Linear(INPUTS, WIDTH), chain, nn.Linear(WIDTH, CLASSES)).double()
        x, y = torch.randn(1, INPUTS, dtype=torch.float64), torch.tensor([1])
        losses = make_rule("stream", net, states="chain", **passing(kind)).losses(x, y, Step())
        # Each stage's own loss: those of others reach its block by their spines. The embed is walked back by itself.
        credit = {
            loss.stage: torch.autograd.grad(loss.value, net.blocks[loss.stage - 1].shift)[0]
            for loss in losses
            if loss.stage != "embed"
        }
        states = [state.detach() for state in chain_states(net, x)]

        def follow(state, numbers):
            """Where some blocks lead, the Jacobian of the way, and the gradient of the head's loss there."""
            way = torch.eye(WIDTH, dtype=torch.float64)
            for number in numbers:
                block = net.blocks[number - 1]
                way = torch.func.jacrev(lambda z, block=block: block(z.unsqueeze(0)).squeeze(0))(state[0]) @ way
                state = block(state)
            at_head = torch.func.grad(lambda z: F.cross_entropy(net.head(z), y))(state)
            return state, way.detach(), at_head.detach()

        assert sorted(credit) == list(range(1, blocks + 1))
        for n in range(1, blocks + 1):
            passed = jumps(n, blocks, kind)
            landing, spine_way, at_landing = follow(states[n], passed)
            _, chain_way, at_end = follow(states[n], range(n + 1, blocks + 1))
            error = (credit[n] - at_end @ chain_way).norm()
            mismatch, head_changed = (torch.linalg.matrix_norm(spine_way - chain_way, 2), (at_landing - at_end).norm())
            length = torch.linalg.matrix_norm(spine_way, 2)
            assert error <= mismatch * at_end.norm() + length * head_changed + 1e-12
            # What the two sides are at most, for residual blocks.
            assert (
                mismatch <= (1 + lipschitz) ** (blocks - n) + (1 + lipschitz) ** len(passed) - 2 + 1e-6
            )  # drawn in float32
            curvature = torch.linalg.matrix_norm(net.head.weight, 2) ** 2 / 2  # of the cross-entropy
            assert head_changed <= curvature * (landing - states[-1]).norm() + 1e-12


class TestSpine:
    """The jumps of every stage."""

    @pytest.mark.parametrize("kind", ["doubling", "right", "last"])
    @given(last=st.integers(1, 70))
    @settings(max_examples=20)
    def test_brute_force(self, kind, last):
        tree = Tree(last + 1)
        for n in range(1, last + 1):
            found = spine(n, tree, kind)
            assert list(found) == jumps(n, last, kind)
            assert all(a < b for a, b in pairwise((n, *found)))
            assert 2 ** (len(found) - 1) <= last  # at most log2 S + 1 jumps
            if kind == "doubling" and n < last:
                assert found[-1] == last

    def test_fifteen_stages(self):
        tree = Tree(16)
        assert spine(1, tree, "doubling") == (2, 4, 8, 15)
        assert spine(8, tree, "doubling") == (9, 11, 15)
        assert spine(14, tree, "doubling") == (15,)
        assert spine(15, tree, "doubling") == ()
        assert spine(5, tree, "right") == (6, 8)


class TestShare:
    """Spine credit for a few stages, drawn anew each step."""

    @pytest.mark.parametrize(
        ("share", "count", "way", "engine"),
        [(0.5, 2, "doubling", "loop"), (0.01, 1, "doubling", "batched"), (0.5, 2, "none", "batched")],
    )
    def test_unbiased_and_bounded(self, share, count, way, engine):
        net, x, y = mlp(5)
        whole, rule = (make_rule("stream", net, **passing(way), engine=engine, spine_share=s) for s in (1.0, share))
        for _ in range(4):
            full, _ = whole(x, y), rule(x, y)
        torch.manual_seed(0)
        draws = {}
        for _ in range(30):
            step = rule(x, y)
            draws[tuple(step.reports)] = gradients(net, step.loss)
            assert len(step.reports) == count
            if engine == "loop":  # stacked with others, a stage is walked back through all the same
                assert step.work < full.work
            assert step.work <= full.work
        # Every choice occurs, and their mean is the gradient of all stages.
        assert set(draws) == set(combinations(range(1, 5), count))
        exact = gradients(net, full.loss)
        mean = {name: torch.stack([found[name] for found in draws.values()]).mean(0) for name in exact}
        assert_equal_gradients(mean, exact)

    @pytest.mark.parametrize(("states", "engine"), [("stream", "loop"), ("stream", "batched"), ("chain", "loop")])
    def test_stages_without_credit_stay(self, states, engine):
        net, x, y = mlp(9)
        rule = make_rule("stream", net, readout="head", spine_share=0.3, states=states, engine=engine)
        torch.manual_seed(0)
        for _ in range(10):
            step = rule(x, y)
            found = gradients(net, step.loss)
            for n in range(1, 9):
                assert (found[f"blocks.{n - 1}.linear.weight"].abs().max() > 0) == (n in step.reports)
            assert (found["embed.weight"].abs().max() > 0) == (1 in step.reports)

    def test_a_diagnosis_is_of_all_stages_and_draws_nothing(self):
        net, x, y = mlp(9)
        before = torch.get_rng_state()
        assert list(make_rule("stream", net, spine_share=0.3).diagnose(x, y)) == list(range(1, 9))
        assert torch.equal(torch.get_rng_state(), before)

    def test_every_stage_still_streams(self):
        net, _, _ = mlp(5)
        sparse, full = make_rule("stream", net, spine_share=0.25), make_rule("stream", net)
        for batch in batches(5):
            sparse(*batch)
            full(*batch)
        kept = [rule.carry()["kept"]["stream"] for rule in (sparse, full)]
        for n in (2, 3, 4):
            torch.testing.assert_close(kept[0][n]["state"], kept[1][n]["state"])


class TestGreedy:
    """Stages with heads of their own."""

    @pytest.mark.parametrize(
        ("kind", "size", "engine"), [("mlp", 1, "batched"), ("convolutional", 2, "loop"), ("transformer", 3, "loop")]
    )
    def test_by_autograd(self, kind, size, engine):
        net, _, _ = KINDS[kind][0](8)
        rule = make_rule("greedy", net, stage=size, engine=engine)
        oracle = StreamStep(net, size, "none", heads=own_heads(rule))
        for batch in batches(len(rule.stages) + 1, kind, sizes=(4, 2)):
            step, loss = rule(*batch), oracle.loss(*batch)
            assert_equal_gradients(gradients(rule, step.loss), gradients(rule, loss))

    def test_heads_are_copies(self):
        net, _, _ = mlp(8)
        heads = own_heads(make_rule("greedy", net))
        assert len({id(p) for head in [*heads, net.head] for p in head.parameters()}) == 2 * 7
        for head in heads:
            assert torch.equal(head.weight, net.head.weight)

    def test_stages_are_independent_of_each_other(self):
        net, x, y = mlp(8)
        rule = make_rule("greedy", net)
        for _ in range(7):
            step = rule(x, y)
        before = gradients(net, step.loss)
        with torch.no_grad():
            for block in net.blocks[4:]:
                block.linear.weight.mul_(0.5)
            net.head.weight.mul_(2.0)
        after = gradients(net, rule(x, y).loss)
        for n in range(4):
            name = f"blocks.{n}.linear.weight"
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
        assert not torch.equal(after["blocks.4.linear.weight"], before["blocks.4.linear.weight"])

    @pytest.mark.parametrize("states", ["stream", "chain"])
    def test_states_may_change_shape_where_nothing_jumps(self, states):
        class Sums(nn.Module):
            """A head of any width."""

            def forward(self, state):
                return state.cumsum(-1)[:, :CLASSES]

        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise((WIDTH, 5, 5, 4))]
        net = Chain(nn.Linear(INPUTS, WIDTH), blocks, Sums()).double()
        rule, oracle = make_rule("greedy", net, states=states), StreamStep(net, 1, "none", flight=states == "stream")
        seen = batches(3)
        for batch in seen:
            assert_equal_gradients(gradients(net, rule(*batch).loss), gradients(net, oracle.loss(*batch)))
        jumping = make_rule("stream", net, spine="last", states=states)
        with pytest.raises(ValueError, match=r"block 3 changes the state's shape from \(4, 5\) to \(4, 4\)"):
            jumping(*seen[0])


def test_training_lowers_the_chains_loss_without_skips():
    net, x, y = mlp(8)
    rule = make_rule("stream", net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    before = F.cross_entropy(net(x), y).item()
    for _ in range(60):
        optimizer.zero_grad()
        rule(x, y).loss.backward()
        optimizer.step()
    assert F.cross_entropy(net(x), y).item() < 0.5 * before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"spine_share": 0.0}, "spine_share must be positive"),
        ({"spine_share": float("nan")}, "spine_share must be positive"),
        ({"spine_share": 1.01}, "spine_share is at most 1; got 1.01"),
        ({"states": "tree"}, "states is one of stream, chain; got 'tree'"),
        ({"spine": "nonsense"}, "spine is one of doubling, right, last; got 'nonsense'"),
        ({"readout": "nonsense"}, "readout is one of spine, head, solo; got 'nonsense'"),
    ],
)
def test_values_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule("stream", mlp(8)[0], **options)
