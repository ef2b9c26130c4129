"""The rule stream. Oracles: the pseudo-code of the specification, transcribed with its update; the chain; brute force."""

import copy
import io
from itertools import accumulate, combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import parents
from tests.test_objective import (
    CLASSES,
    INPUTS,
    WIDTH,
    Layer,
    assert_equal_gradients,
    convolutional,
    gradients,
    mlp,
    transformer,
)
from tests.test_scan_rule import Bounded, chain_states
from torch import nn

import hbll
from hbll.credit import spine
from hbll.tree import Tree

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])
# Tanh layers have no skip, the other two have.
KINDS = {"mlp": mlp, "convolutional": convolutional, "transformer": transformer}


def batches(kind, count, seed=1):
    """Mini-batches like those of the networks of tests/test_objective.py."""
    torch.manual_seed(seed)
    for _ in range(count):
        if kind == "transformer":
            yield torch.randint(11, (4, 7)), torch.randint(CLASSES, (4, 7))
        else:
            shape = (4, 2, 5, 4) if kind == "convolutional" else (4, INPUTS)
            yield torch.randn(*shape, dtype=torch.float64), torch.randint(CLASSES, (4,))


def label_loss(logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def next_position(n, position, last, kind):
    """Where the output of stage n jumps from ``position``; None if to the head."""
    if position == last or kind == "none":
        return None
    if kind == "last":
        return last
    if kind == "right":
        (right,) = (j for level in parents(last + 1) for m, _, j in level if m == position)
        return right if right <= last else None
    # n -> n + 1 -> n + 3 -> n + 7 .. -> S
    distance = 2 * (position - n) + 1
    return min(n + distance, last)


class Reference:
    """The specification's pseudo-code, stage by stage, with what is in flight."""

    def __init__(self, net, size, kind="doubling"):
        self.net, self.kind = net, kind
        blocks = list(net.blocks)
        borders = [*range(0, len(blocks), size), len(blocks)] if isinstance(size, int) else [0, *accumulate(size)]
        self.stages = [blocks[start:end] for start, end in pairwise(borders)]
        self.inputs, self.labels = {}, {}

    def loss(self, x, y):
        last = len(self.stages)
        self.inputs[1], self.labels[1] = self.net.embed(x), y
        total, later, later_labels = 0.0, {}, {}
        for n in sorted(self.inputs):
            out = self.inputs[n]
            for block in self.stages[n - 1]:
                out = block(out)
            if n < last:
                later[n + 1], later_labels[n + 1] = out.detach(), self.labels[n]
            current, position = out, n
            while (jump := next_position(n, position, last, self.kind)) is not None:
                position = jump
                current = self.stages[position - 1][-1](current)
            total = total + label_loss(self.net.head(current), self.labels[n])
        self.inputs, self.labels = later, later_labels
        return total


class TestPseudoCode:
    """Several steps of the specification's pseudo-code with a plain SGD update, to float64 rounding."""

    @pytest.mark.parametrize(
        ("kind", "size", "jumps", "engine"),
        [
            ("mlp", 1, "doubling", "loop"),
            ("mlp", 1, "doubling", "batched"),
            ("mlp", 2, "doubling", "batched"),
            ("mlp", 3, "doubling", "loop"),
            ("mlp", 1, "right", "loop"),
            ("mlp", 1, "right", "batched"),
            ("mlp", 2, "right", "loop"),
            ("mlp", 1, "none", "batched"),
            ("mlp", 3, "none", "loop"),
            ("mlp", 9, "doubling", "auto"),
            ("mlp", 1, "last", "batched"),
            ("mlp", (2, 2, 3), "last", "loop"),
            ("mlp", (2, 3, 2), "right", "batched"),
            ("mlp", (1, 2, 3, 1), "doubling", "batched"),
            ("convolutional", 2, "doubling", "loop"),
            ("transformer", 2, "doubling", "batched"),
            ("transformer", 3, "right", "loop"),
        ],
    )
    def test_parameters_after_several_steps(self, kind, size, jumps, engine):
        net, _, _ = KINDS[kind](8)
        other = copy.deepcopy(net)
        objective = hbll.Objective("stream", stage=size, spine=jumps, engine=engine)
        reference = Reference(other, size, jumps)
        moved = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (net, other)]
        for x, y in batches(kind, 11):
            step, loss = objective(net, x, y), reference.loss(x, y)
            torch.testing.assert_close(step.loss.detach(), loss.detach())
            for optimizer, value in zip(moved, (step.loss, loss), strict=True):
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        if size != 9:
            kept = torch.stack([reference.inputs[n] for n in sorted(reference.inputs)])
            torch.testing.assert_close(objective.states.flight.nest["inputs"], kept)
            assert torch.equal(
                objective.states.flight.nest["labels"], torch.stack([reference.labels[n] for n in reference.labels])
            )

    @every_engine
    def test_every_gradient_while_it_fills(self, engine):
        net, _, _ = mlp(6)
        objective, reference = hbll.Objective("stream", engine=engine), Reference(net, 1)
        for number, (x, y) in enumerate(batches("mlp", 7), 1):
            step, loss = objective(net, x, y), reference.loss(x, y)
            found = gradients(net, step.loss)
            assert_equal_gradients(found, gradients(net, loss))
            assert set(step.nodes) == set(range(1, min(number, 5) + 1))

    def test_exact_states_alone(self):
        # The states of the chain with spine credit: what the pipeline costs is then zero.
        net, x, y = mlp(8)
        states = [net.embed(x)]
        for block in net.blocks:
            states.append(block(states[-1].detach() if len(states) > 1 else states[-1]))
        total = 0.0
        for n in range(1, 8):
            current, position = states[n], n
            while (position := next_position(n, position, 7, "doubling")) is not None:
                current = net.blocks[position - 1](current)
            total = total + F.cross_entropy(net.head(current), y)
        step = hbll.Objective("stream", states="chain")(net, x, y)
        torch.testing.assert_close(step.loss.detach(), total.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, total))


class TestStates:
    """What is in flight."""

    @pytest.mark.parametrize("size", [1, 3])
    @pytest.mark.parametrize(
        ("kind", "engine"), [*((kind, "loop") for kind in KINDS), ("mlp", "batched"), ("convolutional", "batched")]
    )
    def test_with_frozen_weights_they_are_the_chains_own(self, kind, size, engine):
        net, x, y = KINDS[kind](8)
        objective = hbll.Objective("stream", stage=size, engine=engine)
        numbers = objective.stages(net).numbers
        for x_other, y_other in batches(kind, 3):
            objective(net, x_other, y_other)
        for _ in range(len(numbers)):
            step = objective(net, x, y)
        state = net.embed(x).detach()
        for n, stage in enumerate(numbers):
            tolerance = {"rtol": 0, "atol": 0} if engine == "loop" else {}
            torch.testing.assert_close(step.trace.boundary[n].detach(), state, **tolerance)
            if n:
                torch.testing.assert_close(objective.states.flight.nest["inputs"][n - 1], state, **tolerance)
                assert torch.equal(objective.states.flight.nest["labels"][n - 1], y)
            for block in stage:
                state = net.blocks[block - 1](state).detach()
            torch.testing.assert_close(step.trace.outputs((n + 1,))[0], state, **tolerance)

    def test_every_batch_passes_every_stage_once(self):
        net, _, _ = mlp(5)
        objective = hbll.Objective("stream", engine="loop")
        seen = list(batches("mlp", 9))
        for t, (x, y) in enumerate(seen):
            step = objective(net, x, y)
            for n in range(1, 5):
                if t - (n - 1) < 0:
                    assert n not in step.nodes
                    continue
                state = net.embed(seen[t - (n - 1)][0])
                for block in net.blocks[: n - 1]:
                    state = block(state)
                torch.testing.assert_close(step.trace.boundary[n - 1], state)
                assert torch.equal(step.trace.labels[n - 1], seen[t - (n - 1)][1])

    @pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "older"])
    def test_it_continues_exactly_from_mid_flight(self, way):
        net, _, _ = mlp(8)
        objective = hbll.Objective("stream", engine="loop")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def train(objective, net, optimizer, seen):
            for x, y in seen:
                optimizer.zero_grad()
                objective(net, x, y).loss.backward()
                optimizer.step()

        train(objective, net, optimizer, batches("mlp", 4))
        twin = copy.deepcopy(net)
        if way == "deepcopy":
            other = copy.deepcopy(objective)
        else:
            other = hbll.Objective("stream", engine="loop")
            saved = objective.state_dict()
            assert set(saved) == {"states.flight._extra_state"}
            if way == "file":
                file = io.BytesIO()
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            if way == "older":  # an objective that holds something else already
                other(twin, *next(batches("mlp", 1, seed=7)))
            other.load_state_dict(saved)
        train(objective, net, optimizer, batches("mlp", 6, seed=2))
        train(other, twin, torch.optim.SGD(twin.parameters(), lr=0.1), batches("mlp", 6, seed=2))
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
        assert torch.equal(objective.states.flight.nest["inputs"], other.states.flight.nest["inputs"])
        # And it matters: an objective that starts anew goes another way.
        twin.load_state_dict({name: p + 0 for name, p in twin.state_dict().items()})
        x, y = next(batches("mlp", 1, seed=3))
        assert hbll.Objective("stream")(twin, x, y).loss.item() != objective(net, x, y).loss.item()

    @every_engine
    def test_another_batch_size_is_refused(self, engine):
        net, x, y = mlp(8)
        objective = hbll.Objective("stream", engine=engine)
        objective(net, x, y)
        kept = objective.states.flight.nest["inputs"].clone()
        with pytest.raises(ValueError, match=r"batches of one size: states are \(3, 6\) now and were \(4, 6\) before"):
            objective(net, x[:3], y[:3])
        assert torch.equal(objective.states.flight.nest["inputs"], kept)
        objective(net, x, y)

    def test_in_evaluation_the_batch_passes_all_stages(self):
        net, x, y = mlp(8)
        objective = hbll.Objective("stream", spine="none")
        for other in batches("mlp", 3):
            objective(net, *other)
        kept = objective.states.flight.nest["inputs"].clone()
        objective.eval()
        step = objective(net, x[:3], y[:3])
        state = net.embed(x[:3])
        for n, block in enumerate(net.blocks, 1):
            state = block(state)
            assert step.nodes[n].error == pytest.approx(F.cross_entropy(net.head(state), y[:3]).item())
        assert torch.equal(objective.states.flight.nest["inputs"], kept)

    def test_states_are_kept_without_graph(self):
        net, x, y = mlp(8)
        objective = hbll.Objective("stream")
        objective(net, x, y)
        assert not objective.states.flight.nest["inputs"].requires_grad
        assert objective.states.flight.nest["inputs"].grad_fn is None


class TestErrorBound:
    """Of the credit that a spine gives, by the Jacobians of jumps and chain (docs/full-depth.md)."""

    @settings(max_examples=30, deadline=None)
    @given(
        blocks=st.integers(1, 12),
        kind=st.sampled_from(["doubling", "right", "last", "none"]),
        lipschitz=st.floats(0.02, 1),
        seed=st.integers(0, 1000),
    )
    def test_by_jacobians(self, blocks, kind, lipschitz, seed):
        torch.manual_seed(seed)
        chain = [Bounded(5, lipschitz) for _ in range(blocks)]
        net = hbll.TreeNetwork(nn.Linear(INPUTS, WIDTH), chain, nn.Linear(WIDTH, CLASSES)).double()
        x, y = torch.randn(1, INPUTS, dtype=torch.float64), torch.tensor([1])
        credit = hbll.Objective("stream", states="chain", spine=kind)(net, x, y).trace.gradient
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

        for n in range(1, blocks + 1):
            jumps, position = [], n
            while (position := next_position(n, position, blocks, kind)) is not None:
                jumps.append(position)
            landing, spine_way, at_landing = follow(states[n], jumps)
            _, chain_way, at_end = follow(states[n], range(n + 1, blocks + 1))
            error = (credit[n] - at_end @ chain_way).norm()
            mismatch, head_changed = (torch.linalg.matrix_norm(spine_way - chain_way, 2), (at_landing - at_end).norm())
            length = torch.linalg.matrix_norm(spine_way, 2)
            assert error <= mismatch * at_end.norm() + length * head_changed + 1e-12
            # What the two sides are at most, for residual blocks.
            assert (
                mismatch <= (1 + lipschitz) ** (blocks - n) + (1 + lipschitz) ** len(jumps) - 2 + 1e-6
            )  # drawn in float32
            curvature = torch.linalg.matrix_norm(net.head.weight, 2) ** 2 / 2  # of the cross-entropy
            assert head_changed <= curvature * (landing - states[-1]).norm() + 1e-12


class TestSpine:
    """The jumps of every stage."""

    @pytest.mark.parametrize("kind", ["doubling", "right", "last", "none"])
    @given(last=st.integers(1, 70))
    def test_brute_force(self, kind, last):
        tree = Tree(last + 1)
        for n in range(1, last + 1):
            position, expected = n, []
            while (position := next_position(n, position, last, kind)) is not None:
                expected.append(position)
            found = spine(n, tree, kind)
            assert list(found) == expected
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
        assert spine(1, tree, "none") == ()


class TestShare:
    """Spine credit for a few stages, drawn anew each step."""

    @staticmethod
    def full(net, x, y, engine, jumps):
        full = hbll.Objective("stream", spine=jumps, engine=engine)
        for _ in range(4):
            step = full(net, x, y)
        return step

    @every_engine
    @pytest.mark.parametrize("jumps", ["doubling", "none"])
    @pytest.mark.parametrize(("share", "count"), [(0.5, 2), (0.01, 1)])
    def test_unbiased_and_bounded(self, share, count, jumps, engine):
        net, x, y = mlp(5)
        whole = self.full(net, x, y, engine, jumps)
        objective = hbll.Objective("stream", spine=jumps, spine_share=share, engine=engine)
        for _ in range(4):
            objective(net, x, y)
        torch.manual_seed(0)
        draws = {}
        for _ in range(30):
            step = objective(net, x, y)
            draws[tuple(step.nodes)] = gradients(net, step.loss)
            assert len(step.nodes) == count
            if engine == "loop":  # stacked with others, a stage is walked back through all the same
                assert step.work < whole.work
            assert step.work <= whole.work
        # Every choice occurs, and their mean is the gradient of all stages.
        assert set(draws) == set(combinations(range(1, 5), count))
        exact = gradients(net, whole.loss)
        mean = {name: torch.stack([found[name] for found in draws.values()]).mean(0) for name in exact}
        assert_equal_gradients(mean, exact)

    @every_engine
    def test_stages_without_credit_stay(self, engine):
        net, x, y = mlp(9)
        objective = hbll.Objective("stream", spine="none", spine_share=0.3, engine=engine)
        torch.manual_seed(0)
        for _ in range(10):
            step = objective(net, x, y)
            found = gradients(net, step.loss)
            for n in range(1, 9):
                assert (found[f"blocks.{n - 1}.linear.weight"].abs().max() > 0) == (n in step.nodes)
            assert (found["embed.weight"].abs().max() > 0) == (1 in step.nodes)

    def test_a_diagnosis_is_of_all_stages_and_draws_nothing(self):
        net, x, y = mlp(9)
        objective = hbll.Objective("stream", spine_share=0.3)
        before = torch.get_rng_state()
        assert list(objective.diagnose(net, x, y)) == list(range(1, 9))
        assert torch.equal(torch.get_rng_state(), before)

    def test_every_stage_still_streams(self):
        net, x, y = mlp(5)
        sparse, full = hbll.Objective("stream", spine_share=0.25), hbll.Objective("stream")
        for x, y in batches("mlp", 5):
            sparse(net, x, y)
            full(net, x, y)
        torch.testing.assert_close(sparse.states.flight.nest["inputs"], full.states.flight.nest["inputs"])


class TestOwnHeads:
    """Greedy stages."""

    def test_heads_must_be_prepared(self):
        net, x, y = mlp(8)
        objective = hbll.Objective("stream", heads="own", spine="none")
        with pytest.raises(
            ValueError, match=r"0 heads for 6 stages before the last: call objective.prepare\(network\)"
        ):
            objective(net, x, y)

    @pytest.mark.parametrize("nodes", [7, 9])
    def test_heads_are_of_one_network(self, nodes):
        objective = hbll.Objective("stream", heads="own", spine="none").prepare(mlp(8)[0])
        other, x, y = mlp(nodes)
        with pytest.raises(ValueError, match=f"6 heads for {nodes - 2} stages .*an objective for each network"):
            objective(other, x, y)

    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize(
        ("kind", "engine"), [("mlp", "batched"), ("convolutional", "loop"), ("transformer", "loop")]
    )
    def test_by_autograd(self, size, kind, engine):
        net, x, y = KINDS[kind](8)
        objective = hbll.Objective("stream", stage=size, heads="own", spine="none", engine=engine).prepare(net)
        numbers = objective.stages(net).numbers
        heads = [*objective.credit.heads, net.head]
        assert len(heads) == len(numbers)
        for _ in numbers:
            step = objective(net, x, y)
        state, total = net.embed(x), 0.0
        for head, stage in zip(heads, numbers, strict=True):
            for n in stage:
                state = net.blocks[n - 1](state)
            total = total + label_loss(head(state), y)
            state = state.detach()
        model = nn.ModuleList([net, objective])
        assert_equal_gradients(gradients(model, step.loss), gradients(model, total))

    def test_heads_are_fresh(self):
        net, _, _ = mlp(8)
        objective = hbll.Objective("stream", heads="own", spine="none").prepare(net)
        assert len({id(p) for head in [*objective.credit.heads, net.head] for p in head.parameters()}) == 2 * 7
        for head in objective.credit.heads:
            assert head.weight.shape == net.head.weight.shape
            assert not torch.equal(head.weight, net.head.weight)

    def test_stages_are_independent_of_each_other(self):
        net, x, y = mlp(8)
        objective = hbll.Objective("stream", heads="own", spine="none").prepare(net)
        for _ in range(7):
            step = objective(net, x, y)
        before = gradients(net, step.loss)
        with torch.no_grad():
            for block in net.blocks[4:]:
                block.linear.weight.mul_(0.5)
            net.head.weight.mul_(2.0)
        after = gradients(net, objective(net, x, y).loss)
        for n in range(4):
            torch.testing.assert_close(
                after[f"blocks.{n}.linear.weight"], before[f"blocks.{n}.linear.weight"], rtol=0, atol=0
            )
        assert not torch.equal(after["blocks.4.linear.weight"], before["blocks.4.linear.weight"])

    def test_heads_are_saved(self):
        net, x, y = mlp(4)
        objective = hbll.Objective("stream", heads="own").prepare(net)
        other = hbll.Objective("stream", heads="own").prepare(net)
        assert objective(net, x, y).loss.item() != other(net, x, y).loss.item()
        other.load_state_dict(objective.state_dict())
        assert objective(net, x, y).loss.item() == other(net, x, y).loss.item()


def test_training_lowers_the_chains_loss_without_skips():
    net, x, y = mlp(8, block=Layer)
    objective = hbll.Objective("stream")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    before = F.cross_entropy(net(x), y).item()
    for _ in range(60):
        optimizer.zero_grad()
        objective(net, x, y).loss.backward()
        optimizer.step()
    assert F.cross_entropy(net(x), y).item() < 0.5 * before
