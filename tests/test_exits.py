"""Confidence exits. Oracle: every sample at every readout, and every threshold tried."""

import pytest
import torch
from tests.networks import masked, residual
from torch import nn

import hbll
from hbll import Chain
from hbll.calls import Readout
from hbll.exits import calibrate, classify, confidence, costs, first_exits, logits_at, outputs_at
from hbll.rules import make_rule


def test_the_confidence_is_the_largest_probability():
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0]]).double().log_softmax(-1)
    torch.testing.assert_close(confidence(logits), logits.exp().amax(-1))
    assert confidence(torch.zeros(2, 3, 4)).tolist() == [[0.25] * 3] * 2


def test_the_first_that_is_sure_enough():
    confidences = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.7, 0.2], [0.9, 0.9, 0.3]])
    assert first_exits(confidences, 0.5).tolist() == [0, 0, 2]
    assert first_exits(confidences, 0.6).tolist() == [0, 1, 2]
    assert first_exits(confidences, float("inf")).tolist() == [2, 2, 2]


def test_costs_count_blocks_once_that_are_shared_from_the_start():
    network = residual(8)[0]
    chain, *rim = network.readouts
    assert costs([*rim, chain]) == [1, 2, 3, 10]  # the rim shares nothing with the chain
    assert costs(make_rule("greedy", network, stage=(2, 2, 3)).exits) == [2, 4, 7]
    # Stage 1 goes on by the last blocks of stages 2 and 3, stage 2 by that of stage 3, to block 7; the chain is the same.
    assert costs(make_rule("stream", network, stage=(2, 2, 3)).exits) == [4, 7, 10]
    # Two blocks of its own.
    assert costs([Readout("own", (1, 2), 4, head=nn.Identity()), chain]) == [4, 9]


def brute_force(confidences, right, loss):
    """The smallest of all thresholds between which something changes."""
    full = right[-1].double().mean()
    for threshold in [*confidences[:-1].flatten().unique().tolist(), float("inf")]:
        exits = first_exits(confidences, threshold)
        if right.gather(0, exits[None]).double().mean() >= full - loss - 1e-12:
            return threshold
    raise AssertionError


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("loss", [0.0, 0.01, 0.1, 1.0])
def test_the_smallest_threshold_with_that_loss(seed, loss):
    torch.manual_seed(seed)
    confidences = (torch.rand(4, 60) * 20).round() / 20  # with ties
    right = torch.rand(4, 60) < torch.tensor([0.6, 0.7, 0.8, 0.9])[:, None] * (0.5 + confidences / 2)
    threshold = calibrate(confidences, right, loss)
    expected = brute_force(confidences, right, loss)
    assert first_exits(confidences, threshold).equal(first_exits(confidences, expected))
    full, kept = right[-1].sum(), right.gather(0, first_exits(confidences, threshold)[None]).sum()
    assert kept >= full - loss * 60 - 1e-6


def test_no_sample_leaves_where_all_readouts_before_are_wrong():
    confidences, right = torch.rand(3, 10), torch.tensor([False, False, True])[:, None].expand(3, 10)
    assert calibrate(confidences, right, 0.0) == float("inf")
    assert calibrate(confidences, right, 1.0) == confidences[:1].min()
    with pytest.raises(ValueError, match=r"must not be negative; got -0\.1"):
        calibrate(confidences, right, -0.1)


def rim_of(network):
    chain, *rim = network.readouts
    return [*rim, chain]


@torch.no_grad()
@pytest.mark.parametrize("make", [residual, masked])
@pytest.mark.parametrize("kind", ["greedy", "stream", "rim"])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 1.0])
def test_samples_leave_at_the_first_readout_that_is_sure(make, kind, quantile):
    network, _, _ = make(8)
    x = torch.randn(40, 5, dtype=torch.float64)
    readouts = rim_of(network) if kind == "rim" else make_rule(kind, network, stage=2).exits
    logits = torch.stack([network(x, path=readout) for readout in readouts])
    torch.testing.assert_close(logits_at(network, readouts, x), logits)
    threshold = confidence(logits[:-1]).quantile(quantile).item() + 1e-9 * (quantile == 1)
    expected = first_exits(confidence(logits), threshold)
    evaluated = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, args, __: evaluated.append(len(args[0])))
    found = classify(network, readouts, x, threshold)
    assert found.exits.equal(expected)
    torch.testing.assert_close(found.logits, logits[expected, torch.arange(40)])
    each = torch.tensor(costs(readouts), dtype=torch.float64)[expected]
    assert found.blocks == pytest.approx(each.mean().item()) == pytest.approx(sum(evaluated) / 40)
    if 0 < quantile < 1:
        assert len(expected.unique()) > 1


@pytest.mark.parametrize(
    ("paths", "evaluations"),
    [
        (["chain", "block-4", "4-6", "4-6-7", "4-5-6-7", "2-4-5-6-7"], 7 + 1 + 1 + 1 + 3 + 5),
        (["4-6-7", "block-4", "4-6"], 3),  # whatever comes first
        (["2-4", "2-3-4", "2-4"], 2 + 2),
        (["chain"], 7),
    ],
)
def test_blocks_that_readouts_share_from_the_start_on_are_evaluated_once(paths, evaluations):
    network, x, _ = residual(8)
    readouts = [network.readout(path) for path in paths]
    expected = [network(x, path=readout) for readout in readouts]
    evaluated = []
    for number, block in enumerate(network.blocks, 1):
        block.register_forward_hook(lambda *_, number=number: evaluated.append(number))
    found = list(outputs_at(network, readouts, x))
    assert len(evaluated) == evaluations
    for logits, known in zip(found, expected, strict=True):
        assert torch.equal(logits, known)
        assert not logits.requires_grad


@pytest.mark.parametrize("paths", [["chain", "1-2-4"], ["1-2-4", "chain"]])
def test_a_path_that_a_change_of_shape_forbids_is_refused_whatever_it_shares(paths):
    blocks = [nn.Linear(6, 7), *(nn.Linear(7, 7) for _ in range(6))]
    network = Chain(nn.Linear(5, 6), blocks, nn.Linear(7, 3))
    with pytest.raises(ValueError, match=r"block [12] changes the state's shape from \(4, 6\) to \(4, 7\)"):
        list(outputs_at(network, [network.readout(path) for path in paths], torch.randn(4, 5)))


def test_what_a_readout_evaluates_of_its_own_is_counted():
    network, x, _ = residual(4)
    readouts = [Readout("own", (1,), 3, head=network.head), network.readouts[0]]
    assert classify(network, readouts, x, 1.0).blocks == 3 + 2
    assert classify(network, readouts, x, 0.0).blocks == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["greedy", "stream", "rim"])
def test_where_no_sample_may_leave_all_go_straight_to_the_chain(kind):
    network, x, _ = residual(8)
    readouts = rim_of(network) if kind == "rim" else make_rule(kind, network, stage=2).exits
    evaluated = []
    for block in network.blocks:
        block.register_forward_hook(lambda *_: evaluated.append(1))
    found = classify(network, readouts, x, float("inf"))
    assert found.blocks == len(evaluated) == 7
    assert found.exits.tolist() == [len(readouts) - 1] * len(x)
    torch.testing.assert_close(found.logits, network(x))


def test_the_public_rooms():
    assert hbll.exits.classify is classify
    assert callable(hbll.generate.generate)
