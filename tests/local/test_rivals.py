"""The rivals as training rules. Oracles: backpropagation where a rule becomes it, and the papers' formulas by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hbll
from hbll.cuts import SequentialNetwork
from hbll.local.contrastive import ContrastiveForwardForward, contrastive_loss
from hbll.local.feedback_alignment import DirectFeedbackAlignment
from hbll.local.forward_forward import ForwardForward, goodness, overlay, unit_length
from hbll.local.greedy import DecoupledGreedy
from hbll.local.predsim import PredSim, similarity_loss
from hbll.models.mlp import normed_layer
from hbll.models.vgg import vgg8b

RULES = {
    "dgl": DecoupledGreedy,
    "predsim": PredSim,
    "ff": ForwardForward,
    "cff": ContrastiveForwardForward,
    "dfa": DirectFeedbackAlignment,
}


def mlp(normed=False):
    layers = [normed_layer(12, 8), normed_layer(8, 6), normed_layer(6, 6)]
    if not normed:
        layers = [nn.Sequential(layer[0], nn.Tanh()) for layer in layers]
    return SequentialNetwork(*layers, nn.Linear(6, 3)).double()


def convolutional():
    """States change their shape on the way, from maps to vectors."""
    return SequentialNetwork(*vgg8b(16, width=2, channels=2, classes=3, dropout=0.0)).double()


def tokens():
    def block():
        return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())

    class Head(nn.Linear):
        def forward(self, state):
            return super().forward(state.mean(1))

    return SequentialNetwork(nn.Linear(4, 6), block(), block(), Head(6, 3)).double()


NETWORKS = {
    "vectors": (mlp, (10, 12)),
    "normed": (lambda: mlp(normed=True), (10, 12)),
    "maps": (convolutional, (10, 2, 16, 16)),
    "tokens": (tokens, (10, 5, 4)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    return make(), torch.randn(shape, dtype=torch.float64), torch.randint(3, shape[:1])


def prepared(name, network, x, **options):
    torch.manual_seed(1)
    return RULES[name](**options).prepare(network, x).double()


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("name", RULES)
def test_a_blocks_loss_reaches_the_block_and_what_is_beside_it(case, name):
    network, x, y = case
    rule = prepared(name, network, x)
    step = rule(network, x, y)
    assert len(step.losses) == len(network) - 1
    for k, loss in enumerate(step.losses, 1):
        own = [network[k - 1], *rule.auxiliary(k), *([network[-1]] if k == len(step.losses) else [])]
        own = {id(p) for module in own for p in module.parameters()}
        every = [*network.parameters(), *rule.parameters()]
        for p, gradient in zip(every, gradients(loss, every), strict=True):
            assert (gradient is not None) == (id(p) in own)
            assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("name", ["dgl", "predsim", "ff", "cff"])
def test_a_block_learns_whatever_the_blocks_after_it_are(case, name):
    network, x, y = case
    rule = prepared(name, network, x)
    early = list(nn.Sequential(*list(network)[:2]).parameters())

    def update():
        torch.manual_seed(2)
        return gradients(rule(network, x, y).loss, early)

    before = update()
    with torch.no_grad():
        for p in [
            *nn.Sequential(*list(network)[2:]).parameters(),
            *(p for k in range(3, len(network)) for m in rule.auxiliary(k) for p in m.parameters()),
        ]:
            p.copy_(torch.randn_like(p))
    for one, other in zip(before, update(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", RULES)
def test_a_few_steps_separate_three_clusters(name):
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 12) + 2 * torch.randn(3, 12)[y]
    network = SequentialNetwork(normed_layer(12, 16), normed_layer(16, 16), nn.Linear(16, 3))
    rule = RULES[name]().prepare(network, x)
    optimizer = torch.optim.Adam([*network.parameters(), *rule.parameters()], lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        rule(network, x, y).loss.backward()
        optimizer.step()
    assert (network.eval()(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("name", RULES)
def test_its_weights_are_restored(name):
    network, x, y = mlp(), torch.randn(10, 12, dtype=torch.float64), torch.randint(3, (10,))
    rule = prepared(name, network, x)
    torch.manual_seed(5)
    other = RULES[name]().prepare(network, x).double()
    other.load_state_dict(rule.state_dict())
    losses = []
    for one in (rule, other):
        torch.manual_seed(2)
        losses.append(gradients(one(network, x, y).loss, list(network.parameters())))
    assert all(a.equal(b) for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_it_can_be_prepared_for_another_network(name):
    network, x, y = mlp(), torch.randn(10, 12, dtype=torch.float64), torch.randint(3, (10,))
    rule = prepared(name, convolutional(), torch.randn(2, 2, 16, 16, dtype=torch.float64))
    step = rule.prepare(network, x)(network, x, y)
    assert len(step.losses) == 3


# Direct feedback alignment


def test_feedback_through_the_true_jacobian_is_backpropagation():
    torch.manual_seed(0)
    network = SequentialNetwork(*(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 4)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(4, (6,))
    rule = prepared("dfa", network, x)
    after = torch.eye(4, dtype=torch.float64)
    for k in (3, 2, 1):  # d logits / d output of block k is the product of the weights after it
        after = after @ network[k].weight.detach()
        rule.feedback.get_buffer(str(k)).copy_(after)
    parameters = list(network.parameters())
    exact = gradients(F.cross_entropy(network(x), y), parameters)
    for ours, theirs in zip(gradients(rule(network, x, y).loss, parameters), exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_feedback_is_fixed_random_and_of_the_papers_size():
    network, x = mlp(), torch.randn(10, 12, dtype=torch.float64)
    rule = prepared("dfa", network, x)
    assert not list(rule.parameters())
    for k, units in enumerate([8, 6, 6], 1):
        feedback = rule.feedback.get_buffer(str(k))
        assert feedback.shape == (3, units)
        assert feedback.abs().max() <= units**-0.5


# Decoupled greedy learning


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_one_greedy_block_is_backpropagation(make):
    torch.manual_seed(0)
    network = make()
    x = torch.randn(6, 12, dtype=torch.float64) if make is mlp else torch.randn(6, 2, 16, 16, dtype=torch.float64)
    y = torch.randint(3, (6,))
    rule = prepared("dgl", network, x, blocks=1)
    assert not list(rule.parameters())
    parameters = list(network.parameters())
    exact = gradients(F.cross_entropy(network(x), y), parameters)
    for ours, theirs in zip(gradients(rule(network, x, y).loss, parameters), exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_greedy_block_learns_as_a_network_of_itself_and_its_auxiliary_network():
    torch.manual_seed(0)
    network, x, y = convolutional(), torch.randn(6, 2, 16, 16, dtype=torch.float64), torch.randint(3, (6,))
    rule = prepared("dgl", network, x)
    state = network[0](x).detach()
    alone = nn.Sequential(copy.deepcopy(network[1]), copy.deepcopy(*rule.auxiliary(2)))
    F.cross_entropy(alone(state), y).backward()
    together = [*network[1].parameters(), *rule.auxiliary(2)[0].parameters()]
    for p, gradient in zip(alone.parameters(), gradients(rule(network, x, y).losses[1], together), strict=True):
        torch.testing.assert_close(p.grad, gradient)


# Similarity matching and prediction


def test_predsims_loss_by_its_parts():
    torch.manual_seed(0)
    network, x, y = convolutional(), torch.randn(6, 2, 16, 16, dtype=torch.float64), torch.randint(3, (6,))
    rule = prepared("predsim", network, x, beta=0.7, pooled=64)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(torch.randn_like(p))
    losses, state = rule(network, x, y).losses, x
    for k, block in enumerate(list(network)[:-1], 1):
        state = block(state)
        match, predict = rule.auxiliary(k)
        pooled = state
        while pooled.ndim == 4 and pooled[0].numel() > 64:  # sides are halved in turn, height first
            pooled = F.avg_pool2d(pooled, (2, 1) if pooled.shape[2] >= pooled.shape[3] else (1, 2))
        prediction = pooled.flatten(1) @ predict[-1].weight.mT + predict[-1].bias
        matched = F.conv2d(state, match.weight, padding=1) if state.ndim == 4 else state @ match.weight.mT
        expected = 0.7 * similarity_loss(matched, y, 3) + 0.3 * F.cross_entropy(prediction, y)
        if k == len(losses):
            expected = expected + 0.3 * F.cross_entropy(network[-1](state), y)
        torch.testing.assert_close(losses[k - 1], expected)


def test_predictors_know_nothing_at_first():
    network, x = mlp(), torch.randn(10, 12, dtype=torch.float64)
    rule = prepared("predsim", network, x, beta=0.0)
    losses = rule(network, x, torch.randint(3, (10,))).losses
    bias = [rule.auxiliary(k)[1][-1].bias for k in (1, 2)]
    for loss, b in zip(losses, bias, strict=False):
        assert loss.item() == pytest.approx(math.log(3), abs=b.abs().max().item() * 2)


# Forward-Forward


def forward_forward(rule, network, x, y, wrong):
    """Outputs of the blocks on inputs under the right and under wrong labels, by the paper's description."""
    for label in (y, wrong):
        state, outputs = overlay(x, label, 3), []
        for block in list(network)[:-1]:
            state = block(unit_length(state))
            outputs.append(state)
        yield outputs


def test_the_loss_is_the_likelihood_of_right_and_wrong(monkeypatch):
    torch.manual_seed(0)
    network, x, y = mlp(), torch.randn(10, 12, dtype=torch.float64), torch.randint(3, (10,))
    rule = prepared("ff", network, x, threshold=0.4)
    wrong = (y + 1) % 3
    monkeypatch.setattr(torch, "randint_like", lambda y, low, high: torch.ones_like(y))
    losses = rule(network, x, y).losses
    for k, (right, other) in enumerate(zip(*forward_forward(rule, network, x, y, wrong), strict=True)):
        units = right.shape[1]
        is_right, is_wrong = (torch.sigmoid(goodness(out) - 0.4 * units) for out in (right, other))
        expected = -(is_right.log() + (1 - is_wrong).log()).mean()
        if k == 2:
            expected = expected + F.cross_entropy(network(x), y)
        torch.testing.assert_close(losses[k], expected)


def test_the_symmetric_loss_compares_right_and_wrong(monkeypatch):
    torch.manual_seed(0)
    network, x, y = mlp(), torch.randn(10, 12, dtype=torch.float64), torch.randint(3, (10,))
    rule = prepared("ff", network, x, contrast="symmetric")
    monkeypatch.setattr(torch, "randint_like", lambda y, low, high: torch.ones_like(y))
    right, other = forward_forward(rule, network, x, y, (y + 1) % 3)
    expected = -torch.sigmoid(goodness(right[0]) - goodness(other[0])).log().mean()
    torch.testing.assert_close(rule(network, x, y).losses[0], expected)


def test_wrong_labels_are_all_the_others(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hbll.local.forward_forward.overlay", lambda x, y, c: seen.append(y.clone()) or overlay(x, y, c)
    )
    network, x, y = mlp(), torch.randn(600, 12, dtype=torch.float64), torch.arange(600) % 3
    prepared("ff", network, x)(network, x, y)
    right, wrong = seen
    assert right.equal(y)
    assert not (wrong == y).any()
    shares = torch.bincount((wrong - y) % 3, minlength=3) / 600
    assert abs(shares[1] - 0.5) < 5 * (0.25 / 600) ** 0.5


def test_running_statistics_are_those_of_the_chain():
    torch.manual_seed(0)
    network = mlp(normed=True)
    same = copy.deepcopy(network)
    x, y = torch.randn(10, 12, dtype=torch.float64), torch.randint(3, (10,))
    rule = prepared("ff", network, x)
    rule(network, x, y)
    same(x)
    for (name, ours), theirs in zip(network.named_buffers(), same.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(ours, theirs)


def test_scores_are_the_goodness_behind_the_first_block():
    torch.manual_seed(0)
    network, x = mlp(), torch.randn(4, 12, dtype=torch.float64)
    scores = prepared("ff", network, x).scores(network, x)
    assert scores.shape == (4, 3)
    for label in range(3):
        y = torch.full((4,), label)
        outputs, _ = forward_forward(None, network, x, y, y)
        torch.testing.assert_close(scores[:, label], goodness(outputs[1]) + goodness(outputs[2]))


# Contrastive Forward-Forward


def test_margins_shrink_from_the_first_block_to_the_last():
    torch.manual_seed(0)
    network, x, y = mlp(), torch.randn(10, 12, dtype=torch.float64), torch.randint(3, (10,))
    losses, state = prepared("cff", network, x)(network, x, y).losses, x
    for k, (block, margin) in enumerate(zip(network, (0.4, 0.25, 0.1), strict=False)):
        state = block(state)
        expected = contrastive_loss(state, y, 0.15, margin)
        if k == 2:
            expected = expected + F.cross_entropy(network[-1](state), y)
        torch.testing.assert_close(losses[k], expected)


def test_one_sample_cannot_be_contrasted():
    network, x = mlp(), torch.randn(1, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="batches of two or more"):
        prepared("cff", network, x)(network, x, torch.tensor([0]))


# Cost: blocks of the network in units of an evaluation, as of a tree whose embed and head cost nothing


@pytest.mark.parametrize(
    ("name", "work", "span"),
    [
        # forward 4; backward 2 a block, of which the block's own input needs none: the first layers' walk ends there
        ("predsim", 4 + 4 + 3 * 5, 4 + 2 + 1),
        ("cff", 4 + 4, 4 + 1),
        ("ff", 2 * (4 + 4) + 4, 4 + 1),
        ("dfa", 4 + 4, 4 + 1),
        ("dgl", 4 + 4 + 3 * 4, 4 + 2 + 1 - 1),
    ],
)
def test_cost(name, work, span):
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
    network = hbll.TreeNetwork(nn.Linear(12, 6), blocks, nn.Linear(6, 3)).double()
    x, y = torch.randn(10, 12, dtype=torch.float64), torch.randint(3, (10,))
    step = prepared(name, network, x)(network, x, y)
    assert (step.work, step.span) == (work, span)
