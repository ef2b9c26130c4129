"""States of older weights as the first guess of scan. Oracles: backpropagation on the batch that is due, a transcription."""

import copy
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.test_objective import CLASSES, INPUTS, assert_equal_gradients, gradients, mlp, residual
from tests.test_scan_rule import cut, reference_scan

import hbll
from hbll.trace import Trace
from hbll.training import checkpoint

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])


def batches(count, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(4, INPUTS, dtype=torch.float64), torch.randint(CLASSES, (4,))) for _ in range(count)]


def descend(net, found, rate=0.3):
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.sub_(rate * found[name])


def delay(stages, sweeps, credit_sweeps):
    """Steps that a batch needs to pass all stages but the last, at most K + K_c + 1 of them in each."""
    return math.ceil((stages - 1) / (sweeps + credit_sweeps + 1))


class Reference:
    """scan from the states of older weights, batch by batch and stage by stage; states as lists h_0, h_1, .."""

    def __init__(self, net, size, sweeps, credit_sweeps):
        self.net, self.size, self.sweeps, self.credit_sweeps = net, size, sweeps, credit_sweeps
        self.f = cut(net, size)
        self.delay = delay(len(self.f), sweeps, credit_sweeps)
        self.turns = math.ceil((len(self.f) - 1) / self.delay) if self.delay else 0
        self.queue = []

    def loss(self, x, y):
        """The loss of a step."""
        self.queue.append((x, y, [self.net.embed(x).detach()]))
        for _, _, states in self.queue:
            for stage in islice(self.f, len(states) - 1, len(states) - 1 + self.turns):
                states.append(stage(states[-1]).detach())
        if len(self.queue) > self.delay:
            x, y, states = self.queue.pop(0)
        else:
            states = [self.net.embed(x).detach()]
            for stage in self.f:
                states.append(stage(states[-1]).detach())
        options = self.sweeps, self.credit_sweeps, self.size
        return reference_scan(self.net, x, y, *options, guess=states[1:])[0]


@every_engine
@given(
    blocks=st.integers(1, 7),
    size=st.integers(1, 3),
    sweeps=st.integers(1, 3),
    credit_sweeps=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_the_pseudo_code_while_weights_move(engine, blocks, size, sweeps, credit_sweeps, seed):
    net, _, _ = residual(blocks + 1, seed)
    other = copy.deepcopy(net)
    options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps}
    if size > 1 or blocks == 1:  # stages of unlike sizes, or a single one, cannot be stacked
        engine = "auto"
    objective = hbll.Objective("scan", guess="ahead", engine=engine, **options)
    reference = Reference(other, size, sweeps, credit_sweeps)
    for x, y in batches(8, seed):
        found, expected = gradients(net, objective(net, x, y).loss), gradients(other, reference.loss(x, y))
        assert_equal_gradients(found, expected)
        descend(net, found)
        descend(other, expected)


@every_engine
@pytest.mark.parametrize(("size", "sweeps", "credit_sweeps"), [(1, 1, 7), (1, 2, 7), (2, 1, 4), (3, 1, 3)])
def test_with_frozen_weights_it_is_backpropagation_on_the_batch_that_is_due(size, sweeps, credit_sweeps, engine):
    # Any block, with skip or without: a guess that is right stays right.
    net, _, _ = mlp(8)
    due = delay(math.ceil(7 / size), sweeps, credit_sweeps)
    options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps}
    objective = hbll.Objective("scan", guess="ahead", engine=engine if size < 3 else "auto", **options)
    seen = batches(6)
    for t, (x, y) in enumerate(seen):
        step = objective(net, x, y)
        x, y = seen[t - due if t >= due else t]
        assert_equal_gradients(gradients(net, step.loss), gradients(net, F.cross_entropy(net(x), y)))
        assert step.defect.item() < 1e-12


@given(
    blocks=st.integers(2, 40),
    size=st.integers(1, 4),
    sweeps=st.integers(1, 4),
    credit_sweeps=st.integers(0, 4),
    tolerance=st.sampled_from([None, math.inf]),
)
@settings(max_examples=40, deadline=None)
def test_once_the_pipeline_is_filled_it_costs_work_but_no_span(blocks, size, sweeps, credit_sweeps, tolerance):
    stages = math.ceil(blocks / size)
    assume(stages > 1)
    net, _, _ = residual(blocks + 1)
    options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps, "tolerance": tolerance}
    objective = hbll.Objective("scan", engine="loop", **options)
    due = delay(stages, sweeps, credit_sweeps)
    for x, y in batches(due + 1):
        step = objective(net, x, y)
    if tolerance:  # the sweep with graph follows the first one that is near enough
        sweeps, credit_sweeps = min(sweeps, 2), min(credit_sweeps, 1)
    length = sweeps + credit_sweeps + 1
    # Where sweeps end early, the step waits for the batches in flight.
    assert step.span == size * max(length, math.ceil((stages - 1) / due))
    # Every step some batches pass as many stages as one batch passes in all its steps, the last of which may be cut short.
    ahead = size * (stages - 1)
    # All sweeps and all parameters' products, and the walk back inside stages, where blocks hand the gradient on.
    assert step.work == blocks * length + blocks - stages + ahead


def test_training_goes_on_from_a_checkpoint(tmp_path):
    net, _, _ = residual(8)
    options = {"sweeps": 1, "credit_sweeps": 0, "guess": "ahead"}  # four batches in flight
    objective = hbll.Objective("scan", **options)
    *before, (x, y) = batches(6)
    for earlier in before:
        objective(net, *earlier)
    checkpoint.save(tmp_path / "state", objective.state_dict())
    other = hbll.Objective("scan", **options)
    other.load_state_dict(checkpoint.load(tmp_path / "state"))
    for _ in range(5):
        found, expected = (gradients(net, one(net, x, y).loss) for one in (other, objective))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_guess_outside_of_a_step_keeps_nothing():
    net, _, _ = residual(8)
    objective = hbll.Objective("scan", sweeps=1, credit_sweeps=0)
    (x, y), *others = batches(4)
    for earlier in others:
        objective(net, *earlier)
    flight = list(objective.states.guess.flight.nest)
    with torch.no_grad():
        objective.states.guess(Trace(net, objective.stages(net), objective.rule, x, y))
    assert objective.states.guess.flight.nest == flight


@pytest.mark.parametrize("rule", ["scan", "stream", "pipeline"])
def test_a_loader_may_use_its_buffers_again(rule):
    net, _, _ = residual(8)
    objective, careless = (hbll.Objective(rule, stage=2) for _ in range(2))
    seen = batches(9)
    buffers = [tensor.clone() for tensor in seen[0]]
    for x, y in seen:
        for buffer, newest in zip(buffers, (x, y), strict=True):
            buffer.copy_(newest)
        expected, found = (
            gradients(net, one(net, *batch).loss) for one, batch in ((objective, (x, y)), (careless, buffers))
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rule", ["scan", "stream", "pipeline"])
def test_what_is_in_flight_moves_with_the_objective(rule):
    net, _, _ = residual(8)
    objective = hbll.Objective(rule, stage=2)
    seen = batches(12)
    for x, y in seen[:9]:
        objective(net, x, y)
    net.float()
    objective.float()
    for x, y in seen[9:]:
        found = gradients(net, objective(net, x.float(), y).loss)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("look", ["eval", "diagnose", "audit", "predict"])
def test_looking_moves_nothing_and_sees_the_batch_at_hand(look):
    net, _, _ = residual(8)
    objective = hbll.Objective("scan", guess="ahead", sweeps=1, credit_sweeps=7)
    (x, y), *others = batches(4)
    for earlier in others:
        objective(net, *earlier)
    flight = list(objective.states.guess.flight.nest)
    if look == "eval":
        step = objective.eval()(net, x, y)
        assert_equal_gradients(gradients(net, step.loss), gradients(net, F.cross_entropy(net(x), y)))
    elif look == "diagnose":
        assert min(report.cosine for report in objective.diagnose(net, x, y).values()) > 1 - 1e-9
    elif look == "audit":
        hbll.audit(net, objective, x, y)
    else:  # the anytime readout starts from the embedded input
        torch.testing.assert_close(objective.predict(net, x, 0), net.head(net.embed(x)))
        torch.testing.assert_close(objective.predict(net, x, 7), net(x))
    assert all(a is b for a, b in zip(flight, objective.states.guess.flight.nest, strict=True))


def test_a_diagnosis_is_of_the_batch_that_is_due_as_training_has_it():
    # Few sweeps and fast learning: the states of older weights are not the chain's.
    net, _, _ = residual(8)
    objective = hbll.Objective("scan", sweeps=1, credit_sweeps=3)  # two batches in flight
    (x, y), (another, _), *others = batches(8)
    for earlier in others:
        descend(net, gradients(net, objective(net, *earlier).loss), rate=1.0)
    found = objective.diagnose(net, x[:2], y[:2])
    assert {n: report.cosine for n, report in found.items()} == pytest.approx(
        objective.cosines(net, copy.deepcopy(objective)(net, another, y))
    )
    assert min(report.cosine for report in found.values()) < 0.99
    # Before any batch is due, of the batch at hand, whose states are exact.
    early = hbll.Objective("scan", sweeps=1, credit_sweeps=3)
    early(net, *others[0])
    found = {n: report.cosine for n, report in early.diagnose(net, x, y).items()}
    assert found == pytest.approx(early.cosines(net, early.eval()(net, x, y)))


@every_engine
def test_batches_that_pass_stages_together_must_be_of_one_size(engine):
    net, x, y = residual(8)
    objective = hbll.Objective("scan", guess="ahead", sweeps=1, credit_sweeps=0, engine=engine)
    objective(net, x, y)
    flight = list(objective.states.guess.flight.nest)
    with pytest.raises(ValueError, match=r"guess='ahead' needs batches of one size: .*drop the last, short batch"):
        objective(net, x[:2], y[:2])
    assert objective.states.guess.flight.nest == flight
    alone = hbll.Objective("scan", guess="ahead", engine=engine)  # one batch in flight at a time
    for size in (4, 2, 3):
        found = gradients(net, alone(net, x[:size], y[:size]).loss)
    assert all(g.isfinite().all() for g in found.values())
