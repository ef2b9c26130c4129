"""What all local rules share. Oracles: autograd on each stage alone, products counted as they run, graphs that are alive."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from tests.networks import CLASSES, TOKENS, WIDTH, Transformer, convolutional, mlp, residual, transformer
from tests.oracles.meter import batch, countable, measure
from torch import nn

from hbll import Chain, Step
from hbll.models.mlp import normed_layer
from hbll.models.vgg import vgg8b
from hbll.rules import make_rule
from hbll.rules.local import LocalRule

RULES = ["dgl", "predsim", "ff", "cff", "dfa", "bll"]
TOKEN_RULES = [name for name in RULES if name != "ff"]
IN_ORDER = ["dgl", "predsim", "ff", "cff", "bll"]


class Halves(LocalRule):
    """Pulls every stage's output to zero: its gradients are known without the rest of the network."""

    apart = True

    def local_loss(self, k, rows, classes):
        return rows.square().sum() / 2


def normed():
    torch.manual_seed(0)
    layers = [normed_layer(WIDTH, WIDTH) for _ in range(4)]
    network = Chain(nn.Linear(5, WIDTH), layers, nn.Linear(WIDTH, CLASSES)).double()
    return network, torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % CLASSES


def shrinking():
    """States change their shape on the way, from maps to vectors."""
    torch.manual_seed(0)
    *layers, head = vgg8b(16, width=2, channels=2, classes=CLASSES, dropout=0.0)
    network = Chain(nn.Identity(), layers, head).double()
    return network, torch.randn(6, 2, 16, 16, dtype=torch.float64), torch.arange(6) % CLASSES


class Mean(nn.Linear):
    def forward(self, state):
        return super().forward(state.mean(1))


def pooled():
    """Tokens with one label for all of them."""
    torch.manual_seed(0)
    network = Chain(nn.Linear(5, WIDTH), [Transformer() for _ in range(4)], Mean(WIDTH, CLASSES)).double()
    return network, torch.randn(6, TOKENS, 5, dtype=torch.float64), torch.arange(6) % CLASSES


NETWORKS = {
    "vectors": residual,
    "normed": normed,
    "maps": convolutional,
    "shrinking": shrinking,
    "pooled tokens": pooled,
    "tokens": lambda: transformer(4),
}
CASES = [(name, network) for name in RULES for network in NETWORKS if (name, network) != ("ff", "tokens")]


def made(name, case, **options):
    network, x, y = NETWORKS[case]()
    torch.manual_seed(1)
    return make_rule(name, network, example=x, **options), x, y


def by_stage(rule, x, y):
    """Each stage's losses of one step, summed; every graph is still there."""
    torch.manual_seed(2)
    found = {}
    for loss in rule.losses(x, y, Step()):
        found.setdefault(loss.stage, []).append(loss.value)
    return {k: torch.stack(values).sum() for k, values in sorted(found.items())}


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)


def parameters_of(modules):
    return [p for module in modules for p in module.parameters()]


# Reach


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_stages_loss_reaches_the_stage_and_what_is_beside_it(name, case):
    rule, x, y = made(name, case, stage=2)
    losses = by_stage(rule, x, y)
    assert list(losses) == list(range(1, len(rule.stages) + 1))
    every = list(rule.parameters())
    for k, loss in losses.items():
        own = {id(p) for p in parameters_of(rule.own(k))}
        for p, gradient in zip(every, gradients(loss, every), strict=True):
            assert (gradient is not None) == (id(p) in own)
            assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, case in CASES if name != "dfa"])
def test_a_stage_learns_whatever_the_stages_after_it_are(name, case):
    rule, x, y = made(name, case)
    early = parameters_of([*rule.own(1), *rule.own(2)])
    late = list(rule.stages[2:-1])
    if name != "bll":  # whose messages come through the maps of later stages
        late += [module for k in range(3, len(rule.stages)) for module in rule.auxiliary(k)]
    before = gradients(sum(by_stage(rule, x, y).values()), early)
    with torch.no_grad():
        for p in parameters_of(late):
            p.copy_(torch.randn_like(p))
    torch.testing.assert_close(gradients(sum(by_stage(rule, x, y).values()), early), before)


def test_nothing_crosses_from_stage_to_stage():
    network, x, y = mlp(5)
    rule = Halves(network, stage=(1, 2, 1))
    first = network.blocks[0](network.embed(x))
    second = network.blocks[2](network.blocks[1](first.detach()))
    last = network.blocks[3](second.detach())
    head = F.cross_entropy(network.head(last.detach()), y)
    expected = first.square().sum() / 2 + second.square().sum() / 2 + last.square().sum() / 2 + head
    step = rule(x, y)
    torch.testing.assert_close(step.loss, expected)
    ours, theirs = (gradients(loss, network.parameters()) for loss in (step.loss, expected))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(step.label_loss, head)
    assert {k: report.error for k, report in step.reports.items()} == pytest.approx(
        {1: first.square().sum().item() / 2, 2: second.square().sum().item() / 2, 3: last.square().sum().item() / 2}
    )


class Positions(nn.Module):
    """An embed with learned positions, which every block is given as a context."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, WIDTH)
        self.positions = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.linear(x), {"positions": self.positions}


class Placed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, state, positions):
        return torch.tanh(self.linear(state) + positions)


@pytest.mark.parametrize("name", [name for name in RULES if name != "ff"])
def test_a_learned_context_is_the_first_stages_alone(name):
    torch.manual_seed(0)
    network = Chain(Positions(), [Placed() for _ in range(3)], nn.Linear(WIDTH, CLASSES)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % CLASSES
    rule = make_rule(name, network, example=x)
    for k, loss in by_stage(rule, x, y).items():
        (gradient,) = gradients(loss, [network.embed.positions])
        assert (gradient is not None) == (k == 1)
    rule.backward(x, y)  # in which the first stage's graph is gone when the second one's is walked


@pytest.mark.parametrize("name", ["dgl", "bll"])
def test_one_stage_is_backpropagation(name):
    network, x, y = shrinking()
    rule = make_rule(name, network, example=x, stage=len(network.blocks))
    assert len(list(rule.parameters())) == len(list(network.parameters()))
    step, exact = rule(x, y), F.cross_entropy(network(x), y)
    torch.testing.assert_close(step.loss, exact, rtol=1e-13, atol=0)
    ours, theirs = (gradients(loss, network.parameters()) for loss in (step.loss, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["ff", "cff", "dfa"])
def test_a_weight_of_two_stages_is_refused_where_it_cannot_be_shared(name):
    network, _, _ = mlp(4)
    network.head = nn.Linear(WIDTH, 5).double()
    network.head.weight = nn.Parameter(network.embed.weight.detach().mT.clone())
    network.embed.weight = network.head.weight
    with pytest.raises(ValueError, match="the embed and the head share a weight: two stages would train it"):
        make_rule(name, network)
    make_rule(name, network, stage=3)
    network.embed.requires_grad_(False)
    make_rule(name, network)


# One graph at a time


class Alive:
    """What graphs hold at this moment: the tensors that autograd has saved, and for which a graph still lives."""

    def __init__(self):
        self._held = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor):
        class Held:
            pass

        held = Held()
        held.tensor = tensor.detach()  # no circle, should it be the output of what saves it
        self._held.add(held)
        return held

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *args):
        self._hooks.__exit__(*args)

    def __len__(self):
        return len(self._held)


def mode(which, rule, x, y):
    if which == "without gradients":
        with torch.no_grad():
            return rule(x, y)
    return rule.backward(x, y) if which == "backward" else rule(x, y)


@pytest.mark.parametrize("which", ["forward", "backward", "without gradients"])
@pytest.mark.parametrize("name", IN_ORDER)
def test_no_graph_of_another_stage_lives_while_a_stage_is_evaluated(name, which):
    network, x, y = residual(6)
    rule = make_rule(name, network, example=x)
    living = []
    with Alive() as alive:
        for block in network.blocks[1:]:  # in the first stage there is the embed's before
            block.register_forward_pre_hook(lambda *_: living.append(len(alive)))
        mode(which, rule, x, y)
    # Of bll there is a product for each feedback map that is still to learn.
    assert living == ([3, 2, 1, 0] if name == "bll" else [0] * (8 if name == "ff" else 4))


# Labels


@pytest.mark.parametrize("name", TOKEN_RULES)
@pytest.mark.parametrize("ignored", [False, True])
def test_tokens_with_labels_are_samples(name, ignored):
    """On blocks that see each token alone a step equals one on its tokens as samples, without those that have no label."""
    network, x, _ = residual(4)
    torch.manual_seed(1)
    tokens, labels = torch.randn(4, 5, 5, dtype=torch.float64), torch.randint(CLASSES, (4, 5))
    if ignored:
        labels[0, 1:] = labels[2, 3] = -100
    rule, alike = make_rule(name, network, example=tokens), make_rule(name, network, example=x)
    alike.load_state_dict(rule.state_dict())
    found = gradients(rule(tokens, labels).loss, rule.parameters())
    counted = labels != -100
    expected = gradients(alike(tokens[counted], labels[counted]).loss, alike.parameters())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", RULES)
def test_samples_without_a_label_are_left_out(name, monkeypatch):
    monkeypatch.setattr(torch, "randint_like", lambda y, low, high: torch.ones_like(y))
    network, x, y = residual(4)
    rule = make_rule(name, network, example=x)
    expected = gradients(rule(x[[0, 1, 3]], y[[0, 1, 3]]).loss, rule.parameters())
    y[2] = -100
    torch.testing.assert_close(gradients(rule(x, y).loss, rule.parameters()), expected)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.zeros(3, dtype=int), r"one class for each of 4 samples; got labels \(3,\)"),
        (torch.zeros(4, 2, dtype=int), r"labels.* \(B,\).*; got \(4, 2\)|4 samples; got labels \(4, 2\)"),
        (torch.zeros(4), r"labels are integer classes here, .*; got \(4,\) of torch.float32"),
        ([0, 1, 2, 0], "labels are integer classes here, .*; got a list"),
        (torch.tensor([0, 1, 2, 3]), r"labels must be classes 0\.\.2"),
    ],
)
@pytest.mark.parametrize("name", RULES)
def test_wrong_labels_are_refused(name, labels, sentence):
    network, x, _ = residual(4)
    with pytest.raises(ValueError, match=sentence):
        make_rule(name, network)(x, labels)


@pytest.mark.parametrize("name", TOKEN_RULES)
def test_labels_of_another_length_than_tokens_are_refused(name):
    network, x, y = transformer(4)
    rule = make_rule(name, network)
    with pytest.raises(ValueError, match=r"each of 4 samples, or for each of their 7 tokens; got labels \(4, 6\)"):
        rule(x, y[:, :6])
    one_each = (
        r"labels are integer classes here, \(B, T\) as the head's scores are|scores \(4, 7, 3\) take labels \(4, 7\)"
    )
    with pytest.raises(ValueError, match=one_each):
        rule(x, y[:, 0])


def test_a_head_that_scores_tokens_needs_states_of_tokens():
    network, x, _ = convolutional(4)
    network.head = nn.Sequential(nn.Flatten(2), nn.Linear(20, CLASSES)).double()
    with pytest.raises(ValueError, match=r"the head scores every token, and block 1 hands on \(1, 4, 5, 4\)"):
        make_rule("dgl", network, example=x)


def test_a_head_that_scores_nothing_is_refused():
    network, x, y = mlp(3)
    network.head = nn.Flatten(0)
    with pytest.raises(ValueError, match=r"the head gives scores of classes, \(B, C\) or \(B, T, C\); got \(24,\)"):
        make_rule("cff", network)(x, y)


# Training


@pytest.mark.parametrize("name", RULES)
def test_a_few_steps_separate_three_clusters(name):
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 12) + 2 * torch.randn(3, 12)[y]
    network = Chain(normed_layer(12, 16), [normed_layer(16, 16)], nn.Linear(16, 3))
    rule = make_rule(name, network)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        rule.backward(x, y)
        optimizer.step()
    assert (network.eval()(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("name", TOKEN_RULES)
def test_a_few_steps_classify_tokens(name):
    torch.manual_seed(0)
    network = Chain(nn.Embedding(6, 16), [Transformer(16) for _ in range(2)], nn.Linear(16, 3))
    x = torch.randint(6, (20, 5))
    y = x % 3
    y[:, 0] = -100
    rule = make_rule(name, network)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        rule.backward(x, y)
        optimizer.step()
    assert (network(x).argmax(2) == y)[:, 1:].float().mean() > 0.95


class Scaled(nn.Module):
    """A loss with a temperature to be learned."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, logits, y):
        return F.cross_entropy(self.scale * logits, y, reduction="none")


@pytest.mark.parametrize("name", RULES)
def test_a_loss_may_have_parameters(name):
    network, x, y = residual(3)
    rule = make_rule(name, network, example=x, loss=Scaled())
    assert rule.loss in rule.own(2)
    rule.backward(x, y)
    assert rule.loss.scale.grad.abs() > 0


@pytest.mark.parametrize("name", RULES)
def test_a_head_without_parameters(name):
    network, x, y = residual(3)
    network.blocks[1] = nn.Linear(WIDTH, CLASSES).double()
    network.head = nn.Identity()
    rule = make_rule(name, network, example=x)
    rule.backward(x, y)
    assert all(p.grad.abs().max() > 0 for p in network.parameters())


def test_reports_compare_with_backpropagation():
    network, x, y = residual(4)
    reports = make_rule("dgl", network, example=x, stage=3).diagnose(x, y)
    assert reports[1].cosine == pytest.approx(1.0)
    reports = Halves(network).diagnose(x, y)
    assert list(reports) == [1, 2, 3]
    assert all(-1 <= report.cosine < 0.999 for report in reports.values())


@pytest.mark.parametrize("name", RULES)
def test_the_chain_is_what_is_read(name):
    network, _, _ = residual(4)
    assert make_rule(name, network).readouts[0] == network.readouts[0]
    assert len(make_rule(name, network).readouts) == (2 if name == "ff" else 1)


# Cost


@pytest.mark.parametrize(
    ("name", "work", "span"),
    [
        # forward 4; back 2 a block, of which the stage's own input needs none: the walk ends there
        ("predsim", 4 + 4 + 3 * 4, 4 + 2 + 1),
        ("cff", 4 + 4, 4 + 1),
        ("ff", 2 * (4 + 4) + 4, 4 + 1),
        ("dfa", 4 + 4, 4 + 1),
        ("dgl", 4 + 4 + 3 * 3, 4 + 2 + 1 - 1),
        ("bll", 4 + 4, 4 + 1),
    ],
)
def test_cost(name, work, span):
    rule, (x, y) = make_rule(name, countable(5)), batch()
    rule.network.embed.requires_grad_(False)
    step = rule(x, y)
    assert (step.work, step.span) == (work, span)


def greedy(network, stage):
    """With auxiliary networks of one matrix each, as a block is."""
    rule = make_rule("dgl", network, example=batch()[0], stage=stage, hidden=0)
    for k in range(1, len(rule.stages)):
        rule.auxiliary(k)[0][-1].bias = None
    return rule


@pytest.mark.parametrize("stage", [1, 2, 4, (1, 2, 1)])
@pytest.mark.parametrize("frozen", [False, True])
def test_counted_is_what_really_runs(stage, frozen):
    network = countable(5)
    network.embed.requires_grad_(not frozen)  # what makes the first block's input product necessary, or not
    rule = greedy(network, stage)
    stages = len(rule.stages)
    counted, measured = measure(rule)
    assert counted == measured
    assert counted[0] == 4 + 4 + 4 - stages + (not frozen) + 3 * (stages - 1)


def test_frozen_blocks_cost_their_evaluation_and_what_is_carried_through_them():
    network = countable(7)
    network.embed.requires_grad_(False)
    network.blocks[0].requires_grad_(False)
    network.blocks[4].requires_grad_(False)
    counted, measured = measure(greedy(network, 3))
    # Stage 1: blocks 2 and 3, and the input of 3. Stage 2: blocks 4 and 6, and the inputs of 5 and 6.
    assert counted == measured == (6 + 2 + 1 + 2 + 2 + 3, 6 + 3)
