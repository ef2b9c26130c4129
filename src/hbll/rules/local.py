"""What every local rule is: each stage trains on a loss of its own, and what it hands to the next stage is detached.

Stages are evaluated in order, and each is walked back before the next: a step by ``rule.backward`` holds one stage, what
is beside it, and what it hands on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import or_
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from hbll.calls import Context, Readout
from hbll.carry import map_tensors
from hbll.losses import IGNORED, Loss, cross_entropy, mean_loss
from hbll.modes import evaluating, is_trained
from hbll.network import Chain
from hbll.rule import Message, Rule, StageLoss, Step
from hbll.rules.lazy import Waiting

__all__ = ["Cost", "Labels", "LocalRule", "detached"]

LocalLoss: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""(k, rows, classes) -> the loss of stage k, a scalar with the graph of the stage; see ``LocalRule.local_loss``."""


class Labels:
    """The classes of a batch, one for each sample or for each token; those of -100 stand for none and are left out.

    Args:
        y: integers, (B,) or (B, T).
        dims: how many dimensions they may have.

    Raises:
        ValueError: it is something else.
    """

    def __init__(self, y: Any, dims: Sequence[int] = (1, 2)) -> None:
        if not isinstance(y, Tensor) or y.is_floating_point() or y.ndim not in dims:
            form = " or ".join(("(B,)", "(B, T)")[dim - 1] for dim in dims)
            got = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(f"labels are integer classes here, {form} as the head's scores are; got {got}")
        self.y = y
        self.classes = y.flatten().long()
        self.kept: Tensor | None = None
        counts = self.classes != IGNORED
        if not counts.all():
            self.kept = counts.nonzero().squeeze(1)
            self.classes = self.classes[self.kept]

    def __len__(self) -> int:
        """How many count; where none does there is nothing to learn."""
        return len(self.classes)

    def check(self, state: Tensor) -> None:
        """Raises ValueError unless there is one for each sample of a state (B, ...), or for each token of one (B, T, F)."""
        tokens = [state.shape[:2]] if state.ndim == 3 else []
        if self.y.shape not in (state.shape[:1], *tokens):
            each = f"{len(state)} samples" + "".join(f", or for each of their {length} tokens" for _, length in tokens)
            raise ValueError(f"local rules take one class for each of {each}; got labels {tuple(self.y.shape)}")

    def rows(self, state: Tensor) -> Tensor:
        """What the classes are of: samples (n, ...) of a state (B, ...), or tokens (n, F) of one (B, T, F)."""
        rows = state.flatten(0, self.y.ndim - 1)
        return rows if self.kept is None else rows[self.kept]


@dataclass(frozen=True)
class Cost:
    """What a stage costs, in the units of ``hbll.rule.Step``."""

    forward: int
    """Evaluations, one after the other."""
    products: int
    """Vector-Jacobian products of a walk back that ends at the stage's own input."""
    back: int
    """Those of them in which each needs the one before; a block's two products need not wait for each other."""


class OfRows(nn.Module):
    """A classifier of rows, samples or tokens, as one of states.

    Args:
        classifier: rows (n, ...) -> logits (n, C).
        dims: of a state's dimensions the first so many number its rows.
    """

    def __init__(self, classifier: nn.Module, dims: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.dims = dims

    def forward(self, state: Tensor) -> Tensor:
        return self.classifier(state.flatten(0, self.dims - 1)).unflatten(0, state.shape[: self.dims])


class LocalRule(Rule):
    """A training rule by which every stage has a loss of its own.

    A subclass defines ``local_loss``, or ``losses``; and if it ``expect``s modules of its own, ``made``.

    Args:
        network: the network to train.
        stage: consecutive blocks that are trained as one, or a number for every stage.
        loss: the label's loss, one value per sample or per token.

    Raises:
        ValueError: the network cannot be cut so, or two stages have a weight in common and the rule cannot share it.
    """

    apart: ClassVar[bool] = False
    """Whether the head learns beside the last stage, which then has a local loss too, and not through it."""

    shares: ClassVar[bool] = True
    """Whether several stages may train one weight, whose gradients add up."""

    by_itself: ClassVar[bool] = True
    """Whether a stage's loss needs nothing of other stages but what the one before hands on."""

    beside_cost: ClassVar[int] = 0
    """Evaluations that a stage's own modules count as, forth and back; heads and maps of one linear layer count as none."""

    def __init__(self, network: Chain, *, stage: int | Sequence[int] = 1, loss: Loss = cross_entropy) -> None:
        super().__init__(network, stage=stage, loss=loss)
        self.beside = nn.ModuleList()
        self.built = True  # until modules are expected
        self.label_dims: tuple[int, ...] = (1, 2)  # of which the head's scores leave one, once they have been seen
        if not self.shares:
            _check_untied(self)

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        return self.in_order(x, y, step, self.local_loss)

    def local_loss(self, k: int, rows: Tensor, classes: Tensor) -> Tensor:
        """The loss of a stage, a scalar with the graph of the stage and its own modules.

        Args:
            k: the stage, from 1 to S; the last one if the head learns ``apart``.
            rows: what it handed on: samples (n, ...), or tokens (n, F) if every token has a label.
            classes: their labels, (n,).
        """
        raise NotImplementedError

    @property
    def readouts(self) -> list[Readout]:
        """The readouts that the rule trains: the chain."""
        return self.network.readouts[:1]

    def classifier(self, stage: int) -> nn.Module | None:
        """Of the modules that were ``made`` for a stage the one that tells the label, rows (n, ...) -> logits (n, C)."""
        return None

    def exit(self, stage: int) -> Readout | None:
        if not self.built:
            raise ValueError(
                "readouts of stages wait for the shapes of states: call rule.build(x) with a batch of inputs"
            )
        classifier = self.classifier(stage)
        return self.exit_by(stage, OfRows(classifier, self.label_dims[0])) if classifier else None

    # What a rule has beside the network

    def expect(self, *parameters: int, last: bool = True) -> None:
        """Announces modules for every stage, with so many parameters each, at most.

        Args:
            last: whether the last stage has them too.
        """
        like = next((p for p in self.network.parameters() if p.is_floating_point()), torch.empty(0))
        for _ in self.stages if last else self.stages[:-1]:
            self.beside.append(nn.ModuleList(Waiting(count, like) for count in parameters))
        self.built = False

    def made(self, shapes: Sequence[torch.Size], classes: int) -> Sequence[Sequence[nn.Module]]:
        """The announced modules of every stage that has some.

        Args:
            shapes: of each stage's output without the batch, or of one of its tokens if every token has a label.
            classes: how many the head scores.
        """
        raise NotImplementedError

    def build(self, x: Any) -> None:
        """Makes the modules that were announced, for states as a batch of inputs gives them, in their precision and on their
        device; once, and at the latest in the first step.

        Raises:
            ValueError: the head scores every token, and what a stage hands on is no tokens.
        """
        if self.built:
            return
        device = next((p.device.type for p in self.network.parameters()), "cpu")
        # Without autocast, under which states have less precision than weights are to have.
        with evaluating(self.network), torch.no_grad(), torch.autocast(device, enabled=False):
            state, context = self.network.embedded(map_tensors(lambda tensor: tensor[:1], x))
            states = []
            for stage in self.stages:
                state = stage.forward(state, **context)  # not as compiled, which would be for one sample
                states.append(state)
            logits = self.logits(states[-1], context)
        for stage, state in zip(self.stages, states, strict=True):
            if logits.ndim == 3 and state.ndim != 3:
                raise ValueError(
                    f"the head scores every token, and {stage.title} hands on {tuple(state.shape)}: for labels per token, "
                    "local rules need states (B, T, F)"
                )
        self.label_dims = (logits.ndim - 1,)
        waiting = [module for module in self.beside.modules() if isinstance(module, Waiting)]
        # Where weights were loaded, the stream of random numbers goes on as if none had been drawn.
        with torch.random.fork_rng(devices=[], enabled=any(module.loaded for module in waiting)):
            made = self.made([state.shape[logits.ndim - 1 :] for state in states], logits.shape[-1])
        places = iter(waiting)
        for i, (modules, state) in enumerate(zip(made, states, strict=False)):
            self.beside[i] = nn.ModuleList(next(places).filled(module.to(state)) for module in modules)
        self.built = True

    def auxiliary(self, stage: int) -> list[nn.Module]:
        return list(self.beside[stage - 1].children()) if stage <= len(self.beside) else []

    # What steps are made of

    def in_order(self, x: Any, y: Any, step: Step, local_loss: LocalLoss) -> Iterator[StageLoss]:
        """The losses of a step whose stages are evaluated one after the other, each on what the one before handed on."""
        self.build(x)
        labels = Labels(y, self.label_dims)
        if not len(labels):
            yield self.nothing(y, step)
            return
        step.count(*self.local_cost())
        messages = [Message(x, y, {})]
        for k in range(1, len(self.stages) + 1):
            yield from self._stage_losses(k, messages.pop(), labels, local_loss, step, messages.append)

    def stage_losses(
        self, stage: int, given: Message, step: Step, hand_on: Callable[[Message], None]
    ) -> Iterator[StageLoss]:
        self.check_apart()
        cost = self.costs()[stage - 1]
        beside = self.beside_cost if self.auxiliary(stage) else 0
        step.count(cost.forward + cost.products + 3 * beside, cost.forward + 2 * beside + cost.back)
        labels = Labels(given.labels, self.label_dims)
        yield from self._stage_losses(stage, given, labels, self.local_loss, step, hand_on)

    def check_apart(self) -> None:
        if not self.by_itself:
            super().check_apart()
        if not self.built:
            raise ValueError(
                f"the modules of {type(self).__name__} are made by an example: make_rule(name, network, x)"
            )

    def _stage_losses(
        self,
        k: int,
        given: Message,
        labels: Labels,
        local_loss: LocalLoss,
        step: Step,
        hand_on: Callable[[Message], None],
    ) -> Iterator[StageLoss]:
        state, context = self.network.embedded(given.state) if k == 1 else (given.state, given.context)
        output = self.stages[k - 1](state, **context)
        labels.check(output)
        state, last = output.detach(), k == len(self.stages)
        if not last:
            hand_on(Message(state, given.labels, detached(context)))
        if not len(labels):
            nothing = torch.zeros((), device=state.device)
            step.report([k], error=nothing.unsqueeze(0))
            step.label_loss = nothing if last else step.label_loss
            yield StageLoss(k, nothing)
            return
        if not last or self.apart:
            value = local_loss(k, labels.rows(output), labels.classes)
        else:
            value = self.label_loss(self.logits(output, context), given.labels, step)
        step.report([k], error=value.unsqueeze(0))
        found = [StageLoss(k, value)]
        del output, value
        yield found.pop()  # whose graph nothing holds here while it is walked back
        if last and self.apart:
            yield StageLoss(k, self.label_loss(self.logits(state, detached(context)), given.labels, step))

    def nothing(self, y: Tensor, step: Step) -> StageLoss:
        """The loss, 0, of a batch no label of which counts: nothing moves."""
        step.label_loss = torch.zeros((), device=y.device)
        return StageLoss(len(self.stages), step.label_loss)

    def logits(self, state: Tensor, context: Context) -> Tensor:
        """The head's scores of the last state, (B, C) or (B, T, C).

        Raises:
            ValueError: the head returns something else.
        """
        scores = self.network.read(state, context)
        if not isinstance(scores, Tensor) or scores.ndim not in (2, 3):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(f"for local rules the head gives scores of classes, (B, C) or (B, T, C); got {got}")
        return scores

    def label_loss(self, logits: Tensor, y: Tensor, step: Step) -> Tensor:
        """The mean loss of the head's scores, a scalar with graph; noted in the step.

        Raises:
            ValueError: there are other scores than labels.
        """
        if logits.shape[:-1] != y.shape:
            raise ValueError(
                f"the head's scores {tuple(logits.shape)} take labels {tuple(logits.shape[:-1])}; got {tuple(y.shape)}"
            )
        value = mean_loss(self.loss, logits, y)
        step.label_loss = value.detach()
        return value

    def costs(self) -> list[Cost]:
        """What each stage costs; of the embed, that it is trained makes the first block's input product necessary."""
        found = []
        for k, stage in enumerate(self.stages, 1):
            trained = [is_trained(block) for block in stage.blocks]
            below = list(accumulate([k == 1 and is_trained(self.network.embed), *trained], or_))[:-1]
            reached = sum(map(or_, trained, below))
            found.append(Cost(len(trained), sum(trained) + sum(below), reached))
        return found

    def local_cost(self) -> tuple[int, int]:
        """Work and span of a pass through detached stages, each of which walks back as soon as its own output is there."""
        work = span = ready = 0
        for k, cost in enumerate(self.costs(), 1):
            beside = self.beside_cost if self.auxiliary(k) else 0
            ready += cost.forward
            work += cost.forward + cost.products + 3 * beside
            span = max(span, ready + 2 * beside + cost.back)
        return work, span


def detached(context: Context) -> Context:
    """What stages after the first are given: the embed learns by the first one alone."""
    return map_tensors(Tensor.detach, context) if context else context


def _check_untied(rule: Rule) -> None:
    """Raises ValueError if two stages would train one weight of the network."""
    owners: dict[nn.Parameter, tuple[int, str]] = {}
    for place, (name, module) in enumerate(rule.parts.items()):
        stage = min(max(place, 1), len(rule.stages))  # the first one's is the embed, the last one's the head
        for parameter in module.parameters():
            other, its_name = owners.setdefault(parameter, (stage, name))
            if other != stage and parameter.requires_grad:
                raise ValueError(
                    f"{its_name} and {name} share a weight: two stages would train it, and by a {type(rule).__name__} they "
                    "have no loss in common; untie them, or put both into one stage"
                )
