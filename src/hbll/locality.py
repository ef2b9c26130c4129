"""Audit: which parameters does each stage's loss reach, and whose weights does its credit need?

Both answers are read off autograd's own graph, leaf by leaf, so they hold for the modules at hand and not only on paper.
Frozen parameters count among what credit uses; weights that a module uses detached from the graph are not seen.
What stages hand each other without gradient, states forwards and messages backwards, is no part of either.
Inverted arcs transport weights, but only across one arc: the credit of node n uses the Jacobian of its right neighbour.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hbll.modes import looking
from hbll.network import Chain
from hbll.rule import Rule, StageLoss, Step

__all__ = ["Audit", "StageAudit", "audit", "locality"]


@dataclass(frozen=True)
class StageAudit:
    """What the graph says of one stage.

    Modules are named ``embed``, ``block 3``, ``head``, and what a rule has besides for its third stage ``auxiliary 3``;
    ``elsewhere`` are parameters that none of these have, and ``loss`` those of the label's loss.
    """

    stage: int | str
    """A stage, or the name of a loss beside them: ``embed`` (credit for the embedded input), ``rim``, ``jumps``,
    ``consistency``."""
    reaches: tuple[str, ...]
    """Modules whose parameters receive a gradient from the stage's losses."""
    uses: tuple[str, ...]
    """Modules beside its own blocks that the stage's credit was carried back through."""
    outside: tuple[str, ...]
    """Those of either that are neither the stage's own nor near it (of a node of the tree its right neighbour is, see
    ``Rule.near``). A stage that is the whole network is none: all is outside."""


@dataclass(frozen=True)
class Audit:
    """The audit of a rule, a row per stage; ``str`` gives the table."""

    rows: tuple[StageAudit, ...]
    shared: tuple[tuple[str, ...], ...]
    """Modules that own a parameter together: to the audit, a loss that reaches one of them reaches all."""

    @property
    def local(self) -> bool:
        """Whether no loss or credit crosses the bounds of its stage and what is near it."""
        return not any(row.outside for row in self.rows)

    @property
    def crossed(self) -> int:
        """The most blocks that the loss or the credit of one stage passes."""
        return max(len({name for name in (*row.reaches, *row.uses) if name.startswith("block")}) for row in self.rows)

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("stage", "loss reaches", "credit uses", "outside")]
        for row in self.rows:
            cells.append((str(row.stage), *(", ".join(names) or "-" for names in (row.reaches, row.uses, row.outside))))
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
        lines += [f"{' and '.join(owners)} share parameters" for owners in self.shared]
        return "\n".join(line.rstrip() for line in lines)


def audit(rule: Rule, x: Any, y: Any) -> Audit:
    """Carries one step out as in training, stage by stage, and reads the reach of every loss off its graph.

    Args:
        rule, x, y: as for ``rule(x, y)``. No gradient and no trace in running statistics is left behind.

    Raises:
        ValueError: the rule's credit comes from other steps, as an asynchronous pipeline's does; or it is no rule.
    """
    if not isinstance(rule, Rule):
        raise ValueError(f"what is audited is a rule, as hbll.make_rule makes them, not a {type(rule).__name__}")
    if rule.late:
        raise ValueError("an asynchronous pipeline cannot be audited: its credit comes from other steps")
    rule.build(x)
    reader = _Reader(rule)
    with torch.enable_grad(), looking(rule), _thawed(rule):
        reached: dict[int | str, set[tuple[str, bool]]] = {}
        for loss in rule.losses(x, y, Step(look=True)):
            for stage in loss.stages:
                reached.setdefault(stage, set()).update(reader.passed(loss))
    rows = [reader.row(rule, stage, found) for stage, found in reached.items()]
    return Audit(tuple(sorted(rows, key=lambda row: (isinstance(row.stage, str), row.stage))), reader.shared)


def locality(rule: Rule, x: Any, y: Any) -> str:
    """What the audit says, in a few words: ``yes``, or how many blocks credit crosses; nothing where there are no blocks."""
    if not isinstance(rule.network, Chain):
        return ""
    if rule.late:
        return f"no: crosses {len(rule.network.blocks)} blocks"  # one a step
    found = audit(rule, x, y)
    return "yes" if found.local else f"no: crosses {found.crossed} blocks"


ELSEWHERE = "elsewhere"


class _Reader:
    """Names the modules that own the leaves of a loss's graph."""

    def __init__(self, rule: Rule) -> None:
        network = rule.network
        blocks = {f"block {n}": [block] for n, block in enumerate(network.blocks, 1)}
        beside = {f"auxiliary {k}": rule.auxiliary(k) for k in range(1, len(rule.stages) + 1)}
        self.modules: Mapping[str, list[nn.Module]] = {
            "embed": [network.embed],
            **blocks,
            "head": [network.head],
            **beside,
            "loss": [rule.loss] if isinstance(rule.loss, nn.Module) else [],
            ELSEWHERE: [],
        }
        self.frozen = {id(parameter) for parameter in rule.parameters() if not parameter.requires_grad}
        self.owners: dict[int, tuple[str, ...]] = {}
        for name, modules in self.modules.items():
            for parameter in dict.fromkeys(p for module in modules for p in module.parameters()):
                self.owners[id(parameter)] = (*self.owners.get(id(parameter), ()), name)

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        return tuple(sorted({names for names in self.owners.values() if len(names) > 1}))

    def passed(self, loss: StageLoss) -> set[tuple[str, bool]]:
        """The modules that a gradient from the loss passes, each with whether a parameter of it receives its gradient."""
        found = set()
        for value, receives in ((loss.value, True), *((tensor, False) for tensor in loss.through)):
            for leaf in _leaves(value):
                nowhere = (ELSEWHERE,) if isinstance(leaf, nn.Parameter) else ()  # a state may be a leaf as well
                for name in self.owners.get(id(leaf), nowhere):
                    found.add((name, receives and id(leaf) not in self.frozen))
        return found

    def row(self, rule: Rule, stage: int | str, found: Iterable[tuple[str, bool]]) -> StageAudit:
        reaches = {name for name, receives in found if receives}
        passed = {name for name, _ in found}
        if isinstance(stage, str):
            own = {"embed"} if stage == "embed" else {name for name in passed if name.startswith("auxiliary")}
            blocks: set[str] = own
        else:
            last = len(rule.stages)
            numbers = {f"block {n}" for n in rule.stages[stage - 1].numbers}
            # By place: a module that is in two places is a stage's own in one of them.
            own = numbers | {f"auxiliary {stage}"} | ({"embed"} if stage == 1 else set())
            own |= self._names(rule.near(stage)) | ({"head", "loss"} if stage == last else set())
            own = set() if last == 1 else own
            blocks = own & (numbers | {"embed"})
        uses = passed - blocks
        return StageAudit(stage, self._order(reaches), self._order(uses), self._order((reaches | uses) - own))

    def _names(self, modules: Iterable[nn.Module]) -> set[str]:
        wanted = set(modules)
        return {name for name, own in self.modules.items() if any(module in wanted for module in own)}

    def _order(self, found: set[str]) -> tuple[str, ...]:
        return tuple(name for name in self.modules if name in found)


@contextmanager
def _thawed(rule: Rule) -> Iterator[None]:
    """Frozen parameters, which would leave no trace in the graph, with a gradient for the time being."""
    frozen = [p for p in rule.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors whose gradient a backward pass from a value accumulates."""
    leaves, seen, pending = [], set(), [value.grad_fn]
    while pending:
        function = pending.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            leaves.append(function.variable)
        pending += [after for after, _ in function.next_functions]
    return leaves
