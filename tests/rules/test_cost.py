"""Work and span of rules. Oracle: the tensor operations that really run, each with the depth of what it depends on."""

from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.meter import batch, countable, measure

from hbll import make_rule
from hbll.losses import cross_entropy
from hbll.rules.chain import ChainStates
from hbll.rules.composed import Composed
from hbll.rules.scan import ScanCredit
from hbll.rules.stream import ReadoutCredit
from hbll.rules.tree import ArcCredit, TreeStates

every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])

CHOICES = [
    ("scan", {"guess": "mean", "sweeps": 2, "credit_sweeps": 2, "coarse": "none"}),
    ("scan", {"guess": "tree", "sweeps": 2, "credit_sweeps": 1}),
    ("scan", {"guess": "star", "sweeps": 1, "credit_sweeps": 2}),
    ("scan", {"sweeps": 2, "credit_sweeps": 1}),
    ("scan", {"sweeps": 1, "credit_sweeps": 0}),
    ("scan", {"sweeps": 2, "credit_sweeps": 1, "leak": 0.2, "consistency": 0.1}),
    ("scan", {"guess": "mean", "sweeps": 1, "credit_sweeps": 3, "consistency": 0.1}),
    *(("stream", {"spine": spine}) for spine in ("doubling", "last", "right")),
    ("stream", {"readout": "head"}),
    ("stream", {"spine": "last", "readout_depth": 2, "copies": True}),
    *(("stream", {"spine": spine, "states": "chain"}) for spine in ("doubling", "last")),
    ("greedy", {}),
    ("greedy", {"states": "chain"}),
    ("pipeline", {}),
    ("tree", {"rim": 0.3}),
    ("scan", {"rim": 0.3, "guess": "mean"}),
]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    boundary=st.sampled_from(["posterior", "prior"]),
    scope=st.sampled_from(["block", "triplet", "tree"]),
)
def test_trees_of_any_stages(sizes, boundary, scope):
    # A node waits for its own parents alone, whatever the others of its level are waiting for.
    rule = make_rule("paper", countable(sum(sizes) + 1), stage=sizes, boundary=boundary, scope=scope, engine="loop")
    counted, measured = measure(rule)
    assert counted == measured


@pytest.mark.parametrize("scope", ["block", "triplet", "tree"])
@pytest.mark.parametrize("boundary", ["posterior", "prior"])
@pytest.mark.parametrize(("nodes", "stage"), [(3, 1), (11, 1), (12, 3)])
def test_trees_by_stacked_calls(nodes, stage, boundary, scope):
    rule = make_rule("paper", countable(nodes), boundary=boundary, scope=scope, stage=stage, engine="auto")
    counted, measured = measure(rule)
    assert counted == measured


@every_engine
@pytest.mark.parametrize("inversion", ["none", "exact"])
@pytest.mark.parametrize("boundary", ["posterior", "prior"])
def test_other_inversions(boundary, inversion, engine):
    options = {"boundary": boundary, "inversion": inversion, "iterations": 2, "engine": engine}
    counted, measured = measure(make_rule("paper", countable(8), **options))
    if inversion == "none":
        assert counted[0] == measured[0]
        # The state's gradient is computed whether or not a target needs it; what nothing waits for may be shorter.
        assert counted[1] >= measured[1]
    else:
        assert counted == measured


@pytest.mark.parametrize(("engine", "stage"), [("loop", (1, 3, 2, 1, 2)), ("batched", 3)])
@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_every_choice_of_states_and_credit(name, options, engine, stage):
    # Enough steps to fill whatever is in flight.
    counted, measured = measure(make_rule(name, countable(10), stage=stage, engine=engine, **options), steps=9)
    assert counted == measured


@pytest.mark.parametrize(
    ("states", "credit"),
    [
        (ChainStates, lambda: ArcCredit(cross_entropy, "triplet")),
        (ChainStates, lambda: ScanCredit(cross_entropy, 2, None, 1.0)),
        (lambda: ChainStates(carry_gradient=True), lambda: ReadoutCredit(cross_entropy, "last")),
        (lambda: TreeStates("prior", False), lambda: ReadoutCredit(cross_entropy, "right")),
        (lambda: TreeStates("prior", False), lambda: ScanCredit(cross_entropy, 1, None, 1.0)),
    ],
)
def test_combinations_that_have_no_name(states, credit):
    for stage in ((1, 3, 2, 1, 2), 1):
        counted, measured = measure(Composed(countable(10), states(), credit(), stage=stage))
        assert counted == measured


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["stream", "pipeline"])
def test_while_a_pipeline_fills(name, steps):
    rule = make_rule(name, countable(10), stage=2)
    for _ in range(9):  # everything is recorded now
        rule(*batch())
    full = measure(rule)[0]
    rule.reset()
    counted, measured = measure(rule, steps)
    assert counted == measured
    assert counted[0] < full[0]


@every_engine
@pytest.mark.parametrize("frozen", ["embed", "head", "blocks.1"])
@pytest.mark.parametrize("name", ["paper", "tree", "scan", "stream"])
def test_frozen_parts(name, frozen, engine):
    network = countable(8)
    network.get_submodule(frozen).requires_grad_(False)
    # Stacked with others, a frozen block's products are made all the same.
    (work, span), (really, longest) = measure(
        make_rule(name, network, engine=engine), steps=7 if name == "stream" else 1
    )
    if engine == "loop" and frozen == "blocks.1" and name in ("scan", "stream"):
        assert (work >= really, span >= longest) == (True, True)  # all products are counted
    else:
        assert (work, span) == (really, longest)


@pytest.mark.parametrize("depth", range(2, 7))
def test_formulas_of_the_specification(depth):
    nodes = 2**depth
    network, (x, y) = countable(nodes), batch()
    spans = {"paper": 3 * depth - 1, "tree": depth + 3}
    for name, span in spans.items():
        level_by_level = make_rule(name, network, engine="batched")(x, y)
        node_by_node = make_rule(name, network, engine="loop")(x, y)
        assert level_by_level.span == span
        # The rim's arcs end in the head, which costs nothing: only a level that is waited for has the formula's span.
        assert node_by_node.span == span - 1
        backpropagation = 3 * (nodes - 1)
        assert 1.0 < node_by_node.work / backpropagation <= 2.0
        assert 1.0 < level_by_level.work / backpropagation <= 2.0


@every_engine
@pytest.mark.parametrize("name", ["paper", "tree"])
def test_span_grows_with_the_logarithm_for_any_number_of_nodes(name, engine):
    for nodes in (3, 5, 6, 7, 13, 60):
        depth = ceil(log2(nodes))
        bound = 3 * depth - 1 if name == "paper" else depth + 3
        step = make_rule(name, countable(nodes), engine=engine)(*batch())
        assert depth < step.span <= bound
        assert step.work <= 2 * 3 * (nodes - 1)


def test_work_by_hand():
    # N = 4, block scope, node by node. Forward: 3 priors and the arc 1 -> 2. Its backward: input and parameters.
    # KL: parameters of 3 blocks, and the input of those that read the embed, blocks 1 and 2.
    counted, measured = measure(make_rule("paper", countable(4), engine="loop"))
    assert counted[0] == measured[0] == 3 + 1 + 2 + 3 + 2


@every_engine
@pytest.mark.parametrize(("stage", "span", "work"), [(1, 10, 4.0), (3, 12, 1.5), (5, 14, 1.2)])
def test_stream_of_the_specification(stage, span, work, engine):
    rule = make_rule("stream", countable(16), stage=stage, engine=engine)
    for _ in range(16):
        step = rule(*batch())
    assert step.span == span
    # The table takes three evaluations for every stage; the gradient in an input that is a leaf is not needed.
    assert step.work / 45 == pytest.approx(work, rel=0.1)
    assert step.work / 45 < work + 0.05


@pytest.mark.parametrize(
    ("options", "span", "work"),
    [
        ({"stage": 1, "sweeps": 4, "credit_sweeps": 2, "guess": "mean"}, 7, 2.3),
        ({"stage": 3, "sweeps": 2, "credit_sweeps": 1, "guess": "mean"}, 12, 1.7),
        ({"stage": 5, "sweeps": 2, "credit_sweeps": 1, "guess": "mean"}, 20, 1.7),
        ({"stage": 3, "sweeps": 3, "credit_sweeps": 2, "guess": "tree"}, 21, 2.7),
    ],
)
def test_scan_of_the_specification(options, span, work):
    step = make_rule("scan", countable(16), **options)(*batch())
    assert step.span == span
    assert step.work / 45 == pytest.approx(work, rel=0.12)
    assert step.work / 45 < work + 0.05


@settings(max_examples=15)
@given(
    count=st.integers(2, 12),
    size=st.integers(1, 4),
    sweeps=st.integers(1, 4),
    credit_sweeps=st.integers(0, 3),
    guess=st.sampled_from(["mean", "tree", "star"]),
)
def test_formula_of_scan(count, size, sweeps, credit_sweeps, guess):
    options = {"stage": size, "sweeps": sweeps, "credit_sweeps": credit_sweeps, "guess": guess}
    step = make_rule("scan", countable(count + 1), engine="loop", **options)(*batch())
    stages = -(-count // size)
    levels = {"mean": 0, "star": 1, "tree": stages.bit_length()}[guess]  # ceil(log2(stages + 1)) of the tree
    assert step.span == min(size, count) * (sweeps + credit_sweeps + 1) + levels
    # The update takes a product for every block's parameters, and one for every state inside of a stage.
    update = 2 * count - stages
    assert step.work == (sweeps + credit_sweeps) * count + update + (0 if guess == "mean" else 2 * stages)


@pytest.mark.parametrize(
    ("sizes", "jumps", "span"),
    [((2, 2, 3), "last", 6), ((2, 3, 2), "right", 6), ((3, 3, 1), "doubling", 10), ((1, 2, 4), "doubling", 8)],
)
def test_short_stages_with_long_spines_cost_no_span(sizes, jumps, span):
    counted, measured = measure(make_rule("stream", countable(8), stage=sizes, spine=jumps), steps=3)
    assert counted == measured
    assert counted[1] == span


@pytest.mark.parametrize("name", ["paper", "tree", "greedy", "bp", "dgl"])
def test_both_ways_to_take_a_step_cost_the_same(name):
    rule, (x, y) = make_rule(name, countable(8)), batch()
    rule(x, y)
    rule.reset()
    one = rule(x, y)
    rule.reset()
    other = rule.backward(x, y)
    assert (one.work, one.span) == (other.work, other.span)
