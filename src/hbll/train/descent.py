"""The training loop: batches through a rule, and optimizers that move its parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hbll.carry import map_tensors
from hbll.names import check_choice, check_number
from hbll.rule import Rule, Step
from hbll.train.divergence import LOOK_EVERY, Growth

__all__ = ["Descent", "Fit", "fit"]

Batch: TypeAlias = tuple[Any, Any]
"""What a rule takes: (x, y), each a tensor or a nest of them."""

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]

OneT = TypeVar("OneT")

_LOWER = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Fit:
    """What a training came to."""

    steps: int
    """Training steps, those in which a pipeline ran empty included."""

    losses: tuple[float, ...]
    """The mean over the batches of every epoch of what the rule minimises: comparable within a rule only."""


def fit(
    rule: nn.Module,
    batches: Iterable[Batch],
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    epochs: int = 1,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    accumulate: int = 1,
    clip: float | Sequence[float | None] | None = None,
    schedule: LRScheduler | Sequence[LRScheduler] | None = None,
    drain: bool = True,
    on_step: Callable[[int, Step], None] = lambda number, step: None,
) -> Fit:
    """Trains a network by a rule.

    A rule's own `backward` is used, which takes the least memory; a wrapper such as `DistributedDataParallel(rule)` is
    called and its loss walked back. Whether parts train or evaluate (dropout, batch norm) stays as it is. A loss that grows
    without bound is told once, by a `DivergenceWarning`.

    Args:
        rule: the rule, or a wrapper around one.
        batches: pairs (x, y) of tensors or nests of them, such as a list or a DataLoader; gone through once an epoch.
        optimizer: any of torch's, or several, all of which step: one for each stage over `rule.own(stage)`, for instance, or
            what `make_optimizers` makes. Together they hold all parameters that are not frozen.
        epochs: times to go through the batches.
        device: where to train; by default where the rule's parameters lie.
        precision: `float32`; or the type that autocast lowers what may be lowered to, for `float16` with a GradScaler.
        accumulate: batches of a training step, over which gradients are averaged; the last step of an epoch may have fewer.
            To a pipeline each is a step of its own.
        clip: norm that the gradients of the network, and those of the rule's own parameters, are each cut down to; or for
            every optimizer the norm that the gradients of what it holds are cut down to, or None.
        schedule: a schedule of learning rates, or several; all go on after each training step on a new batch.
        drain: whether batches that are still in flight after the last one pass through, so that every stage has learned from
            every batch; a step each.
        on_step: called after each training step with their number so far, from 1, and the step (of its last batch).

    Raises:
        ValueError: there is no rule or no batch, an option has no such value, or the optimizers do not fit the rule.
    """
    descent = Descent(rule, optimizer, device=device, precision=precision, clip=clip, schedule=schedule)
    return descent.run(batches, epochs=epochs, accumulate=accumulate, drain=drain, on_step=on_step)


def lowered(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, autocast lowers what may be lowered to a precision; of `float32` nothing."""
    lower = _LOWER.get(precision)
    return torch.autocast(device.type, lower) if lower else nullcontext()


class Descent:
    """A rule, and all that moves its parameters: optimizers, schedules, the scale of gradients.

    Args: as of `fit`.
    """

    def __init__(
        self,
        rule: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        device: torch.device | str | None = None,
        precision: Precision = "float32",
        clip: float | Sequence[float | None] | None = None,
        schedule: LRScheduler | Sequence[LRScheduler] | None = None,
    ) -> None:
        check_choice("precision", precision, ("float32", *_LOWER))
        self.wrapped = rule
        self.rule = _rule_in(rule)
        self.optimizers = _listed(optimizer, Optimizer)
        self.schedules = [] if schedule is None else _listed(schedule, LRScheduler)
        self.clip = clip
        _check_clip(clip, len(self.optimizers))
        _check_held(self.rule, self.optimizers)
        self.device = next(self.rule.parameters()).device if device is None else torch.device(device)
        if device is not None:
            rule.to(self.device)  # in place: the optimizers hold the same parameters
        self.precision: Precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.growth = Growth()

    def run(
        self,
        batches: Iterable[Batch],
        *,
        epochs: int = 1,
        accumulate: int = 1,
        drain: bool = True,
        on_step: Callable[[int, Step], None] = lambda number, step: None,
    ) -> Fit:
        """The training loop; as `fit`."""
        check_number("epochs", epochs, least=1)
        check_number("accumulate", accumulate, least=1)
        if epochs > 1 and isinstance(batches, Iterator):
            raise ValueError(f"batches can be gone through once, not {epochs} times: give a list or a DataLoader")
        number, losses = 0, []
        for _ in range(epochs):
            mean = _Mean()
            for group in _groups(batches, accumulate):
                steps = self.step(*group)
                mean.add(steps)
                self.growth.add(steps)
                number += 1
                on_step(number, steps[-1])
                if number % LOOK_EVERY == 0:
                    self.growth.look()
            losses.append(mean.value)
            self.growth.look()
        while drain and self.rule.in_flight:
            (step,) = self.step((None, None))
            number += 1
            on_step(number, step)
        return Fit(number, tuple(float(loss) for loss in losses))

    def step(self, *batches: Batch) -> list[Step]:
        """A training step on one batch or several, over which gradients are averaged; the rule's step of each."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        share = 1 / len(batches)
        scaled = self.scaler.is_enabled()
        scale = self.scaler.scale(torch.tensor(share, device=self.device)) if scaled else share
        steps = [self._gradients(*self._moved(batch), scale) for batch in batches]
        moved, drains = self._descend(), batches[0][0] is None
        if moved and not drains:  # a schedule is of so many batches
            for schedule in self.schedules:
                schedule.step()
        return steps

    def _moved(self, batch: Batch) -> Batch:
        """The batch on the device."""
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ValueError(
                f"batches are pairs (x, y), x and y tensors or nests of them; got a {type(batch).__name__}"
            )
        x, y = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch)
        return x, y

    def _gradients(self, x: Any, y: Any, scale: Tensor | float) -> Step:
        """Adds the gradients of a batch to `.grad`."""
        if self.wrapped is self.rule:
            with lowered(self.precision, self.device):
                return self.rule.backward(x, y, scale)
        with lowered(self.precision, self.device):
            # The wrapper walks back later, and in float16 gradients would have vanished by then.
            step = self.wrapped(x, y, scale) if self.scaler.is_enabled() else self.wrapped(x, y)
        (step.loss * scale).backward()
        return step

    def _descend(self) -> bool:
        """Moves the parameters along their gradients; whether it did, and they were finite."""
        if self.scaler.is_enabled() and not self._unscaled():
            return False
        for parameters, limit in self._limits():
            clip_grad_norm_(parameters, limit)
        for optimizer in self.optimizers:
            optimizer.step()
        return True

    def _unscaled(self) -> bool:
        """Takes the scale out of the gradients and adapts it; whether it left all of them finite.

        If not, no optimizer may step: to clip by the norm of infinite gradients would spoil those of the others too.
        """
        before = self.scaler.get_scale()
        # While a pipeline fills, an optimizer of later stages has no gradients, which a GradScaler cannot stand.
        held = [o for o in self.optimizers if any(p.grad is not None for p in _parameters(o))]
        for optimizer in held:
            self.scaler.unscale_(optimizer)
        if held:
            self.scaler.update()
        return self.scaler.get_scale() >= before

    def _limits(self) -> Iterator[tuple[list[nn.Parameter], float]]:
        """Parameters, and the norm that their gradients are cut down to."""
        if isinstance(self.clip, Sequence):
            for optimizer, limit in zip(self.optimizers, self.clip, strict=True):
                if limit is not None:
                    yield _parameters(optimizer), limit
        elif self.clip is not None:
            of_network = list(self.rule.network.parameters())
            known = set(of_network)
            yield of_network, self.clip
            yield [p for p in self.rule.parameters() if p not in known], self.clip

    def state_dict(self) -> dict[str, Any]:
        """The state of optimizers, schedules and scale."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave.

        Raises:
            ValueError: it is of other optimizers or schedules.
        """
        parts = {"optimizers": self.optimizers, "schedules": self.schedules}
        for name, own in parts.items():
            if len(state[name]) != len(own):
                raise ValueError(f"the state is of {len(state[name])} {name}, and there are {len(own)}")
        for name, own in parts.items():
            for part, stored in zip(own, state[name], strict=True):
                part.load_state_dict(stored)
        self.scaler.load_state_dict(state["scaler"])


class _Mean:
    """A running mean of losses, which does not wait for the device."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None

    def add(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.count += 1
            loss = step.loss.detach().float()
            self.mean = loss if self.mean is None else self.mean + (loss - self.mean) / self.count

    @property
    def value(self) -> Tensor:
        if self.mean is None:
            raise ValueError("there is no batch to train on")
        return self.mean


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        yield group


def _listed(given: OneT | Sequence[OneT], kind: type[OneT]) -> list[OneT]:
    found = [given] if isinstance(given, kind) else list(given)  # pyrefly: ignore
    for one in found:
        if not isinstance(one, kind):
            raise ValueError(f"there should be a torch {kind.__name__}, or several; got a {type(one).__name__}")
    return found


def _rule_in(module: nn.Module) -> Rule:
    """The rule, or the one that a wrapper is around."""
    rule = next((part for part in module.modules() if isinstance(part, Rule)), None)
    if rule is None:
        raise ValueError(
            f"what is trained is a rule, hbll.make_rule(name, network), or a wrapper of one; got a {type(module).__name__}"
        )
    return rule


def _check_clip(clip: float | Sequence[float | None] | None, optimizers: int) -> None:
    limits = [clip] if not isinstance(clip, Sequence) else clip
    for limit in limits:
        if limit is not None:
            check_number("clip", limit, above=0)
    if isinstance(clip, Sequence) and len(clip) != optimizers:
        raise ValueError(f"clip is one number, or one for every optimizer: {optimizers}, not {len(clip)}")


def _check_held(rule: Rule, optimizers: Sequence[Optimizer]) -> None:
    """Raises ValueError unless each optimizer holds parameters of the rule, and each trained one is held once."""
    named = dict(rule.named_parameters())
    own, held = set(named.values()), [set(_parameters(optimizer)) for optimizer in optimizers]
    for number, parameters in enumerate(held, 1):
        if not parameters & own:
            which = f"optimizer {number} of {len(held)}" if len(held) > 1 else "the optimizer"
            raise ValueError(
                f"{which} holds no parameter of the rule: make it for rule.parameters(), or rule.own(stage)"
            )
    for name, parameter in named.items():
        times = sum(parameter in parameters for parameters in held)
        if times > 1:
            raise ValueError(
                f"{times} optimizers hold {name}, which each step would move as often: leave it to one of them "
                "(a weight that two stages share goes with one optimizer for all)"
            )
        if not times and parameter.requires_grad:
            raise ValueError(f"no optimizer holds {name}: give it to one, or freeze it (requires_grad_(False))")


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
