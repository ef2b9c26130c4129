"""Readouts of stages. Oracles: autograd through modules put together by hand, and their optimizer steps in plain Python."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.networks import KINDS, assert_equal_gradients, batches, gradients, mlp
from tests.oracles.stream_step import jumps
from torch import nn

from hbll import Chain, Step, make_rule

STAGES = [[0, 1], [2], [3, 4, 5], [6]]
SIZES = tuple(map(len, STAGES))


def cross_entropy(logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def passed(n, way, depth):
    """The numbers, from 0, of the blocks that stage n passes."""
    if way is None:
        return []
    return [block for jump in jumps(n, len(STAGES), way) for block in STAGES[jump - 1][-depth:]]


class ByHand:
    """Stages in order, each with a readout of its own that is written out: blocks, a head, and what the last step left.

    Args:
        ways: numbers of blocks that each stage's readout copies; of SOLO the network's first two.
        solo: whether the head's linear layer is the network's own of the last refresh, times a temperature.
    """

    def __init__(self, net, ways, solo=False):
        self.net, self.ways, self.solo = net, ways, solo
        self.blocks = [nn.ModuleList(copy.deepcopy(net.blocks[b]) for b in way) for way in ways]
        self.heads = [copy.deepcopy(net.head) for _ in ways]
        self.taus = [nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in ways]

    def parameters(self):
        own = [p for blocks in self.blocks for p in blocks.parameters()]
        heads = [] if self.solo else [p for head in self.heads for p in head.parameters()]
        return [*self.net.parameters(), *own, *heads, *(self.taus if self.solo else [])]

    def loss(self, x, y):
        state, total = self.net.embed(x), 0.0
        for n, stage in enumerate(STAGES, 1):
            for block in stage:
                state = self.net.blocks[block](state)
            read = state
            if n == len(STAGES):
                logits = self.net.head(read)
            else:
                for block in self.blocks[n - 1]:
                    read = block(read)
                logits = self.heads[n - 1](read)
                logits = self.taus[n - 1] * logits if self.solo else logits
            total = total + cross_entropy(logits, y)
            state = state.detach()
        return total

    @torch.no_grad()
    def meet(self, how):
        """Each copy and its original become their mean, or the copies the original."""
        for b, block in enumerate(self.net.blocks):
            same = [self.blocks[i][way.index(b)] for i, way in enumerate(self.ways) if b in way and not self.solo]
            self._meet([*same, block], how)
        self._meet([*self.heads, self.net.head], how)

    @staticmethod
    def _meet(modules, how):
        for values in zip(*(module.parameters() for module in modules), strict=True):
            value = torch.stack([v.detach() for v in values]).mean(0) if how == "mean" else values[-1].clone()
            for one in values:
                one.copy_(value)


def descend(rule, hand, steps, kind="mlp", refresh=None, how="mean"):
    """Steps of both by plain gradient descent, held to each other in loss and weights."""
    moved = [torch.optim.SGD(rule.parameters(), lr=0.1), torch.optim.SGD(hand.parameters(), lr=0.1)]
    for number, (x, y) in enumerate(batches(steps, kind)):
        if refresh and number and number % refresh == 0:
            hand.meet(how)
        losses = rule(x, y).loss, hand.loss(x, y)
        torch.testing.assert_close(*(loss.detach() for loss in losses), rtol=1e-11, atol=1e-11)
        for optimizer, loss in zip(moved, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for p, q in zip(rule.network.parameters(), hand.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize(
    ("kind", "way", "depth", "refresh", "how"),
    [
        ("mlp", "doubling", None, None, "mean"),
        ("mlp", "doubling", 2, 1, "mean"),
        ("mlp", "last", 2, 3, "original"),
        ("mlp", "right", 3, 2, "mean"),
        ("mlp", None, None, 2, "mean"),
        ("transformer", "last", 1, 1, "original"),
        ("convolutional", "doubling", 2, 2, "mean"),
    ],
)
def test_copies_learn_by_their_own_stage_and_meet_the_originals(kind, way, depth, refresh, how, engine):
    net, _, _ = KINDS[kind][0](8)
    hand = ByHand(copy.deepcopy(net), [passed(n, way, depth or 1) for n in (1, 2, 3)])
    passing = {"spine": way, "readout_depth": depth} if way else {"readout": "head"}
    rule = make_rule(
        "stream",
        net,
        stage=SIZES,
        states="chain",
        copies=True,
        refresh=refresh,
        engine=engine,
        **({"meet": how} if how != "mean" else {}),
        **passing,
    )
    descend(rule, hand, 5, kind, refresh, how)
    for readout, blocks, head in zip(rule.credit.own, hand.blocks, hand.heads, strict=True):
        for p, q in zip(readout.parameters(), [*blocks.parameters(), *head.parameters()], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "depth", "refresh"), [("mlp", None, 1), ("mlp", 3, 2), ("transformer", 1, 3)])
def test_solo_reads_the_head_of_some_steps_before(kind, depth, refresh):
    net, _, _ = KINDS[kind][0](8)
    if kind == "mlp":
        net.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)).double()
    hand = Solo(copy.deepcopy(net), [list(range(depth or 2))] * 3)
    options = {} if depth is None else {"readout_depth": depth}
    rule = make_rule("solo", net, stage=SIZES, states="chain", refresh=refresh, **options)
    descend(rule, hand, 7, kind, refresh)
    for readout, tau in zip(rule.credit.own, hand.taus, strict=True):
        torch.testing.assert_close(readout.head.temperature, tau, rtol=1e-9, atol=1e-11)
        assert tau != 1


class Solo(ByHand):
    """Blocks and norm of the stage's own, the linear layer read only."""

    def __init__(self, net, ways):
        super().__init__(net, ways, solo=True)
        for head in self.heads:
            self.linear(head).requires_grad_(False)

    @staticmethod
    def linear(head):
        return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]

    def parameters(self):
        norms = [p for head in self.heads for p in head.parameters() if p.requires_grad]
        return [*super().parameters(), *norms]

    def meet(self, how):
        for head in self.heads:
            self.linear(head).load_state_dict(self.linear(self.net.head).state_dict())


@pytest.mark.parametrize("readout_depth", [1, 2])
def test_two_shared_blocks_are_passed_and_trained(readout_depth):
    net, x, y = mlp(8)
    rule = make_rule("stream", net, stage=SIZES, states="chain", spine="last", readout_depth=readout_depth)
    state, total = net.embed(x), 0.0
    for n, stage in enumerate(STAGES, 1):
        for block in stage:
            state = net.blocks[block](state)
        read = state
        for block in [] if n == 4 else passed(n, "last", readout_depth):
            read = net.blocks[block](read)
        total = total + cross_entropy(net.head(read), y)
        state = state.detach()
    step = rule(x, y)
    torch.testing.assert_close(step.loss.detach(), total.detach())
    assert_equal_gradients(gradients(rule, step.loss), gradients(net, total))


def test_with_copies_nothing_but_states_joins_stages():
    net, x, y = mlp(8)
    rule = make_rule("stream", net, stage=SIZES, states="chain", copies=True)
    for loss in rule.losses(x, y, step := Step()):
        if loss.stage == "embed":
            continue
        own = {id(p) for module in rule.own(loss.stage) for p in module.parameters()}
        found = torch.autograd.grad(loss.value, list(rule.parameters()), allow_unused=True, retain_graph=True)
        reached = {id(p) for p, g in zip(rule.parameters(), found, strict=True) if g is not None}
        assert reached <= own
        assert reached
    assert step.work > 0


def test_the_clock_goes_on_after_a_resume():
    net, _, _ = mlp(8)
    options = {"stage": SIZES, "copies": True, "refresh": 3}
    whole, half = (make_rule("stream", copy.deepcopy(net), **options) for _ in range(2))
    seen = batches(8)

    def take(rule, some):
        for x, y in some:
            rule.zero_grad()
            rule.backward(x, y)
            with torch.no_grad():
                for p in rule.parameters():
                    if p.grad is not None:
                        p.sub_(0.05 * p.grad)

    take(whole, seen)
    take(half, seen[:4])
    other = make_rule("stream", copy.deepcopy(net), **options)
    other.load_state_dict(half.state_dict())
    other.load_carry(half.carry())
    take(other, seen[4:])
    for p, q in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_without_learning_refreshes_nothing():
    net, x, y = mlp(8)
    rule = make_rule("stream", net, stage=SIZES, states="chain", copies=True, refresh=1)
    rule(x, y)
    with torch.no_grad():
        net.head.weight.add_(1.0)
    before = copy.deepcopy(rule.state_dict())
    rule.diagnose(x, y)
    with torch.no_grad():
        rule(x, y)
    rule.eval()
    rule(x, y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in rule.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("stream", {"readout": "head", "spine": "last"}, "spine is of readout='spine'; leave it out for 'head'"),
        ("stream", {"readout": "head", "readout_depth": 2}, "readout_depth is of readout='spine' or 'solo'"),
        ("stream", {"readout_depth": 0}, "readout_depth must be at least 1; got 0"),
        ("stream", {"copies": True, "refresh": 0}, "refresh must be at least 1; got 0"),
        ("stream", {"refresh": 4}, "refresh is of copies that meet their originals: give copies=True too"),
        ("stream", {"copies": True, "meet": "original"}, "meet says how copies are refreshed: give refresh too"),
        ("stream", {"copies": True, "refresh": 2, "meet": "never"}, "meet is one of mean, original; got 'never'"),
        ("solo", {"copies": True}, "solo's blocks are the stage's own: leave out copies and meet"),
        ("stream", {"readout": "solo"}, "solo reads the head as it was some steps before: give refresh=1 or more"),
    ],
)
def test_options_that_cannot_be(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule(name, mlp(8)[0], stage=SIZES, **options)


def test_solo_needs_a_linear_layer():
    net, _, _ = mlp(8)
    with pytest.raises(ValueError, match="reads the last linear layer of the head, which has none"):
        make_rule("solo", Chain(net.embed, net.blocks, nn.Softmax(-1)))


@pytest.mark.parametrize("head", [nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), nn.LazyLinear(3)])
def test_solo_needs_a_weight_that_can_be_read(head):
    net = Chain(nn.Linear(4, 5), [nn.Linear(5, 5) for _ in range(4)], head)
    with pytest.raises(
        ValueError, match="the head's last linear layer is lazy or parametrized: take 'spine' or 'head'"
    ):
        make_rule("solo", net, stage=2)


def test_what_has_no_weights_is_not_refreshed():
    net = Chain(nn.Linear(4, 3), [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU()], nn.Identity())
    rule = make_rule("stream", net, stage=2, readout_depth=2, copies=True, refresh=1, meet="original", states="chain")
    copy_ = rule.own_readouts[0].blocks[0]
    with torch.no_grad():
        copy_.weight.zero_()
    for _ in range(2):
        rule(torch.randn(6, 4), torch.arange(6) % 3)
    assert torch.equal(copy_.weight, net.blocks[2].weight)


def test_a_block_that_was_changed_no_longer_meets_its_copy():
    net, x, y = mlp(8)
    rule = make_rule("stream", net, stage=SIZES, states="chain", copies=True, refresh=1)
    rule(x, y)
    net.blocks[6] = nn.Sequential(net.blocks[6], nn.Linear(6, 6)).double()
    with pytest.raises(ValueError, match="a module has other parameters than its copies in readouts"):
        rule(x, y)
