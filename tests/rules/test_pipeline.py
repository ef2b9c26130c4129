"""The asynchronous pipeline. Oracles: backpropagation on the batch that a stage is late for, and a transcription."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tests.networks import (
    CLASSES,
    INPUTS,
    KINDS,
    WIDTH,
    assert_equal_gradients,
    batches,
    gradients,
    label_loss,
    mlp,
)
from tests.oracles.pipeline_step import PipelineStep, stages_of
from torch import nn

import hbll
from hbll import Chain, make_rule


@pytest.mark.parametrize(
    ("kind", "size", "engine"),
    [("mlp", 1, "batched"), ("mlp", 3, "auto"), ("convolutional", 1, "loop"), ("transformer", 2, "loop")],
)
def test_with_frozen_weights_it_is_backpropagation(kind, size, engine):
    net, x, y = KINDS[kind][0](6)
    rule = make_rule("pipeline", net, stage=size, engine=engine)
    for _ in range(2 * len(rule.stages)):
        step = rule(x, y)
    loss = label_loss(net(x), y)
    torch.testing.assert_close(step.loss.detach(), loss.detach())
    torch.testing.assert_close(step.label_loss, loss.detach())
    assert_equal_gradients(gradients(net, step.loss), gradients(net, loss))


@pytest.mark.parametrize("size", [1, 3])
def test_every_stage_is_late_by_its_distance_from_the_head(size):
    # Weights do not move: the gradient of stage n at step t is backpropagation's on the batch that stage n saw 2 (S - n)
    # steps earlier, which came in n - 1 steps before that.
    net, _, _ = mlp(8)
    cut = stages_of(7, size)
    last, seen = len(cut), batches(17)
    exact = [gradients(net, F.cross_entropy(net(x), y)) for x, y in seen]
    rule = make_rule("pipeline", net, stage=size)
    for t, (x, y) in enumerate(seen):
        found = gradients(net, rule(x, y).loss)

        def check(names, came_in, found=found):
            for name in names:
                if came_in < 0:
                    assert (found[name] == 0).all()
                else:
                    torch.testing.assert_close(found[name], exact[came_in][name])

        for n, numbers in enumerate(cut, 1):
            names = [f"blocks.{b}.linear.{part}" for b in numbers for part in ("weight", "bias")]
            check(names, t - 2 * (last - n) - (n - 1))
        check(["head.weight", "head.bias"], t - (last - 1))
        check(["embed.weight", "embed.bias"], t - 2 * last + 1)


@pytest.mark.parametrize(
    ("kind", "size", "sizes"), [("mlp", 1, (4,)), ("mlp", 2, (4, 2, 3)), ("mlp", 7, (4, 1)), ("transformer", 3, (4, 2))]
)
def test_training_is_the_transcription(kind, size, sizes):
    net, _, _ = KINDS[kind][0](8)
    other = copy.deepcopy(net)
    rule, oracle = make_rule("pipeline", net, stage=size), PipelineStep(other, size)
    moved = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, other)]
    seen = batches(2 * len(rule.stages) + 6, kind, sizes=sizes)
    # Those in flight in the end come out one a step: the last stage has the newest after S - 1, the embed after 2 S - 1.
    for batch in [*seen, *[(None, None)] * (2 * len(rule.stages) - 1)]:
        for optimizer in moved:
            optimizer.zero_grad()
        assert rule.in_flight or batch[0] is not None
        rule(*batch).loss.backward()
        oracle.accumulate(*batch)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)
        for optimizer in moved:
            optimizer.step()
    assert not rule.in_flight
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_an_embed_without_parameters():
    net, _, y = mlp(4)
    net.embed = nn.Flatten()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    rule = make_rule("pipeline", net)
    for _ in range(6):
        found = gradients(net, rule(x, y).loss)
    assert_equal_gradients(found, gradients(net, F.cross_entropy(net(x), y)))


def test_states_may_change_shape():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise((WIDTH, 7, 5, 4))]
    net = Chain(nn.Linear(INPUTS, WIDTH), blocks, nn.Linear(4, CLASSES)).double()
    ((x, y),) = batches(1)
    rule = make_rule("pipeline", net)
    for _ in range(6):
        step = rule(x, y)
    assert_equal_gradients(gradients(net, step.loss), gradients(net, F.cross_entropy(net(x), y)))


def test_while_it_fills_nothing_moves():
    net, x, y = mlp(6)
    rule = make_rule("pipeline", net)
    for _ in range(4):
        step = rule(x, y)
        assert step.reports == {}
        assert step.label_loss is None
        assert step.loss.item() == 0
        step.loss.backward()
        assert all(p.grad is None for p in net.parameters())
    step = rule(x, y)
    assert step.reports.keys() == {5}
    assert step.reports[5].error == pytest.approx(F.cross_entropy(net(x), y).item())


def test_it_cannot_be_looked_at():
    net, x, y = mlp(6)
    rule = make_rule("pipeline", net)
    twin = copy.deepcopy(rule)
    rule(x, y)
    twin(x, y)
    assert rule.diagnose(x, y) == {}
    with pytest.raises(ValueError, match="cannot be audited: its credit comes from other steps"):
        hbll.audit(rule, x, y)
    with pytest.raises(ValueError, match="no gradients of the batch at hand"):
        rule.eval()(x, y)
    with torch.no_grad(), pytest.raises(ValueError, match="no gradients of the batch at hand"):
        rule.train()(x, y)
    assert rule.training
    for _ in range(6):  # and nothing of it stays
        assert torch.equal(rule(x, y).loss, twin(x, y).loss)
