"""The rule scan. Oracles: the pseudo-code of the specification, autograd on the chain, the bound of Picard sweeps."""

import copy
from math import comb

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.networks import (
    KINDS,
    WIDTH,
    Bounded,
    assert_equal_gradients,
    chain_states,
    convolutional,
    gradients,
    label_loss,
    mlp,
    residual,
    transformer,
)
from tests.oracles.scan_step import relative_change, scan_step
from tests.oracles.stream_step import StreamStep
from torch import nn

from hbll import Chain, make_rule
from hbll.losses import cross_entropy
from hbll.rules.chain import ChainStates
from hbll.rules.composed import Composed
from hbll.rules.guess import Guess, Guessed, MeanGuess
from hbll.rules.scan import ScanCredit, ScanStates
from hbll.rules.stream import ReadoutCredit

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])
RESIDUAL = {"mlp": residual, "convolutional": convolutional, "transformer": transformer}


def exact(net, x, y):
    """The gradient of the chain's loss."""
    return gradients(net, label_loss(net(x), y))


class TestPseudoCode:
    """The rule is the specification's, at any number of sweeps."""

    @pytest.mark.parametrize(
        ("sweeps", "credit_sweeps", "engine"), [(1, 0, "batched"), (3, 2, "loop"), (2, 1, "batched")]
    )
    @pytest.mark.parametrize("kind", RESIDUAL)
    def test_blocks(self, kind, sweeps, credit_sweeps, engine):
        net, x, y = RESIDUAL[kind](6)
        expected, states, before, _ = scan_step(net, x, y, sweeps, credit_sweeps)
        options = {"sweeps": sweeps, "credit_sweeps": credit_sweeps, "engine": engine}
        step = make_rule("scan", net, guess="mean", **options)(x, y)
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))
        loss = label_loss(net.head(states[-1]), y)
        torch.testing.assert_close(step.loss.detach(), loss.detach())
        torch.testing.assert_close(step.label_loss, loss.detach())
        assert {n: report.error for n, report in step.reports.items()} == {5: pytest.approx(loss.item())}
        assert step.defect.item() == pytest.approx(relative_change(states, before), rel=1e-5)
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
        expected, *_ = scan_step(net, x, y, sweeps, credit_sweeps, size)
        if (nodes - 1) // size < 2:  # no two stages are alike
            engine = "auto"
        options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps, "engine": engine}
        rule = make_rule("scan", net, guess="mean", **options)
        assert_equal_gradients(gradients(net, rule(x, y).loss), gradients(net, expected))

    @pytest.mark.parametrize("sweeps", [1, 3])
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
        step = make_rule("scan", net, guess="mean", sweeps=sweeps, credit_sweeps=2, coarse="none")(x, y)
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))


class TestExactness:
    """With as many sweeps as stages the gradient is that of the chain's loss, whatever the guess and the coarse step."""

    @pytest.mark.parametrize(
        ("size", "stages", "coarse", "guess", "engine"),
        [(1, 7, "skip", "mean", "batched"), (3, 3, "none", "tree", "loop"), (3, 3, "skip", "tree", "batched")],
    )
    @pytest.mark.parametrize("kind", ["without skip", *RESIDUAL])
    def test_equals_backpropagation(self, kind, size, stages, coarse, guess, engine):
        net, x, y = RESIDUAL.get(kind, mlp)(8)
        options = {"sweeps": stages, "credit_sweeps": stages, "coarse": coarse, "guess": guess}
        rule = make_rule("scan", net, stage=size, engine=engine, **options)
        rule(torch.roll(x, 1, 0), y)  # so that a running mean is not zero
        step = rule(x, y)
        assert step.engine == engine
        assert_equal_gradients(gradients(net, step.loss), exact(net, x, y))

    @pytest.mark.parametrize(("sweeps", "credit_sweeps"), [(6, 7), (7, 5)])
    def test_fewer_sweeps_are_not_exact(self, sweeps, credit_sweeps):
        net, x, y = residual(8)
        expected = exact(net, x, y)
        options = {"sweeps": sweeps, "credit_sweeps": credit_sweeps, "coarse": "none"}
        found = gradients(net, make_rule("scan", net, guess="mean", **options)(x, y).loss)
        assert max((found[name] - expected[name]).abs().max() for name in expected) > 1e-6

    @pytest.mark.parametrize(("size", "stages", "coarse"), [(1, 7, 1.0), (3, 3, None)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_credit_scan_on_chain_states(self, kind, size, stages, coarse):
        net, x, y = KINDS[kind][0](8)  # with skip or without
        rule = Composed(net, ChainStates(), ScanCredit(cross_entropy, stages, None, coarse), stage=size)
        assert_equal_gradients(gradients(net, rule(x, y).loss), exact(net, x, y))

    def test_spine_credit_on_scanned_states(self):
        net, x, y = residual(6)
        states, credit = ScanStates(MeanGuess(), 5, None, 1.0), ReadoutCredit(cross_entropy, "doubling")
        step = Composed(net, states, credit)(x, y)
        expected = StreamStep(net, 1, flight=False).losses(x, y)  # the states are the chain's own
        assert_equal_gradients(gradients(net, step.loss), gradients(net, sum(expected.values())))
        assert {n: report.error for n, report in step.reports.items()} == pytest.approx(
            {n: loss.item() for n, loss in expected.items()}
        )

    def test_exact_credit_for_inexact_states(self):
        # At full credit sweeps b_n is the gradient through the rest of the chain, each Jacobian taken at the states at hand.
        net, x, y = residual(6)
        z0 = net.embed(x)
        outs = [block(z0.detach()) for block in net.blocks]  # the guess of the first step is z_0
        last = (z0 + sum(out - z0 for out in outs)).detach().requires_grad_()
        total = F.cross_entropy(net.head(last), y)
        (b,) = torch.autograd.grad(total, last, retain_graph=True)
        for block, out in zip(reversed(net.blocks), reversed(outs), strict=True):
            total = total + (out * b).sum()
            leaf = z0.detach().requires_grad_()
            (b,) = torch.autograd.grad(block(leaf), leaf, b)
        step = make_rule("scan", net, guess="mean", sweeps=1, credit_sweeps=5)(x, y)
        assert_equal_gradients(gradients(net, step.loss), gradients(net, total + (z0 * b).sum()))

    def test_weighted_labels(self):
        net, x, y = transformer(6)
        y = torch.where(torch.rand(y.shape) < 0.4, -100, y)
        step = make_rule("scan", net, guess="mean", sweeps=5, credit_sweeps=5)(x, y)
        assert_equal_gradients(gradients(net, step.loss), exact(net, x, y))

    def test_training_is_backpropagations(self):
        # SGD with the exact rule: the same parameters after several steps.
        torch.manual_seed(3)
        net, x, y = residual(6)
        twin = copy.deepcopy(net)
        rule = make_rule("scan", net, guess="mean", sweeps=5, credit_sweeps=5)
        moved = [torch.optim.SGD(model.parameters(), lr=0.3) for model in (net, twin)]
        for _ in range(5):
            losses = rule(x, y).loss, F.cross_entropy(twin(x), y)
            for optimizer, loss in zip(moved, losses, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)

    def test_diagnosis(self):
        net, x, y = residual(8)
        rule = make_rule("scan", net, guess="mean", sweeps=7, credit_sweeps=7)
        assert [report.cosine for report in rule.diagnose(x, y).values()] == pytest.approx([1.0] * 7)
        rough = make_rule("scan", net, guess="mean", sweeps=1, credit_sweeps=0).diagnose(x, y)
        assert min(report.cosine for report in rough.values()) < 0.99


class TestSweeps:
    """How fast the sweeps converge, and when they stop."""

    @settings(max_examples=30)
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
        net = Chain(nn.Identity(), made, nn.Identity()).double()
        x = torch.randn(4, WIDTH, dtype=torch.float64)
        estimate = make_rule("scan", net, guess="mean").predict(x, sweeps)
        error = (estimate - net(x)).norm(dim=-1).max().item()
        limit = bound / lipschitz * comb(blocks, sweeps + 1) * lipschitz ** (sweeps + 1)
        assert error <= limit * (1 + 1e-9) + 1e-12

    @settings(max_examples=30)
    @given(
        blocks=st.integers(1, 12),
        sweeps=st.integers(0, 4),
        distance=st.floats(1e-3, 3),
        lipschitz=st.floats(0.02, 1),
        seed=st.integers(0, 1000),
    )
    def test_error_bound_from_a_guess_at_a_distance(self, blocks, sweeps, distance, lipschitz, seed):
        torch.manual_seed(seed)
        net = Chain(nn.Identity(), [Bounded(5, lipschitz) for _ in range(blocks)], nn.Identity()).double()
        x = torch.randn(4, WIDTH, dtype=torch.float64)

        class Near(Guess):
            def forward(self, cut, batch, step):
                right = torch.stack(chain_states(net, x)[1:])
                return Guessed(batch, right + distance * F.normalize(torch.randn_like(right), dim=-1), 0)

        rule = make_rule("scan", net)
        rule.states.guess = Near()
        error = (rule.predict(x, sweeps) - net(x)).norm(dim=-1).max().item()
        assert error <= distance * comb(blocks - 1, sweeps) * lipschitz**sweeps * (1 + 1e-9) + 1e-12

    @settings(max_examples=30)
    @given(
        blocks=st.integers(1, 12),
        credit_sweeps=st.integers(0, 6),
        lipschitz=st.floats(0.02, 1),
        seed=st.integers(0, 1000),
    )
    def test_error_bound_of_the_credit(self, blocks, credit_sweeps, lipschitz, seed):
        torch.manual_seed(seed)
        made = [Bounded(5, lipschitz) for _ in range(blocks)]
        net = Chain(nn.Linear(WIDTH, WIDTH), made, nn.Linear(WIDTH, 3)).double()
        x, y = torch.randn(1, WIDTH, dtype=torch.float64), torch.tensor([1])
        rule = make_rule("scan", net, guess="mean", sweeps=blocks, credit_sweeps=credit_sweeps)
        found = gradients(net, rule(x, y).loss)["embed.bias"]  # of one sample: the credit of its embedded input
        *_, last = chain_states(net, x)
        last = last.detach().requires_grad_()
        (at_head,) = torch.autograd.grad(F.cross_entropy(net.head(last), y), last)
        left_out = sum(comb(blocks, k) * lipschitz**k for k in range(credit_sweeps + 1, blocks + 1))
        error = (found - exact(net, x, y)["embed.bias"]).norm().item()
        assert error <= at_head.norm().item() * left_out * (1 + 1e-9) + 1e-12

    @pytest.mark.parametrize("sweeps", [0, 1, 2, 3, 4])
    def test_the_bound_is_nearly_reached(self, sweeps):
        # One feature, g(z) = M (1 - delta) + L z from z_0 = 0: ||g|| stays below M, and nothing cancels.
        lipschitz, blocks = 1e-3, 10

        class Affine(nn.Module):
            def forward(self, state):
                return state + 0.98 + lipschitz * state

        net = Chain(nn.Identity(), [Affine() for _ in range(blocks)], nn.Identity())
        x = torch.zeros(1, 1, dtype=torch.float64)
        assert max((0.98 + lipschitz * state).item() for state in chain_states(net, x)) < 1
        error = (net(x) - make_rule("scan", net, guess="mean", engine="loop").predict(x, sweeps)).abs().item()
        limit = comb(blocks, sweeps + 1) * lipschitz**sweeps
        assert 0.97 * limit < error <= limit

    @pytest.mark.parametrize(
        ("size", "coarse", "engine"), [(1, "skip", "batched"), (3, "skip", "loop"), (2, "none", "batched")]
    )
    def test_readout_at_any_number_of_sweeps(self, size, coarse, engine):
        net, x, y = residual(8)
        rule = make_rule("scan", net, guess="mean", stage=size, coarse=coarse, engine=engine)
        stages = len(rule.stages)
        errors = [(rule.predict(x, k) - net(x)).abs().max().item() for k in range(stages + 1)]
        assert errors[stages] < 1e-12
        assert min(errors[: stages - 1]) > 1e-9
        assert not rule.predict(x, 1).requires_grad
        torch.testing.assert_close(rule.predict(x, 0), net.head(net.embed(x)))
        if coarse == "skip":
            for k in (1, 2):
                _, states, _, _ = scan_step(net, x, y, k, 0, size)
                torch.testing.assert_close(rule.predict(x, k), net.head(states[-1]))

    def test_reading_out_changes_nothing(self):
        net, x, y = residual(6)
        rule = make_rule("scan", net, guess="mean")
        rule(x, y)
        before = rule.carry()["kept"]["mean"]
        rule.predict(x + 1, 2)
        assert torch.equal(rule.carry()["kept"]["mean"], before)
        assert rule.training
        with pytest.raises(ValueError, match="sweeps must not be negative; got -1"):
            rule.predict(x, -1)

    def test_tolerance_stops_early(self):
        net, x, y = mlp(12, block=Bounded)
        options = {"guess": "mean", "credit_sweeps": 0, "engine": "loop"}
        steps = {k: make_rule("scan", net, sweeps=k, **options)(x, y) for k in range(1, 12)}
        defects = [step.defect.item() for step in steps.values()]
        assert defects == sorted(defects, reverse=True)
        for tolerance in (0.1, 1e-3, 1e-6):
            # As soon as a sweep without graph moves the states by less, the one with graph is the last.
            needed = min(11, 2 + next((i for i, d in enumerate(defects) if d <= tolerance), 9))
            step = make_rule("scan", net, sweeps=11, tolerance=tolerance, **options)(x, y)
            assert step.work == steps[11].work - 11 * (11 - needed)
            assert step.span == steps[11].span - (11 - needed)
            assert step.defect == steps[needed].defect
        assert make_rule("scan", net, sweeps=11, tolerance=0.0, **options)(x, y).span == steps[11].span

    @pytest.mark.parametrize("tolerance", [0.3, 1e-6, "between"])
    def test_tolerance_stops_credit_early(self, tolerance):
        net, x, y = mlp(12, block=Bounded)
        right = [state.detach() for state in chain_states(net, x)[1:]]
        b = [torch.stack(scan_step(net, x, y, 1, sweeps, guess=right)[3]) for sweeps in range(12)]
        if tolerance == "between":  # relative to the new credit, and to the old
            tolerance = ((b[1] - b[0]).norm() * (1 / b[1].norm() + 1 / b[0].norm()) / 2).item()
        needed = next(k for k in range(1, 12) if (b[k] - b[k - 1]).norm() <= tolerance * b[k].norm())
        # In evaluation mode the states are exact from the start, and no tolerance touches them.
        ended, fixed = (
            make_rule("scan", net, sweeps=2, engine="loop", **options).eval()(x, y)
            for options in ({"credit_sweeps": 11, "tolerance": tolerance}, {"credit_sweeps": needed})
        )
        assert (ended.work, ended.span) == (fixed.work, fixed.span)
        assert_equal_gradients(gradients(net, ended.loss), gradients(net, fixed.loss))

    def test_defect_of_exact_states_is_zero(self):
        net, x, y = residual(5)
        assert make_rule("scan", net, guess="mean", sweeps=1)(x, y).defect > 0.1
        assert make_rule("scan", net, guess="mean", sweeps=6, coarse="none")(x, y).defect < 1e-7


class TestWords:
    """What cannot be is refused by one sentence."""

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"sweeps": 0}, "sweeps must be at least 1; got 0"),
            ({"credit_sweeps": -1}, "credit_sweeps must not be negative; got -1"),
            ({"tolerance": -0.1}, "tolerance must not be negative; got -0.1"),
            ({"tolerance": float("nan")}, "tolerance must be at least 0; got nan"),
            ({"guess": "nonsense"}, "guess is one of ahead, mean, tree, star; got 'nonsense'"),
            ({"coarse": "nonsense"}, "coarse is one of skip, none; got 'nonsense'"),
        ],
    )
    def test_values(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            make_rule("scan", residual()[0], **options)

    def test_limits_are_allowed(self):
        net, x, y = residual()
        assert make_rule("scan", net, sweeps=1, credit_sweeps=0, tolerance=0)(x, y).loss.isfinite()

    @pytest.mark.parametrize(("guess", "sweeps"), [("mean", 1), ("mean", 2), ("ahead", 1)])
    def test_a_stage_that_changes_the_shape_is_named(self, guess, sweeps):
        net, x, y = residual()
        net.blocks[4] = nn.Linear(6, 7).double()
        net.blocks[5] = nn.Linear(7, 7).double()
        with pytest.raises(
            ValueError, match=r"stage 2 \(blocks 4-6\) changes the state's shape from \(4, 6\) to \(4, 7\)"
        ):
            make_rule("scan", net, stage=3, guess=guess, sweeps=sweeps, engine="loop")(x, y)


class TestRemedies:
    """A leak of the coarse step, and a loss for what one sweep is off."""

    def test_a_leak_by_hand(self):
        # Every sweep carries .8 of a disagreement across each stage, forwards and backwards.
        net, x, y = residual(6)
        share, z0 = 0.8, net.embed(x)
        h = [z0.detach()] * 6
        for _ in range(2):
            outs = [f(state).detach() for f, state in zip(net.blocks, h[:-1], strict=True)]
            new = [h[0]]
            for out, state in zip(outs, h[:-1], strict=True):
                new.append(out + share * (new[-1] - state))
            before, h = h, new
        o = [f(state) for f, state in zip(net.blocks, before[:-1], strict=True)]
        leaf = h[-1].detach().requires_grad_()
        loss = F.cross_entropy(net.head(leaf), y)
        (at_head,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        b = [at_head] * 6
        for _ in range(2):
            leaves = [state.detach().requires_grad_() for state in before[:-1]]
            pulled = [
                torch.autograd.grad(f(leaf), leaf, g)[0] for f, leaf, g in zip(net.blocks, leaves, b[1:], strict=True)
            ]
            new = [at_head]
            for value, g in zip(reversed(pulled), reversed(b[1:]), strict=True):
                new.insert(0, value + share * (new[0] - g))
            b = new
        expected = loss + sum((out * g).sum() for out, g in zip(o, b[1:], strict=True)) + (z0 * b[0]).sum()
        step = make_rule("scan", net, guess="mean", sweeps=2, credit_sweeps=2, leak=0.2)(x, y)
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    @pytest.mark.parametrize("kind", RESIDUAL)
    def test_with_any_leak_enough_sweeps_are_exact(self, kind):
        net, x, y = RESIDUAL[kind](6)
        step = make_rule("scan", net, guess="mean", sweeps=5, credit_sweeps=5, leak=0.3)(x, y)
        assert_equal_gradients(gradients(net, step.loss), exact(net, x, y))

    def test_a_leak_of_1_is_no_coarse_step(self):
        net, x, y = residual(6)
        options = {"guess": "mean", "sweeps": 2, "credit_sweeps": 2}
        found, expected = (make_rule("scan", net, **options, **o)(x, y) for o in ({"leak": 1.0}, {"coarse": "none"}))
        assert_equal_gradients(gradients(net, found.loss), gradients(net, expected.loss))

    @every_engine
    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("kind", RESIDUAL)
    def test_the_loss_of_one_sweep_by_hand(self, kind, size, engine):
        # With sweeps enough for exact states, which are h; one sweep from z_0 gives z_0 + sum (f_m(z_0) - z_0).
        net, x, y = RESIDUAL[kind](7)
        stages = [nn.Sequential(*net.blocks[a : a + size]) for a in range(0, 6, size)]
        start = net.embed(x).detach()
        h = swept = stages[0](start)
        off = 0.0  # of the first stage
        for f in stages[1:]:
            h, swept = f(h.detach()).detach(), swept + f(start) - start
            off = off + (swept - h).norm() / h.norm() / len(stages)
        expected = gradients(net, label_loss(net(x), y) + 0.3 * off)
        sweeps = {"sweeps": len(stages), "credit_sweeps": len(stages)}
        for guess in ("mean", "ahead"):
            rule = make_rule("scan", net, stage=size, guess=guess, consistency=0.3, engine=engine, **sweeps)
            step = rule(x, y)
            assert_equal_gradients(gradients(net, step.loss), expected)
            torch.testing.assert_close(step.loss.detach(), step.label_loss + 0.3 * off.detach())
        assert torch.equal(rule.eval()(x, y).loss.detach(), rule(x, y).label_loss)  # a regulariser of training

    @every_engine
    def test_the_loss_of_one_sweep_with_a_weight_that_stages_share(self, engine):
        net, x, y = residual(7)
        net.blocks[4] = net.blocks[1]
        start = net.embed(x).detach()
        h = [state.detach() for state in chain_states(net, x)[1:]]
        swept = start + torch.stack([f(start) - start for f in net.blocks]).cumsum(0)
        off = sum((s - state).norm() / state.norm() for s, state in zip(swept[1:], h[1:], strict=True)) / 6
        expected = gradients(net, label_loss(net(x), y) + 0.3 * off)
        rule = make_rule("scan", net, guess="mean", sweeps=6, credit_sweeps=6, consistency=0.3, engine=engine)
        assert_equal_gradients(gradients(net, rule(x, y).loss), expected)

    def test_stages_that_learn_nothing_are_off_all_the_same(self):
        net, x, y = residual(4)
        net.blocks.requires_grad_(False)
        rule = make_rule("scan", net, guess="mean", sweeps=3, credit_sweeps=3, consistency=0.3)
        step, without = rule(x, y), make_rule("scan", net, guess="mean", sweeps=3, credit_sweeps=3)(x, y)
        assert step.loss > step.label_loss
        assert step.work == without.work + 3  # the sweep
        assert_equal_gradients(gradients(net, step.loss), exact(net, x, y))

    @pytest.mark.parametrize("guess", ["tree", "star", "mean", "ahead"])
    def test_the_sweep_starts_from_the_guess_that_is_there(self, guess):
        net, x, y = residual(4)
        step = make_rule("scan", net, guess=guess, consistency=0.3)(x, y)
        without = make_rule("scan", net, guess=guess)(x, y)
        assert step.work == without.work + 3 + 3  # the sweep and the products for weights: no predictor once more

    def test_a_chain_whose_stages_add_constants_is_consistent(self):
        class Adds(nn.Linear):
            def forward(self, state):
                return state + self.bias

        net = Chain(nn.Linear(5, WIDTH), [Adds(1, WIDTH) for _ in range(4)], nn.Linear(WIDTH, 3)).double()
        x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
        step = make_rule("scan", net, guess="mean", consistency=1.0)(x, y)
        torch.testing.assert_close(step.loss.detach(), step.label_loss, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"leak": 1.2}, "leak is at most 1, and of coarse='skip'; got 1.2 with coarse='skip'"),
            ({"leak": 0.2, "coarse": "none"}, "leak is at most 1, and of coarse='skip'; got 0.2 with coarse='none'"),
            ({"leak": -0.1}, "leak must not be negative; got -0.1"),
            ({"consistency": -1.0}, "consistency must not be negative; got -1.0"),
        ],
    )
    def test_what_they_cannot_be(self, options, sentence):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            make_rule("scan", mlp(4)[0], **options)
