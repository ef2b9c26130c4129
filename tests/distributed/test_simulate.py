"""Oracles: closed forms, and earliest times by relaxation to a fixed point."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbll.distributed.simulate import Network, Op, Schedule, longest_chain, messages, peak, period, simulate

A, B, C = (Op("F", stage) for stage in range(3))


def duration(op):
    return 1.0 + op.stage


def test_devices_run_their_operations_in_order_and_wait_for_each_other():
    schedule = Schedule(((A, C), (B,)), {C: (B,), B: (A,)})
    times = simulate(schedule, duration)
    assert [times[op] for op in (A, B, C)] == [(0, 1), (1, 3), (3, 6)]


def test_messages_take_their_size_and_then_the_delay():
    schedule = Schedule(((A,), (B,)), {B: (A,)})
    assert simulate(schedule, duration, lambda op: 8, Network(bandwidth=4, delay=0.5))[B].start == 1 + 8 / 4 + 0.5


def test_a_device_sends_its_messages_one_after_the_other_and_computes_beside():
    first, second = Op("F", 0, 0), Op("F", 0, 1)
    schedule = Schedule(((first, second), (B,), (C,)), {B: (first,), C: (second,)})
    times = simulate(schedule, lambda op: 1.0, lambda op: 20, Network(bandwidth=4))
    assert times[second] == (1, 2)
    assert times[B].start == 1 + 5
    assert times[C].start == 1 + 5 + 5


def test_a_result_goes_to_each_device_once():
    again = Op("F", 3)
    schedule = Schedule(((A,), (B, again), (C,)), {B: (A,), again: (A,), C: (A,)})
    assert messages(schedule) == {A: (1, 2)}


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("bound", [1, 2, 3])
def test_a_sender_waits_until_fewer_messages_than_the_bound_are_to_be_taken(bound, delay):
    """The taker needs ten times as long: the sender is ahead by as many as may wait, and the one that it has ready."""
    fast, slow = ([Op(kind, 0, number) for number in range(20)] for kind in "FB")
    schedule = Schedule((tuple(fast), tuple(slow)), {b: (f,) for f, b in zip(fast, slow, strict=True)})
    times = simulate(
        schedule, lambda op: 1.0 if op.kind == "F" else 10.0, network=Network(delay=delay, in_flight=bound)
    )
    for number in range(bound + 1, 20):
        # The sender goes on when it hears that the message that was in the way is taken.
        heard = times[slow[number - 1 - bound]].start + delay
        assert times[fast[number]].start == max(times[fast[number - 1]].end, heard)
    assert [times[b].start for b in slow] == [1 + delay + 10 * number for number in range(20)]


def test_a_message_that_is_asked_for_late_leaves_late():
    busy = Op("F", 9)
    schedule = Schedule(((A,), (busy, B)), {B: (A,)})
    late = Network(bandwidth=4, delay=0.5, asked=True)
    assert simulate(schedule, duration, lambda op: 8, late)[B].start == 10 + 0.5 + 8 / 4 + 0.5
    assert simulate(schedule, duration, lambda op: 8, Network(bandwidth=4, delay=0.5))[B].start == 10
    early = Schedule(((busy,), (B,)), {B: (busy,)})  # which asks while the sender is at work
    assert simulate(early, duration, lambda op: 8, late)[B].start == 10 + 8 / 4 + 0.5


def test_what_waits_for_itself_is_told():
    with pytest.raises(ValueError, match="device 0 waits for ever before Op"):
        simulate(Schedule(((A,), (B,)), {A: (B,), B: (A,)}), duration)


@given(st.data())
def test_times_are_the_earliest_that_keep_order_and_needs(data):
    count, devices = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    ops = [Op("F", number) for number in range(count)]
    homes = [data.draw(st.integers(0, devices - 1)) for _ in ops]
    lengths = [data.draw(st.integers(0, 5)) for _ in ops]
    needs = {op: tuple(data.draw(st.sets(st.sampled_from(ops[:i])))) if i else () for i, op in enumerate(ops)}
    delay = data.draw(st.integers(0, 3))
    lists = [tuple(op for op, home in zip(ops, homes, strict=True) if home == device) for device in range(devices)]
    times = simulate(Schedule(tuple(lists), needs), lambda op: lengths[op.stage], network=Network(delay=delay))

    ends = dict.fromkeys(ops, 0)
    for _ in range(count + 1):
        for op in ops:
            before = [ends[n] + (delay if homes[n.stage] != homes[op.stage] else 0) for n in needs[op]]
            own = lists[homes[op.stage]]
            before += [ends[own[own.index(op) - 1]]] if own.index(op) else []
            ends[op] = max(before, default=0) + lengths[op.stage]
    assert {op: span.end for op, span in times.items()} == ends


def test_the_period_is_that_of_steps_in_the_middle():
    ends = [7.0, 10.0, 12.0, 14.0, 15.0]
    timeline = {Op("U", 0, 0, step): (0.0, end) for step, end in enumerate(ends)}
    spans = simulate(Schedule((tuple(timeline),), {}), lambda op: [7, 3, 2, 2, 1][op.step])
    assert [span.end for span in spans.values()] == ends
    assert period(spans, 5) == 2.0


def test_the_longest_chain_stops_at_a_device_where_it_is_to():
    schedule = Schedule(((A, C), (B,)), {B: (A,), C: (A,)})
    assert longest_chain(schedule, duration) == max(1 + 2, 1 + 3)
    assert longest_chain(Schedule(((A,), (B, C)), {B: (A,), C: (B,)}), duration) == 6
    assert longest_chain(Schedule(((A,), (B, C)), {B: (A,), C: (B,)}), duration, across=False) == 5


def test_the_peak_is_what_is_held_and_what_an_operation_takes_beside():
    held = {A: (1, 5), B: (9, -2), C: (0, 1)}
    assert peak([A, B, C], held.__getitem__) == 5 + 9
    assert peak([A, C], held.__getitem__) == 6
