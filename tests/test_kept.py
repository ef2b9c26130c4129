"""What rules keep from step to step. Oracle: an objective that nothing happened to."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_ahead_guess import batches
from tests.test_objective import gradients, residual
from torch import nn

import hbll
from hbll.network import evaluating

# Every kind of thing that is kept, and several batches in flight where there are batches.
KEEPING = {
    "ahead": ("scan", {"sweeps": 1, "credit_sweeps": 0}),
    "mean": ("scan", {"guess": "mean", "sweeps": 1}),
    "stream": ("stream", {"stage": 2}),
    "pipeline": ("pipeline", {"stage": 2}),
}
every_kind = pytest.mark.parametrize("kind", KEEPING)


def make(kind, **options):
    preset, own = KEEPING[kind]
    return hbll.Objective(preset, **(own | options))


def assert_same_steps(one, other, net, seen, twin=None):
    """The second objective may have a network of its own."""
    for x, y in seen:
        found, expected = gradients(net, one(net, x, y).loss), gradients(twin or net, other(twin or net, x, y).loss)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class Fuse(nn.Module):
    """Burns out once when it is told to."""

    def __init__(self, module):
        super().__init__()
        self.module, self.due = module, False

    def forward(self, state):
        if self.due:
            self.due = False
            raise MemoryError("no room")
        return self.module(state)


@every_kind
@pytest.mark.parametrize("place", ["embed", "first block", "last block", "head"])
@pytest.mark.parametrize("step", [0, 2, 9])
def test_a_step_that_fails_leaves_everything_as_it_was(kind, place, step):
    net, _, _ = residual(8)
    fuses = {"embed": Fuse(net.embed), "head": Fuse(net.head)}
    net.embed, net.head = fuses["embed"], fuses["head"]
    for name, position in (("first block", 0), ("last block", -1)):
        fuses[name] = net.blocks[position] = Fuse(net.blocks[position])
    objective, spared = make(kind, engine="loop"), make(kind, engine="loop")
    *seen, (x, y) = batches(20)
    assert_same_steps(objective, spared, net, seen[:step])
    fuses[place].due = True
    try:
        objective(net, x, y)
    except MemoryError:
        pass
    else:  # a pipeline that fills has not come to its end yet
        assert (kind in ("stream", "pipeline"), step < 4, "last" in place or place == "head") == (True, True, True)
        fuses[place].due = False
        spared(net, x, y)
    assert_same_steps(objective, spared, net, seen[step:])


@every_kind
def test_gradients_that_are_switched_off_are_said_at_once(kind):
    net, _, _ = residual(8)
    objective, spared = make(kind), make(kind)
    *seen, (x, y) = batches(12)
    assert_same_steps(objective, spared, net, seen[:6])
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"outside of torch.no_grad\(\); a validation loss is that of"),
    ):
        objective(net, x, y)
    assert_same_steps(objective, spared, net, seen[6:])


def test_rules_that_keep_nothing_refuse_switched_off_gradients_too_but_for_backpropagation():
    net, x, y = residual(8)
    with torch.no_grad():
        for rule in ("paper", "tree"):
            with pytest.raises(ValueError, match="finds its gradients as it goes"):
                hbll.Objective(rule)(net, x, y)
        assert hbll.Objective("bp")(net, x, y).loss == F.cross_entropy(net(x), y)


@every_kind
def test_it_is_of_one_network(kind):
    (net, _, _), (other, _, _) = residual(8), residual(8, seed=3)
    seen = batches(12)
    objective = make(kind)
    for x, y in seen:
        objective(net, x, y)
    with pytest.raises(
        ValueError, match=r"another network: take one objective for each network, or call objective.reset\(\)"
    ):
        objective(other, *seen[0])
    assert_same_steps(objective, copy.deepcopy(objective), net, seen)
    objective.reset()
    assert_same_steps(objective, make(kind), other, seen)


@every_kind
def test_a_network_that_is_gone_is_another_one(kind):
    objective = make(kind)
    for trial in range(3):
        net, _, _ = residual(8, seed=trial)
        x, y = batches(1)[0]
        if trial:
            with pytest.raises(ValueError, match="another network"):
                objective(net, x, y)
            objective.reset()
        objective(net, x, y)


@every_kind
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_go_on_with_a_copy_of_the_network(kind, way):
    net, _, _ = residual(8)
    seen = batches(20)
    objective = make(kind)
    for x, y in seen[:10]:
        objective(net, x, y)
    twin = copy.deepcopy(net)
    if way == "deepcopy":
        other = copy.deepcopy(objective)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(objective))
    else:
        other = make(kind)
        for x, y in seen[:3]:  # what it has seen itself is forgotten
            other(net, x, y)
        other.load_state_dict(objective.state_dict())
    assert_same_steps(objective, other, net, seen[10:], twin)


@every_kind
def test_other_stages_are_refused(kind):
    net, _, _ = residual(13)
    x, y = batches(1)[0]
    objective, other = make(kind, stage=3), make(kind, stage=4)
    for _ in range(5):
        objective(net, x, y)
    other.load_state_dict(objective.state_dict())
    with pytest.raises(
        ValueError, match=r"of 3, 3, 3, 3 blocks, and the network is cut into stages of 4, 4, 4: choose the"
    ):
        other(net, x, y)
    other.reset()
    assert_same_steps(other, make(kind, stage=4), net, batches(6))


@settings(max_examples=30, deadline=None)
@given(before=st.integers(1, 8), after=st.integers(1, 8), steps=st.integers(1, 9))
def test_other_sweeps_go_on_with_the_newest_batches(before, after, steps):
    # With frozen weights the guess is exact, whoever made it.
    net, _, _ = residual(9)
    one, other = (hbll.Objective("scan", sweeps=sweeps, credit_sweeps=0) for sweeps in (before, after))
    delay = math.ceil(7 / (after + 1))
    seen = batches(steps + 12)
    for x, y in seen[:steps]:
        one(net, x, y)
    other.load_state_dict(one.state_dict())
    for t, (x, y) in enumerate(seen[steps:], steps):
        step = other(net, x, y)
        trained = next(i for i, batch in enumerate(seen) if torch.equal(batch[0], step.trace.x))
        assert trained in (t, t - delay)
        assert step.defect < 1e-12
        assert len(other.states.guess.flight.nest) <= delay + 1
    assert trained == t - delay


@pytest.mark.parametrize(
    ("rule", "options"),
    [("pipeline", {}), ("stream", {}), ("stream", {"spine": "none", "heads": "own"}), ("stream", {"states": "chain"})],
)
def test_labels_may_be_any_nest(rule, options):
    net, _, _ = residual(8)

    def loss(prediction, labels):
        return F.cross_entropy(prediction, labels["class"], reduction="none") * labels["more"][0]

    def plain(prediction, labels):
        return F.cross_entropy(prediction, labels[..., 0].long(), reduction="none") * labels[..., 1]

    torch.manual_seed(0)
    nested = hbll.Objective(rule, loss=loss, **options).prepare(net)
    torch.manual_seed(0)
    flat = hbll.Objective(rule, loss=plain, **options).prepare(net)
    for x, y in batches(18):
        weight = torch.rand(4, dtype=torch.float64)
        step = nested(net, x, {"class": y, "more": (weight, "a name")})
        found, expected = step.loss, flat(net, x, torch.stack([y.double(), weight], -1)).loss
        torch.testing.assert_close(found, expected)
        found, expected = gradients(net, found), gradients(net, expected)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
    assert any(gradient.abs().max() > 0 for gradient in expected.values())


@pytest.mark.parametrize("kind", [kind for kind in KEEPING if kind != "pipeline"])  # which cannot be looked at
def test_in_evaluation_nothing_is_kept(kind):
    net, _, _ = residual(8)
    objective, spared = make(kind), make(kind)
    seen = batches(9)
    assert_same_steps(objective, spared, net, seen)
    with evaluating(objective):
        objective(net, *batches(1, seed=5)[0])
    assert_same_steps(objective, spared, net, seen)
