"""BLL. Oracles: autograd through the whole network, closed forms, and the products that a step really makes."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tests.networks import CLASSES, residual, transformer
from tests.oracles.meter import Meter, countable, measure
from tests.oracles.meter import batch as countable_batch
from torch import nn

from hbll import Chain, Step, make_rule
from hbll.data import digits
from hbll.families import Bernoulli, Gaussian
from hbll.models.mlp import SkipBlock
from hbll.rules.bll import BLL, evidence, prototype_loss

FEEDBACK = ("learned", "random", "prototype", "inverted")


def plain(*sizes):
    """Layers of these sizes, a stage each."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)]
    return Chain(nn.Identity(), layers, nn.Linear(sizes[-1], CLASSES)).double()


def batch(size=7, features=4):
    torch.manual_seed(1)
    return torch.randn(size, features, dtype=torch.float64), torch.arange(size) % CLASSES


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, materialize_grads=True, allow_unused=True)


def losses(rule, x, y):
    """The loss of each stage, with its graph."""
    return {loss.stage: loss.value for loss in rule.losses(x, y, Step())}


@pytest.mark.parametrize("feedback", FEEDBACK)
@pytest.mark.parametrize(
    "network", [plain(4, 6, 5, 4), Chain(nn.Linear(4, 4), [nn.Linear(4, 4)], nn.Linear(4, 3)).double()]
)
def test_one_stage_is_backpropagation(network, feedback):
    x, y = batch()
    step = make_rule("bll", network, example=x, feedback=feedback, stage=len(network.blocks))(x, y)
    exact = F.cross_entropy(network(x), y)
    assert step.loss.item() == pytest.approx(exact.item(), rel=1e-14)
    ours, theirs = (gradients(loss, network.parameters()) for loss in (step.loss, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("topology", ["chain", "direct"])
@pytest.mark.parametrize("feedback", ["learned", "random"])
def test_gaussian_stages_follow_the_likelihood_of_the_label(feedback, topology):
    # KL(stop(alpha + beta) || alpha) has the gradient of -log p(y | z): a local classifier with the messages as weights.
    network, (x, y) = plain(4, 6, 5, 4), batch()
    rule = make_rule("bll", network, example=x, feedback=feedback, topology=topology)
    step = rule(x, y)
    message = torch.eye(CLASSES, dtype=torch.float64)
    labels, state, weights = message, x, {}
    for k in (2, 1):
        (feedback_map,) = rule.auxiliary(k)
        message = (F.normalize(message) if topology == "chain" else labels) @ feedback_map.weight.T.detach()
        weights[k] = message
    for k, block in zip((1, 2), network.blocks, strict=False):
        state = block(state.detach())
        classifier = F.cross_entropy(F.layer_norm(state, state.shape[1:]) @ weights[k].T, y)
        torch.testing.assert_close(gradients(step.loss, block.parameters()), gradients(classifier, block.parameters()))


def test_direct_linear_feedback_of_a_fixed_map_is_the_error_fed_back():
    # phi_beta = B (onehot(y) - softmax(B^T z)): the local error through a fixed random matrix.
    torch.manual_seed(0)
    z, b, y = torch.randn(5, 4), torch.randn(CLASSES, 4), torch.tensor([0, 1, 2, 2, 0])
    error = F.one_hot(y, CLASSES) - (z @ b.T).softmax(1)
    torch.testing.assert_close(evidence(z @ b.T, b, y), error @ b)


def test_evidence_is_the_gradient_of_the_log_likelihood():
    torch.manual_seed(0)
    z, messages, y = torch.randn(5, 4, requires_grad=True), torch.randn(CLASSES, 4), torch.tensor([0, 1, 2, 2, 0])
    log_likelihood = (z @ messages.T).log_softmax(1)[range(5), y].sum()
    torch.testing.assert_close(evidence((z @ messages.T).detach(), messages, y), gradients(log_likelihood, [z])[0])


@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_a_stages_loss_is_zero_only_without_evidence_and_pulls_to_the_posterior(family):
    rule = BLL(plain(4, 4), feedback="random", family=family, variance=0.5)
    known = Gaussian(0.5) if family == "gaussian" else Bernoulli()
    torch.manual_seed(0)
    natural = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    messages, y = torch.randn(CLASSES, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0])
    mean = known.mean(natural)
    loss = rule.block_loss(mean, messages, y)
    beta = evidence(mean @ messages.T, messages, y).detach()
    assert loss.item() == pytest.approx(known.kl(natural + beta, natural).mean().item())
    # The gradient in alpha's natural parameters is alpha's mean minus the posterior's.
    expected = (mean - known.mean(natural.detach() + beta)) / 5
    torch.testing.assert_close(gradients(loss, [natural])[0], expected)
    assert rule.block_loss(mean, torch.zeros_like(messages), y).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("feedback", ["learned", "random", "prototype"])
def test_feedback_maps_learn_by_their_own_stage_alone_or_not_at_all(feedback):
    network, (x, y) = plain(4, 6, 5, 4), batch()
    rule = make_rule("bll", network, example=x, feedback=feedback)
    maps = [feedback_map for k in (1, 2) for feedback_map in rule.auxiliary(k)]
    assert len(maps) == len(rule.beside) == 2
    for k, loss in losses(rule, x, y).items():
        for own, feedback_map in enumerate(maps, 1):
            if feedback == "random":
                assert not feedback_map.weight.requires_grad
            else:
                assert bool(gradients(loss, [feedback_map.weight])[0].any()) == (k == own)


def test_the_feedback_pass_needs_neither_input_nor_labels():
    rule = make_rule("bll", plain(4, 6, 5, 4), example=batch()[0])
    second, first = rule.messages()
    (own,), (after,) = rule.auxiliary(1), rule.auxiliary(2)
    assert first.shape == (CLASSES, 6)
    torch.testing.assert_close(second, after.weight.T)
    torch.testing.assert_close(first, second / second.norm(dim=1, keepdim=True) @ own.weight.T)


def test_prototypes_are_fitted_to_class_means():
    torch.manual_seed(0)
    z, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % CLASSES
    means = torch.stack([z[y == c].mean(0) for c in range(CLASSES)]).requires_grad_()
    loss = prototype_loss(z, means, y)
    torch.testing.assert_close(gradients(loss, [means])[0], torch.zeros(CLASSES, 6, dtype=torch.float64))


def test_what_agrees_with_its_prototype_has_the_lowest_prototype_loss():
    y = torch.tensor([0, 0, 1, 1])
    prototypes = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]])
    agreeing = prototypes[y]
    # Correlation 1, cosines equal, prototypes met; what remains is the cross-entropy of scores 4 / sqrt(4) and 0.
    expected = torch.log1p(torch.exp(torch.tensor(-2.0)))
    assert prototype_loss(agreeing, prototypes, y).item() == pytest.approx(expected.item(), abs=1e-4)
    torch.manual_seed(0)
    assert all(prototype_loss(torch.randn(4, 4), prototypes, y) > expected for _ in range(20))


def test_inverted_arcs_are_target_propagation():
    # Square linear arcs and hardly any trust in the forward state: a stage's target is the inverse of the next one's.
    torch.manual_seed(0)
    network = Chain(nn.Identity(), [nn.Linear(3, 3) for _ in range(3)], nn.Identity()).double()
    first, second, third = network.blocks
    x, y = batch(5, 3)
    variance = 1e8

    def half_distance(logits, y):
        return (logits - F.one_hot(y, 3)).square().sum(1) / 2

    rule = make_rule("bll", network, feedback="inverted", variance=variance, iterations=9, loss=half_distance)
    found = losses(rule, x, y)
    a1 = first(x)
    a2 = second(a1.detach())
    target2 = (F.one_hot(y, 3) - third.bias) @ torch.inverse(third.weight.T)
    # With equal variances the middle arc has (I + J^T J) delta = J^T (target - a).
    jacobian = second.weight
    pull = (target2 - a2).detach() @ jacobian
    delta = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + jacobian.T @ jacobian, pull.T).T
    for loss, output, move, layer in [(found[2], a2, target2 - a2, second), (found[1], a1, delta, first)]:
        expected = gradients(-(output * move.detach() / variance).sum(1).mean(), layer.parameters())
        torch.testing.assert_close(gradients(loss, layer.parameters()), expected, rtol=1e-5, atol=1e-14)


def test_credit_of_inverted_arcs_comes_through_the_next_stage():
    network, x, y = residual(4)
    rule = make_rule("bll", network, feedback="inverted")
    assert all(loss.through == () for loss in rule.losses(x, y, Step()))

    def passed(value):
        return [
            k for k, stage in enumerate(rule.stages, 1) if any(g.any() for g in gradients(value, stage.parameters()))
        ]

    found = {loss.stage: [passed(value) for value in loss.through] for loss in rule.losses(x, y, Step(look=True))}
    assert found == {3: [], 2: [[3]], 1: [[2]]}


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("feedback", FEEDBACK)
def test_tokens_with_labels_are_samples(feedback, ignored):
    network, x, _ = residual(4)
    torch.manual_seed(1)
    tokens, labels = torch.randn(4, 5, 5, dtype=torch.float64), torch.randint(CLASSES, (4, 5))
    if ignored:
        labels[0, 1:] = labels[2, 3] = -100
    options = {"feedback": feedback, "iterations": 40}  # as many as solve all tokens of a sample at once
    rule, alike = (make_rule("bll", network, example=example, **options) for example in (tokens, x))
    alike.load_state_dict(rule.state_dict())
    counted = labels != -100
    found, expected = losses(rule, tokens, labels), losses(alike, tokens[counted], labels[counted])
    for k in (1, 2, 3):
        ours, theirs = (
            gradients(loss[k], (p for p in own.parameters() if p.requires_grad))
            for own, loss in ((rule, found), (alike, expected))
        )
        torch.testing.assert_close(ours, theirs)


def test_arcs_with_fused_attention_are_inverted():
    network, x, y = transformer(3)
    make_rule("bll", network, feedback="inverted", iterations=2).backward(x, y)
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("feedback", FEEDBACK)
def test_states_may_change_shape_from_stage_to_stage(feedback):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise((3, 4, 6))]
    blocks += [nn.Flatten(), nn.Linear(24, 5), nn.ReLU()]
    network = Chain(nn.Identity(), blocks, nn.Linear(5, 3))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    rule = make_rule("bll", network, example=x, feedback=feedback, pixels=2, stage=(1, 1, 3))
    rule.backward(x, y)
    assert all(p.grad.abs().max() > 0 for p in network.parameters())
    maps = [feedback_map.out_features for k in (1, 2) for feedback_map in rule.auxiliary(k)]
    assert maps == ([] if feedback == "inverted" else [4 * 2 * 2, 6 * 2 * 2])


@pytest.mark.parametrize("blocks", [2, 5, 9])
def test_forward_and_feedback_pass_do_not_wait_for_each_other(blocks):
    rule, (x, y) = make_rule("bll", countable(blocks + 1)), countable_batch()
    rule.network.embed.requires_grad_(False)
    rule(x, y)
    with Meter() as meter:
        step = rule.backward(x, y)
    assert step.span == blocks + 1
    # Beside the blocks' products there are scores and evidence: no more of them the deeper the network.
    assert step.span <= meter.span <= step.span + 2
    # Backpropagation goes back through all of them.
    assert step.work == 2 * blocks


@pytest.mark.parametrize("blocks", [2, 5, 9])
@pytest.mark.parametrize("stage", [1, 2])
def test_inverted_arcs_wait_for_the_forward_pass_and_for_each_other(blocks, stage):
    rule = make_rule("bll", countable(blocks + 1), stage=stage, feedback="inverted", iterations=2)
    rule.network.embed.requires_grad_(False)
    counted, measured = measure(rule)
    assert counted[0] == measured[0]
    assert counted[1] <= measured[1]
    if stage == 1:
        assert counted[1] == blocks + (blocks - 1) * 5 + 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"feedback": "lerned"}, "feedback is one of learned, random, prototype, inverted; got 'lerned'"),
        ({"topology": "tree"}, "topology is one of chain, direct; got 'tree'"),
        ({"family": "categorical"}, "family is one of gaussian, bernoulli; got 'categorical'"),
        ({"feedback": "inverted", "family": "bernoulli"}, "inverted feedback is for Gaussian states"),
        ({"variance": 0}, "variance must be positive; got 0"),
        ({"pixels": 0}, "pixels must be at least 1; got 0"),
        ({"iterations": 1.5}, "iterations is a whole number; got 1.5"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule("bll", plain(4, 4), **options)


@pytest.fixture(scope="module")
def splits():
    return digits()


def accuracy(splits, stage, frozen=False):
    """After eight epochs of digits on seven blocks with a skip."""
    torch.manual_seed(0)
    network = Chain(nn.Linear(64, 64), [SkipBlock(64) for _ in range(7)], nn.Linear(64, 10))
    rule = make_rule("bll", network, example=splits.train.inputs[:64], stage=stage)
    if frozen:
        for k in range(1, len(rule.stages)):
            for module in rule.own(k):
                module.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in rule.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(8):
        for index in torch.randperm(len(splits.train)).split(64):
            optimizer.zero_grad()
            rule.backward(splits.train.inputs[index], splits.train.labels[index])
            optimizer.step()
    return (network(splits.test.inputs).argmax(1) == splits.test.labels).float().mean().item()


def test_learned_feedback_trains_what_a_random_start_does_not(splits):
    backpropagation, halves, single = (accuracy(splits, stage) for stage in (7, (4, 3), 1))
    assert halves > backpropagation - 0.02
    assert single > accuracy(splits, 1, frozen=True) + 0.03
