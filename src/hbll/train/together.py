"""A run of several processes that goes on in one: the checkpoints of its stages become one of the whole network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hbll.distributed.share import modules_of
from hbll.distributed.tree import even_sizes
from hbll.rule import Rule
from hbll.rules.stream import Stream
from hbll.train import checkpoint, metrics
from hbll.train.device import device
from hbll.train.error_feedback import ErrorFeedback
from hbll.train.hold import held
from hbll.train.loop import Training, is_best, optimizers_of
from hbll.train.parallel import carry_of, draw_anew
from hbll.train.run import Run, check_same, open_run

__all__ = ["put_together"]


def put_together(run: Run) -> None:
    """Makes of the run on several processes that lies in the folder of a run the latter, which is of one.

    It stands behind the newest epoch that all stages have seen. Whoever stops in between can call it again.

    Args:
        run: the run as it is to go on, for more epochs perhaps.

    Raises:
        ValueError: the folder holds no run, or another one; or a stage's checkpoint is missing, damaged or another's.
    """
    stored = open_run(run.folder)
    check_same(stored, replace(run, parallel=stored.parallel, wire=stored.wire))
    splits = run.recipe.splits(run.data_dir).to(device())
    with held(run.folder):
        states = _newest(stored)
        epoch = states[0]["epoch"]
        training = Training(run, splits.train)
        parts = _parts(training.rule, stored.parallel, len(states))
        metrics.cut(run.metrics_file, epoch, states[0]["metrics"])
        _keep_best(training, stored, parts, states)
        _load(stored, parts, states)
        for number, (part, state) in enumerate(zip(parts, states, strict=True), 1):
            with checkpoint.understood(stored.stage_files(number)[0]):
                _move(training, part, state)
        training.rule.load_carry(_carry(training.rule, stored, states[0]["carries"]))
        training.epoch = epoch
        draw_anew(run.seed, epoch, 1, 0)  # as the first of the processes would
        training.save()
        run.write_configuration(device(), training.engine)  # from here on it is of one process
        for number in range(1, len(states) + 1):
            for file in (*stored.stage_files(number), stored.best_stage_file(number)):
                file.unlink(missing_ok=True)


def _newest(run: Run) -> list[dict[str, Any]]:
    """The checkpoints of all stages, of the newest epoch that they have in common."""
    first = run.stage_checkpoints(1)
    stages = next(state["stages"] for _, state in first.values())
    found = [first, *(run.stage_checkpoints(stage, stages) for stage in range(2, stages + 1))]
    if not (common := set.intersection(*map(set, found))):
        raise ValueError(f"{run.folder}: the stages' checkpoints have no epoch in common: begin a new run")
    return [states[max(common)][1] for states in found]


def _parts(rule: Rule, parallel: str, processes: int) -> list[nn.Module]:
    """What each process had of a rule."""
    if parallel == "data":
        return [rule]
    ends = [0, *accumulate(even_sizes(len(rule.stages), processes))]
    return [nn.ModuleList(modules_of(rule, range(a + 1, b + 1))) for a, b in pairwise(ends)]


def _keep_best(
    training: Training, stored: Run, parts: Sequence[nn.Module], states: Sequence[Mapping[str, Any]]
) -> None:
    """Keeps the weights that were best by the validation samples; the stages keep them an epoch later."""
    lines, measure = metrics.read(stored.metrics_file), stored.recipe.measures[0]
    best = [line.epoch for i, line in enumerate(lines) if is_best(line, lines[:i], measure)]
    if not best:
        return
    training.epoch = best[-1]
    if training.epoch < len(lines):
        files = [stored.best_stage_file(number) for number in range(1, len(parts) + 1)]
        states = [stored.load_checkpoint(file=file) for file in files]
    _load(stored, parts, states)
    training.save_best()


def _load(stored: Run, parts: Sequence[nn.Module], states: Sequence[Mapping[str, Any]]) -> None:
    """Puts the weights of the stages into the parts of the rule."""
    for number, (part, state) in enumerate(zip(parts, states, strict=True), 1):
        with checkpoint.understood(stored.stage_files(number)[0]):
            part.load_state_dict(state["module"])


def _move(training: Training, part: nn.Module, state: Mapping[str, Any]) -> None:
    """Hands what the optimizers and schedules of a process had on to those of the whole rule."""
    recipe, descent = training.run.recipe, training.descent
    optimizers = optimizers_of(recipe, training.rule, part.parameters())
    stored = zip(optimizers, state["optimizers"], state["schedules"], strict=True)
    for optimizer, of_optimizer, of_schedule in stored:
        optimizer.load_state_dict(of_optimizer)
        held = set(_parameters(optimizer))
        for whole, schedule in zip(descent.optimizers, descent.schedules, strict=True):
            if held & set(_parameters(whole)):
                _hand_on(optimizer, whole)
                schedule.load_state_dict(of_schedule)


def _hand_on(optimizer: Optimizer, whole: Optimizer) -> None:
    """Gives the state of an optimizer of some parameters to one that has more."""
    if isinstance(optimizer, ErrorFeedback) and isinstance(whole, ErrorFeedback):
        _hand_on(optimizer.optimizer, whole.optimizer)
    whole.state.update(optimizer.state)
    for group, own in zip(optimizer.param_groups, whole.param_groups, strict=True):
        own.update({name: value for name, value in group.items() if name != "params"})


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _carry(rule: Rule, stored: Run, carries: Sequence[Any]) -> Mapping[str, Any]:
    """What the rule in one process keeps: of stages, which were drained, at most how many steps there were."""
    kept = carry_of(stored, carries, 0, 1)
    if stored.parallel == "data":
        return kept
    if isinstance(rule, Stream) and rule.refresh:
        return {"stages": [len(stage.blocks) for stage in rule.stages], "kept": kept}
    return {}
