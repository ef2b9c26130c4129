"""What rules keep from step to step, and what travels with a batch in flight. Oracles: a rule that nothing happened to, and
networks without a context."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.networks import (
    assert_equal_gradients,
    batches,
    gradients,
    masked,
    residual,
    transformer,
    unmasked,
)
from torch.utils._pytree import tree_leaves

import hbll
from hbll import make_rule
from hbll.carry import Carry, concatenate, map_tensors, own_copy

# Every kind of thing that is kept, and several batches in flight where there are batches.
KEEPING = {
    "ahead": ("scan", {"sweeps": 1, "credit_sweeps": 0}),
    "mean": ("scan", {"guess": "mean", "sweeps": 1}),
    "stream": ("stream", {"stage": 2}),
    "pipeline": ("pipeline", {"stage": 2}),
    "late": ("2bw", {"delay": 3}),
}
every_kind = pytest.mark.parametrize("kind", KEEPING)


def make(kind, net, **options):
    name, own = KEEPING[kind]
    return make_rule(name, net, **(own | options))


def assert_same_steps(one, other, seen):
    for x, y in seen:
        found, expected = (gradients(rule.network, rule(x, y).loss) for rule in (one, other))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class TestNests:
    """Dicts, lists, tuples and tensors."""

    def test_what_a_step_leaves_is_there_once_the_step_is_complete(self):
        carry = Carry()
        assert carry.on(torch.device("cpu")) is None
        carry.leave([1])
        assert carry.nest is None
        carry.complete()
        assert carry.nest == [1]
        carry.leave([2])
        carry.begin()  # the step failed: another begins
        carry.complete()
        assert carry.nest == [1]

    def test_it_is_used_on_the_device_of_the_step(self):
        carry = Carry()
        carry.leave({"a": [torch.ones(2), ("b", torch.ones(3, dtype=torch.long))]})
        carry.complete()
        moved = carry.on(torch.device("meta"))
        assert [leaf.device.type for leaf in tree_leaves(moved) if isinstance(leaf, torch.Tensor)] == ["meta", "meta"]
        assert moved["a"][1][0] == "b"
        carry.on(torch.device("cpu"))["a"].pop()  # the containers are new
        assert len(carry.nest["a"]) == 2

    def test_a_copy_shares_no_memory_and_has_no_graph(self):
        parameter = torch.ones(2, requires_grad=True)
        nest = {"a": (parameter * 2, [3, None, "name"])}
        found = own_copy(nest)
        with torch.no_grad():
            nest["a"][0].zero_()
        assert found["a"][0].tolist() == [2, 2]
        assert not found["a"][0].requires_grad
        assert found["a"][1] == [3, None, "name"]

    def test_nests_of_one_form_are_concatenated(self):
        one, other = ({"a": torch.full((n, 2), n), "b": (torch.arange(n), "name")} for n in (1, 3))
        found = concatenate([one, other])
        assert found["a"].tolist() == [[1, 1], [3, 3], [3, 3], [3, 3]]
        assert found["b"][0].tolist() == [0, 0, 1, 2]
        assert found["b"][1] == "name"
        assert map_tensors(torch.numel, found) == {"a": 8, "b": (4, "name")}


class TestCarry:
    """``rule.carry()`` and what it is taken up by."""

    def test_a_mean_is_beside_the_state_dict(self):
        net, _, _ = residual(8)
        rule = make("mean", net)
        assert rule.carry() == {}
        keys = list(rule.state_dict())
        for batch in batches(3):
            rule(*batch)
        assert list(rule.state_dict()) == keys
        file = io.BytesIO()
        torch.save(rule.carry(), file)
        file.seek(0)
        other = make("mean", copy.deepcopy(net))
        other.load_carry(torch.load(file, weights_only=True))
        assert_same_steps(other, rule, batches(3, seed=2))

    @every_kind
    def test_it_shares_no_memory_with_the_rule(self, kind):
        net, _, _ = residual(8)
        rule, spared = make(kind, net), make(kind, net)
        seen = batches(12)
        assert_same_steps(rule, spared, seen[:6])
        carry = rule.carry()
        rule.load_carry(carry)
        for leaf in tree_leaves(carry):
            if isinstance(leaf, torch.Tensor):
                leaf.zero_()
        for leaf in tree_leaves(rule.carry()):
            if isinstance(leaf, torch.Tensor):
                leaf.zero_()
        assert_same_steps(rule, spared, seen[6:])

    @every_kind
    def test_what_is_loaded_takes_the_place_of_what_was_there(self, kind):
        net, _, _ = residual(8)
        rule, other = make(kind, net), make(kind, net)
        for batch in batches(4):
            rule(*batch)
        rule.load_carry(other.carry())  # which is empty
        assert rule.carry() == {}
        assert_same_steps(rule, other, batches(6, seed=2))
        rule.reset()
        assert rule.carry() == {}
        assert_same_steps(rule, make(kind, net), batches(6, seed=3))

    @pytest.mark.parametrize("kind", [kind for kind in KEEPING if kind != "late"])  # which has one stage
    def test_other_stages_are_refused(self, kind):
        net, _, _ = residual(13)
        rule, other = make(kind, net, stage=3), make(kind, net, stage=4)
        for batch in batches(5):
            rule(*batch)
        with pytest.raises(
            ValueError,
            match=r"of 3, 3, 3, 3 blocks, and the network is cut into stages of 4, 4, 4: take the same stage=",
        ):
            other.load_carry(rule.carry())
        assert other.carry() == {}

    @every_kind
    def test_another_rule_is_refused(self, kind):
        net, x, y = residual(8)
        rule = make(kind, net)
        rule(x, y)
        names = {"pipeline": "late, stream"}.get(kind, kind)
        with pytest.raises(ValueError, match=f"what was kept is of another rule: this one keeps nothing as {names}$"):
            make_rule("tree", net, stage=rule.size).load_carry(rule.carry())

    @settings(max_examples=12)
    @given(before=st.integers(1, 8), after=st.integers(1, 8), steps=st.integers(1, 9))
    def test_other_sweeps_go_on_with_the_newest_batches(self, before, after, steps):
        # With frozen weights the guess is exact, whoever made it.
        net, _, _ = residual(9)
        one, other = (make_rule("scan", net, sweeps=sweeps, credit_sweeps=0) for sweeps in (before, after))
        delay = math.ceil(7 / (after + 1))
        seen = batches(steps + 12)
        for batch in seen[:steps]:
            one(*batch)
        other.load_carry(one.carry())
        for t, (x, y) in enumerate(seen[steps:], steps):
            step = other(x, y)
            learned, _ = step.batch or (x, y)
            trained = next(i for i, (x, _) in enumerate(seen) if torch.equal(x, learned))
            assert trained in (t, t - delay)
            assert step.defect < 1e-12
            assert len(other.carry()["kept"]["ahead"]) <= delay + 1
        assert trained == t - delay

    @pytest.mark.parametrize("kind", [kind for kind in KEEPING if kind != "mean"])
    def test_a_loader_may_use_its_buffers_again(self, kind):
        net, _, _ = residual(8)
        rule, careless = make(kind, net), make(kind, net)
        seen = batches(12)
        buffers = [tensor.clone() for tensor in seen[0]]
        for x, y in seen:
            for buffer, newest in zip(buffers, (x, y), strict=True):
                buffer.copy_(newest)
            expected, found = gradients(net, rule(x, y).loss), gradients(net, careless(*buffers).loss)
            assert all(torch.equal(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("look", ["evaluation", "no_grad", "diagnose", "audit"])
    def test_looking_does_not_move_a_mean(self, look):
        net, _, _ = residual(8)
        rule, spared = make("mean", net), make("mean", net)
        seen = batches(6)
        assert_same_steps(rule, spared, seen[:3])
        x, y = batches(1, seed=5, sizes=(2,))[0]
        if look == "evaluation":
            rule.eval()(x, y)
            rule.train()
        elif look == "no_grad":
            with torch.no_grad():
                assert rule(x, y).loss.grad_fn is None
        elif look == "diagnose":
            rule.diagnose(x, y)
        else:
            hbll.audit(rule, x, y)
        assert rule.training
        assert_same_steps(rule, spared, seen[3:])


TRAVELLING = [
    ("stream", {}),
    ("stream", {"states": "chain", "stage": 2}),
    ("greedy", {"stage": (3, 4)}),
    ("pipeline", {}),
    ("scan", {"sweeps": 1, "credit_sweeps": 0}),
]


@pytest.mark.parametrize(("name", "options"), TRAVELLING)
def test_labels_may_be_any_nest(name, options):
    net, _, _ = residual(8)

    def loss(prediction, labels):
        return F.cross_entropy(prediction, labels["class"], reduction="none") * labels["more"][0]

    def plain(prediction, labels):
        return F.cross_entropy(prediction, labels[..., 0].long(), reduction="none") * labels[..., 1]

    torch.manual_seed(0)
    nested = make_rule(name, net, loss=loss, **options)
    torch.manual_seed(0)
    flat = make_rule(name, net, loss=plain, **options)
    for x, y in batches(15, sizes=(4, 2)):
        weight = torch.rand(len(y), dtype=torch.float64)
        step = nested(x, {"class": y, "more": (weight, "a name")})
        expected = flat(x, torch.stack([y.double(), weight], -1))
        torch.testing.assert_close(step.loss, expected.loss)
        found, wanted = gradients(nested, step.loss), gradients(flat, expected.loss)
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key])
    assert any(gradient.abs().max() > 0 for gradient in wanted.values())


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stream", {}),
        ("stream", {"spine": "right", "stage": 2, "rim": 0.3}),
        ("greedy", {"stage": 2}),
        ("pipeline", {}),
        ("scan", {"sweeps": 1, "credit_sweeps": 0}),
        ("scan", {"guess": "mean", "stage": 2}),
        ("paper", {"rim": 0.3}),
    ],
)
def test_a_context_travels_with_its_batch(name, options, engine):
    # Each batch has a mask of its own: a network whose state it is a part of cannot mistake one for another's.
    net, _, _ = masked(8)
    plain = unmasked(net)
    torch.manual_seed(0)
    rule = make_rule(name, net, engine=engine, **options)
    torch.manual_seed(0)
    twin = make_rule(name, plain, engine=engine, **options)
    for x, y in batches(15, sizes=(4, 4, 2)):
        step, expected = rule(x, y), twin(x, y)
        if expected.label_loss is not None:  # else a pipeline fills
            torch.testing.assert_close(step.label_loss, expected.label_loss)
            assert_equal_gradients(gradients(net, step.loss), gradients(plain, expected.loss))
    assert step.engine == engine


def test_backpropagation_has_the_context_of_the_network():
    net, x, y = masked(8)
    exact = gradients(net, F.cross_entropy(unmasked(net)(x), y))
    assert_equal_gradients(gradients(net, make_rule("bp", net)(x, y).loss), exact)
    assert_equal_gradients(gradients(net, F.cross_entropy(net(x), y)), exact)


def test_batches_in_flight_agree_in_what_of_their_context_is_no_tensor():
    net, x, y = masked(8)
    rule = make_rule("stream", net, engine="batched", readout="head")
    rule(x, y)
    net.embed.factor = 0.9
    with pytest.raises(ValueError, match="must agree in what of their context is no tensor"):
        rule(x, y)


@pytest.mark.parametrize("name", ["pipeline", "scan"])
def test_what_was_in_flight_is_dropped_with_a_batch_whose_loss_cannot_be_found(name):
    def loss(scores, y):  # what it takes is not known before it is called
        return F.cross_entropy(scores, y, reduction="none")

    options = {"sweeps": 1, "credit_sweeps": 0} if name == "scan" else {}
    network, x, y = residual(4)
    rule = make_rule(name, network, loss=loss, **options)
    if name == "scan":
        rule.backward(x, y), rule.backward(x, y)  # it learns at once from the first ones
    rule.backward(x, y + 100)  # whose turn comes in one of the next steps
    with pytest.raises(ValueError, match=r"that came in some steps before.*what was in flight is dropped: Target"):
        all(rule.backward(x, y) for _ in range(3))
    assert not rule.in_flight
    for _ in range(6):
        rule.backward(x, y)


@pytest.mark.parametrize("name", ["pipeline", "scan", "stream", "greedy"])
def test_a_wrong_label_is_refused_as_it_comes_in_and_nothing_is_kept_of_its_batch(name):
    options = {"sweeps": 1, "credit_sweeps": 0} if name == "scan" else {}
    rules = [make_rule(name, residual(5)[0], **options) for _ in range(2)]
    _, x, y = residual(5)
    for i, wrong in enumerate(
        [None, y + 100, None, None, y.double(), None, y[:-1], y.tolist(), None, -y - 1] + 8 * [None]
    ):
        if wrong is not None:
            with pytest.raises(ValueError, match="labels"):
                rules[0].backward(x, wrong)
        else:
            steps = [rule.backward(x + i, y) for rule in rules]
            assert steps[0].loss == steps[1].loss
    assert steps[0].label_loss is not None


def test_labels_of_another_class_are_seen_where_every_token_has_one():
    network, x, y = transformer(4)
    rule = make_rule("pipeline", network)
    for length in (7, 5, 3):  # that of the batch at hand
        rule.backward(x[:, :length], y[:, :length])
        with pytest.raises(ValueError, match="take integer labels"):
            rule.backward(x[:, :length], y[:, : length - 1])
        with pytest.raises(ValueError, match="classes"):
            rule.backward(x[:, :length], y[:, :length] + 3)
