"""BLL. Oracles: autograd through the whole network, closed forms, and the products that a step really makes."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tests.test_counters import Meter
from torch import nn

from hbll import TreeNetwork
from hbll.bll import BLL, evidence, prototype_loss
from hbll.cuts import SequentialNetwork
from hbll.families import Bernoulli, Gaussian
from hbll.recipes import RECIPES

FEEDBACK = ("learned", "random", "prototype", "inverted")
CLASSES = 3


def plain(*sizes):
    torch.manual_seed(0)
    layers = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), nn.Tanh())]
    return SequentialNetwork(*layers, nn.Linear(sizes[-1], CLASSES)).double()


def batch(size=7, features=4):
    torch.manual_seed(1)
    return torch.randn(size, features, dtype=torch.float64), torch.arange(size) % CLASSES


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("feedback", FEEDBACK)
@pytest.mark.parametrize(
    "network", [plain(4, 6, 5, 4), TreeNetwork(nn.Linear(4, 4), [nn.Linear(4, 4)], nn.Linear(4, 3)).double()]
)
def test_one_block_is_backpropagation(network, feedback):
    x, y = batch()
    step = BLL(feedback, blocks=1).prepare(network, x)(network, x, y)
    exact = F.cross_entropy(network(x), y)
    assert step.loss.item() == pytest.approx(exact.item(), rel=1e-14)
    for ours, theirs in zip(*(gradients(loss, network.parameters()) for loss in (step.loss, exact)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("topology", ["chain", "direct"])
@pytest.mark.parametrize("feedback", ["learned", "random"])
def test_gaussian_blocks_follow_the_likelihood_of_the_label(feedback, topology):
    # KL(stop(alpha + beta) || alpha) has the gradient of -log p(y | z): a local classifier with the messages as weights.
    network, (x, y) = plain(4, 6, 5, 4), batch()
    rule = BLL(feedback, topology).prepare(network, x)
    step = rule(network, x, y)
    message = torch.eye(CLASSES, dtype=torch.float64)
    labels, state, weights = message, x, []
    for feedback_map in reversed(rule.maps):
        message = (F.normalize(message) if topology == "chain" else labels) @ feedback_map.weight.T.detach()
        weights.insert(0, message)
    for k in range(2):
        state = network[2 * k + 1](network[2 * k](state.detach()))
        classifier = F.cross_entropy(F.layer_norm(state, state.shape[1:]) @ weights[k].T, y)
        ours = gradients(step.loss, network[2 * k].parameters())
        for mine, theirs in zip(ours, gradients(classifier, network[2 * k].parameters()), strict=True):
            torch.testing.assert_close(mine, theirs)


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
def test_a_blocks_loss_is_zero_only_without_evidence_and_pulls_to_the_posterior(family):
    rule = BLL("random", family=family, variance=0.5).double()
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
def test_feedback_maps_learn_by_their_own_block_alone_or_not_at_all(feedback):
    network, (x, y) = plain(4, 6, 5, 4), batch()
    rule = BLL(feedback).prepare(network, x)
    step = rule(network, x, y)
    assert len(rule.maps) == 2
    for k, loss in enumerate(step.losses, 1):
        for own, feedback_map in enumerate(rule.maps, 1):
            if feedback == "random":
                assert not feedback_map.weight.requires_grad
            else:
                assert bool(gradients(loss, [feedback_map.weight])[0].any()) == (k == own)


def test_the_feedback_pass_needs_neither_input_nor_labels():
    rule = BLL().prepare(plain(4, 6, 5, 4), batch()[0])
    first, second = rule.messages()
    assert first.shape == (CLASSES, 6)
    torch.testing.assert_close(second, rule.maps[1].weight.T)
    torch.testing.assert_close(first, second / second.norm(dim=1, keepdim=True) @ rule.maps[0].weight.T)


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
    # Square linear arcs and hardly any trust in the forward state: a block's target is the inverse of the next one's.
    torch.manual_seed(0)
    network = SequentialNetwork(*(nn.Linear(3, 3) for _ in range(3)), nn.Identity()).double()
    x, y = batch(5, 3)
    variance = 1e8

    def half_distance(logits, y):
        return (logits - F.one_hot(y, 3)).square().sum(1) / 2

    rule = BLL("inverted", variance=variance, iterations=9, loss=half_distance).prepare(network, x)
    step = rule(network, x, y)
    a1 = network[0](x)
    a2 = network[1](a1.detach())
    target2 = (F.one_hot(y, 3) - network[2].bias) @ torch.inverse(network[2].weight.T)
    # With equal variances the middle arc has (I + J^T J) delta = J^T (target - a).
    jacobian = network[1].weight
    pull = (target2 - a2).detach() @ jacobian
    delta = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + jacobian.T @ jacobian, pull.T).T
    for loss, output, move, layer in [
        (step.losses[1], a2, target2 - a2, network[1]),
        (step.losses[0], a1, delta, network[0]),
    ]:
        expected = gradients(-(output * move.detach() / variance).sum(1).mean(), layer.parameters())
        for ours, theirs in zip(gradients(loss, layer.parameters()), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("feedback", FEEDBACK)
def test_states_may_change_shape_from_block_to_block(feedback):
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise((3, 4, 6))]
    network = SequentialNetwork(*convolutions, nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    rule = BLL(feedback, pixels=2).prepare(network, x)
    step = rule(network, x, y)
    step.loss.backward()
    assert len(step.losses) == 3
    assert all(p.grad.abs().max() > 0 for p in network.parameters())
    if feedback != "inverted":
        assert [m.out_features for m in rule.maps] == [4 * 2 * 2, 6 * 2 * 2]


def chain_of(feedback, blocks):
    torch.manual_seed(0)
    network = SequentialNetwork(
        *(nn.Linear(5, 5, bias=False) for _ in range(blocks)), nn.Linear(5, CLASSES, bias=False)
    )
    x, y = torch.randn(7, 5), torch.arange(7) % CLASSES
    rule = BLL(feedback, iterations=2).prepare(network, x)
    with Meter() as chain:
        step = rule(network, x, y)
        step.loss.backward()
    return step, chain.span


@pytest.mark.parametrize("blocks", [2, 5, 9])
def test_forward_and_feedback_pass_do_not_wait_for_each_other(blocks):
    step, measured = chain_of("learned", blocks)
    assert step.span == blocks + 1
    # Beside the blocks' products there is the head's two, or scores and evidence: no more of them the deeper the network.
    assert step.span <= measured <= step.span + 2
    # Backpropagation goes back through all of them.
    assert chain_of("learned", blocks=1)[0].work == 2
    assert step.work == 2 * blocks


@pytest.mark.parametrize("blocks", [2, 5, 9])
def test_inverted_arcs_wait_for_the_forward_pass_and_for_each_other(blocks):
    step, measured = chain_of("inverted", blocks)
    assert step.span == blocks + (blocks - 1) * 5 + 1
    assert measured >= step.span


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"feedback": "lerned"}, "unknown feedback 'lerned'; did you mean learned"),
        ({"topology": "tree"}, "unknown topology 'tree'"),
        ({"family": "categorical"}, "unknown family 'categorical'"),
        ({"feedback": "inverted", "family": "bernoulli"}, "inverted feedback is for Gaussian states"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        BLL(**options)


@pytest.fixture(scope="module")
def digits():
    return RECIPES["digits"](blocks=7).splits(None)


def accuracy(splits, rule, frozen=False):
    """After eight epochs of digits on seven blocks with a skip."""
    recipe = RECIPES["digits"](blocks=7)
    network = recipe.initial_network(0)
    rule.prepare(network, splits.train.inputs[:64])
    if frozen:
        for segment in rule.cut(network).segments[:-1]:
            for p in segment.parameters:
                p.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in [*network.parameters(), *rule.parameters()] if p.requires_grad], lr=2e-3)
    torch.manual_seed(0)
    for _ in range(8):
        for index in torch.randperm(len(splits.train)).split(64):
            optimizer.zero_grad()
            rule(network, splits.train.inputs[index], splits.train.labels[index]).loss.backward()
            optimizer.step()
    return (network(splits.test.inputs).argmax(1) == splits.test.labels).float().mean().item()


def test_learned_feedback_trains_what_a_random_start_does_not(digits):
    by_blocks = {blocks: accuracy(digits, BLL(blocks=blocks)) for blocks in (1, 2, 8)}
    assert by_blocks[2] > by_blocks[1] - 0.02
    assert by_blocks[8] > accuracy(digits, BLL(blocks=8), frozen=True) + 0.03
