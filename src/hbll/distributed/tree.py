"""The tree over processes: each owns a part of it, consecutive stages.

    torch.distributed.init_process_group("gloo")
    rule = hbll.make_rule("tree", network)                       # or "paper"; the same in every process
    worker = TreeWorker(rule)
    optimizer = torch.optim.AdamW(worker.parameters(), lr=1e-3)
    for x, y in batches:                                         # x is read by the first process, y by the last
        optimizer.zero_grad()
        worker.backward(x, y)
        optimizer.step()

A level of the tree is three rounds of messages, those of a round at once. The boundaries of left parents go to the owners
of their children. A node's prior goes to the owner of its right neighbour's block, which predicts its own target from it,
learns by the error, and sends back the error's gradient and the node's target. The embedded input is the left parent of a
node of every level, and its gradients come back to the first process. Parameters and their gradients never cross, and losses
and gradients are those of one process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hbll.distributed.link import Crossing, Exchange
from hbll.distributed.share import Share
from hbll.engine import stack
from hbll.losses import counts
from hbll.rule import Message, StageLoss, Step, walk_back
from hbll.rules.composed import Batch, Target, Targets, Walk, count_walks
from hbll.rules.tree import ArcCredit, TreeStates
from hbll.rules.tree import Tree as TreeRule
from hbll.tree import Tree

__all__ = ["Level", "TreeWorker", "check_tree", "even_sizes", "levels"]


@dataclass(frozen=True)
class Level:
    """A level of the tree over processes: its nodes, and what crosses."""

    nodes: tuple[int, ...]
    boundaries: tuple[Crossing, ...]
    """States of left parents, to processes that do not have them yet."""
    priors: tuple[Crossing, ...]
    """States of nodes, to the owners of their right neighbours."""
    credit: tuple[Crossing, ...]
    """The gradient of the embedded input."""

    @property
    def answers(self) -> tuple[Crossing, ...]:
        """What comes back for the priors."""
        return tuple(Crossing("answer", c.node, c.to, c.source) for c in self.priors)


def levels(owners: Sequence[int]) -> list[Level]:
    """What crosses between the processes of a tree, level by level.

    Args:
        owners: the process of every stage, in order.
    """
    tree = Tree(len(owners) + 1)
    owner = [owners[0], *owners, owners[-1]]  # of the embedded input, the stages, the head
    there = set(enumerate(owner))
    found = []
    for nodes in tree.levels:
        boundaries, priors = [], []
        for n in nodes:
            left, right = tree.interval(n)
            if (left, owner[n]) not in there:
                boundaries.append(Crossing("boundary", left, owner[left], owner[n]))
            if owner[n] != owner[right]:
                priors.append(Crossing("prior", n, owner[n], owner[right]))
        there.update((c.node, c.to) for c in boundaries + priors)  # who has the prior finds the target
        credit = [Crossing("credit", n, owner[n], owner[0]) for n in nodes if not tree.left(n) and owner[n] != owner[0]]
        found.append(Level(nodes, tuple(boundaries), tuple(priors), tuple(credit)))
    return found


@dataclass
class Known:
    """What a process knows of the states of a step, by node."""

    boundaries: Targets = field(default_factory=dict)
    priors: Targets = field(default_factory=dict)
    targets: Targets = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """Of the errors in the states; none in block scope."""
    arrivals: dict[int, int] = field(default_factory=dict)
    """As of ``hbll.rules.tree.Answer``."""

    def told(self, crossing: Crossing) -> tuple[Any, ...]:
        """What crosses from here."""
        n = crossing.node
        match crossing.what:
            case "boundary":
                boundary = self.boundaries[n]
                return boundary.value, boundary.depth, boundary.value.requires_grad
            case "prior":
                return self.priors[n].value, self.priors[n].depth
            case "answer":
                return self.targets[n].value, self.targets[n].depth, self.gradients.get(n), self.arrivals[n]
            case "credit":
                embedded = self.boundaries[0].value
                gradient, embedded.grad = embedded.grad, None
                return (gradient,)
        raise AssertionError(crossing)

    def take(self, crossing: Crossing, content: tuple[Any, ...]) -> None:
        """Takes what has crossed to here."""
        n = crossing.node
        match crossing.what:
            case "boundary":
                value, depth, learns = content
                self.boundaries[n] = Target(value.requires_grad_(learns), depth)
            case "prior":
                self.priors[n] = Target(*content)
            case "answer":
                value, depth, gradient, self.arrivals[n] = content
                self.targets[n] = Target(value, depth)
                if gradient is not None:
                    self.gradients[n] = gradient
            case "credit":
                (gradient,) = content
                embedded = self.boundaries[0].value  # to which this process's own nodes, of later levels, add theirs
                if gradient is not None:
                    embedded.grad = gradient if embedded.grad is None else embedded.grad + gradient


class TreeWorker(Share):
    """This process's stages of ``paper`` or ``tree``, and its messages to the other processes.

    Other processes' modules give their memory back: they are on the device ``meta`` until ``gather``. Random numbers that
    blocks draw, as for a dropout, are each process's own.

    Args:
        rule: the rule, made alike in every process and on this process's device.
        mesh: the processes, by ``stage`` and ``data``: replicas average their gradients. By default as many replicas of
            every part as there are processes.
        sizes: stages of every process, one after the other, such as (3, 4); by default as even as can be, over all processes
            unless the mesh says otherwise.
        wire: precision of floating point states and gradients on the way; None: their own.

    Raises:
        ValueError: the rule is another one, or has an option that reaches further than to the right neighbour; two processes
            share a weight; there are more processes than stages, or others than ``sizes`` or ``mesh`` are for.
    """

    def __init__(
        self,
        rule: TreeRule,
        mesh: DeviceMesh | None = None,
        *,
        sizes: Sequence[int] | None = None,
        wire: torch.dtype | None = None,
    ) -> None:
        self._states, self._credit = check_tree(rule)
        if sizes is None:
            sizes = even_sizes(len(rule.stages), dist.get_world_size() if mesh is None else mesh.mesh.shape[0])
        if min(sizes) < 1 or sum(sizes) != len(rule.stages):
            raise ValueError(f"the rule has {len(rule.stages)} stages: sizes are to add up to them; got {tuple(sizes)}")
        self._cut = rule.evaluated  # by an engine that is chosen for all blocks
        ends = [0, *accumulate(sizes)]
        super().__init__(rule, mesh, [tuple(range(a + 1, b + 1)) for a, b in pairwise(ends)])
        self._levels = levels([place for place, size in enumerate(sizes) for _ in range(size)])
        rounds = [crossings for level in self._levels for crossings in (level.boundaries, level.priors, level.answers)]
        firsts = {c.to: c for crossings in reversed(rounds) for c in reversed(crossings) if c.to}
        self._with_context = set(firsts.values())
        """The first message of a step to every other process has the context in it."""
        titles = [self.title(place) for place in range(len(sizes))]
        self._exchange = Exchange(self.place, self._ranks, titles, self._shares, self.on_wire, self.device, wire)
        dist.barrier(self._shares)  # NCCL's first call in a group is one of all its processes

    @property
    def messages_sent(self) -> int:
        """Messages to other processes so far."""
        return self._exchange.messages

    @property
    def bytes_sent(self) -> int:
        """Bytes of them."""
        return self._exchange.bytes

    def backward(self, x: Any = None, y: Any = None, scale: Tensor | float = 1.0, *, average: bool = True) -> Step:
        """A training step, whose gradients are added to ``.grad`` and averaged over the replicas.

        Args:
            x, y: a batch, the same in all processes, of which the first one reads the inputs, which it embeds, and the last
                one the labels. The others need neither, unless all labels of a batch may be left out (``IGNORED``): by them
                they see that nothing is to be learned. No larger than the first.
            scale: what gradients are multiplied by.
            average: whether the gradients in ``.grad``, those of earlier micro-batches among them, are then averaged: once,
                after the last one of a step, is enough.

        Returns:
            The process's part in the step: loss and work are what they are in one process if added up over all, the span if
            the largest is taken. The error of a stage is reported by the owner of its right neighbour, which finds it, its
            divergence by its own; the label's loss by the last process.

        Raises:
            ValueError: the embed computes a context by weights that are trained, or a batch is larger than the first.
            ConnectionError: another process is lost.
        """
        step = Step(scale=scale)
        walk_back(self._losses(x, y, step), step)
        if average:
            self._average()
        return step

    @torch.no_grad()
    def predict(self, x: Any = None, y: Any = None) -> tuple[Any, Any] | None:
        """The head's output of a batch by the chain, and its labels, in the last process; the others evaluate their stages
        and return None.

        Args: as of ``backward``. No larger than the first batch that was predicted.
        """
        before, after = (Crossing("chain", 0, place, place + 1) for place in (self.place - 1, self.place))
        if self.place == 0:
            state, context = self.rule.network.embedded(x)
        else:
            message = self._exchange([before], _nothing)[before]
            state, context = message.state, message.context
        for n in self.stages:
            state = self.rule.stages[n - 1](state, **context)
        if self.place == len(self.owned) - 1:
            return self.rule.network.read(state, context), y
        self._exchange([after], lambda _: Message(state, None, context))
        return None

    def _losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        cut, states, credit = self._cut, self._states, self._credit
        known = Known()
        walks: list[Walk] = []
        counted = counts(credit.loss, y)
        batch: Batch | None = None
        if self.place == 0:
            batch = Batch.of(cut.network, x, y, step)
            if batch.context_leaves:
                raise ValueError(
                    "the context that the embed returns is computed by weights that are trained, and the gradients of all "
                    "stages would have to come back to it: freeze them, or train in one process"
                )
            known.boundaries[0] = Target(batch.state, 0)

        def at_hand() -> Batch:
            assert batch is not None  # something has come in before there is anything to do
            return batch

        def message(crossing: Crossing) -> Message:
            return Message(known.told(crossing), None, at_hand().context if crossing in self._with_context else {})

        def cross(crossings: tuple[Crossing, ...]) -> None:
            nonlocal batch
            for crossing, found in self._exchange(crossings, message).items():
                known.take(crossing, found.state)
                if crossing in self._with_context:
                    batch = Batch(None, y, found.state[0], found.context)  # any state: the embedded input's like

        credit_due: tuple[Crossing, ...] = ()
        for level in self._levels:
            cross((*credit_due, *level.boundaries))
            own = [n for n in level.nodes if n in self.stages]
            above = [known.boundaries[cut.tree.left(n)].value for n in own]
            groups = cut.engine.groups(own, above)
            fronts = [states.front(cut, group, known.boundaries, at_hand(), step) for group in groups]
            walks += map(Walk.of, fronts)
            for front in fronts:
                known.priors.update(states.priors(front))
            cross(level.priors)
            for nodes in self._asked(level, known.priors):
                priors = [known.priors[n] for n in nodes]
                depth = max(prior.depth for prior in priors)
                answer = credit.answer(
                    nodes, stack([prior.value for prior in priors]), depth, cut, at_hand(), known.targets, step
                )
                known.arrivals.update(answer.arrivals)
                if credit.scope != "block":
                    known.gradients.update(answer.gradients)
                yield StageLoss(tuple(min(cut.tree.right(n), cut.last) for n in nodes), answer.loss).times(counted)
                del answer
            cross(level.answers)
            for n in known.priors.keys() & set(level.nodes):
                known.boundaries[n] = states.boundary(n, known.priors[n], known.targets)
            while fronts:
                front = fronts.pop(0)
                loss = credit.move(front, known.gradients, cut, known.targets, step)
                yield StageLoss(front.title, loss).times(counted)
                del front, loss
            credit_due = level.credit
        cross(credit_due)
        yield from at_hand().embed_losses()  # whose gradients are all in the first process
        count_walks(walks, known.arrivals, cut, step)

    def _asked(self, level: Level, priors: Targets) -> Iterator[tuple[int, ...]]:
        """The nodes of a level whose right neighbours this process has, those together that one call evaluates."""
        tree = self._cut.tree
        node_of = {tree.right(n): n for n in level.nodes}
        if self.stages[-1] == self._cut.last and tree.nodes in node_of:
            yield (node_of[tree.nodes],)
        own = [j for j in self.stages if j in node_of]
        for right in self._cut.engine.groups(own, [priors[node_of[j]].value for j in own]):
            yield tuple(node_of[j] for j in right)


def check_tree(rule: TreeRule) -> tuple[TreeStates, ArcCredit]:
    """What a rule is made of, once it is known that its nodes need no more than their parents; else raises ValueError."""
    if not isinstance(rule, TreeRule):
        raise ValueError(
            f"a tree over processes is for paper and tree, not for {type(rule).__name__}: hbll.distributed.Worker is for "
            "rules whose stages learn by themselves"
        )
    states, credit = rule.states, rule.credit
    assert isinstance(states, TreeStates)
    assert isinstance(credit, ArcCredit)
    if credit.scope == "tree":
        raise ValueError(
            "with scope='tree' gradients go back through all levels: take scope 'block' or 'triplet', or one process"
        )
    if rule.rim:
        raise ValueError("the paths of rim= are trained end to end: leave it out, or train in one process")
    if credit.noise:
        raise ValueError(
            "noise on targets is drawn from one generator for all nodes: leave noise= out, or train in one process"
        )
    return states, credit


def even_sizes(stages: int, processes: int) -> list[int]:
    """Stages of every process, as even as can be.

    Raises:
        ValueError: there are more processes than stages.
    """
    if processes > stages:
        raise ValueError(
            f"the rule has {stages} stages, and there are {processes} processes: start {stages} or fewer, or say by sizes= "
            "which are replicas"
        )
    return [stages * (place + 1) // processes - stages * place // processes for place in range(processes)]


def _nothing(crossing: Crossing) -> Message:
    raise AssertionError(f"{crossing} starts elsewhere")
