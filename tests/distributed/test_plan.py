"""Which scheme a plan takes, and what it says. Expectations are those of the closed forms in test_cost.py."""

import pytest

from hbll.distributed.cost import Costs, Line, Part, equal
from hbll.distributed.plan import COLUMNS, as_json, growth, make_plan, reasons, table
from hbll.distributed.simulate import Network

FREE = Network()


def schemes(plan):
    return [choice.cost.scheme for choice in plan.choices]


def heavy(blocks=8):
    """Blocks of 3 units a sample, of 1000 bytes of parameters, 1 byte of graph and 1 of state a sample."""
    line = Line(0.0, 1.0)
    block = Part(line, Line(0.0, 2.0), line, parameters=1000, graph=1, state=1)
    none = Part(Line(), Line(), Line(), state=1)
    return Costs(none, (block,) * blocks, none)


def test_micro_batches_are_as_many_as_are_best():
    """On a free network more are better; where every message takes long, fewer are."""
    free = make_plan(equal(8), 16, 2, FREE)
    slow = make_plan(equal(8), 16, 2, Network(delay=40.0))
    chosen = [{c.cost.scheme: c.cost.micros for c in plan.choices} for plan in (free, slow)]
    assert chosen[0]["1F1B"] == 16
    # (m + 1) / (2 m) * 384 of work and 2 m messages of 40 in turn, but for those that are under way together.
    assert chosen[1]["1F1B"] < 16


def test_a_batch_of_one_leaves_those_that_do_not_split_it():
    plan = make_plan(equal(15), 1, 2, FREE)
    assert plan.best.cost.scheme == "greedy"
    assert sorted(schemes(plan)[:4]) == ["greedy", "solo", "stream", "stream, one jump"]
    assert plan.refused == {
        "DDP": "a batch of 1 cannot be split over 2 devices",
        "ZBV": "ZBV needs as many micro-batches as devices, 2; got 1",
        "2BW": "2BW needs as many micro-batches as devices, 2; got 1",
    }
    (gpipe,) = [c for c in plan.choices if c.cost.scheme == "GPipe"]
    assert gpipe.cost.seconds == pytest.approx(plan.alone.cost.seconds)
    assert gpipe.waits == pytest.approx(gpipe.cost.seconds / 2, rel=0.1)


def test_a_narrow_link_is_what_gradients_wait_for():
    plan = make_plan(heavy(), 16, 2, Network(bandwidth=10.0))
    (data,) = [c for c in plan.choices if c.cost.scheme == "DDP"]
    assert data.link == pytest.approx(8000 / 10)  # one bucket, around a ring of two
    assert data.waits == 0
    assert schemes(plan).index("stream") < schemes(plan).index("DDP")
    assert any("DDP" in said and "waits 800 for messages" in said for said in reasons(plan))


def test_refreshes_are_counted_in():
    """Two round trips of 2 x 3 in turn, those of a block's copy and of the head's, every four steps."""
    never, often = (make_plan(heavy(15), 16, 2, Network(delay=3.0), refresh=refresh) for refresh in (None, 4))
    found = [{c.cost.scheme: c for c in plan.choices}["stream"].cost for plan in (never, often)]
    assert found[1].seconds == pytest.approx(found[0].seconds + 2 * 2 * 3.0 / 4)
    assert (found[0].messages, found[1].messages) == (1, 1 + 2 * 2 / 4)
    assert found[1].bytes == pytest.approx(found[0].bytes + 1000 / 4)
    assert "60000 steps of 2 stages are too many" in make_plan(heavy(), 16, 2, FREE, refresh=60000).refused["greedy"]
    assert "solo" not in dict(growth(heavy(2), 4, FREE, 2, [1, 2], refresh=60000))


def test_the_fastest_that_fits_is_taken_and_what_does_not_is_named():
    free = make_plan(heavy(), 16, 2, FREE)
    assert free.best.cost.scheme in ("DDP", "greedy", "2BW", "ZBV")
    limit = 4 * 8000  # what one device needs without any graph
    plan = make_plan(heavy(), 16, 2, FREE, memory=limit)
    assert not plan.alone.fits
    assert all(choice.fits == (choice.cost.memory <= limit) for choice in plan.choices)
    assert plan.best.fits
    assert plan.best.cost.seconds == min(c.cost.seconds for c in plan.choices if c.fits)
    said = reasons(plan)
    assert said[0].startswith(f"The fastest of what fits is {plan.best.cost.scheme}")
    assert any(line.startswith("DDP") and line.endswith("does not fit.") for line in said)


def test_memory_may_decide_how_many_micro_batches_there_are():
    roomy, tight = (make_plan(heavy(), 16, 2, Network(delay=50.0), memory) for memory in (None, 4 * 4000 + 70))
    micros = [next(c.cost.micros for c in p.choices if c.cost.scheme == "2BW") for p in (roomy, tight)]
    assert micros == sorted(micros)


def test_where_nothing_fits_the_least_is_named():
    assert reasons(make_plan(heavy(), 16, 2, FREE, memory=1)) == [
        f"Nothing fits: {least} needs the least, 0.0 MiB on its fullest device."
        for least in [min(make_plan(heavy(), 16, 2, FREE).choices, key=lambda c: c.cost.memory).cost.scheme]
    ]


def test_one_device_is_the_best_where_messages_take_too_long():
    plan = make_plan(heavy(), 16, 2, Network(bandwidth=1e-6))
    assert plan.best is plan.alone
    assert reasons(plan)[0].startswith("The fastest of what fits is bp, ")


def test_shares_are_of_one_device():
    plan = make_plan(equal(8), 16, 2, FREE)
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table(plan)}
    assert rows["bp"]["bp = 1"] == rows["bp"]["work"] == rows["bp"]["span"] == "1.00"
    assert rows["DDP"]["bp = 1"] == "0.50"
    assert rows["2BW"]["work"] == "1.00"
    assert as_json(plan)["best"] == plan.best.cost.scheme


def test_curves_grow_with_the_devices_as_the_closed_forms_say():
    curves = dict(growth(equal(2), 4, FREE, 2, [1, 2, 4, 16]))
    assert curves["bp"] == [(3, 24), (5, 48), (9, 96), (33, 384)]
    assert [seconds for _, seconds in curves["DDP"]] == [24, 24, 24]  # no more than a sample each
    assert [seconds for _, seconds in curves["greedy"]] == [24] * 4
    (alone, *others) = [seconds / 4 for _, seconds in curves["stream"]]
    assert alone == 6
    assert others == sorted(others)
    assert others[-1] <= 3 * (2 + 5)  # a spine of at most log2 16 + 1
    micros = 4
    assert dict(curves["1F1B"])[33] == pytest.approx((micros + 15) / (micros * 16) * 3 * 32 * 4)
