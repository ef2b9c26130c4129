"""The rule scan. Oracles: the pseudo-code of the specification, autograd on the chain, the bound of Picard sweeps."""

import copy
import io
from math import comb

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_objective import (
    INPUTS,
    KINDS,
    WIDTH,
    assert_equal_gradients,
    convolutional,
    gradients,
    mlp,
    residual,
    transformer,
)
from torch import nn

import hbll
from hbll.guess import Guess

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])


RESIDUAL = {"mlp": residual, "convolutional": convolutional, "transformer": transformer}


def label_loss(net, logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def cut(net, size):
    """The stages as functions."""
    blocks = list(net.blocks)
    return [nn.Sequential(*blocks[start : start + size]) for start in range(0, len(blocks), size)]


def reference_scan(net, x, y, sweeps, credit_sweeps, size=1, mean=None, stops=True, guess=None):
    """The specification's pseudo-code, stage by stage, from a running mean or any other guess of h_1, h_2, ..

    Returns the loss, the corrected states h_0 .. h_S, those of the sweep before, and b_0 .. b_S. Without ``stops`` the
    sums of states carry their graph: what the specification warns of.
    """
    f = cut(net, size)
    last = len(f)
    z0 = net.embed(x)
    start = z0.detach()
    h = [start, *(guess or [start if mean is None else start + mean[n] for n in range(last)])]
    for _ in range(sweeps - 1):
        with torch.no_grad():
            rest = [f[m - 1](h[m - 1]) - h[m - 1] for m in range(1, last + 1)]
        h = [start] + [start + sum(rest[:n]) for n in range(1, last + 1)]
    before = h
    if not stops:
        h = [z0, *h[1:]]
    o = [None] + [f[n - 1](h[n - 1].detach() if stops else h[n - 1]) for n in range(1, last + 1)]
    corrected = [z0] + [z0 + sum(o[m] - h[m - 1] for m in range(1, n + 1)) for n in range(1, last + 1)]
    if stops:
        corrected = [state.detach() for state in corrected]
    leaf = corrected[last].detach().requires_grad_()
    loss = label_loss(net, net.head(leaf), y)
    (at_head,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    b = [at_head] * (last + 1)
    for _ in range(credit_sweeps):
        differences = [None]
        for m in range(1, last + 1):
            source = h[m - 1].detach().requires_grad_()
            (pulled,) = torch.autograd.grad(f[m - 1](source), source, b[m])
            differences.append(pulled - b[m])
        b = [at_head + sum(differences[n + 1 :]) for n in range(last)] + [at_head]
    total = loss + sum((o[n] * b[n].detach()).sum() for n in range(1, last + 1)) + (z0 * b[0].detach()).sum()
    return total, corrected, before, b


class TestPseudoCode:
    """The rule is the specification's, at any number of sweeps."""

    @every_engine
    @pytest.mark.parametrize(("sweeps", "credit_sweeps"), [(1, 0), (1, 2), (2, 1), (3, 2), (5, 4)])
    @pytest.mark.parametrize("kind", RESIDUAL)
    def test_blocks(self, kind, sweeps, credit_sweeps, engine):
        net, x, y = RESIDUAL[kind](6)
        expected, states, before, b = reference_scan(net, x, y, sweeps, credit_sweeps)
        step = hbll.Objective("scan", guess="mean", sweeps=sweeps, credit_sweeps=credit_sweeps, engine=engine)(
            net, x, y
        )
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))
        torch.testing.assert_close(step.loss.detach(), label_loss(net, net.head(states[-1]), y).detach())
        for n in range(1, 6):
            torch.testing.assert_close(step.trace.gradient[n], b[n])
        new, old = torch.stack(states[1:]), torch.stack(before[1:])
        assert step.defect.item() == pytest.approx(((new - old).norm() / new.norm()).item(), rel=1e-5)
        assert not step.defect.requires_grad

    @every_engine
    @settings(max_examples=15)
    @given(
        nodes=st.integers(2, 12),
        size=st.integers(1, 4),
        sweeps=st.integers(1, 5),
        credit_sweeps=st.integers(0, 5),
        seed=st.integers(0, 1000),
    )
    def test_stages_of_any_size(self, engine, nodes, size, sweeps, credit_sweeps, seed):
        net, x, y = residual(nodes, seed)
        expected, *_ = reference_scan(net, x, y, sweeps, credit_sweeps, size)
        if (nodes - 1) // size < 2:  # no two stages are alike
            engine = "auto"
        objective = hbll.Objective(
            "scan", guess="mean", stage=size, sweeps=sweeps, credit_sweeps=credit_sweeps, engine=engine
        )
        assert_equal_gradients(gradients(net, objective(net, x, y).loss), gradients(net, expected))

    @pytest.mark.parametrize("sweeps", [1, 3])
    def test_the_guess_of_later_steps_is_the_running_mean(self, sweeps):
        net, _, y = residual(6)
        objective = hbll.Objective("scan", guess="mean", sweeps=sweeps, credit_sweeps=2, engine="loop")
        mean = None
        for _ in range(4):
            x = torch.randn(4, INPUTS, dtype=torch.float64)
            expected, states, _, _ = reference_scan(net, x, y, sweeps, 2, mean=mean)
            assert_equal_gradients(gradients(net, objective(net, x, y).loss), gradients(net, expected))
            newest = [(state - states[0]).mean(0) for state in states[1:]]
            # The newest batch has a tenth of the weight, the first one all of it.
            mean = newest if mean is None else [0.9 * m + 0.1 * new for m, new in zip(mean, newest, strict=True)]
        for m, kept in zip(mean, objective.states.guess.mean.nest, strict=True):
            torch.testing.assert_close(kept, m)

    @pytest.mark.parametrize("sweeps", [1, 2, 3])
    def test_jacobi_by_hand(self, sweeps):
        # Without coarse step every sweep just hands each stage's output on, and gradients likewise.
        net, x, y = residual(6)
        z0 = net.embed(x)
        h = [z0.detach()] * 6
        for _ in range(sweeps - 1):
            h = [h[0], *(f(state).detach() for f, state in zip(net.blocks, h[:-1], strict=True))]
        o = [f(state) for f, state in zip(net.blocks, h[:-1], strict=True)]
        leaf = o[-1].detach().requires_grad_()
        loss = F.cross_entropy(net.head(leaf), y)
        (at_head,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        b = [at_head] * 6
        for _ in range(2):
            leaves = [state.detach().requires_grad_() for state in h[:-1]]
            pulled = [
                torch.autograd.grad(f(leaf), leaf, g)[0] for f, leaf, g in zip(net.blocks, leaves, b[1:], strict=True)
            ]
            b = [*pulled, at_head]
        expected = loss + sum((out * g).sum() for out, g in zip(o, b[1:], strict=True)) + (z0 * b[0]).sum()
        step = hbll.Objective("scan", guess="mean", sweeps=sweeps, credit_sweeps=2, coarse="none")(net, x, y)
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    def test_the_embed_gets_the_credit_of_the_input_alone(self):
        net, x, y = residual(8)
        _, _, _, b = reference_scan(net, x, y, 3, 2)
        found = gradients(net, hbll.Objective("scan", guess="mean", credit_sweeps=2)(net, x, y).loss)
        z0 = net.embed(x)
        weight, bias = torch.autograd.grad(z0, [net.embed.weight, net.embed.bias], b[0])
        torch.testing.assert_close(found["embed.weight"], weight)
        torch.testing.assert_close(found["embed.bias"], bias)

    def test_without_the_stops_the_gradient_is_wrong(self):
        net, x, y = residual(8)
        exact = gradients(net, F.cross_entropy(net(x), y))
        with_stops = gradients(net, reference_scan(net, x, y, 7, 7)[0])
        without = gradients(net, reference_scan(net, x, y, 7, 7, stops=False)[0])
        ours = gradients(net, hbll.Objective("scan", guess="mean", sweeps=7, credit_sweeps=7)(net, x, y).loss)
        assert_equal_gradients(with_stops, exact)
        assert_equal_gradients(ours, exact)
        error = (without["embed.weight"] - exact["embed.weight"]).norm() / exact["embed.weight"].norm()
        assert error > 0.3


class TestExactness:
    """With as many sweeps as stages the gradient is that of the chain's loss, whatever the guess and the coarse step."""

    @pytest.mark.parametrize(
        ("coarse", "guess", "engine"),
        [("skip", "mean", "loop"), ("none", "tree", "loop"), ("skip", "tree", "batched"), ("none", "mean", "batched")],
    )
    @pytest.mark.parametrize(("size", "stages"), [(1, 7), (3, 3)])
    @pytest.mark.parametrize("kind", RESIDUAL)
    def test_equals_backpropagation(self, kind, size, stages, coarse, guess, engine):
        net, x, y = RESIDUAL[kind](8)
        options = {"sweeps": stages, "credit_sweeps": stages, "coarse": coarse, "guess": guess}
        objective = hbll.Objective("scan", stage=size, engine=engine, **options).prepare(net)
        other = torch.roll(x, 1, 0)
        objective(net, other, y)  # so that a running mean is not zero
        step = objective(net, x, y)
        assert step.engine == engine
        assert_equal_gradients(gradients(net, step.loss), gradients(net, label_loss(net, net(x), y)))

    @pytest.mark.parametrize(("sweeps", "credit_sweeps"), [(6, 7), (7, 5)])
    def test_fewer_sweeps_are_not_exact(self, sweeps, credit_sweeps):
        net, x, y = residual(8)
        exact = gradients(net, F.cross_entropy(net(x), y))
        step = hbll.Objective("scan", guess="mean", sweeps=sweeps, credit_sweeps=credit_sweeps, coarse="none")(
            net, x, y
        )
        found = gradients(net, step.loss)
        assert max((found[name] - exact[name]).abs().max() for name in exact) > 1e-6

    @pytest.mark.parametrize("coarse", ["skip", "none"])
    @pytest.mark.parametrize(("size", "stages"), [(1, 7), (3, 3)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_credit_scan_on_chain_states(self, kind, size, stages, coarse):
        net, x, y = KINDS[kind][0](8)  # with skip or without
        objective = hbll.Objective("scan", states="chain", stage=size, credit_sweeps=stages, coarse=coarse)
        step = objective(net, x, y)
        assert_equal_gradients(gradients(net, step.loss), gradients(net, label_loss(net, net(x), y)))

    def test_blocks_without_skip(self):
        net, x, y = mlp(8)
        for coarse in ("skip", "none"):
            step = hbll.Objective("scan", guess="mean", sweeps=7, credit_sweeps=7, coarse=coarse)(net, x, y)
            assert_equal_gradients(gradients(net, step.loss), gradients(net, F.cross_entropy(net(x), y)))

    def test_exact_credit_for_inexact_states(self):
        # At full credit sweeps b_n is the gradient through the rest of the chain, each Jacobian taken at the states at hand.
        net, x, y = residual(6)
        step = hbll.Objective("scan", guess="mean", sweeps=1, credit_sweeps=5)(net, x, y)
        z0 = net.embed(x).detach()
        b = step.trace.gradient[5]
        for n in range(5, 1, -1):
            leaf = z0.clone().requires_grad_()  # the guess of the first step
            (b,) = torch.autograd.grad(net.blocks[n - 1](leaf), leaf, b)
            torch.testing.assert_close(step.trace.gradient[n - 1], b)

    def test_weighted_labels(self):
        net, x, y = transformer(6)
        y = torch.where(torch.rand(y.shape) < 0.4, -100, y)
        step = hbll.Objective("scan", guess="mean", sweeps=5, credit_sweeps=5)(net, x, y)
        assert_equal_gradients(gradients(net, step.loss), gradients(net, label_loss(net, net(x), y)))

    def test_training_is_backpropagations(self):
        # SGD with the exact rule: the same parameters after several steps.
        torch.manual_seed(3)
        net, x, y = residual(6)
        twin = copy.deepcopy(net)
        objective = hbll.Objective("scan", guess="mean", sweeps=5, credit_sweeps=5)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        other = torch.optim.SGD(twin.parameters(), lr=0.3)
        for _ in range(5):
            for model, moved, loss in [
                (net, optimizer, objective(net, x, y).loss),
                (twin, other, F.cross_entropy(twin(x), y)),
            ]:
                moved.zero_grad()
                loss.backward()
                moved.step()
                assert all(p.grad is not None for p in model.parameters())
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


class TestFrozenParts:
    """Frozen parameters change no other gradient."""

    @every_engine
    @pytest.mark.parametrize("frozen", ["embed", "head", "blocks.2", "blocks"])
    @pytest.mark.parametrize("size", [1, 2])
    def test_other_gradients(self, size, frozen, engine):
        net, x, y = residual(7)
        objective = hbll.Objective("scan", guess="mean", stage=size, engine=engine)
        expected = gradients(net, hbll.Objective("scan", guess="mean", stage=size, engine=engine)(net, x, y).loss)
        net.get_submodule(frozen).requires_grad_(False)
        objective(net, x, y).loss.backward()
        for name, parameter in net.named_parameters():
            if name.startswith(frozen):
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, expected[name])


class Bounded(nn.Module):
    """z + g(z) with ||g|| <= M and Lipschitz constant L: g = M / sqrt(d) sin(a U z + c), U orthogonal, a = L sqrt(d) / M."""

    def __init__(self, bound, lipschitz, width=WIDTH):
        super().__init__()
        self.amplitude = bound / width**0.5
        self.rate = lipschitz / self.amplitude
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(width, width))[0])
        self.phase = nn.Parameter(torch.randn(width))

    def forward(self, state):
        return state + self.amplitude * torch.sin(self.rate * (state @ self.turn.mT) + self.phase)


def chain_states(net, x):
    states = [net.embed(x)]
    for block in net.blocks:
        states.append(block(states[-1]))
    return states


class TestSweeps:
    """How fast the sweeps converge, and when they stop."""

    @settings(max_examples=40)
    @given(
        blocks=st.integers(1, 12),
        sweeps=st.integers(0, 6),
        bound=st.floats(0.1, 3),
        lipschitz=st.floats(0.02, 2),
        seed=st.integers(0, 1000),
    )
    def test_error_bound(self, blocks, sweeps, bound, lipschitz, seed):
        torch.manual_seed(seed)
        made = [Bounded(bound, lipschitz) for _ in range(blocks)]
        net = hbll.TreeNetwork(nn.Identity(), made, nn.Identity()).double()
        x = torch.randn(4, WIDTH, dtype=torch.float64)
        estimate = hbll.Objective("scan", guess="mean").predict(net, x, sweeps)
        error = (estimate - net(x)).norm(dim=-1).max().item()
        limit = bound / lipschitz * comb(blocks, sweeps + 1) * lipschitz ** (sweeps + 1)
        assert error <= limit * (1 + 1e-9) + 1e-12

    @settings(max_examples=40)
    @given(
        blocks=st.integers(1, 12),
        sweeps=st.integers(0, 4),
        distance=st.floats(1e-3, 3),
        lipschitz=st.floats(0.02, 1),
        seed=st.integers(0, 1000),
    )
    def test_error_bound_from_a_guess_at_a_distance(self, blocks, sweeps, distance, lipschitz, seed):
        torch.manual_seed(seed)
        net = hbll.TreeNetwork(nn.Identity(), [Bounded(5, lipschitz) for _ in range(blocks)], nn.Identity()).double()
        x = torch.randn(4, WIDTH, dtype=torch.float64)

        class Beside(Guess):
            def forward(self, trace):
                exact = torch.stack(chain_states(net, x)[1:])
                return exact + distance * F.normalize(torch.randn_like(exact), dim=-1)

        objective = hbll.Objective("scan")
        objective.states.guess = Beside()
        error = (objective.predict(net, x, sweeps) - net(x)).norm(dim=-1).max().item()
        assert error <= distance * comb(blocks - 1, sweeps) * lipschitz**sweeps * (1 + 1e-9) + 1e-12

    @settings(max_examples=40)
    @given(
        blocks=st.integers(1, 12),
        credit_sweeps=st.integers(0, 6),
        lipschitz=st.floats(0.02, 1),
        seed=st.integers(0, 1000),
    )
    def test_error_bound_of_the_credit(self, blocks, credit_sweeps, lipschitz, seed):
        torch.manual_seed(seed)
        made = [Bounded(5, lipschitz) for _ in range(blocks)]
        net = hbll.TreeNetwork(nn.Linear(WIDTH, WIDTH), made, nn.Linear(WIDTH, 3)).double()
        x, y = torch.randn(1, WIDTH, dtype=torch.float64), torch.tensor([1])
        rule = hbll.Objective("scan", guess="mean", sweeps=blocks, credit_sweeps=credit_sweeps)
        found = gradients(net, rule(net, x, y).loss)["embed.bias"]  # of one sample: the credit of its embedded input
        *_, last = chain_states(net, x)
        last = last.detach().requires_grad_()
        (at_head,) = torch.autograd.grad(F.cross_entropy(net.head(last), y), last)
        exact = gradients(net, F.cross_entropy(net(x), y))["embed.bias"]
        left_out = sum(comb(blocks, k) * lipschitz**k for k in range(credit_sweeps + 1, blocks + 1))
        assert (found - exact).norm().item() <= at_head.norm().item() * left_out * (1 + 1e-9) + 1e-12

    @pytest.mark.parametrize("sweeps", [0, 1, 2, 3, 4])
    def test_the_bound_is_nearly_reached(self, sweeps):
        # One feature, g(z) = M (1 - delta) + L z from z_0 = 0: ||g|| stays below M, and nothing cancels.
        lipschitz, blocks = 1e-3, 10

        class Affine(nn.Module):
            def forward(self, state):
                return state + 0.98 + lipschitz * state

        net = hbll.TreeNetwork(nn.Identity(), [Affine() for _ in range(blocks)], nn.Identity())
        x = torch.zeros(1, 1, dtype=torch.float64)
        states = chain_states(net, x)
        assert max((0.98 + lipschitz * state).item() for state in states) < 1
        error = (net(x) - hbll.Objective("scan", guess="mean", engine="loop").predict(net, x, sweeps)).abs().item()
        limit = comb(blocks, sweeps + 1) * lipschitz**sweeps
        assert 0.97 * limit < error <= limit

    @every_engine
    @pytest.mark.parametrize("coarse", ["skip", "none"])
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_readout_at_any_number_of_sweeps(self, size, coarse, engine):
        net, x, y = residual(8)
        objective = hbll.Objective("scan", guess="mean", stage=size, coarse=coarse, engine=engine)
        stages = len(cut(net, size))
        exact = net(x)
        errors = [(objective.predict(net, x, k) - exact).abs().max().item() for k in range(stages + 1)]
        assert errors[stages] < 1e-12
        assert min(errors[: stages - 1]) > 1e-9
        assert not objective.predict(net, x, 1).requires_grad
        torch.testing.assert_close(objective.predict(net, x, 0), net.head(net.embed(x)))
        if coarse == "skip":
            for k in (1, 2):
                _, states, _, _ = reference_scan(net, x, y, k, 0, size)
                torch.testing.assert_close(objective.predict(net, x, k), net.head(states[-1]))

    def test_readout_is_of_scan_states(self):
        net, x, _ = residual(4)
        with pytest.raises(ValueError, match="states='scan'"):
            hbll.Objective("stream").predict(net, x, 2)

    def test_a_negative_number_of_sweeps_is_refused(self):
        net, x, _ = residual(4)
        with pytest.raises(ValueError, match="sweeps must not be negative; got -1"):
            hbll.Objective("scan").predict(net, x, -1)

    def test_reading_out_changes_nothing(self):
        net, x, y = residual(6)
        objective = hbll.Objective("scan", guess="mean")
        objective(net, x, y)
        before = objective.states.guess.mean.nest.clone()
        objective.predict(net, x + 1, 2)
        assert torch.equal(objective.states.guess.mean.nest, before)

    def test_tolerance_stops_early(self):
        net, x, y = mlp(12, block=lambda: Bounded(1.0, 0.3))
        options = {"guess": "mean", "credit_sweeps": 0, "engine": "loop"}
        eleven = hbll.Objective("scan", sweeps=11, **options)(net, x, y)
        defects = [hbll.Objective("scan", sweeps=k, **options)(net, x, y).defect.item() for k in range(1, 12)]
        assert defects == sorted(defects, reverse=True)
        for tolerance in (0.1, 1e-3, 1e-6):
            # As soon as a sweep without graph moves the states by less, the one with graph is the last.
            needed = 2 + next((i for i, d in enumerate(defects) if d <= tolerance), 9)
            step = hbll.Objective("scan", sweeps=11, tolerance=tolerance, **options)(net, x, y)
            assert step.work == eleven.work - 11 * (11 - min(needed, 11))
            assert step.span == eleven.span - (11 - min(needed, 11))
            assert step.defect == hbll.Objective("scan", sweeps=min(needed, 11), **options)(net, x, y).defect
        assert hbll.Objective("scan", sweeps=11, tolerance=0.0, **options)(net, x, y).span == eleven.span

    @pytest.mark.parametrize("tolerance", [0.3, 0.1, 1e-3, 1e-6])
    def test_tolerance_stops_credit_early(self, tolerance):
        net, x, y = mlp(12, block=lambda: Bounded(1.0, 0.3))
        exact = [state.detach() for state in chain_states(net, x)[1:]]
        b = [torch.stack(reference_scan(net, x, y, 1, sweeps, guess=exact)[3]) for sweeps in range(12)]
        needed = next(k for k in range(1, 12) if (b[k] - b[k - 1]).norm() <= tolerance * b[k].norm())
        # In evaluation mode the states are exact from the start, and no tolerance touches them.
        ended, fixed = (
            hbll.Objective("scan", sweeps=2, engine="loop", **options).eval()(net, x, y)
            for options in ({"credit_sweeps": 11, "tolerance": tolerance}, {"credit_sweeps": needed})
        )
        assert (ended.work, ended.span) == (fixed.work, fixed.span)
        assert_equal_gradients(gradients(net, ended.loss), gradients(net, fixed.loss))

    def test_defect_of_exact_states_is_zero(self):
        net, x, y = residual(5)
        assert hbll.Objective("scan", guess="mean", sweeps=1)(net, x, y).defect > 0.1
        assert hbll.Objective("scan", guess="mean", sweeps=6, coarse="none")(net, x, y).defect < 1e-7
        assert hbll.Objective("tree")(net, x, y).defect is None


class TestReports:
    """What a step says of its stages."""

    @every_engine
    def test_reports_by_brute_force(self, engine):
        net, x, y = residual(8)
        step = hbll.Objective("scan", guess="mean", stage=2, credit_sweeps=2, step=0.3, engine=engine)(net, x, y)
        _, states, _, b = reference_scan(net, x, y, 3, 2, 2)
        assert list(step.nodes) == [1, 2, 3, 4]
        for n, report in step.nodes.items():
            # Each sample's own gradient is that of the mean, times the batch.
            length = 0.3 * (len(x) * b[n]).norm(dim=-1).mean().item()
            assert report.distance == pytest.approx(length)
            assert report.correction == pytest.approx(length)
        assert [n for n, report in step.nodes.items() if report.error is not None] == [4]
        loss = F.cross_entropy(net.head(states[-1]), y).item()
        assert step.nodes[4].error == pytest.approx(loss)
        assert step.loss.item() == pytest.approx(loss)

    def test_diagnosis(self):
        net, x, y = residual(8)
        objective = hbll.Objective("scan", guess="mean", sweeps=7, credit_sweeps=7)
        assert [report.cosine for report in objective.diagnose(net, x, y).values()] == pytest.approx([1.0] * 7)
        rough = hbll.Objective("scan", guess="mean", sweeps=1, credit_sweeps=0).diagnose(net, x, y)
        assert min(report.cosine for report in rough.values()) < 0.99
        assert all(p.grad is None for p in net.parameters())

    def test_no_gradient_is_left_in_what_is_no_parameter(self):
        net, x, y = residual(6)
        x.requires_grad_(False)
        objective = hbll.Objective("scan", guess="mean")
        step = objective(net, x, y)
        step.loss.backward()
        for wave in step.trace.waves:
            assert wave.inputs.grad is None


class TestAutocast:
    @pytest.mark.parametrize("kind", ["mlp", "convolutional"])
    def test_half_precision_stays_close(self, kind):
        net, x, y = RESIDUAL[kind](5)
        net = net.float()
        x = x.float() if x.is_floating_point() else x
        exact = gradients(net, hbll.Objective("scan", guess="mean")(net, x, y).loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = hbll.Objective("scan", guess="mean")(net, x, y).loss
        found = gradients(net, loss)
        mine, theirs = (torch.cat([g.flatten() for g in d.values()]) for d in (found, exact))
        assert torch.cosine_similarity(mine, theirs, dim=0) > 0.98
        assert all(g.dtype == torch.float32 for g in found.values())


def test_checkpoints_through_a_file():
    net, x, y = residual(6)
    objective = hbll.Objective("scan", guess="mean", sweeps=1)
    for _ in range(3):
        objective(net, x, y)
        x = x + 0.1
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    file.seek(0)
    fresh = hbll.Objective("scan", guess="mean", sweeps=1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(objective)
    forgetful = hbll.Objective("scan", guess="mean", sweeps=1)
    for _ in range(2):
        losses = [one(net, x, y).loss.item() for one in (objective, fresh, twin, forgetful)]
        assert losses[0] == losses[1] == losses[2]
        assert losses[3] != losses[0]
        x = x - 0.3
    for one in (fresh, twin):
        assert torch.equal(one.states.guess.mean.nest, objective.states.guess.mean.nest)


def test_other_credit_on_exact_states():
    # The spines of the last two stages are the chain's own steps: their credit is exact.
    net, x, y = residual(6)
    states = chain_states(net, x)
    exact = torch.autograd.grad(F.cross_entropy(net.head(states[-1]), y), states)
    step = hbll.Objective("scan", guess="mean", sweeps=5, credit="spine")(net, x, y)
    for n in (4, 5):
        torch.testing.assert_close(step.trace.gradient[n], exact[n])
    assert (step.trace.gradient[1] - exact[1]).norm() > 0.01 * exact[1].norm()
    assert all(report.error is not None for report in step.nodes.values())
