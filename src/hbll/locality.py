"""Audit: which parameters does each node's or block's loss reach, and whose weights does its credit need?

Both answers are read off autograd's own graph, leaf by leaf, so they hold for the modules at hand and not only on paper.
Frozen parameters count among what credit uses; weights that a module uses detached from the graph are not seen.
What blocks hand each other without gradient, states forwards and messages backwards, is no part of either.
Inverted arcs transport weights, but only across one arc: the credit of node n uses the Jacobian of its right neighbour.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hbll.cuts import parts
from hbll.local.rule import LocalRule
from hbll.network import TreeNetwork, evaluating
from hbll.objective import Objective
from hbll.protocols import TrainingRule
from hbll.stages import Stages
from hbll.trace import Trace

__all__ = ["Audit", "NodeAudit", "audit", "locality"]


@dataclass(frozen=True)
class NodeAudit:
    """What the graph says of one node or block.

    Modules are named ``embed``, ``block 3``, ``head``, those of a plain network ``layer 3``, and what a local rule has
    besides for its third block ``auxiliary 3``.
    """

    node: int | str
    """A node of the tree, a block of a local rule, or the name of a loss beside them: ``embed`` (credit for the embedded
    input), ``rim``."""
    left: int | None
    right: int | None
    reaches: tuple[str, ...]
    """Modules whose parameters receive a gradient from the node's losses."""
    uses: tuple[str, ...]
    """Modules that the node's credit was carried back through."""
    outside: tuple[str, ...]
    """Those of either that are no part of the node's triple: its own block, its right neighbour, and from node 0 the
    embed; or that are no part of a local rule's block. A block that is the whole network is none: all is outside."""


@dataclass(frozen=True)
class Audit:
    """The audit of a network under an objective, a row per node; ``str`` gives the table."""

    rows: tuple[NodeAudit, ...]
    shared: tuple[tuple[str, ...], ...]
    """Modules that own a parameter together: to the audit, a loss that reaches one of them reaches all."""

    @property
    def local(self) -> bool:
        """Whether no loss or credit crosses the bounds of its triple or block."""
        return not any(row.outside for row in self.rows)

    @property
    def crossed(self) -> int:
        """The most blocks, or layers of a plain network, that the loss or the credit of one node passes."""
        return max(
            len({name for name in (*row.reaches, *row.uses) if name.startswith(("block", "layer"))})
            for row in self.rows
        )

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("node", "left", "right", "loss reaches", "credit uses", "outside")]
        last = max(row.right or 0 for row in self.rows)
        for row in self.rows:
            sides = [str(row.node), *("-" if side is None else str(side) for side in (row.left, row.right))]
            sides[2] = "label" if row.right == last else sides[2]
            cells.append((*sides, *(", ".join(names) or "-" for names in (row.reaches, row.uses, row.outside))))
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
        lines += [f"{' and '.join(owners)} share parameters" for owners in self.shared]
        return "\n".join(line.rstrip() for line in lines)


def audit(network: nn.Module, rule: TrainingRule, x: Any, y: Any) -> Audit:
    """Carries one step out, block by block, and reads the reach of every loss off its graph.

    Args:
        network, rule, x, y: as for ``rule(network, x, y)``, the rule being an ``Objective`` or a ``LocalRule``. No gradient
            and no trace in running statistics is left behind.

    Raises:
        ValueError: the rule is of another kind, or an asynchronous pipeline, whose credit comes from other steps.
    """
    match network, rule:
        case TreeNetwork(), Objective():
            return _audit_tree(network, rule, x, y)
        case _, LocalRule():
            return _audit_blocks(network, rule, x, y)
    raise ValueError(f"a {type(rule).__name__} cannot be audited: take an Objective on a TreeNetwork, or a local rule")


def locality(network: Any, rule: TrainingRule, x: Any, y: Any) -> str:
    """What the audit says, in a few words: ``yes``, or how many blocks credit crosses; nothing where there is no audit."""
    if not isinstance(rule, Objective | LocalRule):
        return ""
    if isinstance(network, TreeNetwork) and isinstance(rule, Objective) and rule.rule.credit == "late":
        return f"no: crosses {len(network.blocks)} blocks"  # one a step, which no step's graph shows
    found = audit(network, rule, x, y)
    return "yes" if found.local else f"no: crosses {found.crossed} blocks"


class _Reader:
    """Names the modules that own the leaves of a value's graph.

    Args:
        modules: by name, in the order of tables.
        frozen: parameters that receive no gradient.
    """

    def __init__(self, modules: Mapping[str, Iterable[Tensor]], frozen: Iterable[Tensor]) -> None:
        self.modules = modules
        self.frozen = {id(parameter) for parameter in frozen}
        owners: dict[int, list[str]] = {}
        for name, parameters in modules.items():
            for parameter in parameters:
                owners.setdefault(id(parameter), []).append(name)
        self.owners = {key: tuple(names) for key, names in owners.items()}

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        return tuple(sorted({names for names in self.owners.values() if len(names) > 1}))

    def reached(self, value: Tensor) -> set[str]:
        """Those that receive a gradient from the value."""
        return self._names(leaf for leaf in _leaves(value) if id(leaf) not in self.frozen)

    def used(self, value: Tensor) -> set[str]:
        """Those that a gradient from the value passes."""
        return self._names(_leaves(value))

    def _names(self, leaves: Iterable[Tensor]) -> set[str]:
        return {name for leaf in leaves for name in self.owners.get(id(leaf), ())}

    def order(self, found: set[str]) -> tuple[str, ...]:
        return tuple(name for name in self.modules if name in found)


@contextmanager
def _thawed(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Frozen parameters, which would leave no trace in the graph, with a gradient for the time being."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield frozen
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _audit_tree(network: TreeNetwork, objective: Objective, x: Any, y: Any) -> Audit:
    uses: dict[int, set[str]] = {}
    # One stage a call: a stacked call would connect every loss of a level with every stage of it.
    stages = Stages(network.blocks, objective.rule.stage, "loop")
    with evaluating(network), evaluating(objective), _thawed(network.parameters()) as frozen:
        reader = _Reader({part.name: part.parameters for part in parts(network)}, frozen)

        def observe(nodes: tuple[int, ...], value: Tensor) -> None:
            for n in nodes:
                uses.setdefault(n, set()).update(reader.used(value))

        trace = Trace(network, stages, objective.rule, x, y)
        trace.observer = observe
        objective.follow(trace)
    reaches: dict[int | str, set[str]] = {}
    for nodes, term in trace.terms:
        for n in (nodes,) if isinstance(nodes, str) else nodes:
            reaches.setdefault(n, set()).update(reader.reached(term))
    rows = []
    for n, found in sorted(reaches.items(), key=lambda item: (isinstance(item[0], str), item[0])):
        if isinstance(n, str):
            rows.append(NodeAudit(n, None, None, reader.order(found), (), reader.order(found - {"embed"})))
            continue
        left, right = stages.tree.interval(n)
        triple = {f"block {b}" for node in (n, right) if node < stages.tree.nodes for b in stages.numbers[node - 1]}
        triple |= {"head"} if right == stages.tree.nodes else set()
        triple |= {"embed"} if left == 0 else set()
        rows.append(_row(reader, n, left, right, found, uses.get(n, set()), triple))
    return Audit(tuple(rows), reader.shared)


def _audit_blocks(network: nn.Module, rule: LocalRule, x: Any, y: Any) -> Audit:
    blocks = rule.cut(network)
    modules = {part.name: part.parameters for part in parts(network)}
    for k in range(1, len(blocks.segments) + 1):
        modules[f"auxiliary {k}"] = [p for module in rule.auxiliary(k) for p in module.parameters()]
    owned = [{*(part.name for part in segment.parts), f"auxiliary {k}"} for k, segment in enumerate(blocks.segments, 1)]
    owned[-1].add("head")
    with evaluating(network), _thawed([*network.parameters(), *rule.parameters()]) as frozen:
        reader = _Reader(modules, frozen)
        step = rule(network, x, y)
    rows = []
    for k, (loss, own) in enumerate(zip(step.losses, owned, strict=True), 1):
        uses = reader.used(step.credit.get(k, loss))
        rows.append(_row(reader, k, None, None, reader.reached(loss), uses, own if len(owned) > 1 else set()))
    return Audit(tuple(rows), reader.shared)


def _row(
    reader: _Reader, node: int, left: int | None, right: int | None, reaches: set[str], uses: set[str], own: set[str]
) -> NodeAudit:
    outside = (reaches | uses) - own
    return NodeAudit(node, left, right, reader.order(reaches), reader.order(uses), reader.order(outside))


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
