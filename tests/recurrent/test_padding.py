"""What does not count: padding, and labels of -100. Oracles: the same sequences without them; plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hbll.losses import squared_error
from hbll.recurrent import GRU, LSTM, RULES, DepthCells, PaperRule, RecurrentNetwork, make_rule
from hbll.recurrent.network import presence

LENGTH, INPUTS, WIDTH, OUTPUTS = 8, 2, 5, 3
LENGTHS = [8, 5, 3, 6]
PRESENT = torch.arange(LENGTH) >= LENGTH - torch.tensor(LENGTHS)[:, None]
PADDED = [name for name in RULES if name != "bptt-fused"]  # which takes sequences of one length alone


def made(name, every_step, cell=GRU, embed=None, **options):
    torch.manual_seed(0)
    cells = DepthCells(cell, INPUTS, WIDTH, 3)
    network = RecurrentNetwork(cells, nn.Linear(WIDTH, OUTPUTS), every_step, embed=embed, length=LENGTH)
    if name == "hbll":
        options = {"chunk": 2, "sweeps": 4, "credit_sweeps": 4, "guess": "zero", **options}  # exact
    return make_rule(name, network, **options)


def batch(every_step):
    torch.manual_seed(1)
    shape = (len(LENGTHS), LENGTH) if every_step else (len(LENGTHS),)
    return torch.randn(len(LENGTHS), LENGTH, INPUTS), torch.randint(OUTPUTS, shape), torch.randn(*shape, OUTPUTS)


def gradients(rule, x, y):
    rule.zero_grad()
    step = rule.backward(x, y)
    return step, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in rule.named_parameters()}


@pytest.mark.parametrize("filling", [0.0, 7.0, torch.inf, torch.nan])
@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("name", PADDED)
def test_what_the_padding_holds_does_not_matter(name, every_step, filling):
    x, y, goal = batch(every_step)
    plain = x.where(PRESENT[..., None], 0)
    filled = x.where(PRESENT[..., None], filling)
    for loss, labels in ((None, y), (squared_error, goal)):
        other = labels.clone()
        if every_step:
            other[~PRESENT] = 99 if loss is None else filling
        options = {} if loss is None else {"loss": loss}
        expected = gradients(made(name, every_step, **options), (plain, torch.tensor(LENGTHS)), labels)
        found = gradients(made(name, every_step, **options), (filled, LENGTHS), other)
        assert found[0].loss == expected[0].loss
        assert found[0].loss.isfinite()
        assert any(gradient.any() for gradient in found[1].values())
        for parameter, gradient in expected[1].items():
            torch.testing.assert_close(found[1][parameter], gradient)


@pytest.mark.parametrize("name", ["hbll", "bptt", "deer"])
def test_a_squared_error_is_the_mean_over_what_is_no_padding(name):
    x, _, goal = batch(True)
    rule = made(name, True, loss=squared_error, **({"tolerance": 0.0} if name == "deer" else {}))
    step, found = gradients(rule, (x, LENGTHS), goal)
    network = made("bptt", True).network
    # Each sequence by itself, without its padding.
    errors = [
        (network(x[i : i + 1, LENGTH - length :]) - goal[i : i + 1, LENGTH - length :]).square().sum(-1).flatten() / 2
        for i, length in enumerate(LENGTHS)
    ]
    expected = torch.cat(errors).mean()
    torch.testing.assert_close(step.label_loss, expected.detach())
    weights = [network.cell.weight_hh, network.head.weight]
    for name, gradient in zip(
        ("network.cells.cells.0.weight_hh", "network.head.weight"), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(found[name], gradient)


def per_sequence(prediction, y):
    """The mean loss of each sequence's steps, those of later ones weighing more: (B,)."""
    steps = F.cross_entropy(prediction.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
    return (steps * torch.linspace(0, 1, y.shape[1])).sum(1) / (y != 0).sum(1).clamp_min(1)


@pytest.mark.parametrize("name", ["hbll", "bptt", "bptt-fused", "deer"])
def test_a_loss_of_whole_sequences_is_given_the_batch_first(name):
    """As by the network; of as many sequences as steps, which no shape tells from one another."""
    torch.manual_seed(2)
    x, y = torch.randn(LENGTH, LENGTH, INPUTS), torch.randint(OUTPUTS, (LENGTH, LENGTH))
    rule = made(name, True, loss=per_sequence, **({"tolerance": 0.0} if name == "deer" else {}))
    step, found = gradients(rule, x, y)
    expected = per_sequence(rule.network(x), y).mean()
    torch.testing.assert_close(step.label_loss, expected.detach())
    weights = [rule.network.cell.weight_hh, rule.network.head.weight]
    for parameter, gradient in zip(
        ("network.cells.cells.0.weight_hh", "network.head.weight"), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(found[parameter], gradient)
    if name != "bptt-fused":
        with pytest.raises(ValueError, match=r"returned values \(4,\), .* let it return one value per step"):
            rule((x[:4], LENGTHS), y[:4])


@pytest.mark.parametrize("name", PADDED)
def test_a_loss_of_ones_own_never_sees_the_labels_of_the_padding(name):
    x, y, goal = batch(True)

    def classes(prediction, y):
        return F.cross_entropy(prediction.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)

    def logarithms(prediction, y):
        return (prediction - y.log()).square().sum(-1)

    for loss, labels, filling in ((classes, y, 99), (logarithms, goal.exp(), -1.0)):
        other = labels.clone()
        other[~PRESENT] = filling
        expected, found = (made(name, True, loss=loss)((x, LENGTHS), given) for given in (labels, other))
        assert found.loss == expected.loss
        assert found.loss.isfinite()


@pytest.mark.parametrize("every_step", [True, False])
def test_what_a_sample_aims_at_does_not_depend_on_whose_labels_count_beside_it(every_step, monkeypatch):
    x, y, _ = batch(every_step)
    found = []
    level = PaperRule._level

    def noted(self, *args):
        result = level(self, *args)
        found.append(result[1])
        return result

    monkeypatch.setattr(PaperRule, "_level", noted)
    lengths = torch.tensor([LENGTH, 1, 1, 1])
    made("paper", every_step)((x[:1], lengths[:1]), y[:1])
    alone, found[:] = found[:], []
    if not every_step:
        y[1:] = -100
    made("paper", every_step)((x, lengths), y)
    for target, beside in zip(alone, found, strict=True):
        torch.testing.assert_close(beside[:, :1], target)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("every_step", [True, False])
def test_a_head_may_look_at_states_as_rows(name, every_step):
    class Rows(nn.Linear):
        def forward(self, h):
            return super().forward(h.view(-1, WIDTH)).view(*h.shape[:-1], OUTPUTS)

    x, y, _ = batch(every_step)
    rule = made(name, every_step)
    expected = gradients(rule, x, y)[1]
    head = Rows(WIDTH, OUTPUTS)
    head.load_state_dict(rule.network.head.state_dict())
    rule.network.head = head
    for parameter, gradient in gradients(rule, x, y)[1].items():
        torch.testing.assert_close(gradient, expected[parameter])


@pytest.mark.parametrize("name", RULES)
def test_a_head_may_have_weights_that_it_does_not_use(name):
    x, y, _ = batch(False)
    rule = made(name, False)
    expected = gradients(rule, x, y)[1]
    rule.network.head.unused = nn.Parameter(torch.ones(3))
    found = gradients(rule, x, y)[1]
    assert not found.pop("network.head.unused").any()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient)


@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_where_no_label_counts_nothing_is_learned(name, every_step):
    x, y, _ = batch(every_step)
    options = {"guess": "tree"} if name == "hbll" else {}
    step, found = gradients(made(name, every_step, **options), x, torch.full_like(y, -100))
    assert step.loss == step.label_loss == 0
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("cell", [GRU, LSTM])
@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_half_precision(name, every_step, cell):
    torch.set_default_dtype(torch.float32)
    x, y, _ = batch(every_step)
    rule, exact = made(name, every_step, cell), made(name, every_step, cell)
    for _ in range(2):  # the slopes of the first step are there in the second
        with torch.autocast("cpu", torch.bfloat16):
            step, found = gradients(rule, x, y)
        reference, expected = gradients(exact, x, y)
    torch.testing.assert_close(step.loss, reference.loss, rtol=0.05, atol=0.05)
    for parameter, gradient in expected.items():
        assert found[parameter].dtype == gradient.dtype
        assert (found[parameter] - gradient).norm() <= 0.1 * max(g.norm() for g in expected.values())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_lengths_in_bytes(kind):
    present = presence(torch.tensor([20, 100], dtype=kind), torch.zeros(2, 300, 1))
    assert present.sum(1).tolist() == [20, 100]
    assert present[:, -20:].all()


def test_infinities_that_are_no_padding_are_refused():
    x, y, _ = batch(False)
    x[1, 5] = torch.inf
    with pytest.raises(ValueError, match="a sequence holds NaN or an infinity"):
        made("bptt", False)((x, LENGTHS), y)
    x[1, 5], x[1, 0] = 0, torch.inf
    with pytest.raises(
        ValueError, match="a sequence holds NaN or an infinity"
    ):  # its weights are given the padding too
        made("bptt", False, embed=nn.Linear(INPUTS, INPUTS))((x, LENGTHS), y)


@pytest.mark.parametrize(
    "lengths", [torch.tensor([8, 5, 3, 1.5]), torch.ones(4, dtype=torch.bool), ["a"], None, [8, 5, 3]]
)
def test_what_are_no_lengths_is_refused(lengths):
    x, y, _ = batch(False)
    if lengths is None:
        assert made("bptt", False)((x, None), y).loss == made("bptt", False)(x, y).loss
    else:
        with pytest.raises(ValueError, match="lengths are"):
            made("bptt", False)((x, lengths), y)


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], torch.tensor([0, 1, 2, 0]).numpy(), None])
def test_what_are_no_labels_is_refused(labels):
    x, *_ = batch(False)
    for name in RULES:
        with pytest.raises(ValueError, match=r"4 sequences of 8 chunks need labels \(4,\); got a"):
            made(name, False)(x, labels)
