"""The schedules beside those that torch runs, and that its visualizer spaces out in time."""

from unittest import mock

import pytest
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining._schedule_visualizer import add_schedule_op_spacing, get_schedule_ops
from torch.distributed.pipelining.schedules import _Action, _ComputationType

from hbll.distributed.schedules import one_f_one_b, pipelined, subtrees, zbv
from hbll.distributed.simulate import messages, simulate
from hbll.tree import Tree

KINDS = {
    "F": _ComputationType.FORWARD,
    "B": _ComputationType.FULL_BACKWARD,
    "I": _ComputationType.BACKWARD_INPUT,
    "W": _ComputationType.BACKWARD_WEIGHT,
}


def actions(ops):
    return [_Action(op.stage, KINDS[op.kind], op.micro) for op in ops if op.kind in KINDS]


def run_by_torch(rank, stages, micros):
    """What Schedule1F1B has a stage do, in order."""
    done = []
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.num_stages, stage.stage_index, stage.is_last = stages, rank, False
    stage.submod = mock.Mock(training=True)
    stage.has_backward = True
    for receive in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, receive).return_value = []
    stage.forward_one_chunk.side_effect = lambda micro, *_, **__: done.append(("F", micro))
    stage.backward_one_chunk.side_effect = lambda micro, **_: done.append(("B", micro))
    schedule = Schedule1F1B(stage, micros, loss_fn=mock.Mock())
    with mock.patch.object(schedule, "_initialize_stage"), mock.patch.object(schedule, "_update_losses"):
        schedule._step_microbatches([()] * micros, [{}] * micros, None)
    return done


@pytest.mark.parametrize(("stages", "micros"), [(2, 2), (2, 5), (4, 4), (4, 9)])
def test_1f1b_is_what_torch_runs(stages, micros):
    for rank, ops in enumerate(one_f_one_b(stages, micros).devices):
        assert [(op.kind, op.micro) for op in ops if op.kind != "U"] == run_by_torch(rank, stages, micros)


@pytest.mark.parametrize(("devices", "micros"), [(2, 2), (2, 8), (3, 4), (4, 4), (4, 11)])
def test_zbv_is_torchs_table(devices, micros):
    table = get_schedule_ops("ZBVZeroBubble", devices, micros, 2)
    ours = [actions(ops) for ops in zbv(devices, micros).devices]
    assert ours == [[action for action in ops if action is not None] for ops in table]


@pytest.mark.parametrize(("build", "devices", "micros"), [(one_f_one_b, 2, 4), (one_f_one_b, 4, 6), (zbv, 4, 8)])
def test_times_are_those_of_torchs_visualizer(build, devices, micros, capsys):
    """A full walk back takes two units there, everything else one. Once a rank has nothing left to do, the visualizer takes
    those after it for others: what begins later is not compared."""
    schedule = build(devices, micros)
    times = simulate(schedule, lambda op: {"B": 2.0, "U": 0.0}.get(op.kind, 1.0))
    spaced = add_schedule_op_spacing([actions(ops) for ops in schedule.devices])
    capsys.readouterr()  # it prints every unit of time
    over = min(times[ops[-1]].end for ops in schedule.devices)
    compared = 0
    for ops, row in zip(schedule.devices, spaced, strict=True):
        starts, now = {}, 0
        for action in row:
            starts[action] = now
            now += 2 if action is not None and action.computation_type == KINDS["B"] else 1
        for op in ops:
            if op.kind in KINDS and times[op].start < over:
                assert times[op].start == starts[_Action(op.stage, KINDS[op.kind], op.micro)]
                compared += 1
    assert compared > 0.8 * sum(op.kind in KINDS for op in times)


def test_one_micro_batch_passes_all_stages_and_comes_back():
    times = simulate(one_f_one_b(3, 1), lambda op: 0.0 if op.kind == "U" else 1.0)
    assert max(span.end for span in times.values()) == 2 * 3


def test_without_a_flush_updates_follow_every_batch_in_one_run_of_micro_batches():
    whole = [(op.kind, op.micro) for op in one_f_one_b(3, 8).devices[0] if op.kind != "U"]
    device = one_f_one_b(3, 4, steps=2, flush=False).devices[0]
    assert [(op.kind, op.micro + 4 * op.step) for op in device if op.kind != "U"] == whole
    for number, op in enumerate(device):
        if op.kind == "U":
            assert device[number - 1][:3] == ("B", 0, 3)
            assert op.step == device[number - 1].step


def test_nothing_comes_back_to_stages_that_learn_by_themselves():
    schedule = pipelined(4, 3)
    owner = schedule.owner
    assert all(to == (owner[op] + 1,) for op, to in messages(schedule).items())
    assert {op.kind for op in messages(schedule)} == {"F"}


@pytest.mark.parametrize("posterior", [True, False])
@pytest.mark.parametrize("nodes", [4, 8, 11])
def test_the_tree_needs_what_the_rule_says(nodes, posterior):
    tree = Tree(nodes)
    owners = list(range(nodes - 1))  # a block each
    schedule = subtrees(owners, posterior)
    owner = schedule.owner
    for op, needs in schedule.needs.items():
        n = op.stage + 1
        if op.kind == "F":
            left = tree.left(n)
            (need,) = needs
            assert owner[op] == n - 1
            assert need[:2] == (("Z", 0) if left == 0 else ("T" if posterior else "F", left - 1))
        if op.kind == "E":
            right = tree.right(n)
            assert owner[op] == (nodes - 2 if right == nodes else right - 1)
    kinds = [op.kind for ops in schedule.devices for op in ops]
    assert {kind: kinds.count(kind) for kind in "FETW"} == dict.fromkeys("FETW", nodes - 1)
