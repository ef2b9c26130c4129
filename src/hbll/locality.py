"""Audit: which parameters does each node's loss reach, and whose weights does its credit need?

Both answers are read off autograd's own graph, leaf by leaf, so they hold for the modules at hand and not only on paper.
Frozen parameters count among what credit uses; weights that a module uses detached from the graph are not seen.
Inverted arcs transport weights, but only across one arc: the credit of node n uses the Jacobian of its right neighbour.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbll.network import TreeNetwork
from hbll.objective import Objective
from hbll.stages import Stages
from hbll.trace import Trace

__all__ = ["Audit", "NodeAudit", "audit"]


@dataclass(frozen=True)
class NodeAudit:
    """What the graph says of one node; modules are named ``embed``, ``block 3``, ``head``."""

    node: int | str
    """A node, or the name of a loss beside them: ``embed`` (credit for the embedded input), ``rim``."""
    left: int | None
    right: int | None
    reaches: tuple[str, ...]
    """Modules whose parameters receive a gradient from the node's losses."""
    uses: tuple[str, ...]
    """Modules that the node's credit was carried back through."""
    outside: tuple[str, ...]
    """Those of either that are no part of the node's triple: its own block, its right neighbour, and from node 0 the
    embed."""


@dataclass(frozen=True)
class Audit:
    """The audit of a network under an objective, a row per node; ``str`` gives the table."""

    rows: tuple[NodeAudit, ...]
    shared: tuple[tuple[str, ...], ...]
    """Modules that own a parameter together: to the audit, a loss that reaches one of them reaches all."""

    @property
    def local(self) -> bool:
        """Whether no node reaches or uses anything outside its triple."""
        return not any(row.outside for row in self.rows)

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("node", "left", "right", "loss reaches", "credit uses", "outside its triple")]
        last = max(row.right or 0 for row in self.rows)
        for row in self.rows:
            sides = [str(row.node), *("-" if side is None else str(side) for side in (row.left, row.right))]
            sides[2] = "label" if row.right == last else sides[2]
            cells.append((*sides, *(", ".join(names) or "-" for names in (row.reaches, row.uses, row.outside))))
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
        lines += [f"{' and '.join(owners)} share parameters" for owners in self.shared]
        return "\n".join(line.rstrip() for line in lines)


def audit(network: TreeNetwork, objective: Objective, x: Any, y: Any) -> Audit:
    """Carries one step out, block by block, and reads the reach of every loss off its graph.

    Args:
        network, objective, x, y: as for ``objective(network, x, y)``. No gradient is left behind.
    """
    owners = _owners(network)
    frozen = [p for p in network.parameters() if not p.requires_grad]
    uses: dict[int, set[str]] = {}

    def names(value: Tensor, *, with_frozen: bool = False) -> set[str]:
        ignored = set() if with_frozen else {id(p) for p in frozen}
        leaves = (leaf for leaf in _leaves(value) if id(leaf) not in ignored)
        return {name for leaf in leaves for name in owners.get(id(leaf), ())}

    def observe(nodes: tuple[int, ...], value: Tensor) -> None:
        for n in nodes:
            uses.setdefault(n, set()).update(names(value, with_frozen=True))

    # One stage a call: a stacked call would connect every loss of a level with every stage of it.
    stages = Stages(network.blocks, objective.rule.stage, "loop")
    training = objective.training
    objective.eval()  # what the rule keeps from step to step stays as it is
    for parameter in frozen:  # only what may receive a gradient leaves a trace in the graph
        parameter.requires_grad_()
    try:
        trace = Trace(network, stages, objective.rule, x, y)
        trace.observer = observe
        objective.follow(trace)
    finally:
        objective.train(training)
        for parameter in frozen:
            parameter.requires_grad_(False)
    reaches: dict[int | str, set[str]] = {}
    for nodes, term in trace.terms:
        for n in (nodes,) if isinstance(nodes, str) else nodes:
            reaches.setdefault(n, set()).update(names(term))

    def order(found: set[str]) -> tuple[str, ...]:
        return tuple(module for module in _modules(network) if module in found)

    rows = []
    for n, found in sorted(reaches.items(), key=lambda item: (isinstance(item[0], str), item[0])):
        if isinstance(n, str):
            rows.append(NodeAudit(n, None, None, order(found), (), order(found - {"embed"})))
            continue
        left, right = stages.tree.interval(n)
        triple = {f"block {b}" for node in (n, right) if node < stages.tree.nodes for b in stages.numbers[node - 1]}
        triple |= {"head"} if right == stages.tree.nodes else set()
        triple |= {"embed"} if left == 0 else set()
        used = uses.get(n, set())
        rows.append(NodeAudit(n, left, right, order(found), order(used), order((found | used) - triple)))
    shared = {names for names in owners.values() if len(names) > 1}
    return Audit(tuple(rows), tuple(sorted(shared)))


def _modules(network: TreeNetwork) -> dict[str, torch.nn.Module]:
    blocks = {f"block {n}": block for n, block in enumerate(network.blocks, 1)}
    return {"embed": network.embed, **blocks, "head": network.head}


def _owners(network: TreeNetwork) -> dict[int, tuple[str, ...]]:
    owners: dict[int, list[str]] = {}
    for name, module in _modules(network).items():
        for parameter in module.parameters():
            owners.setdefault(id(parameter), []).append(name)
    return {key: tuple(names) for key, names in owners.items()}


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
