"""Rules made of two choices: *states*, what the stages are evaluated on, and *credit*, how each ought to move.

States yield fronts, stages that were evaluated at once; credit answers each of them with losses, by which the stages move
and their graph is dropped, before the next front is computed. What they share beside the fronts are targets: where the
states of a tree's nodes are to move, which other nodes may read.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hbll.calls import Context, check_shape
from hbll.carry import Carry, gathering
from hbll.cut import Stage
from hbll.engine import Engine, Evaluation, make_engine
from hbll.losses import Loss, check_labels, check_prediction, counts, cross_entropy, mean_loss, takes_known_labels
from hbll.modes import evaluating, still_statistics, tracking_norms
from hbll.names import check_choice, check_number
from hbll.network import Chain
from hbll.rule import LateError, Rule, StageLoss, Step, attach_gradients
from hbll.rules.rim import rim_loss
from hbll.tree import Tree

__all__ = [
    "Batch",
    "Choice",
    "Composed",
    "Credit",
    "Cut",
    "EngineChoice",
    "Front",
    "States",
    "Target",
    "Targets",
    "Walk",
    "count_walks",
    "per_sample",
    "train_head",
]

EngineChoice: TypeAlias = Literal["auto", "loop", "batched"]
"""How blocks that could be evaluated at once are: one by one, or stacked in one call; auto takes the faster."""


@dataclass(frozen=True)
class Batch:
    """A mini-batch, embedded."""

    x: Any
    y: Any
    state: Tensor
    """The embedded input, (B, ...)."""
    context: Context
    sources: tuple[Tensor, ...] = ()
    """What embed returned of both, with its graph."""
    leaves: tuple[Tensor, ...] = ()
    """What stands for it in ``state`` and ``context``: leaves that gather gradients, so that many may read them and the
    embed is walked back once. None in a step that is only looked at, which has the graph itself."""
    late: bool = False
    """Whether it came in some steps before."""

    @classmethod
    def of(cls, network: Chain, x: Any, y: Any, step: Step) -> "Batch":
        """Embeds a batch."""
        state, context = network.embedded(x)
        leaves: dict[Tensor, Tensor] = {}
        if not step.look:
            (state, context), leaves = gathering((state, dict(context)))
        return cls(x, y, state, context, tuple(leaves), tuple(leaves.values()))

    @property
    def context_leaves(self) -> tuple[Tensor, ...]:
        """Those of what the embed computed of the context by weights that are trained; all stages may take them."""
        return tuple(leaf for leaf in self.leaves if leaf is not self.state)

    def embed_losses(self) -> Iterator[StageLoss]:
        """The loss that walks the embed back by all gradients that were gathered."""
        read = [(s, leaf.grad) for s, leaf in zip(self.sources, self.leaves, strict=True) if leaf.grad is not None]
        if read:
            for leaf in self.leaves:
                leaf.grad = None
            sources, gradients = zip(*read, strict=True)
            value = attach_gradients(gradients[0].new_zeros(()), sources, gradients)
            yield StageLoss("embed", value, gathered=True)


@dataclass(frozen=True)
class Front:
    """Stages that were evaluated at once, n of them."""

    stages: tuple[int, ...]
    parents: tuple[int, ...]
    """The stages whose graphs the inputs carry on; 0 is the embed."""
    inputs: Tensor
    """(n, B, ...)."""
    evaluation: Evaluation
    """Outputs (n, B, ...), with graph."""
    batches: tuple[Batch, ...]
    """The mini-batch of every stage."""
    depth: int
    """The span at which the outputs were there."""
    active: tuple[int, ...]
    """All stages that the step evaluates."""
    states: Tensor | None = None
    """(n, B, ...): the estimate of the chain's states where it is not the outputs, without graph."""
    beside: tuple[StageLoss, ...] = ()
    """Losses of what predicted the states."""

    @property
    def outputs(self) -> Tensor:
        """The outputs without graph, (n, B, ...)."""
        return self.evaluation.outputs.detach()

    @property
    def title(self) -> int | tuple[int, ...]:
        """Whose losses these are, as ``StageLoss`` says it."""
        return self.stages if len(self.stages) > 1 else self.stages[0]


@dataclass(frozen=True)
class Target:
    """Where a state is to move."""

    value: Tensor
    """(B, ...), without graph."""
    depth: int
    """The span at which it was there."""


Targets: TypeAlias = dict[int, Target]
"""By stage."""


@dataclass(frozen=True)
class Cut:
    """The stages of a network, numbered like nodes from 1 on, with the tree over them and what evaluates them.

    Attributes:
        engine: evaluates stages.
        choice: the user's, by which other engines are made too.
        pulls_back: whether credit pulls gradients back to the inputs of fronts, which are then leaves.
        norms: what of blocks and head keeps running statistics: of the fronts alone, and of the head on the last of them.
    """

    stages: tuple[Stage, ...]
    network: Chain
    tree: Tree
    engine: Engine
    choice: EngineChoice
    pulls_back: bool
    norms: tuple[_NormBase, ...]

    @classmethod
    def of(cls, network: Chain, stages: tuple[Stage, ...], choice: EngineChoice, pulls_back: bool) -> "Cut":
        """With an engine of a user's choice."""
        engine = make_engine(stages, [stage.title for stage in stages], choice)
        norms = (*tracking_norms(network.blocks), *tracking_norms(network.head))
        return cls(stages, network, Tree(len(stages) + 1), engine, choice, pulls_back, norms)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def nodes(self) -> tuple[int, ...]:
        """All stages."""
        return self.tree.chain

    @property
    def last(self) -> int:
        """The last stage, S."""
        return len(self.stages)

    def depth(self, nodes: Iterable[int]) -> int:
        """The blocks of the longest of these stages: what evaluating them at once adds to the span."""
        return max(len(self.stages[n - 1].blocks) for n in nodes)

    def size(self, nodes: Iterable[int]) -> int:
        """The blocks of all of these stages together."""
        return sum(len(self.stages[n - 1].blocks) for n in nodes)

    def front(
        self,
        stages: tuple[int, ...],
        parents: tuple[int, ...],
        inputs: Tensor,
        batches: Sequence[Batch],
        depth: int,
        step: Step,
        active: tuple[int, ...] | None = None,
    ) -> Front:
        """Evaluates stages at once on inputs (n, B, ...) that were there at span ``depth``."""
        if self.pulls_back:
            inputs = inputs.detach().requires_grad_()
        with _kept_buffers() if self.pulls_back else nullcontext():
            evaluation = self.engine(stages, inputs, [batch.context for batch in batches])
        step.engine = self.engine.name(inputs[0])
        depth += self.depth(stages)
        step.count(self.size(stages), depth)
        return Front(stages, parents, inputs, evaluation, tuple(batches), depth, active or self.nodes)

    def outputs(self, stages: Sequence[int], inputs: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
        """Evaluates stages, uncounted, as many at once as can be: states (B, ...) to states of that shape."""
        found: dict[int, Tensor] = {}
        for group in self.engine.partition(stages, inputs):
            contexts = [batches[p].context for p in group]
            nodes = tuple(stages[p] for p in group)
            with still_statistics(self.norms):
                outputs = self.engine(nodes, torch.stack([inputs[p] for p in group]), contexts).outputs
            check_shape(self.stages[nodes[0] - 1].title, outputs[0], inputs[group[0]])
            found.update(zip(group, outputs.unbind(0), strict=True))
        return [found[p] for p in range(len(stages))]

    @torch.no_grad()
    def peek(self, stages: Sequence[int], inputs: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
        """The same without graph."""
        return self.outputs(stages, inputs, batches)


@contextmanager
def _kept_buffers() -> Iterator[None]:
    """What is compiled inside keeps what its walk back needs, so that there may be several."""
    config = sys.modules.get("torch._functorch.config")  # nothing was compiled if nothing has imported it
    with config.patch(donated_buffer=False) if config else nullcontext():
        yield


class Choice(nn.Module, ABC):
    """What a rule is made of: it may have modules for the stages, and keep something from step to step."""

    @property
    def in_flight(self) -> bool:
        """Whether there are mini-batches that it is not done with."""
        return False

    def carries(self) -> Mapping[str, Carry]:
        """What is kept from step to step, by name."""
        return {}

    def auxiliary(self, stage: int) -> list[nn.Module]:
        """The modules that belong to a stage."""
        return []


class States(Choice):
    """Estimates of the states: what each stage is evaluated on."""

    graphs_meet = False
    """Whether the graphs of several stages' losses have parts in common."""

    pipelined = False
    """Whether stages are evaluated on different mini-batches."""

    label_waits = False
    """Whether mini-batches wait for their turn, and their labels with them."""

    embed_read_once = True
    """Whether the embedded input is done with once the first stage has moved."""

    @abstractmethod
    def fronts(self, cut: Cut, batch: Batch | None, targets: Targets, step: Step) -> Iterator[Front]:
        """Evaluates every stage once; without a batch those alone that have one in flight."""


class Credit(Choice):
    """Estimates of how each state ought to move to lower the loss."""

    takes_pipelined = False
    """Whether stages may be evaluated on different mini-batches."""

    pulls_back = False
    """Whether gradients are pulled back through the fronts' own evaluations."""

    @abstractmethod
    def losses(self, fronts: Iterator[Front], cut: Cut, targets: Targets, step: Step) -> Iterator[StageLoss]:
        """Answers every front by losses that move its stages; asking for the next front drops the graph of the last."""


class Composed(Rule):
    """A rule of states and credit.

    Args:
        network: the network to train.
        states, credit: the choices, made for this network.
        stage: consecutive blocks that form one node, evaluated one after the other with exact gradients inside; or a number
            for every node, such as (2, 2, 3).
        rim: weight of the mean loss of the rim's paths, trained end to end beside the rule; keeps short paths accurate.
        loss: the label's loss.
        engine: how stages that are evaluated at once are: one by one, or stacked in one call.
    """

    trains_loss = False

    def __init__(
        self,
        network: Chain,
        states: States,
        credit: Credit,
        *,
        stage: int | Sequence[int] = 1,
        rim: float = 0.0,
        loss: Loss = cross_entropy,
        engine: EngineChoice = "auto",
    ) -> None:
        super().__init__(network, stage=stage, loss=loss)
        check_number("rim", rim, least=0.0)
        check_choice("engine", engine, ("auto", "loop", "batched"))
        if states.pipelined and not credit.takes_pipelined:
            raise ValueError(
                f"{type(states).__name__} hold a mini-batch for every stage, which {type(credit).__name__} cannot answer: "
                "take readouts, or late credit"
            )
        self.rim = rim
        self.choice: EngineChoice = engine
        self._evaluated: Cut | None = None
        self._apart: Cut | None = None
        self._scored: tuple[int, torch.Size] | None = None
        self.states = states
        self.credit = credit

    @property
    def evaluated(self) -> Cut:
        """The stages with their engines, made anew when the network has other modules than before."""
        stages = self.stages
        if self._evaluated is None or self._evaluated.stages is not stages:
            self._evaluated = Cut.of(self.network, stages, self.choice, self.credit.pulls_back)
            self._scored = None
        return self._evaluated

    @property
    def apart(self) -> Cut:
        """The stages, each to be evaluated by itself."""
        stages = self.stages
        if self._apart is None or self._apart.stages is not stages:
            self._apart = Cut.of(self.network, stages, "loop", self.credit.pulls_back)
        return self._apart

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        # Where a step is only looked at, a stacked call would connect every loss of a front with every stage of it.
        cut = self.apart if step.look else self.evaluated
        if x is None and not self.in_flight:
            raise ValueError("there is no mini-batch in flight: hand one over")
        if x is None and not self.training:
            raise ValueError("what is in flight moves on in training mode: hand a batch over, or call rule.train()")
        batch = None if x is None else Batch.of(self.network, x, y, step)
        if batch and self.training and not step.look and self.states.label_waits and takes_known_labels(self.loss):
            self._check_labels(batch)
        targets: Targets = {}
        beside: list[StageLoss] = []

        def fronts() -> Iterator[Front]:
            nonlocal batch
            for front in self.states.fronts(cut, batch, targets, step):
                beside.extend(front.beside)
                if 1 in front.stages:  # of which the rim takes the batch
                    batch = front.batches[front.stages.index(1)]
                yield front
                del front

        losses = self.credit.losses(fronts(), cut, targets, step)
        if self.states.graphs_meet and not step.look:
            losses = _together(losses)
        early = self.states.embed_read_once and not self.rim
        for loss in losses:
            yield replace(loss, leaves=(*loss.leaves, *batch.leaves)) if batch and batch.leaves else loss
            if batch and early and 1 in loss.stages and not batch.context_leaves:
                yield from batch.embed_losses()
            del loss
        counted = counts(self.loss, batch.y) if batch else None
        yield from (loss.times(counted) for loss in beside)
        if batch and self.rim:
            mean = rim_loss(self.network, batch.state, batch.context, batch.y, self.loss, step)
            yield StageLoss("rim", self.rim * mean, leaves=batch.leaves)
        if batch:
            yield from batch.embed_losses()

    def _check_labels(self, batch: Batch) -> None:
        """Looks at labels that nothing else would look at before they are due.

        Raises:
            ValueError: the loss will not take them.
        """
        if self._scored is None:
            devices = [batch.state.device] if batch.state.device.type == "cuda" else []
            try:
                with torch.no_grad(), evaluating(self.network), torch.random.fork_rng(devices):
                    scores = check_prediction(self.network(batch.x))
            except RuntimeError:  # of which the step itself says better where
                return
            # Where the head scores tokens, as many of them as the state has may be others in another batch.
            tokens = scores.ndim - 1
            same = scores.shape[:-1] == batch.state.shape[:tokens]
            self._scored = (tokens if same else 1), scores.shape
        shared, shape = self._scored
        check_labels(self.loss, torch.Size([*batch.state.shape[:shared], *shape[shared:]]), batch.y)

    @property
    def in_flight(self) -> bool:
        return self.states.in_flight or self.credit.in_flight

    def auxiliary(self, stage: int) -> list[nn.Module]:
        return [*self.states.auxiliary(stage), *self.credit.auxiliary(stage)]

    def near(self, stage: int) -> list[nn.Module]:
        left, right = self.evaluated.tree.interval(stage)
        before = [self.network.embed] if left == 0 else []
        return [*before, *([self.network.head] if right > len(self.stages) else self.stages[right - 1].blocks)]

    def carries(self) -> Mapping[str, Carry]:
        return {**self.states.carries(), **self.credit.carries()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_evaluated": None, "_apart": None}


def _together(losses: Iterable[StageLoss]) -> Iterator[StageLoss]:
    """Losses whose graphs meet as one."""
    found = list(losses)
    stages = tuple(s for loss in found for s in loss.stages if isinstance(s, int))
    yield StageLoss(stages, torch.stack([loss.value for loss in found]).sum())


def train_head(loss: Loss, cut: Cut, state: Tensor, batch: Batch, step: Step) -> tuple[StageLoss, Tensor]:
    """The label's loss on the state (B, ...) of the last stage, which trains the head, and its gradient in the state."""
    state = state.detach().requires_grad_()
    prediction = cut.network.read(state, batch.context)
    try:
        value = mean_loss(loss, prediction, batch.y)
    except Exception as error:
        if batch.late:
            raise LateError(
                f"the loss of a mini-batch that came in some steps before cannot be found, and what was in flight is "
                f"dropped: {error}"
            ) from error
        raise
    step.label_loss = value.detach()
    step.report([cut.last], error=value.unsqueeze(0))
    trained = [*(p for p in cut.network.head.parameters() if p.requires_grad), *batch.context_leaves]
    gradient, *for_head = torch.autograd.grad(value, [state, *trained], materialize_grads=True)
    return StageLoss(cut.last, attach_gradients(value, trained, for_head)), gradient


@dataclass(frozen=True)
class Walk:
    """A front's walk back, to be counted once it is known when the gradients at its outputs are there."""

    stages: tuple[int, ...]
    parents: tuple[int, ...]
    parameters: bool
    """Whether the stages have any that are trained."""
    inputs: bool
    """Whether the inputs carry a graph."""

    @classmethod
    def of(cls, front: Front) -> "Walk":
        """That of a front whose graph is walked by the losses."""
        return cls(front.stages, front.parents, bool(front.evaluation.parameters), front.inputs.requires_grad)


def count_walks(walks: Sequence[Walk], arrivals: Mapping[int, int], cut: Cut, step: Step) -> None:
    """Counts the walk back through the graphs of fronts, given in the order of their evaluation.

    A front is walked once: its parameters always, its inputs if they carry a graph, and the states inside its stages. The
    engine's call is one operation, so all of its inputs are walked then.

    Args:
        arrivals: the span at which the gradient at a stage's output was there.
    """
    arrived = dict(arrivals)
    for walk in reversed(walks):
        depths = [arrived[n] for n in walk.stages if n in arrived]
        if not depths:
            continue
        blocks = cut.size(walk.stages)
        depth = max(depths) + cut.depth(walk.stages)
        if walk.parameters:
            step.count(2 * blocks - len(walk.stages), depth)
        if walk.inputs:
            step.count(len(walk.stages) if walk.parameters else blocks, depth)
            for parent in walk.parents:
                arrived[parent] = max(arrived.get(parent, 0), depth)


def per_sample(values: Tensor) -> Tensor:
    """Averages over tokens: (n, B, ...) to (n, B)."""
    return values.flatten(2).mean(2) if values.ndim > 2 else values
