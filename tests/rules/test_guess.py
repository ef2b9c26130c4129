"""First guesses of scan. Oracles: means by hand, transcriptions, autograd of the regression, backpropagation on the batch
that is due."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.networks import (
    WIDTH,
    Residual,
    assert_equal_gradients,
    batches,
    chain_states,
    gradients,
    mlp,
    residual,
)
from tests.oracles.scan_step import AheadStep, delay, predicted, relative_change, scan_step
from torch import nn

from hbll import Step, make_rule

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])


def descend(net, found, rate=0.3):
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.sub_(rate * found[name])


@pytest.mark.parametrize(("sweeps", "engine"), [(1, "loop"), (3, "batched")])
def test_the_running_mean(sweeps, engine):
    net, _, _ = residual(6)
    rule = make_rule("scan", net, guess="mean", sweeps=sweeps, credit_sweeps=2, engine=engine)
    mean = None
    for x, y in batches(5, sizes=(4, 3, 1)):
        z0 = net.embed(x).detach()
        guess = None if mean is None else [z0 + added for added in mean]
        expected, states, _, _ = scan_step(net, x, y, sweeps, 2, guess=guess)
        assert_equal_gradients(gradients(net, rule(x, y).loss), gradients(net, expected))
        newest = [(state - z0).mean(0) for state in states[1:]]
        # The newest batch has a tenth of the weight, the first one all of it.
        mean = newest if mean is None else [0.9 * m + 0.1 * new for m, new in zip(mean, newest, strict=True)]
        torch.testing.assert_close(rule.carry()["kept"]["mean"], torch.stack(mean))


class TestTree:
    """The predictor tree, and the star."""

    @pytest.mark.parametrize(
        ("jumps", "guess", "sentence"),
        [
            ([nn.Identity()] * 3, "tree", "predictors need a jump per stage, 7; got 3"),
            ([nn.Identity()] * 8, "star", "predictors need a jump per stage, 7; got 8"),
            ([len] * 7, "tree", "jumps are modules, one per stage"),
            ([nn.Identity()] * 7, "mean", "do nothing with guess='mean'"),
        ],
    )
    def test_jumps_that_cannot_be(self, jumps, guess, sentence):
        with pytest.raises(ValueError, match=sentence):
            make_rule("scan", residual()[0], guess=guess, jumps=jumps)

    @pytest.mark.parametrize("size", [1, 3])
    def test_jumps_are_fresh_copies_of_each_stages_last_block(self, size):
        net, _, _ = residual()
        net.blocks[2] = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
        rule = make_rule("scan", net, stage=size, guess="tree")
        jumps = list(rule.states.guess.jumps)
        assert [rule.auxiliary(k) for k in range(1, len(rule.stages) + 1)] == [[jump] for jump in jumps]
        for jump, stage in zip(jumps, rule.stages, strict=True):
            assert type(jump) is type(stage.blocks[-1])
            for p, q in zip(jump.parameters(), stage.blocks[-1].parameters(), strict=True):
                assert p.shape == q.shape
                assert p.dtype == q.dtype
                assert not torch.equal(p, q)
        assert len(list(rule.parameters())) == len(list(net.parameters())) + 2 * len(jumps)  # none is shared

    @pytest.mark.parametrize(
        ("nodes", "kind", "size", "sweeps", "engine"),
        [
            (8, "tree", 1, 1, "loop"),
            (8, "tree", 1, 3, "batched"),
            (11, "tree", 3, 2, "batched"),
            (8, "star", 1, 1, "batched"),
            (8, "star", 3, 2, "loop"),
        ],
    )
    def test_guess_and_regression_by_autograd(self, nodes, kind, size, sweeps, engine):
        net, x, y = residual(nodes)
        rule = make_rule("scan", net, stage=size, sweeps=sweeps, guess=kind, engine=engine)
        jumps, step = rule.states.guess.jumps, Step()
        values = {loss.stage: loss.value for loss in rule.losses(x, y, step)}
        guess = predicted(jumps, net.embed(x), kind)
        _, states, before, _ = scan_step(net, x, y, sweeps, 0, size, guess=list(guess.detach()))
        assert step.defect.item() == pytest.approx(relative_change(states, before), rel=1e-5)
        error = F.mse_loss(guess, torch.stack(states[1:]))
        assert values["jumps"].item() == pytest.approx(error.item())
        exact = gradients(jumps, error)
        norm = torch.stack([g.norm() for g in exact.values()]).norm()
        clipped = {name: g / max(1.0, norm.item()) for name, g in exact.items()}
        assert_equal_gradients(gradients(jumps, rule(x, y).loss), clipped)

    @pytest.mark.parametrize(("scale", "clipped", "engine"), [(0.01, False, "loop"), (10.0, True, "batched")])
    def test_the_norm_of_all_jumps_together_is_clipped(self, scale, clipped, engine):
        net, x, y = residual()
        with torch.no_grad():
            for module in (net.embed, *(block.linear for block in net.blocks)):
                module.bias.mul_(scale)
            net.embed.weight.mul_(scale)
        jumps = [nn.Linear(WIDTH, WIDTH).double() for _ in range(7)]
        for jump in jumps:
            nn.init.eye_(jump.weight)
            nn.init.zeros_(jump.bias)
        rule = make_rule("scan", net, guess="tree", jumps=jumps, engine=engine)
        found = gradients(nn.ModuleList(jumps), rule(x, y).loss)
        norm = torch.stack([g.norm() for g in found.values()]).norm().item()
        assert norm == pytest.approx(1.0) if clipped else 0 < norm < 0.9

    @every_engine
    def test_nothing_leaks_into_the_network(self, engine):
        # At full sweeps no guess has a say: the jumps change the network's gradient in no way.
        net, x, y = residual(5)
        options = {"sweeps": 4, "credit_sweeps": 4, "engine": engine}
        rule = make_rule("scan", net, guess="tree", **options)
        assert_equal_gradients(gradients(net, rule(x, y).loss), gradients(net, F.cross_entropy(net(x), y)))
        jumps = list(rule.states.guess.jumps.parameters())
        for loss in rule.losses(x, y, Step()):
            wanted = [*net.parameters(), *loss.leaves, *jumps]
            found = torch.autograd.grad(loss.value, wanted, materialize_grads=True)
            assert any(g.abs().max() > 0 for g in found[: -len(jumps)]) == (loss.stage != "jumps")
            assert any(g.abs().max() > 0 for g in found[-len(jumps) :]) == (loss.stage == "jumps")

    @pytest.mark.parametrize("engine", ["loop", "batched"])
    def test_jumps_of_the_users_own(self, engine):
        net, x, y = residual(8)
        jumps = [nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, WIDTH)).double() for _ in range(7)]
        rule = make_rule("scan", net, guess="tree", jumps=jumps, sweeps=1, engine=engine)
        torch.testing.assert_close(rule.predict(x, 0), net.head(predicted(jumps, net.embed(x))[-1]))
        assert all(g.abs().max() > 0 for g in gradients(nn.ModuleList(jumps), rule(x, y).loss).values())

    @every_engine
    def test_one_jump_for_all_stages(self, engine):
        net, x, y = residual(8)
        jump = Residual().double()
        rule = make_rule("scan", net, guess="tree", jumps=[jump] * 7, sweeps=7, engine=engine)
        chain = torch.stack(chain_states(net, x)[1:]).detach()
        exact = gradients(jump, F.mse_loss(predicted([jump] * 7, net.embed(x)), chain))
        norm = torch.stack([g.norm() for g in exact.values()]).norm().item()
        expected = {name: g / max(1.0, norm) for name, g in exact.items()}
        assert_equal_gradients(gradients(jump, rule(x, y).loss), expected)

    def test_jumps_without_parameters(self):
        net, x, y = residual(8)
        rule = make_rule("scan", net, guess="tree", jumps=[nn.Identity()] * 7, engine="loop")
        expected, *_ = scan_step(net, x, y, 3, 3)
        assert_equal_gradients(gradients(net, rule(x, y).loss), gradients(net, expected))

    def test_learning_makes_the_guess_better(self):
        net, x, y = residual(8)
        rule = make_rule("scan", net, guess="tree", sweeps=2)
        optimizer = torch.optim.Adam(rule.states.guess.parameters(), lr=1e-2)
        defects = []
        for _ in range(60):
            step = rule(x, y)
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            defects.append(step.defect.item())
        assert defects[-1] < 0.5 * defects[0]

    def test_a_jump_that_changes_the_shape_is_named(self):
        net, x, y = residual(4)
        jumps = [nn.Linear(WIDTH, WIDTH + (n == 3)).double() for n in (1, 2, 3)]
        with pytest.raises(ValueError, match="jump 3 changes the state's shape"):
            make_rule("scan", net, guess="tree", jumps=jumps, engine="loop")(x, y)


class TestAhead:
    """States of older weights."""

    @every_engine
    @given(
        blocks=st.integers(1, 7),
        size=st.integers(1, 3),
        sweeps=st.integers(1, 3),
        credit_sweeps=st.integers(0, 2),
        sizes=st.sampled_from([(4,), (4, 2, 3)]),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=12)
    def test_the_pseudo_code_while_weights_move(self, engine, blocks, size, sweeps, credit_sweeps, sizes, seed):
        net, _, _ = residual(blocks + 1, seed)
        other = copy.deepcopy(net)
        options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps}
        if size > 1 or blocks == 1:  # stages of unlike sizes, or a single one, cannot be stacked
            engine = "auto"
        rule = make_rule("scan", net, guess="ahead", engine=engine, **options)
        oracle = AheadStep(other, size, sweeps, credit_sweeps)
        for x, y in batches(8, seed=seed, sizes=sizes):
            found, expected = gradients(net, rule(x, y).loss), gradients(other, oracle.loss(x, y))
            assert_equal_gradients(found, expected)
            descend(net, found)
            descend(other, expected)

    @pytest.mark.parametrize(
        ("size", "sweeps", "credit_sweeps", "engine"),
        [(1, 1, 7, "loop"), (1, 2, 7, "batched"), (2, 1, 4, "batched"), (3, 1, 3, "auto")],
    )
    def test_with_frozen_weights_it_is_backpropagation_on_the_batch_that_is_due(
        self, size, sweeps, credit_sweeps, engine
    ):
        # Any block, with skip or without: a guess that is right stays right.
        net, _, _ = mlp(8)
        due = delay(math.ceil(7 / size), sweeps, credit_sweeps)
        options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps}
        rule = make_rule("scan", net, guess="ahead", engine=engine, **options)
        seen = batches(6)
        for t, (x, y) in enumerate(seen):
            step = rule(x, y)
            if t >= due:
                x, y = seen[t - due]
                assert torch.equal(step.batch[0], x)
                assert torch.equal(step.batch[1], y)
            assert_equal_gradients(gradients(net, step.loss), gradients(net, F.cross_entropy(net(x), y)))
            assert step.defect.item() < 1e-12

    @given(
        blocks=st.integers(2, 30),
        size=st.integers(1, 4),
        sweeps=st.integers(1, 4),
        credit_sweeps=st.integers(0, 4),
        tolerance=st.sampled_from([None, math.inf]),
    )
    @settings(max_examples=25)
    def test_once_the_pipeline_is_filled_it_costs_work_but_no_span(
        self, blocks, size, sweeps, credit_sweeps, tolerance
    ):
        stages = math.ceil(blocks / size)
        assume(stages > 1)
        net, _, _ = residual(blocks + 1)
        options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps, "tolerance": tolerance}
        rule = make_rule("scan", net, engine="loop", **options)
        due = delay(stages, sweeps, credit_sweeps)
        for x, y in batches(due + 1):
            step = rule(x, y)
        if tolerance:  # the sweep with graph follows the first one that is near enough
            sweeps, credit_sweeps = min(sweeps, 2), min(credit_sweeps, 1)
        length = sweeps + credit_sweeps + 1
        # Where sweeps end early, the step waits for the batches in flight.
        assert step.span == size * max(length, math.ceil((stages - 1) / due))
        # Every step some batches pass as many stages as one batch passes in all its steps, the last of which may be short.
        ahead = size * (stages - 1)
        # All sweeps and all parameters' products, and the walk back inside stages, where blocks hand the gradient on.
        assert step.work == blocks * length + blocks - stages + ahead

    @pytest.mark.parametrize("steps", [1, 2, 6])
    def test_what_is_in_flight_is_learned_from_when_no_new_batch_comes_in(self, steps):
        # Weights do not move: the guess is the chain's own states, and a sweep leaves them as they are.
        net, _, _ = residual(8)
        rule = make_rule("scan", net, guess="ahead", sweeps=1, credit_sweeps=0)
        assert delay(7, 1, 0) == 3
        seen = batches(steps, sizes=(4, 2))
        for batch in seen:
            rule(*batch)
        for x, y in seen[-3:]:
            assert rule.in_flight
            step = rule(None, None)
            assert torch.equal(step.batch[0], x)
            assert torch.equal(step.batch[1], y)
            states = [state.detach() for state in chain_states(net, x)[1:]]
            expected, *_ = scan_step(net, x, y, 1, 0, guess=states)
            assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))
        assert not rule.in_flight
        with pytest.raises(ValueError, match="there is no mini-batch in flight"):
            rule(None, None)

    def test_in_evaluation_it_is_of_the_batch_at_hand(self):
        net, _, _ = residual(8)
        rule = make_rule("scan", net, guess="ahead", sweeps=1, credit_sweeps=7)
        (x, y), *others = batches(4)
        for earlier in others:
            rule(*earlier)
        step = rule.eval()(x, y)
        assert step.batch is None
        assert_equal_gradients(gradients(net, step.loss), gradients(net, F.cross_entropy(net(x), y)))
        # The anytime readout starts from the embedded input.
        torch.testing.assert_close(rule.predict(x, 0), net.head(net.embed(x)))
        torch.testing.assert_close(rule.predict(x, 7), net(x))

    def test_a_diagnosis_is_of_the_batch_that_is_due_as_training_has_it(self):
        # Few sweeps and fast learning: the states of older weights are not the chain's.
        net, _, _ = residual(8)
        rule = make_rule("scan", net, sweeps=1, credit_sweeps=3)
        assert delay(7, 1, 3) == 2
        *seen, newest = batches(6)
        for x, y in seen:
            descend(net, gradients(net, rule(x, y).loss), rate=1.0)

        def cosines(rule, step, x, y):
            ours = gradients(rule.network, step.loss)
            exact = gradients(net, F.cross_entropy(net(x), y))
            found = []
            for b in range(7):
                names = [f"blocks.{b}.linear.{part}" for part in ("weight", "bias")]
                pair = [torch.cat([g[name].flatten() for name in names]) for g in (ours, exact)]
                found.append(torch.cosine_similarity(*pair, dim=0).item())
            return found

        x, y = newest
        found = [report.cosine for report in rule.diagnose(x[:2], y[:2]).values()]
        twin = copy.deepcopy(rule)
        assert found == pytest.approx(cosines(twin, twin(x, y), *seen[-2]))
        assert min(found) < 0.99
        # Before any batch is due it is of the batch at hand, whose states are exact.
        early = make_rule("scan", net, sweeps=1, credit_sweeps=3)
        early(*seen[0])
        found = [report.cosine for report in early.diagnose(x, y).values()]
        assert found == pytest.approx(cosines(early, early.eval()(x, y), x, y))
