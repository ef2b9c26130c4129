"""Training rules against backpropagation through time, autograd and counting."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from hbll.recurrent import (
    GRU,
    Backpropagation,
    DepthCells,
    FusedBackpropagation,
    Newton,
    PaperRule,
    RecurrentNetwork,
    ScanRule,
    SharedCell,
)
from hbll.recurrent.newton import solve

INPUTS, WIDTH, CLASSES, BATCH = 2, 5, 3, 4  # those of `problem`

LENGTHS = torch.tensor([11, 3, 10, 1])


def chain_gradients(step, network):
    weights = [*network.cell.parameters(), *network.head.parameters()]
    return torch.autograd.grad(step.loss, weights, materialize_grads=True)


def assert_exact(rule, network, x, y, lengths=None):
    exact = Backpropagation()(network, x, y, lengths)
    found = rule(network, x, y, lengths)
    errors = found.errors[x.shape[1]]
    torch.testing.assert_close(errors, exact.loss.detach())
    torch.testing.assert_close(chain_gradients(found, network), chain_gradients(exact, network), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize(("lengths", "chunk"), [(None, 3), (None, 1), (None, 11), (LENGTHS, 4)])
@pytest.mark.parametrize(("guess", "shared"), [("zero", False), ("zero", True), ("tree", False)])
def test_scan_with_all_its_sweeps_is_backpropagation(problem, every_step, lengths, chunk, guess, shared):
    network, x, y = problem(11, every_step)
    chunks = -(-11 // chunk)
    options = {"chunk": chunk, "sweeps": chunks, "credit_sweeps": chunks - 1, "radix": 3}
    rule = ScanRule(network, 11, guess=guess, shared=shared, **options)
    for _ in range(2):  # without and with a coarse step: its slopes are those of the step before
        assert_exact(rule, network, x, y, lengths)


def test_scan_is_exact_for_inputs_with_a_graph(problem):
    network, x, y = problem(6)
    x.requires_grad_()
    rule = ScanRule(network, 6, chunk=2, sweeps=3, credit_sweeps=2)
    torch.testing.assert_close(
        torch.autograd.grad(rule(network, x, y).loss, x), torch.autograd.grad(Backpropagation()(network, x, y).loss, x)
    )


@pytest.mark.parametrize("shared", [False, True])
def test_one_correction_is_enough_where_all_samples_have_the_same_linear_steps(shared):
    # Gates pushed far to one side make u, r constant; small inputs and weights keep tanh linear: the batch-mean
    # Jacobian is then each sample's own.
    network = RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 3), nn.Linear(WIDTH, CLASSES))
    with torch.no_grad():
        cell = network.cell
        for bias in (cell.bias_ih, cell.bias_hh):
            bias.zero_()
        cell.weight_ih[: 2 * WIDTH] = 0
        cell.weight_hh[: 2 * WIDTH] = 0
    x, y = 1e-5 * torch.randn(BATCH, 8, INPUTS), torch.randint(CLASSES, (BATCH,))
    rule = ScanRule(network, 8, chunk=2, sweeps=2, credit_sweeps=0, shared=shared)
    rule(network, x, y)
    exact = chain_gradients(Backpropagation()(network, x, y), network)
    for found, expected in zip(chain_gradients(rule(network, x, y), network), exact, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-12


def test_the_defect_is_what_the_last_sweep_moved(problem):
    network, x, y = problem(6)
    rule = ScanRule(network, 6, chunk=2, sweeps=2)
    found = rule(network, x, y).defect
    # P is 0 in the first step: two Jacobi sweeps from zero starts.
    starts = network.cell.initial(BATCH).repeat(3, 1, 1)
    for _ in range(2):
        ends = torch.stack([network.unroll(x[:, 2 * m : 2 * m + 2], starts[m])[1] for m in range(3)])
        before, starts = starts, torch.cat([starts[:1], ends[:-1]])
    torch.testing.assert_close(found.double(), (starts - before).norm() / starts.norm(), rtol=1e-6, atol=0)


def test_sweeps_adapt_to_the_defect(problem):
    network, x, y = problem(8)
    rule = ScanRule(network, 8, chunk=1, sweeps=2, adapt=1e-3)
    steps = [rule(network, x, y) for _ in range(12)]
    for before, after in pairwise(steps):
        change = int(before.defect > 1e-3) - int(before.defect < 1e-3 / 3)
        assert after.sweeps == min(max(before.sweeps + change, 2), 8)
    assert max(step.sweeps for step in steps) > 2
    again = ScanRule(network, 8, chunk=1, sweeps=2, adapt=1e-3)
    again.load_state_dict(rule.state_dict())
    assert again(network, x, y).sweeps == rule(network, x, y).sweeps


def test_the_predictor_tree_learns_the_states_and_nothing_else_does_from_it(problem):
    network, x, y = problem(8)
    rule = ScanRule(network, 8, chunk=2, sweeps=4, credit_sweeps=3, guess="tree")
    step = rule(network, x, y)
    with torch.no_grad():
        steps = x.transpose(0, 1).unflatten(0, (4, 2)).transpose(1, 2).flatten(2)  # chunks of 2 as one
        tree = {0: network.cell.initial(BATCH)}
        for n, left in ((2, 0), (1, 0), (3, 2)):
            tree[n] = rule.predictor(steps, [(left, n)], tree[left][None])[0]
        states = {m: network.unroll(x[:, : 2 * m])[1] for m in (1, 2, 3)}
    regression = sum((tree[m] - states[m]).square().sum(1).mean() for m in (1, 2, 3))
    torch.testing.assert_close(step.loss.detach(), step.errors[8] + regression)


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_newton_is_backpropagation(problem, every_step, lengths):
    network, x, y = problem(11, every_step)
    assert_exact(Newton(tolerance=1e-12), network, x, y, lengths)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_cyclic_reduction_solves_the_recurrence(length):
    matrices, values = torch.randn(length, 2, 3, 3) / 2, torch.randn(length, 2, 3)
    state, expected = torch.zeros(2, 3), []
    for matrix, value in zip(matrices, values, strict=True):
        state = value + (matrix @ state[..., None])[..., 0]
        expected.append(state)
    torch.testing.assert_close(solve(matrices, values), torch.stack(expected))


@pytest.mark.parametrize("every_step", [False, True])
def test_the_fused_baseline_is_backpropagation(problem, every_step, cell_name):
    network, x, y = problem(7, every_step)
    if cell_name == "elman":
        with pytest.raises(ValueError, match="Elman"):
            FusedBackpropagation(network)
    else:
        assert_exact(FusedBackpropagation(network), network, x, y)


class TestPaper:
    def test_two_chunks_by_hand(self, problem):
        network, x, y = problem(2)
        cell, head = network.cell, network.head
        step = PaperRule(sweeps=1, variance=2.0, label_variance=0.5, step=0.25)(network, x, y)
        prior = cell(x[:, 0], cell.initial(BATCH))
        at_node = prior.detach().requires_grad_()
        errors = nn.functional.cross_entropy(head(cell.hidden(cell(x[:, 1], at_node))), y, reduction="none") / 0.5
        (gradient,) = torch.autograd.grad(errors.sum(), at_node, retain_graph=True)
        target = prior.detach() - 0.25 * 2.0 * gradient
        distance = (prior - target).square().sum(1).mean()
        # The one consistency sweep starts from the initial state, and its first step is the prior once more.
        expected = errors.mean() + distance / 4 + distance
        torch.testing.assert_close(step.loss, expected)
        torch.testing.assert_close(step.errors[1], errors.mean().detach())
        torch.testing.assert_close(chain_gradients(step, network), chain_gradients_of(expected, network))

    def test_inner_nodes_look_at_their_right_parent(self, problem):
        network, x, y = problem(4)
        cells, cell = network.cells.cells, network.cell
        step = PaperRule(sweeps=0)(network, x, y)

        def at_label(node):
            end = cells[1](x[:, 2:].flatten(1), node)
            return nn.functional.cross_entropy(network.head(cell.hidden(end)), y, reduction="none")

        prior2 = cells[1](x[:, :2].flatten(1), cell.initial(BATCH)).detach().requires_grad_()
        target2 = (prior2 - 0.5 * torch.autograd.grad(at_label(prior2).sum(), prior2)[0]).detach()
        prior1 = cell(x[:, 0], cell.initial(BATCH)).detach()
        error1 = (cell(x[:, 1], prior1) - target2).square().sum(1).mean() / 2
        prior3 = cell(x[:, 2], target2)
        error3 = nn.functional.cross_entropy(network.head(cell.hidden(cell(x[:, 3], prior3))), y)
        torch.testing.assert_close(step.errors[1], error1.detach())
        torch.testing.assert_close(step.errors[3], error3.detach())

    @pytest.mark.parametrize("every_step", [False, True])
    @pytest.mark.parametrize("length", [2, 7, 8])
    def test_every_weight_of_the_network_learns(self, problem, length, every_step):
        network, x, y = problem(length, every_step)
        PaperRule()(network, x, y).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())

    def test_padding_changes_nothing(self, problem):
        network, x, y = problem(8)
        lengths = torch.tensor([8, 4, 4, 8])
        other = x.clone()
        other[lengths == 4, :4] = 99.0
        first, second = (PaperRule()(network, each, y, lengths).loss for each in (x, other))
        torch.testing.assert_close(first, second)

    def test_a_shared_cell(self, cell_name, problem):
        network, x, y = problem(8)
        shared = RecurrentNetwork(SharedCell(type(network.cell), INPUTS, WIDTH), network.head)
        PaperRule()(shared, x, y).loss.backward()
        assert all(p.grad is not None for p in shared.parameters())


def chain_gradients_of(loss, network):
    return torch.autograd.grad(loss, [*network.cell.parameters(), *network.head.parameters()])


def test_a_level_costs_one_call_of_its_cell():
    network = RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 6), nn.Linear(WIDTH, CLASSES))
    calls = []
    for depth, cell in enumerate(network.cells.cells):
        cell.register_forward_hook(lambda *_, depth=depth: calls.append(depth))
    PaperRule(sweeps=0)(network, torch.randn(BATCH, 64, INPUTS), torch.zeros(BATCH, dtype=torch.long))
    assert calls == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]  # the arcs to the nodes of a level, and those from them


def test_costs_are_the_specifications():
    network = RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 6), nn.Linear(WIDTH, CLASSES))
    x, y = torch.randn(BATCH, 64, INPUTS), torch.zeros(BATCH, dtype=torch.long)
    step = Backpropagation()(network, x, y)
    assert (step.work, step.span) == (3 * 64, 2 * 64)
    step = ScanRule(network, 64, chunk=4, sweeps=3, credit_sweeps=1)(network, x, y)
    # G (K + Kc + 1) evaluations, and K - 1 + 1 + Kc scans of log2 16 levels.
    assert (step.work, step.span) == (6 * 64, 4 * 5 + 4 * 4)
    step = ScanRule(network, 64, chunk=4, sweeps=3, credit_sweeps=1, guess="tree")(network, x, y)
    assert (step.work, step.span) == (6 * 64 + 2 * 15, 4 * 5 + 4 * 4 + 4)
    for radix, levels in {4: 2, 16: 1}.items():
        step = ScanRule(network, 64, chunk=4, sweeps=3, credit_sweeps=1, radix=radix)(network, x, y)
        assert (step.work, step.span) == (6 * 64, 4 * 5 + 4 * levels)


@pytest.mark.parametrize(("length", "most"), [(64, 2 * 64 / 3), (256, 2 * 256 / 7)])
def test_what_is_suggested_is_shorter_than_backpropagation(length, most):
    network = RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 6), nn.Linear(WIDTH, CLASSES))
    rule = ScanRule(network, length, **ScanRule.suggested(length))
    step = rule(network, torch.randn(BATCH, length, INPUTS), torch.zeros(BATCH, dtype=torch.long))
    assert step.span <= most


class TestBadInput:
    @pytest.fixture
    def network(self):
        return RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 3), nn.Linear(WIDTH, CLASSES))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"chunk": 0}, "at least 1"),
            ({"sweeps": 0}, "at least 1"),
            ({"credit_sweeps": -1}, "at least 0"),
            ({"guess": "mean"}, "zero or tree"),
            ({"radix": 1}, "at least 2"),
        ],
    )
    def test_options(self, network, options, message):
        with pytest.raises(ValueError, match=message):
            ScanRule(network, 8, **options)

    def test_shapes(self, network):
        rule, y = ScanRule(network, 8), torch.zeros(BATCH, dtype=torch.long)
        with pytest.raises(ValueError, match="sequences of 8 chunks; got 7"):
            rule(network, torch.zeros(BATCH, 7, INPUTS), y)
        with pytest.raises(ValueError, match="need labels"):
            rule(network, torch.zeros(BATCH, 8, INPUTS), y[:2])
        with pytest.raises(ValueError, match="not a number"):
            rule(network, torch.full((BATCH, 8, INPUTS), torch.nan), y)
        with pytest.raises(ValueError, match="at least 2 chunks"):
            PaperRule()(network, torch.zeros(BATCH, 1, INPUTS), y)
        with pytest.raises(ValueError, match="positive"):
            PaperRule(variance=0)
        with pytest.raises(ValueError, match="equal length"):
            FusedBackpropagation(network)(network, torch.zeros(BATCH, 8, INPUTS), y, torch.tensor([1, 2, 3, 4]))
