"""Oracles: closed forms of the schedules, the counted work and span of the rules, all cuts of a few blocks."""

import math
from itertools import combinations, pairwise

import pytest
from tests import networks
from tests.launching import launched

import hbll
from hbll.distributed.cost import (
    Costs,
    Line,
    Part,
    balanced,
    by_backpropagation,
    by_data,
    by_late_pipeline,
    by_local_stages,
    by_pipeline,
    by_tree,
    by_zero_bubble,
    equal,
    estimate,
    sent,
    step_seconds,
)
from hbll.distributed.simulate import Network
from hbll.rules.readouts import spine
from hbll.tree import Tree

FREE = Network()


def share(priced, blocks, batch):
    """Seconds of a step in units of one device's."""
    return step_seconds(priced, FREE) / (3 * blocks * batch)


def compositions(total, parts):
    for inner in combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in pairwise((0, *inner, total)))


@pytest.mark.parametrize(("devices", "micros"), [(2, 1), (2, 2), (2, 4), (2, 8), (4, 4), (4, 8), (4, 16), (4, 2)])
def test_a_flushed_pipeline_is_idle_while_it_fills_and_empties(devices, micros):
    expected = (micros + devices - 1) / (micros * devices)
    assert share(by_pipeline(equal(8), 16, devices, micros), 8, 16) == pytest.approx(expected)


@pytest.mark.parametrize(("devices", "micros"), [(2, 4), (2, 8), (4, 8), (4, 16)])
def test_zbv_is_idle_for_one_operation_of_each_other_device(devices, micros):
    """A device has 6 m operations of 1 / (6 p m)."""
    alone = estimate(by_zero_bubble(equal(8), 16, devices, micros), FREE).alone / (3 * 8 * 16)
    assert alone == pytest.approx(1 / devices + (devices - 1) / (6 * devices * micros))


def test_zbv_with_few_micro_batches():
    assert estimate(by_zero_bubble(equal(8), 16, 4, 4), FREE).alone / (3 * 8 * 16) == pytest.approx(0.3125)


@pytest.mark.parametrize(("devices", "micros"), [(2, 2), (2, 8), (4, 4), (4, 16)])
def test_two_versions_of_the_weights_leave_nobody_idle(devices, micros):
    assert share(by_late_pipeline(equal(8), 16, devices, micros), 8, 16) == pytest.approx(1 / devices)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_data_parallel_divides_the_batch(devices):
    assert share(by_data(equal(8), 16, devices, FREE), 8, 16) == pytest.approx(1 / devices)


@pytest.mark.parametrize(
    ("blocks", "devices", "expected"), [(7, 2, 4 / 7), (15, 2, 8 / 15), (15, 4, 1 / 3), (63, 4, 17 / 63)]
)
def test_stages_take_turns_with_nobody_but_carry_their_spines(blocks, devices, expected):
    priced = by_local_stages(equal(blocks), 1, devices)
    assert share(priced, blocks, 1) == pytest.approx(expected)
    tree, sizes = Tree(devices + 1), priced.sizes
    longest = max(
        3 * (size + len(spine(s, tree, "doubling"))) - (s > 1)  # no gradient for the input of a later stage
        for s, size in enumerate(sizes, 1)
    )
    assert step_seconds(priced, FREE) == pytest.approx(longest)


@pytest.mark.parametrize(("blocks", "devices"), [(8, 2), (8, 4)])
def test_heads_alone_leave_every_device_its_share(blocks, devices):
    assert share(by_local_stages(equal(blocks), 1, devices, "head"), blocks, 1) == pytest.approx(1 / devices)


@pytest.mark.parametrize("blocks", [3, 7, 10])
@pytest.mark.parametrize(
    ("name", "options", "build"),
    [
        ("stream", {"copies": True}, lambda c, p: by_local_stages(c, 1, p)),
        ("stream", {"copies": True, "spine": "last"}, lambda c, p: by_local_stages(c, 1, p, "last")),
        ("greedy", {}, lambda c, p: by_local_stages(c, 1, p, "head")),
        ("solo", {}, lambda c, p: by_local_stages(c, 1, p, "solo")),
        ("bp", {}, lambda c, p: by_pipeline(c, 1, p, 1)),
        ("paper", {}, lambda c, p: by_tree(c, 1, p, posterior=True)),
        ("tree", {}, lambda c, p: by_tree(c, 1, p, posterior=False)),
    ],
)
def test_work_and_span_are_those_that_the_rules_count(name, options, build, blocks):
    devices = 3
    priced = build(equal(blocks), devices)
    network, x, y = networks.residual(blocks + 1)
    local = name in ("stream", "greedy", "solo")
    stages = {"stage": priced.sizes} if local else {}
    rule = hbll.make_rule(name, network, **stages, **options, **({} if name == "bp" else {"engine": "loop"}))
    for _ in range(devices):  # until the pipeline is full
        step = rule.backward(x, y)
    found = estimate(priced, FREE)
    assert (found.work, found.span) == (step.work, step.span)


def test_delays_cost_a_pipeline_every_hop_and_a_stream_nothing():
    late = Network(bandwidth=2.0, delay=3.0)
    hop = 1 / 2 + 3
    assert step_seconds(by_pipeline(equal(8), 1, 4, 1), late) == pytest.approx(3 * 8 + 2 * 3 * hop)
    stream = by_local_stages(equal(15), 1, 4)
    assert step_seconds(stream, late) == step_seconds(stream, FREE)


def test_a_stream_is_as_slow_as_its_link_where_that_is_slower():
    narrow = Network(bandwidth=1 / 50)
    assert step_seconds(by_local_stages(equal(15), 1, 4), narrow) == pytest.approx(50)
    assert step_seconds(by_local_stages(equal(15), 1, 4, wire=0.5), narrow) == pytest.approx(25)


def network_costs():
    """Blocks of 100 bytes of parameters and 10 of graph a sample; a state of 4 bytes, a label of 1."""
    line = Line(0.0, 1.0)
    block = Part(line, Line(0.0, 2.0), line, parameters=100, graph=10, state=4)
    none = Line()
    embed, head = Part(none, none, none, parameters=8, state=4), Part(none, none, none, parameters=16, graph=2)
    return Costs(embed, (block,) * 8, head, labels=1, update=0.01, kept=2)


def test_data_parallel_reduces_around_a_ring_what_one_bucket_holds():
    costs, network = network_costs(), Network(bandwidth=5.0, delay=0.25)
    total = 8 * 100 + 8 + 16
    found = estimate(by_data(costs, 16, 4, network), network)
    ring = 2 * 3 * (0.25 + total / 4 / 5.0)
    assert found.seconds == pytest.approx(3 * 8 * 16 / 4 + ring + 0.01 * total)
    assert found.bytes == pytest.approx(2 * 3 / 4 * total)
    assert found.messages == 2 * 3 * 4


def test_buckets_are_reduced_while_the_walk_back_goes_on():
    """Two blocks of a bucket each: of the reduction only the first block's, which comes last, is waited for."""
    line, size = Line(0.0, 1.0), 30 * 2**20
    block = Part(line, Line(0.0, 2.0), line, parameters=size, state=1)
    none = Part(Line(), Line(), Line())
    network = Network(bandwidth=size / 1.5)  # a ring of two takes 1.5 s
    found = estimate(by_data(Costs(none, (block,) * 2, none), 2, 2, network), network)
    assert found.seconds == pytest.approx(2 + 2 + 2 + 1.5)


def test_messages_and_bytes_of_a_step():
    costs = network_costs()
    pipeline = estimate(by_pipeline(costs, 16, 4, 8), FREE)
    assert (pipeline.messages, pipeline.bytes) == (2 * 3 * 8, 2 * 16 * 4)  # of a stage in the middle, both ways
    assert estimate(by_pipeline(costs, 16, 2, 8), FREE).bytes == 16 * 4
    stream = estimate(by_local_stages(costs, 16, 4), FREE)
    assert (stream.messages, stream.bytes) == (3, 16 * (4 + 1))
    assert estimate(by_local_stages(costs, 16, 4, wire=0.5), FREE).bytes == 16 * (2 + 1)
    assert estimate(by_zero_bubble(costs, 16, 2, 4), FREE).messages == 2 * 2 * 4  # the fold is within a device


def test_messages_of_a_tree_of_three_blocks_on_three_devices():
    """z_0 to node 2, its prior to the head, the gradient back; node 1's prior to block 2, the gradient back; the boundary of
    node 2 to node 3; the gradient of z_0 from node 2."""
    assert estimate(by_tree(equal(3), 1, 3, posterior=True), FREE).messages == 7


@pytest.mark.parametrize("refresh", [1, 2, 5])
def test_a_refresh_makes_an_earlier_stage_wait_for_a_round_trip(refresh):
    """Of the slower of two stages: its copy of the head goes there, the mean comes back."""
    costs, late = network_costs(), Network(bandwidth=10.0, delay=3.0)
    priced = by_local_stages(costs, 1, 2, "head", refresh=refresh)
    assert priced.sizes == (4, 4)
    slower = 3 * 4 + 0.01 * (8 + 4 * 100 + 16)
    assert step_seconds(by_local_stages(costs, 1, 2, "head"), late) == pytest.approx(slower)
    assert step_seconds(priced, late) == pytest.approx(slower + 2 * (3 + 16 / 10) / refresh)


@pytest.mark.parametrize("delay", [3.0, 30.0])
def test_a_solo_readout_waits_for_nobody_but_the_head(delay):
    """Whose owner sends it and goes on: what then takes long is the way from there to the first stage, through two whole
    steps of it and a third forward evaluation, whose state goes to the last step of the owner before the next meeting."""
    costs, late = network_costs(), Network(delay=delay)
    found = step_seconds(by_local_stages(costs, 1, 2, "solo", refresh=4, sizes=(3, 5)), late)
    first = 3 * (3 + 2) + 0.01 * (8 + 5 * 100 + 16)
    last = 3 * 5 - 1 + 0.01 * (5 * 100 + 16)
    assert found == pytest.approx(max(first, (delay + 2 * first + 3 + delay + last) / 4))


@pytest.mark.parametrize("devices", [2, 4, 7])
@pytest.mark.parametrize("readout", ["spine", "last", "head", "solo"])
def test_refreshing_costs_nothing_on_a_free_network(readout, devices):
    never, often = (by_local_stages(equal(15), 1, devices, readout, refresh=refresh) for refresh in (None, 2))
    assert step_seconds(often, FREE) == pytest.approx(step_seconds(never, FREE))
    assert (estimate(often, FREE).work, estimate(often, FREE).span) == (
        estimate(never, FREE).work,
        estimate(never, FREE).span,
    )


def test_messages_and_bytes_of_a_refresh():
    """The spines of four stages pass 2 and 4, 3 and 4, 4."""
    never, often = (sent(by_local_stages(network_costs(), 16, 4, refresh=refresh)) for refresh in (None, 5))
    found = [((b - d) * 5, (a - c) * 5) for (a, b), (c, d) in zip(often, never, strict=True)]
    head, block = 16, 100
    expected = [2 * block + head, 2 * block + head + block, block + head + block, 3 * block + 3 * head]
    assert found == [pytest.approx(pair) for pair in zip(expected, [3, 4, 3, 6], strict=True)]


TRAFFIC = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from tests.networks import residual
import hbll
from hbll.distributed import Worker
from hbll.distributed.cost import Costs, Line, Part, by_local_stages, sent

rank, world = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
LIMIT = timedelta(minutes=1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world, timeout=LIMIT)
really_send, crossed = dist.send, []


def send(tensor, *arguments, **options):
    crossed.append(tensor.nbytes)
    really_send(tensor, *arguments, **options)


dist.send = send
STEPS, SIZES = 6, (1, 2, 1, 3)
for name, kind, options in (
    ("stream", "spine", {"copies": True}),
    ("stream", "last", {"copies": True, "spine": "last"}),
    ("greedy", "head", {}),
    ("solo", "solo", {}),
):
    for refresh in (1, 3):
        network, x, y = residual(8)
        line = Line(0.0, 1.0)
        embed, *blocks, head = (
            Part(line, line, line, parameters=sum(p.nbytes for p in module.parameters()), state=x.shape[-1])
            for module in (network.embed, *network.blocks, network.head)
        )
        costs = Costs(embed, tuple(blocks), head)
        rule = hbll.make_rule(name, network, stage=SIZES, engine="loop", refresh=refresh, **options)
        worker = Worker(rule)
        crossed.clear()
        for _ in range(STEPS):
            worker.backward(x, y)
        worker.drain()
        meetings = (STEPS + world - 2) // refresh  # of the clock that all stages share
        often, never = (sent(by_local_stages(costs, 4, 4, kind, refresh=r, sizes=SIZES))[rank] for r in (refresh, None))
        expected = [meetings * refresh * (a - b) for a, b in zip(often, never)]
        found = [len(crossed), sum(crossed)]
        assert all(abs(a - b) < 1e-6 for a, b in zip(found, expected)), (name, kind, refresh, rank, found, expected)
        dist.barrier()
        worker.close()
dist.barrier()
dist.destroy_process_group()
"""


def test_what_a_refresh_sends_is_what_workers_send(tmp_path):
    codes, said = launched(TRAFFIC, 4, path=tmp_path)
    assert codes == [0] * 4, "\n".join(said)


def test_memory_of_the_fullest_device():
    costs = network_costs()
    state = {devices: 4 * (8 / devices * 100 + 8) for devices in (1, 2, 4)}  # of the first device: the embed too
    held = 16 * 10 * 8
    whole = estimate(by_backpropagation(costs, 16), FREE).memory
    assert whole == 4 * (800 + 24) + held + 16 * 2
    first = estimate(by_pipeline(costs, 16, 4, 8), FREE)
    assert first.sizes == (2, 2, 2, 2)
    assert first.memory == state[4] + 4 * 16 / 8 * 2 * 10  # as many micro-batches as devices
    late = estimate(by_late_pipeline(costs, 16, 4, 8), FREE)
    assert late.memory == first.memory + 2 * 100 + 8
    inner = 4 * (2 * 100 + 16)  # a stage in the middle, which has room for messages on both sides
    greedy = estimate(by_local_stages(costs, 16, 4, "head", in_flight=3), FREE)
    assert greedy.sizes == (2, 2, 2, 2)
    assert greedy.memory == inner + 16 * (2 * 10 + 2) + 2 * 3 * 16 * (4 + 1)
    data = estimate(by_data(costs, 16, 4, FREE), FREE).memory
    assert data == 4 * (800 + 24) + held / 4 + 4 * 2


@pytest.mark.parametrize("readout", [None, "head", "spine", "last", "solo"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_are_cut_so_that_the_slowest_is_as_fast_as_can_be(stages, readout):
    costs = equal(9)

    def slowest(sizes):
        tree = Tree(stages + 1)
        found = []
        for s, size in enumerate(sizes, 1):
            copies = {
                None: 0,
                "head": 0,
                "solo": 2 * (s < stages),
                "last": s < stages,
                "spine": len(spine(s, tree, "doubling")),
            }[readout]
            found.append(3 * (size + copies) - (readout is not None and s > 1))
        return max(found)

    sizes = balanced(costs, stages, 1, readout)
    assert sum(sizes) == 9
    assert slowest(sizes) == min(map(slowest, compositions(9, stages)))


def test_unlike_blocks_are_cut_by_their_time():
    lengths = [5, 1, 1, 1, 3, 2, 8]
    blocks = tuple(Part(Line(n), Line(2 * n), Line(n)) for n in lengths)
    none = Part(Line(), Line(), Line())
    costs = Costs(none, blocks, Part(Line(1), Line(2), Line(1)))

    def slowest(sizes):
        ends = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
        return max(3 * (sum(lengths[a:b]) + (b == len(lengths))) for a, b in pairwise(ends))

    for stages in (2, 3, 4):
        assert slowest(balanced(costs, stages, 1)) == min(map(slowest, compositions(len(lengths), stages)))


def test_what_cannot_be_is_told():
    changing = Costs(equal(2).embed, (equal(1).blocks[0], Part(Line(), Line(), Line(), state=2.0)), equal(2).head)
    with pytest.raises(ValueError, match="3 blocks cannot be cut into 4 stages"):
        by_local_stages(equal(3), 1, 4)
    with pytest.raises(ValueError, match="a batch of 2 cannot be split into 4"):
        by_pipeline(equal(8), 2, 2, 4)
    with pytest.raises(ValueError, match="a batch of 2 cannot be split over 4 devices"):
        by_data(equal(8), 2, 4, FREE)
    with pytest.raises(ValueError, match="2BW needs as many micro-batches as devices, 4; got 2"):
        by_late_pipeline(equal(8), 8, 4, 2)
    with pytest.raises(ValueError, match="states change shape"):
        by_tree(changing, 1, 2, posterior=True)
    with pytest.raises(ValueError, match="states change shape"):
        by_local_stages(changing, 1, 2)
    assert math.isfinite(step_seconds(by_local_stages(changing, 1, 2, "head"), FREE))
