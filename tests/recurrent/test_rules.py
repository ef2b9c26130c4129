"""Training rules against backpropagation through time, autograd and counting."""

import copy
import weakref
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from hbll.recurrent import (
    CELLS,
    GRU,
    RULES,
    Backpropagation,
    DepthCells,
    FusedBackpropagation,
    Newton,
    PaperRule,
    RecurrentNetwork,
    ScanRule,
    SharedCell,
    make_rule,
)
from hbll.recurrent.newton import solve
from hbll.rule import Step

INPUTS, WIDTH, CLASSES, BATCH = 2, 5, 3, 4  # those of `problem`

LENGTHS = torch.tensor([11, 3, 10, 1])


def chain_gradients(step, network):
    weights = [*network.cell.parameters(), *network.head.parameters()]
    return torch.autograd.grad(step.loss, weights, materialize_grads=True)


def assert_exact(rule, x, y, lengths=None):
    batch = x if lengths is None else (x, lengths)
    exact, found = Backpropagation(rule.network)(batch, y), rule(batch, y)
    torch.testing.assert_close(found.label_loss, exact.loss.detach())
    assert found.reports[x.shape[1]].error == found.label_loss
    expected = chain_gradients(exact, rule.network)
    torch.testing.assert_close(chain_gradients(found, rule.network), expected, rtol=1e-9, atol=1e-12)


class Leaky(GRU):
    """A cell with options of its own."""

    def __init__(self, inputs, width, leak):
        super().__init__(inputs, width)
        self.leak = leak


def test_the_cells_that_predict_are_made_as_the_networks_own():
    cells = DepthCells(partial(Leaky, leak=0.9), 2, 4, 3)
    rule = ScanRule(RecurrentNetwork(cells, nn.Linear(4, 3), length=8), 8, chunk=2, guess="tree")
    assert [cell.leak for cell in (*cells.cells, *rule.predictor.cells)] == 5 * [0.9]


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize(("lengths", "chunk"), [(None, 3), (None, 1), (None, 11), (LENGTHS, 4)])
@pytest.mark.parametrize(("guess", "shared"), [("zero", False), ("zero", True), ("tree", False)])
def test_scan_with_all_its_sweeps_is_backpropagation(problem, every_step, lengths, chunk, guess, shared):
    network, x, y = problem(11, every_step)
    chunks = -(-11 // chunk)
    options = {"chunk": chunk, "sweeps": chunks, "credit_sweeps": chunks - 1, "radix": 3}
    rule = ScanRule(network, 11, guess=guess, shared=shared, **options)
    for _ in range(2):  # without and with a coarse step: its slopes are those of the step before
        assert_exact(rule, x, y, lengths)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_the_embed_learns_as_by_backpropagation(problem, lengths):
    network, x, y = problem(11)
    network.embed = nn.Linear(INPUTS, INPUTS)
    batch = x if lengths is None else (x, lengths)
    gradients = []
    for rule in (
        Backpropagation(network),
        ScanRule(network, 11, chunk=4, sweeps=3, credit_sweeps=2),
        Newton(network, tolerance=1e-12),
    ):
        gradients.append(torch.autograd.grad(rule(batch, y).loss, list(network.embed.parameters())))
    torch.testing.assert_close(gradients[1:], [gradients[0]] * 2)


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
    rule(x, y)
    exact = chain_gradients(Backpropagation(network)(x, y), network)
    for found, expected in zip(chain_gradients(rule(x, y), network), exact, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-12


def test_the_defect_is_what_the_last_sweep_moved(problem):
    network, x, y = problem(6)
    rule = ScanRule(network, 6, chunk=2, sweeps=2)
    found = rule(x, y).defect
    # P is 0 in the first step: two Jacobi sweeps from zero starts.
    starts = network.cell.initial(BATCH).repeat(3, 1, 1)
    for _ in range(2):
        ends = torch.stack([network.unroll(x[:, 2 * m : 2 * m + 2], starts[m])[1] for m in range(3)])
        before, starts = starts, torch.cat([starts[:1], ends[:-1]])
    torch.testing.assert_close(found.double(), (starts - before).norm() / starts.norm(), rtol=1e-6, atol=0)


def test_sweeps_adapt_to_the_defect(problem):
    network, x, y = problem(8)
    rule = ScanRule(network, 8, chunk=1, sweeps=2, adapt=1e-3)

    def sweeps(step):
        return (
            step.work // 8 - 3
        )  # a step of the cell: the sweeps, a correction of the credit, the last pull, the weights

    steps = [rule(x, y) for _ in range(12)]
    for before, after in pairwise(steps):
        change = int(before.defect > 1e-3) - int(before.defect < 1e-3 / 3)
        assert sweeps(after) == min(max(sweeps(before) + change, 2), 8)
    assert max(map(sweeps, steps)) > 2
    again = ScanRule(network, 8, chunk=1, sweeps=2, adapt=1e-3)
    again.load_state_dict(rule.state_dict())
    assert again(x, y).work == rule(x, y).work


def test_the_predictor_tree_learns_the_states_and_nothing_else_does_from_it(problem):
    network, x, y = problem(8)
    rule = ScanRule(network, 8, chunk=2, sweeps=4, credit_sweeps=3, guess="tree")
    step = rule(x, y)
    with torch.no_grad():
        steps = x.transpose(0, 1).unflatten(0, (4, 2)).transpose(1, 2).flatten(2)  # chunks of 2 as one
        tree = {0: network.cell.initial(BATCH)}
        for n, left in ((2, 0), (1, 0), (3, 2)):
            tree[n] = rule.predictor(steps, [(left, n)], tree[left][None])[0]
        states = {m: network.unroll(x[:, : 2 * m])[1] for m in (1, 2, 3)}
    regression = sum((tree[m] - states[m]).square().sum(1).mean() for m in (1, 2, 3))
    torch.testing.assert_close(step.loss.detach(), step.label_loss + regression)


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_newton_is_backpropagation(problem, every_step, lengths):
    network, x, y = problem(11, every_step)
    assert_exact(Newton(network, tolerance=1e-12), x, y, lengths)


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
        assert_exact(FusedBackpropagation(network), x, y)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what graphs hold of tensors: all in all, and the most of it at a time."""

    def __init__(self):
        self.total = self.now = self.peak = 0
        super().__init__(self._pack, lambda saved: next(iter(saved)))

    def _pack(self, tensor):
        saved = {tensor}
        self.total += tensor.nbytes
        self._add(tensor.nbytes)
        weakref.finalize(saved, self._add, -tensor.nbytes)
        return saved

    def _add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)


class TestPaper:
    def test_two_chunks_by_hand(self, problem):
        network, x, y = problem(2)
        network.embed = nn.Linear(INPUTS, INPUTS)
        cell, head = network.cell, network.head
        step = PaperRule(network, sweeps=1, variance=2.0, label_variance=0.5, step=0.25)(x, y)
        x = network.embed(x)
        prior = cell(x[:, 0], cell.initial(BATCH))
        at_node = prior.detach().requires_grad_()
        errors = nn.functional.cross_entropy(head(cell.hidden(cell(x[:, 1], at_node))), y, reduction="none") / 0.5
        (gradient,) = torch.autograd.grad(errors.sum(), at_node, retain_graph=True)
        target = prior.detach() - 0.25 * 2.0 * gradient
        distance = (prior - target).square().sum(1).mean()
        # The one consistency sweep starts from the initial state, and its first step is the prior once more.
        expected = errors.mean() + distance / 4 + distance
        torch.testing.assert_close(step.loss, expected)
        assert step.reports[1].error == pytest.approx(errors.mean().item())
        torch.testing.assert_close(step.label_loss, errors.mean().detach() / 2)
        weights = list(network.parameters())
        found, expected = (torch.autograd.grad(loss, weights) for loss in (step.loss, expected))
        torch.testing.assert_close(found, expected)

    def test_inner_nodes_look_at_their_right_parent(self, problem):
        network, x, y = problem(4)
        cells, cell = network.cells.cells, network.cell
        step = PaperRule(network, sweeps=0)(x, y)

        def at_label(node):
            end = cells[1](x[:, 2:].flatten(1), node)
            return nn.functional.cross_entropy(network.head(cell.hidden(end)), y, reduction="none")

        prior2 = cells[1](x[:, :2].flatten(1), cell.initial(BATCH)).detach().requires_grad_()
        target2 = (prior2 - 0.5 * torch.autograd.grad(at_label(prior2).sum(), prior2)[0]).detach()
        prior1 = cell(x[:, 0], cell.initial(BATCH)).detach()
        error1 = (cell(x[:, 1], prior1) - target2).square().sum(1).mean() / 2
        prior3 = cell(x[:, 2], target2)
        error3 = nn.functional.cross_entropy(network.head(cell.hidden(cell(x[:, 3], prior3))), y)
        assert step.reports[1].error == pytest.approx(error1.item())
        assert step.reports[3].error == pytest.approx(error3.item())

    @pytest.mark.parametrize("every_step", [False, True])
    @pytest.mark.parametrize("length", [2, 7, 8])
    def test_every_weight_of_the_network_learns(self, problem, length, every_step):
        network, x, y = problem(length, every_step)
        PaperRule(network, sweeps=4)(x, y).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())

    @pytest.mark.parametrize(("sweeps", "arcs"), [(0, 30), (4, 45)])
    def test_no_two_graphs_are_held_at_a_time(self, cell_name, sweeps, arcs):
        network = RecurrentNetwork(SharedCell(CELLS[cell_name], INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES))
        saved = SavedBytes()
        with saved:
            PaperRule(network, sweeps=sweeps).backward(
                torch.randn(BATCH, 16, INPUTS), torch.zeros(BATCH, dtype=torch.long)
            )
        # Every arc is held as much for: 2 of each of 15 nodes, 16 of them in the last level, and 15 of the last sweep.
        assert saved.peak <= 16 / arcs * saved.total

    def test_padding_changes_nothing(self, problem):
        network, x, y = problem(8)
        lengths = torch.tensor([8, 4, 4, 8])
        other = x.clone()
        other[lengths == 4, :4] = 99.0
        first, second = (PaperRule(network)((each, lengths), y).loss for each in (x, other))
        torch.testing.assert_close(first, second)

    def test_a_shared_cell(self, cell_name, problem):
        network, x, y = problem(8)
        shared = RecurrentNetwork(SharedCell(type(network.cell), INPUTS, WIDTH), network.head)
        PaperRule(shared)(x, y).loss.backward()
        assert all(p.grad is not None for p in shared.parameters())


def test_a_level_costs_one_call_of_its_cell():
    network = RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 6), nn.Linear(WIDTH, CLASSES))
    calls = []
    for depth, cell in enumerate(network.cells.cells):
        cell.register_forward_hook(lambda *_, depth=depth: calls.append(depth))
    PaperRule(network, sweeps=0)(torch.randn(BATCH, 64, INPUTS), torch.zeros(BATCH, dtype=torch.long))
    assert calls == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]  # the arcs to the nodes of a level, and those from them


def test_costs_are_the_specifications():
    network = RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 6), nn.Linear(WIDTH, CLASSES))
    x, y = torch.randn(BATCH, 64, INPUTS), torch.zeros(BATCH, dtype=torch.long)
    step = Backpropagation(network)(x, y)
    assert (step.work, step.span) == (3 * 64, 2 * 64)
    step = ScanRule(network, 64, chunk=4, sweeps=3, credit_sweeps=1)(x, y)
    # G (K + Kc + 1) evaluations, and K - 1 + 1 + Kc scans of log2 16 levels.
    assert (step.work, step.span) == (6 * 64, 4 * 5 + 4 * 4)
    step = ScanRule(network, 64, chunk=4, sweeps=3, credit_sweeps=1, guess="tree")(x, y)
    assert (step.work, step.span) == (6 * 64 + 2 * 15, 4 * 5 + 4 * 4 + 4)
    for radix, levels in {4: 2, 16: 1}.items():
        step = ScanRule(network, 64, chunk=4, sweeps=3, credit_sweeps=1, radix=radix)(x, y)
        assert (step.work, step.span) == (6 * 64, 4 * 5 + 4 * levels)


@pytest.mark.parametrize(("length", "most"), [(64, 2 * 64 / 3), (256, 2 * 256 / 7)])
def test_what_is_suggested_is_shorter_than_backpropagation(length, most):
    network = RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 6), nn.Linear(WIDTH, CLASSES))
    rule = ScanRule(network, length, **ScanRule.suggested(length))
    step = rule(torch.randn(BATCH, length, INPUTS), torch.zeros(BATCH, dtype=torch.long))
    assert step.span <= most


RULES_AND_CELLS = [(name, cell) for name in RULES for cell in CELLS if (name, cell) != ("bptt-fused", "elman")]


@pytest.fixture(params=RULES_AND_CELLS, ids="-".join)
def rule(request):
    """Each rule, for sequences of 8 chunks, with an embed that learns."""
    name, cell = request.param
    cells, embed = DepthCells(CELLS[cell], INPUTS, WIDTH, 3), nn.Linear(INPUTS, INPUTS)
    return make_rule(name, RecurrentNetwork(cells, nn.Linear(WIDTH, CLASSES), embed=embed, length=8))


class TestEveryRule:
    """What holds for each rule of the table."""

    x = torch.randn(BATCH, 8, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 2, 1, 1])

    def test_backward_is_forward(self, rule):
        rule.eval()  # which keeps nothing, so that both take the same step
        padded = (self.x, torch.tensor([8, 1, 3, 5]))
        parameters = list(rule.parameters())
        for batch in [self.x] if isinstance(rule, FusedBackpropagation) else [self.x, padded]:
            step = rule(batch, self.y)
            expected = torch.autograd.grad(step.loss, parameters, materialize_grads=True)
            rule.zero_grad()
            again = rule.backward(batch, self.y)
            assert again.loss.equal(step.loss.detach())
            torch.testing.assert_close(
                [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters], list(expected)
            )

    def test_a_step_that_is_looked_at_has_the_same_gradients(self, rule):
        rule.eval()
        parameters = list(rule.parameters())
        expected = torch.autograd.grad(rule(self.x, self.y).loss, parameters, materialize_grads=True)
        values = [loss.value for loss in rule.losses(self.x, self.y, Step(look=True))]
        found = torch.autograd.grad(torch.stack(values).sum(), parameters, materialize_grads=True)
        torch.testing.assert_close(found, expected)

    def test_its_one_stage_owns_every_parameter_once(self, rule):
        owned = [p for module in rule.own(1) for p in module.parameters()]
        assert len(rule.stages) == 1
        assert len(owned) == len(set(owned))
        assert set(owned) == set(rule.parameters())
        assert list(rule.parts) == ["the embed", "the cells", "the head"]

    def test_a_look_leaves_nothing_behind(self, rule):
        rule.backward(self.x, self.y)
        rule.zero_grad()
        kept = {name: tensor.clone() for name, tensor in rule.state_dict().items()}
        reports = rule.diagnose(self.x, self.y)
        with torch.no_grad():
            loss = rule(self.x, self.y).loss
        assert rule.training
        assert not loss.requires_grad
        assert all(p.grad is None for p in rule.parameters())
        assert all(tensor.equal(kept[name]) for name, tensor in rule.state_dict().items())
        assert reports == rule(self.x, self.y).reports
        assert all(report.error >= 0 for report in reports.values())

    def test_a_step_that_fails_leaves_everything_as_it_was(self, rule):
        kept = {name: tensor.clone() for name, tensor in rule.state_dict().items()}
        with pytest.raises(ValueError, match=r"classes 0\.\.2"):
            rule.backward(self.x, self.y + 1)
        assert all(tensor.equal(kept[name]) for name, tensor in rule.state_dict().items())

    def test_frozen_parts_get_no_gradient(self, rule):
        for frozen in (rule.network.embed, rule.network.head):
            frozen.requires_grad_(False)
        rule.backward(self.x, self.y)
        assert all((p.grad is not None) == p.requires_grad for p in rule.network.cell.parameters())
        assert all(p.grad is None for p in [*rule.network.embed.parameters(), *rule.network.head.parameters()])

    def test_copies_and_states_take_the_same_step(self, rule):
        rule.backward(self.x, self.y)
        again = copy.deepcopy(rule)
        again.load_state_dict(rule.state_dict())
        assert again(self.x, self.y).loss.equal(rule(self.x, self.y).loss)


class TestBadInput:
    @pytest.fixture
    def network(self):
        return RecurrentNetwork(DepthCells(GRU, INPUTS, WIDTH, 3), nn.Linear(WIDTH, CLASSES))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"chunk": 0}, "at least 1"),
            ({"sweeps": 0}, "at least 1"),
            ({"credit_sweeps": -1}, "not be negative"),
            ({"guess": "mean"}, "one of zero, tree"),
            ({"radix": 1}, "at least 2"),
            ({"adapt": 0.0}, "positive"),
        ],
    )
    def test_options(self, network, options, message):
        with pytest.raises(ValueError, match=message):
            ScanRule(network, 8, **options)

    def test_other_rules_options(self, network):
        for kind, options in ((PaperRule, {"variance": 0}), (PaperRule, {"sweeps": 1.5}), (Newton, {"iterations": 0})):
            with pytest.raises(ValueError, match=next(iter(options))):
                kind(network, **options)

    def test_names(self, network):
        with pytest.raises(ValueError, match="unknown rule for recurrent networks 'bp'; did you mean bptt"):
            make_rule("bp", network)
        with pytest.raises(ValueError, match="unknown option of hbll 'chunks'; did you mean chunk"):
            make_rule("hbll", network, chunks=3)
        with pytest.raises(ValueError, match="give length="):
            make_rule("hbll", network)

    @pytest.mark.parametrize("name", RULES)
    def test_networks(self, name):
        with pytest.raises(ValueError, match="RecurrentNetwork, not a Linear"):
            make_rule(name, nn.Linear(2, 3), 8)

    def test_a_loss_with_parameters(self, network):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, logits, y):
                return self.scale * nn.functional.cross_entropy(logits, y, reduction="none")

        rule = Backpropagation(network, loss=Scaled())
        rule.backward(torch.randn(BATCH, 8, INPUTS), torch.zeros(BATCH, dtype=torch.long))
        assert rule.loss.scale.grad is not None
        for kind in (Newton, PaperRule):
            with pytest.raises(ValueError, match="does not train"):
                kind(network, loss=Scaled())

    def test_shapes(self, network):
        rule, x, y = ScanRule(network, 8), torch.zeros(BATCH, 8, INPUTS), torch.zeros(BATCH, dtype=torch.long)
        with pytest.raises(ValueError, match="sequences of 8 chunks; got 7"):
            rule(x[:, :7], y)
        with pytest.raises(ValueError, match=r"4 sequences of 8 chunks need labels \(4,\); got \(2,\)"):
            rule(x, y[:2])
        with pytest.raises(ValueError, match="not a number"):
            rule(x.fill_(torch.nan), y)
        with pytest.raises(ValueError, match="at least 2 chunks"):
            PaperRule(network)(torch.zeros(BATCH, 1, INPUTS), y)
        with pytest.raises(ValueError, match="equal length"):
            FusedBackpropagation(network)((torch.zeros(BATCH, 8, INPUTS), torch.tensor([1, 2, 3, 4])), y)
