"""Peak memory of a step. Oracle: plain autograd through one stage and its readout alone, measured in the same way.

By ``rule.backward`` a rule that evaluates its stages in order holds one stage, its readout and the head's logits once; the
others have bounds of their own, from what their definitions need at once. States are counted in pieces of one batch.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hbll import Chain, make_rule
from hbll.train.memory import peak_memory, step_memory

BATCH, WIDTH, HIDDEN, BLOCKS, CLASSES = 64, 32, 160, 8, 300
STATE = 4 * BATCH * WIDTH
CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual perceptron whose inside is larger than its state."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        self.out = nn.Linear(HIDDEN, WIDTH)

    def forward(self, state):
        return state + self.out(self.inside(state))


def made():
    torch.manual_seed(0)
    network = Chain(nn.Linear(WIDTH, WIDTH), [Block() for _ in range(BLOCKS)], nn.Linear(WIDTH, CLASSES))
    return network, torch.randn(BATCH, WIDTH), torch.arange(BATCH) % CLASSES


def alone(function, *modules):
    """The peak of evaluating a function of a state and walking it back, the gradients of all weights being there."""
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    state = torch.randn(BATCH, WIDTH)
    return peak_memory(lambda: function(state).backward(), CPU)


def through(network, blocks, head=None):
    """The peak of a pass through these blocks, by their numbers, and a head to the label's loss, and back."""
    way = nn.Sequential(*(network.blocks[n - 1] for n in blocks), head or network.head)
    labels = torch.arange(BATCH) % CLASSES
    return alone(lambda state: F.cross_entropy(way(state), labels, reduction="none").mean(), way)


def stages_of(size):
    return [list(range(a, min(a + size, BLOCKS + 1))) for a in range(1, BLOCKS + 1, size)]


def jumps(k, stages, kind):
    """The stages whose last blocks a spine passes: k + 1, k + 3, k + 7, .. and the last, by hand."""
    last = len(stages) - 1
    if kind == "none" or k == last:
        return []
    if kind == "last":
        return [last]
    return [*(j for j in (k + 2**i - 1 for i in range(1, 10)) if j < last), last]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["doubling", "last", "none"])
@pytest.mark.parametrize("states", ["chain", "stream"])
def test_stream_holds_one_stage_and_its_spine(states, kind, size):
    network, x, y = made()
    stages = stages_of(size)
    most = max(
        through(network, [*blocks, *(stages[j][-1] for j in jumps(k, stages, kind))]) for k, blocks in enumerate(stages)
    )
    passing = {"readout": "head"} if kind == "none" else {"spine": kind}
    rule = make_rule("stream", network, stage=size, states=states, engine="loop", **passing)
    kept = len(stages) if states == "stream" else 0  # what each stage leaves for the next step
    found = step_memory(rule, x, y)
    assert found <= most + (4 + kept) * STATE
    assert found > most / 2  # the tool sees what autograd holds


@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_holds_one_stage_and_a_head(size):
    network, x, y = made()
    rule = make_rule("greedy", network, stage=size, states="chain")
    most = max(through(network, blocks) for blocks in stages_of(size))
    assert step_memory(rule, x, y) <= most + 4 * STATE
    assert step_memory(rule, x, y) < 1.4 * size / BLOCKS * through(network, range(1, BLOCKS + 1)) + through(network, [])


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", ["dgl", "predsim", "cff"])
def test_local_rules_hold_one_stage_and_its_readout(name, size):
    network, x, y = made()
    rule = make_rule(name, network, x, stage=size)
    bare = max(alone(lambda s, stage=stage: stage(s).sum(), stage) for stage in rule.stages)
    # The last stage has the head for its readout, and some rules one of its own besides.
    own = range(1, len(rule.stages) + rule.apart)
    readouts = [peak_memory(lambda k=k: loss_of_readout(rule, k, y).backward(), CPU) for k in own]
    assert step_memory(rule, x, y) <= bare + max([*readouts, 0]) + through(network, []) + 4 * STATE


@pytest.mark.parametrize("size", [1, 4])
def test_bll_holds_one_stage_and_the_messages_of_all(size):
    network, x, y = made()
    rule = make_rule("bll", network, x, stage=size)
    bare = max(alone(lambda s, stage=stage: stage(s).sum(), stage) for stage in rule.stages)
    messages = 3 * len(rule.stages) * 4 * CLASSES * WIDTH  # of all classes: the message, its direction, their gradient
    scores = 5 * 4 * BATCH * CLASSES  # themselves, their softmax for the target and for the loss, and two gradients
    assert step_memory(rule, x, y) <= bare + max(scores, through(network, [])) + messages + 6 * STATE


def loss_of_readout(rule, k, y):
    return rule.local_loss(k, torch.randn(BATCH, WIDTH, requires_grad=True), y)


@pytest.mark.parametrize("size", [1, 4])
def test_forward_forward_holds_one_stage_on_two_batches(size):
    network, x, y = made()
    network.head, y = nn.Linear(WIDTH, 10), y % 10  # the label takes the place of some inputs
    rule = make_rule("ff", network, x, stage=size)
    both = torch.randn(2 * BATCH, WIDTH)
    bare = max(peak_memory(lambda stage=stage: stage(both).square().sum().backward(), CPU) for stage in rule.stages)
    assert step_memory(rule, x, y) <= bare + 16 * STATE


def test_feedback_alignment_holds_the_whole_network():
    # The error is known at the output, which all stages wait for.
    network, x, y = made()
    rule = make_rule("dfa", network, x)
    assert step_memory(rule, x, y) <= through(network, range(1, BLOCKS + 1)) + 3 * BLOCKS * STATE


@pytest.mark.parametrize("name", ["paper", "tree"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_tree_holds_a_node_and_its_right_neighbour(name, size):
    # The graph of one node's stage, an evaluation of its right neighbour's or of the head and the walk back through it; of
    # every node a boundary, a target and what they were made of.
    network, x, y = made()
    stage = max(alone(lambda s, s_=s_: nn.Sequential(*s_)(s).sum(), *s_) for s_ in blocks_of(network, size))
    right = max(stage, through(network, []))
    rule = make_rule(name, network, stage=size, engine="loop")
    assert step_memory(rule, x, y) <= stage + right + 4 * len(rule.stages) * STATE


def blocks_of(network, size):
    return [[network.blocks[n - 1] for n in blocks] for blocks in stages_of(size)]


@pytest.mark.parametrize("size", [1, 2])
def test_scan_holds_what_backpropagation_holds_and_a_few_states(size):
    network, x, y = made()
    rule = make_rule("scan", network, stage=size, engine="loop")
    whole = through(network, range(1, BLOCKS + 1))
    assert step_memory(rule, x, y) <= whole + 10 * (len(rule.stages) + 1) * STATE


@pytest.mark.parametrize("size", [1, 2])
def test_the_pipeline_holds_one_stage_beside_what_is_in_flight(size):
    network, x, y = made()
    stage = max(alone(lambda s, s_=s_: nn.Sequential(*s_)(s).sum(), *s_) for s_ in blocks_of(network, size))
    rule = make_rule("pipeline", network, stage=size, engine="loop")
    # Its gradients are taken at the stage's input and handed to the loss, which adds them to what is there.
    weights = 2 * 4 * sum(p.numel() for p in rule.stages[0].parameters())
    assert step_memory(rule, x, y) <= max(stage, through(network, [])) + weights + 6 * (len(rule.stages) + 1) * STATE


def test_backpropagation_holds_the_whole_network():
    network, x, y = made()
    whole = through(network, range(1, BLOCKS + 1))
    assert abs(step_memory(make_rule("bp", network), x, y) - whole) <= 4 * STATE


@pytest.mark.parametrize("delay", [1, 3])
def test_late_gradients_are_another_set_beside_those_that_wait(delay):
    network, x, y = made()
    whole = through(network, range(1, BLOCKS + 1))
    weights = 4 * sum(p.numel() for p in network.parameters())
    rule = make_rule("2bw", network, delay=delay)
    assert weights < step_memory(rule, x, y) <= whole + weights + 4 * STATE
    assert sum(g.nbytes for kept in rule.carry()["kept"]["late"] for g in kept.values()) == delay * weights


@pytest.mark.parametrize("name", ["greedy", "paper", "dgl"])
def test_forward_holds_the_gradients_besides(name):
    network, x, y = made()
    options = {"states": "chain"} if name == "greedy" else {}
    rule = make_rule(name, network, x, **options)
    weights = 4 * sum(p.numel() for p in rule.parameters() if p.requires_grad)
    backward, forward = (step_memory(rule, x, y, by) for by in ("backward", "forward"))
    # Those of all stages until loss.backward() has added them up, one by one, to what is there.
    assert backward < forward <= backward + 2 * weights
