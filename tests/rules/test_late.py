"""Late gradients. Oracles: a loop by hand that keeps older weights and batches, and backpropagation on what is due."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.networks import KINDS, assert_equal_gradients, batches, gradients, label_loss, masked, mlp, unmasked
from tests.oracles.meter import countable, measure
from torch.func import functional_call

from hbll import make_rule
from hbll.train import fit

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_training_is_the_loop_by_hand(kind, optimizer, delay):
    # theta_{t+1} = theta_t - u(grad L(theta_{t-d}, batch_{t-d})), the gradient taken anew at weights that were stored.
    net, _, _ = KINDS[kind][0](8)
    other = copy.deepcopy(net)
    rule = make_rule("2bw", net, delay=delay)
    ours, theirs = (OPTIMIZERS[optimizer](list(model.parameters())) for model in (net, other))
    seen, versions = batches(8, kind), []
    for t, (x, y) in enumerate(seen):
        ours.zero_grad()
        step = rule.backward(x, y)
        ours.step()
        versions.append({name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()})
        torch.testing.assert_close(step.loss, label_loss(other(x), y).detach(), rtol=1e-12, atol=0)
        assert torch.equal(step.label_loss, step.loss)
        if t >= delay:
            old_x, old_y = seen[t - delay]
            loss = label_loss(functional_call(other, versions[t - delay], (old_x,)), old_y)
            loss.backward()
            for name, p in other.named_parameters():
                p.grad = versions[t - delay][name].grad
            theirs.step()
        else:
            assert all(p.grad is None for p in net.parameters())
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_what_is_in_flight_is_learned_from_in_the_end():
    # Without moving, the gradients of all steps and of the drained ones are those of all batches, each once.
    net, _, _ = mlp(4)
    rule, seen = make_rule("2bw", net, delay=2), batches(5)
    assert not rule.in_flight
    for x, y in seen:
        rule.backward(x, y)
        assert rule.in_flight
    while rule.in_flight:
        assert rule.backward(None, None).work == 0
    found = {name: p.grad for name, p in net.named_parameters()}
    assert_equal_gradients(found, gradients(net, sum(F.cross_entropy(net(x), y) for x, y in seen)))
    with pytest.raises(ValueError, match="there is no mini-batch in flight: hand one over"):
        rule.backward(None, None)


def test_a_frozen_part_is_not_moved_by_what_was_in_flight():
    net, x, y = mlp(4)
    rule = make_rule("2bw", net)
    rule.backward(x, y)
    net.embed.requires_grad_(False)
    rule.backward(x, y)
    assert net.embed.weight.grad is None
    assert net.head.weight.grad.any()


def test_gradients_wait_without_their_scale():
    net, x, y = mlp(4)
    rule = make_rule("2bw", net)
    exact = gradients(net, F.cross_entropy(net(x), y))
    rule.backward(x, y, scale=torch.tensor(1024.0))
    rule.backward(x, y, scale=8.0)
    assert_equal_gradients({name: p.grad / 8 for name, p in net.named_parameters()}, exact)


def test_the_context_is_the_networks():
    net, x, y = masked(8)
    rule = make_rule("2bw", net)
    rule(x, y)
    assert_equal_gradients(gradients(net, rule(x, y).loss), gradients(net, F.cross_entropy(unmasked(net)(x), y)))


@pytest.mark.parametrize("delay", [1, 3])
def test_a_step_costs_what_backpropagations_does(delay):
    counted, measured = measure(make_rule("2bw", countable(8), delay=delay), steps=delay + 2)
    assert counted == measured == measure(make_rule("bp", countable(8)))[0] == (21, 14)


def test_with_a_path_and_the_rim_it_is_backpropagation_one_step_later():
    net, x, y = mlp(8)
    options = {"path": (4, 6, 7), "rim": 0.3}
    rule, exact = make_rule("2bw", net, **options), make_rule("bp", net, **options)
    rule(x, y)
    assert_equal_gradients(gradients(net, rule(x, y).loss), gradients(net, exact(x, y).loss))


def test_it_cannot_be_looked_at():
    net, x, y = mlp(4)
    rule = make_rule("2bw", net)
    rule(x, y)
    assert rule.diagnose(x, y) == {}
    with pytest.raises(ValueError, match="no gradients of the batch at hand"):
        rule.eval()(x, y)


def test_a_delay_is_a_number_from_one_on():
    with pytest.raises(ValueError, match="delay must be at least 1; got 0"):
        make_rule("2bw", mlp(4)[0], delay=0)


def test_a_training_loop_drains_it():
    net, _, _ = mlp(4)
    rule = make_rule("2bw", net)
    done = fit(rule, batches(3), torch.optim.SGD(rule.parameters(), lr=0.1))
    assert (done.steps, rule.in_flight) == (4, False)
