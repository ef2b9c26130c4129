"""Error feedback. Oracles: the recursion by hand around a twin of the optimizer, and closed forms."""

import copy
import pickle

import pytest
import torch
from tests.networks import batches, residual
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import hbll
from hbll.train import ErrorFeedback, make_optimizers
from hbll.train.descent import Descent

INSIDE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "muon": lambda p: torch.optim.Muon(p, lr=0.05),
}


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2)]


def put_gradients(held, seed):
    torch.manual_seed(seed)
    for p in held:
        p.grad = torch.randn_like(p)


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("inside", INSIDE)
def test_the_recursion_by_hand(inside, strength):
    ours, theirs = parameters(), parameters()
    optimizer, plain = ErrorFeedback(INSIDE[inside](ours), strength), INSIDE[inside](theirs)
    schedules = [LambdaLR(o, lambda t: 1 / (1 + t)) for o in (optimizer, plain)]
    last = [torch.zeros_like(p) for p in theirs]
    for t in range(6):
        put_gradients(ours, t), put_gradients(theirs, t)
        optimizer.step()
        start = [p.detach().clone() for p in theirs]
        plain.step()
        with torch.no_grad():
            for p, x, u_last in zip(theirs, start, last, strict=True):
                u = x - p
                p.copy_(x - u - strength * (u - u_last))
                u_last.copy_(u)
        for schedule in schedules:
            schedule.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_it_stands_one_update_beyond_where_updates_lead():
    # Of constant gradients: after t steps of descent at rate .1 the sum of updates is .1 t g, and one more .1 (t + 1) g.
    (p,) = parameters()[:1]
    start, gradient = p.detach().clone(), torch.ones_like(p)
    optimizer = ErrorFeedback(torch.optim.SGD([p], lr=0.1))
    for t in range(1, 5):
        p.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), start - 0.1 * (t + 1) * gradient)


def test_with_strength_0_it_is_the_optimizer_inside():
    ours, theirs = parameters(), parameters()
    optimizer, plain = ErrorFeedback(INSIDE["adamw"](ours), 0.0), INSIDE["adamw"](theirs)
    for t in range(3):
        put_gradients(ours, t), put_gradients(theirs, t)
        optimizer.step(), plain.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_parameter_without_gradient_goes_back_by_its_last_update():
    p, q = parameters()
    optimizer = ErrorFeedback(torch.optim.SGD([p, q], lr=0.1))
    start = q.detach().clone()
    q.grad = torch.ones_like(q)
    optimizer.step()  # - .2
    q.grad = None
    optimizer.step()  # u = 0: + .1
    torch.testing.assert_close(q.detach(), start - 0.1)


@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_it_goes_on_as_if_it_had_never_stopped(way):
    ours = parameters()
    optimizer = ErrorFeedback(INSIDE["adamw"](ours))
    for t in range(3):
        put_gradients(ours, t)
        optimizer.step()
    if way == "pickle":
        again, theirs = pickle.loads(pickle.dumps((optimizer, ours)))
    else:
        theirs = copy.deepcopy(ours)
        again = ErrorFeedback(torch.optim.AdamW(theirs, lr=9.0))
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[0]["lr"] == 0.05
    for each in (optimizer, again):  # a schedule reaches the optimizer inside
        each.param_groups[0]["lr"] = 0.02
    for t in range(3, 6):
        put_gradients(ours, t), put_gradients(theirs, t)
        optimizer.step(), again.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_group_is_added_to_both():
    p, q = parameters()
    optimizer = ErrorFeedback(torch.optim.SGD([p], lr=0.1))
    optimizer.add_param_group({"params": [q], "lr": 0.3})
    start = q.detach().clone()
    q.grad = torch.ones_like(q)
    optimizer.step()
    torch.testing.assert_close(q.detach(), start - 0.6)


def test_a_training_by_late_gradients_is_resumed():
    def made():
        rule = hbll.make_rule("2bw", residual(3)[0])
        optimizers = make_optimizers(rule, "muon", 0.01, 0.1, error_feedback=True)
        schedules = [OneCycleLR(o, 0.01, 8, cycle_momentum=False) for o in optimizers]
        return rule, Descent(rule, optimizers, clip=1.0, schedule=schedules)

    seen = batches(8)
    whole, half, rest = made(), made(), made()
    whole[1].run(seen, drain=False)
    half[1].run(seen[:4], drain=False)
    rest[0].load_state_dict(half[0].state_dict())
    rest[0].load_carry(half[0].carry())
    rest[1].load_state_dict(half[1].state_dict())
    rest[1].run(seen[4:], drain=False)
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, rest[0].state_dict()[name])


def test_the_state_of_a_plain_optimizer_is_refused():
    network, _, _ = residual(4)
    plain = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the state is of an optimizer without error feedback"):
        ErrorFeedback(plain).load_state_dict(plain.state_dict())
