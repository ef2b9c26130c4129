"""The trials of benchmarks/ideas.py. Oracles: loops by hand with plain gradient descent, closed forms, autograd."""

import copy
from pathlib import Path

import pytest
import torch
from tests.networks import CLASSES, assert_equal_gradients, batches, gradients, label_loss, residual, transformer

from hbll import make_rule
from hbll.rule import Step

RATE = 0.1


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def trial(net, **options):
    from ideas import Trial

    return Trial(net, stage=(3, 4), copies=True, **options)


def through(blocks, state):
    for block in blocks:
        state = block(state)
    return state


def descend(parameters, gradients):
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p -= RATE * g


class ByHand:
    """Stream in stages (3, 4) with a copied head alone; what ``late`` says of a batch is taken in before both descend."""

    def __init__(self, net, late=lambda hand, record: []):
        self.net, self.head, self.late = net, copy.deepcopy(net.head), late
        self.first = [p for part in (net.embed, *net.blocks[:3]) for p in part.parameters()]
        self.second = [p for part in (*net.blocks[3:], net.head) for p in part.parameters()]
        self.records = []

    def stage(self, x):
        return through(self.net.blocks[:3], self.net.embed(x))

    def step(self, x, y):
        found = []
        state = self.stage(x)
        own = [*self.first, *self.head.parameters()]
        loss = label_loss(self.head(state), y)
        foreseen, *gradients = torch.autograd.grad(loss, [state, *own])
        found.append((own, gradients))
        if len(self.records) > 1:
            found += self.late(self, self.records[-2])
        if self.records:
            last = self.records[-1]
            given = last["state"].clone().requires_grad_()
            last["logits"] = self.net.head(through(self.net.blocks[3:], given))
            loss = label_loss(last["logits"], last["y"])
            last["true"], *gradients = torch.autograd.grad(loss, [given, *self.second])
            found.append((self.second, gradients))
        self.records.append({"x": x, "y": y, "state": state.detach(), "foreseen": foreseen})
        for parameters, gradients in found:
            descend(parameters, gradients)


def soft_by_hand(hand, record):
    p, q = record["logits"].detach().softmax(-1), hand.head(record["state"]).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    return [([*hand.head.parameters()], torch.autograd.grad(0.7 * divergence, [*hand.head.parameters()]))]


def match_by_hand(hand, record):
    # Of softmax and cross-entropy on a linear layer: dL/ds = (q - onehot) W / count.
    scores = hand.head(record["state"])
    wrong = scores.softmax(-1) - torch.eye(CLASSES, dtype=scores.dtype)[record["y"]]
    found = wrong @ hand.head.weight / record["y"].numel()
    distance = ((found - record["true"]) ** 2).sum() / (record["true"] ** 2).sum()
    return [([*hand.head.parameters()], torch.autograd.grad(0.3 * distance, [*hand.head.parameters()]))]


def remainder_by_hand(hand, record):
    # By the weights of the day, of a difference as it was found.
    difference = record["true"] - record["foreseen"]
    return [(hand.first, torch.autograd.grad(hand.stage(record["x"]), hand.first, 0.6 * difference))]


class TestByHand:
    @pytest.mark.parametrize(
        ("options", "late"),
        [
            ({}, lambda hand, record: []),
            ({"soft": 0.7}, soft_by_hand),
            ({"match": 0.3}, match_by_hand),
            ({"remainder": 0.6}, remainder_by_hand),
            (
                {"soft": 0.7, "match": 0.3, "remainder": 0.6},
                lambda *of: soft_by_hand(*of) + match_by_hand(*of) + remainder_by_hand(*of),
            ),
        ],
        ids=["stream", "soft", "match", "remainder", "all"],
    )
    @pytest.mark.parametrize(("kind", "make"), [("mlp", residual), ("transformer", transformer)])
    def test_parameters_after_several_steps(self, kind, make, options, late):
        net, _, _ = make()
        hand = ByHand(copy.deepcopy(net), late)
        rule = trial(net, readout="head", **options)
        optimizer = torch.optim.SGD(rule.parameters(), lr=RATE)
        for batch in batches(6, kind):
            hand.step(*batch)
            optimizer.zero_grad()
            rule.backward(*batch)
            optimizer.step()
        torch.testing.assert_close(net.state_dict(), hand.net.state_dict(), rtol=1e-10, atol=1e-12)
        own = rule.own_readouts[0].head
        torch.testing.assert_close(own.state_dict(), hand.head.state_dict(), rtol=1e-10, atol=1e-12)


class TestSums:
    def test_without_options_it_is_stream(self):
        ours, theirs = (make()[0] for make in (transformer, transformer))
        ours = trial(ours, readout_depth=2)
        theirs = make_rule("stream", theirs, stage=(3, 4), copies=True, readout_depth=2)
        for batch in batches(3, "transformer"):
            mine, other = ours.backward(*batch), theirs.backward(*batch)
        assert (mine.work, mine.span) == (other.work, other.span) == (9 + 6 + 11, 10)
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
        assert ours.diagnose(*batch)[1].cosine == pytest.approx(theirs.diagnose(*batch)[1].cosine)

    @pytest.mark.parametrize("backward", [True, False])
    def test_with_the_remainder_a_batch_comes_to_its_true_gradient(self, backward):
        net, _, _ = transformer()
        rule = trial(net, readout_depth=2, remainder=1.0)
        found = batches(5, "transformer")
        early = [p for part in (net.embed, *net.blocks[:3]) for p in part.parameters()]
        expected = [torch.zeros_like(p) for p in early]
        for i, (x, y) in enumerate(found):  # of the last two the true one has not come yet
            state = through(net.blocks[:3], net.embed(x))
            loss = label_loss(net(x) if i < 3 else rule.own_readouts[0](state), y)
            expected = [a + b for a, b in zip(expected, torch.autograd.grad(loss, early), strict=True)]
        for batch in found:
            rule.backward(*batch) if backward else rule(*batch).loss.backward()
        torch.testing.assert_close([p.grad for p in early], expected, rtol=1e-10, atol=1e-12)

    def test_matching_makes_readouts_of_blocks_agree_with_the_true_gradient(self):
        net, x, y = transformer()
        rule = trial(net, readout_depth=2, match=1.0)
        readout = rule.own_readouts[0]
        state = through(net.blocks[:3], net.embed(x)).detach().requires_grad_()
        (true,) = torch.autograd.grad(label_loss(net.head(through(net.blocks[3:], state)), y), state)

        def distance():
            (found,) = torch.autograd.grad(label_loss(readout(state), y), state)
            return ((found - true).square().sum() / true.square().sum()).item()

        # What stage 1 is given back moves its readout alone; the gradient is held to a difference along itself.
        step, before = Step(), distance()
        late = {"state": state.detach(), "foreseen": true, "logits": net(x), "true": true}
        (loss,) = rule._late(step, x=x, y=y, **late)
        weights = [*readout.parameters()]
        gradient = torch.autograd.grad(loss.value, [*net.parameters(), *weights], allow_unused=True)[-len(weights) :]
        assert loss.value.item() == pytest.approx(before)
        size = 1e-6 / sum(g.square().sum() for g in gradient).sqrt()
        with torch.no_grad():
            for p, g in zip(weights, gradient, strict=True):
                p += size * g
        assert (distance() - before) / 1e-6 == pytest.approx(1e-6 / size.item(), rel=1e-4)


class TestFitted:
    def test_stage_1_moves_by_the_estimate(self):
        net, _, _ = transformer()
        rule = trial(net, readout_depth=2, fitted=True)
        readout = rule.own_readouts[0]
        early = [p for part in (net.embed, *net.blocks[:3]) for p in part.parameters()]
        rows, values = [], []
        for i, (x, y) in enumerate(found := batches(5, "transformer")):
            output = through(net.blocks[:3], net.embed(x))
            state = output.detach().requires_grad_()
            (read,) = torch.autograd.grad(label_loss(readout(state), y), state)
            (true,) = torch.autograd.grad(label_loss(net.head(through(net.blocks[3:], state)), y), state)
            normed = (state - state.mean(-1, keepdim=True)) / (state.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            rows.append(torch.cat([read, normed.detach() * (read**2).mean().sqrt()], -1).flatten(0, 1))
            values.append(true.flatten(0, 1))
            expected = read
            if i > 1:  # least squares over what has come back, older pairs for less; a ridge is so many rows more
                weights = [0.98 ** ((i - 2 - j) / 2) for j in range(i - 1)]
                known = torch.cat([w * row for w, row in zip(weights, rows, strict=False)])
                size = (1e-3 * (known**2).sum() / known.shape[1]).sqrt()
                known = torch.cat([known, size * torch.eye(known.shape[1], dtype=known.dtype)])
                wanted = torch.cat([*(w * v for w, v in zip(weights, values, strict=False)), true.new_zeros(12, 6)])
                expected = (rows[-1] @ torch.linalg.lstsq(known, wanted).solution).view_as(read)
            expected = torch.autograd.grad(output, early, expected)
            for p in early:
                p.grad = None
            rule.backward(*found[i])
            torch.testing.assert_close([p.grad for p in early], [*expected], rtol=1e-8, atol=1e-12)


class TestRates:
    def test_the_readout_has_a_rate_of_its_own(self):
        rules = [trial(transformer()[0], readout_depth=2, readout_rate=rate) for rate in (2.5, 1.0)]
        ours = torch.optim.AdamW(rules[0].parameters(), lr=RATE)
        of_network, of_readout = rules[1].network.parameters(), rules[1].own_readouts[0].parameters()
        theirs = torch.optim.AdamW([{"params": [*of_network]}, {"params": [*of_readout], "lr": 2.5 * RATE}], lr=RATE)
        for batch in batches(4, "transformer"):
            for rule, optimizer in zip(rules, (ours, theirs), strict=True):
                optimizer.zero_grad()
                rule.backward(*batch)  # which begins by the rest of the last update
                optimizer.step()
            found = [[p.grad for p in rule.parameters() if p.grad is not None] for rule in rules]
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


class TestExactness:
    def test_from_a_step_on_it_is_backpropagation(self):
        net, _, _ = transformer()
        rule = trial(net, readout_depth=2, exact_from=2)
        first, second, *others = batches(4, "transformer")
        assert [rule.backward(*batch).span for batch in (first, second)] == [10, 10]
        for x, y in others:
            step = rule(x, y)
            assert (step.work, step.span) == (21, 14)
            assert_equal_gradients(gradients(rule, step.loss), gradients(rule, label_loss(net(x), y)))
            assert rule.diagnose(x, y)[1].cosine == pytest.approx(1.0)
        assert not rule.in_flight


@pytest.mark.parametrize("options", [{"copies": False}, {"refresh": 2}, {"stage": (2, 2, 3)}])
def test_what_it_is_not_made_for(options):
    from ideas import Trial

    with pytest.raises(ValueError, match="two stages with copies that are not refreshed"):
        Trial(transformer()[0], **{"stage": (3, 4), "copies": True} | options)
