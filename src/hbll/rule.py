"""What every training rule is: a module that owns its network and yields its losses one after the other.

Each loss belongs to a stage and is walked back, its gradients taken and its graph dropped, before the next one is computed:

    rule = hbll.make_rule("stream", network, stage=(3, 4))
    step = rule(x, y)                  # one scalar with the gradients attached: any wrapper, any torch optimizer
    step.loss.backward()
    rule.backward(x, y)                # or: gradients straight into .grad as they come, in the least memory
"""

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, final

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from hbll.calls import Context, Readout, refuse_in_place
from hbll.carry import Carry, gathering, map_tensors, own_copy
from hbll.cut import Stage, cut
from hbll.losses import Loss, cross_entropy, mean_loss, wide
from hbll.modes import evaluating, is_trained
from hbll.names import check_known
from hbll.network import Chain
from hbll.tree import Path

__all__ = ["LateError", "Message", "Report", "Rule", "StageLoss", "Step", "attach_gradients", "walk_back"]


@dataclass(frozen=True)
class Message:
    """What one stage hands to the next; to the first stage goes a batch itself."""

    state: Any
    """(B, ...), without graph; of a batch the input that the embed takes."""

    labels: Any

    context: Context
    """Of a batch nothing, since the embed makes it."""


@dataclass(frozen=True)
class StageLoss:
    """What a rule yields."""

    stage: int | str | tuple[int, ...]
    """1..S, several where they were evaluated in one graph; ``embed``, ``rim``, ``jumps``, ``consistency`` for what is
    beside the stages."""

    value: Tensor
    """A scalar; its graph reaches the stage, and what the stage's credit led through."""

    leaves: tuple[Tensor, ...] = ()
    """Tensors beside the parameters into whose ``.grad`` the walk back is to put their gradients."""

    gathered: bool = False
    """Whether its gradients are made of those that earlier walks have put into leaves."""

    through: tuple[Tensor, ...] = ()
    """What the stage's credit was carried back through, with its graph, where the value's own graph does not show it."""

    def times(self, counted: Tensor | None) -> "StageLoss":
        """The same where ``counted`` is 1 or None, and a loss without effect where it is 0; see ``hbll.losses.counts``."""
        return self if counted is None else replace(self, value=self.value * counted)

    def scaled(self, scale: Tensor | float) -> "StageLoss":
        """The same with its gradients multiplied; those that were gathered have been when they were found."""
        return self if self.gathered else replace(self, value=self.value * scale)

    @property
    def stages(self) -> tuple[int | str, ...]:
        """``stage`` as a tuple."""
        return self.stage if isinstance(self.stage, tuple) else (self.stage,)


@dataclass(frozen=True)
class Report:
    """What one stage did in one step; means over the batch and over tokens, in nats where it is an error.

    Fields are None where the rule has no such thing; all but ``error`` are there if ``Rule.diagnose`` was asked.
    """

    error: float | None = None
    """The divergence of the stage's prediction from its target, or the label's loss / label_variance."""
    divergence: float | None = None
    """KL(target || prior); the stage's own loss in block scope."""
    correction: float | None = None
    """Norm of the change of the natural parameters from prior to target."""
    distance: float | None = None
    """Norm of the change of the means from prior to target."""
    rose: float | None = None
    """Share of samples for which divergence + error is larger at the target than at the prior: the step was too long."""
    cosine: float | None = None
    """Cosine between the gradient of the stage's blocks and backpropagation's on the chain."""


@dataclass(repr=False)
class Step:
    """A training step, and what a call of a rule returns.

    Work and span count block evaluations: one forward evaluation, one vector-Jacobian product for a block's input and one
    for its parameters are a unit each; embed and head cost nothing. Parameter products hang off the chain of dependent
    evaluations: nothing waits for them.
    """

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    """The sum of all losses, a scalar whose gradients are the rule's updates."""
    label_loss: Tensor | None = None
    """The task's own loss, a mean over the batch that reached the label in this step; a scalar without graph."""
    work: int = 0
    """All block evaluations of the step, those of the walk back counted in."""
    span: int = 0
    """The longest chain of them in which each needs the one before."""
    defect: Tensor | None = None
    """How far the last sweep still moved the states, ||new - old|| / ||new||; None of rules without sweeps."""
    engine: str = "loop"
    """How the blocks were evaluated, ``loop`` or ``batched``."""
    look: bool = False
    """Whether the step is only looked at, by an audit or a diagnosis: stages are evaluated apart from each other, nothing is
    kept from it, and graphs may share what they reach."""
    scale: Tensor | float = 1.0
    """What the gradients of the walks back are multiplied by."""
    batch: tuple[Any, Any] | None = None
    """Input and labels that were learned from, where they are not those of the call."""
    findings: list[tuple[tuple[int, ...], dict[str, Tensor]]] = field(default_factory=list)
    """What is to be reported of n stages: fields, (n,) each, without graph."""

    def count(self, evaluations: int, depth: int) -> None:
        """Counts evaluations made at once, whose results are there at span ``depth``."""
        self.work += evaluations
        self.span = max(self.span, depth)

    def report(self, stages: Sequence[int], **found: Tensor) -> None:
        """Notes fields of the reports of n stages, (n,) each."""
        self.findings.append((tuple(stages), {name: values.detach() for name, values in found.items()}))

    def unscaled(self, gradient: Tensor) -> Tensor:
        """A gradient as it would be without ``scale``: for what waits for a later step, whose scale may be another."""
        plain = isinstance(self.scale, float) and self.scale == 1.0  # of a tensor it would have to wait for the device
        return gradient if plain else wide(gradient) / self.scale

    @property
    def reports(self) -> dict[int, Report]:
        """A report per stage; asking waits for the device."""
        flat = [values.double() for _, found in self.findings for values in found.values()]
        values = iter(torch.cat(flat).tolist() if flat else [])
        fields: dict[int, dict[str, float]] = {}
        for stages, found in self.findings:
            for name in found:
                for stage in stages:
                    fields.setdefault(stage, {})[name] = next(values)
        return {stage: Report(**fields[stage]) for stage in sorted(fields)}

    def __repr__(self) -> str:
        return f"Step(loss={self.loss.item():.4g}, work={self.work}, span={self.span}, engine={self.engine})"


class _AttachGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, count: int, *tensors_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors_and_gradients[count:])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]  (the decorator hides the name ctx)
        gradients, factor = ctx.saved_tensors, grad_outputs[0]
        if factor.device.type != "cpu" or factor != 1:  # elsewhere a look would wait for the device
            gradients = tuple(torch._foreach_mul(gradients, factor))
        return (None, None, *gradients, *(None for _ in gradients))


def attach_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar with the given value whose gradients in ``tensors`` are already known.

    Credit walks the backward graph of an arc once, for the state and for the parameters; this hands the parameters' share
    to the loss without a second walk.
    """
    return _AttachGradients.apply(value.detach(), len(tensors), *tensors, *gradients)


class LateError(ValueError):
    """The label's loss of a mini-batch that came in some steps before cannot be found."""


class Rule(nn.Module, ABC):
    """A training rule: a network, cut into stages, and the losses that train it.

    A subclass defines ``losses`` and, if it has modules of its own for the stages, ``auxiliary``.

    Args:
        network: the network to train; it becomes a part of the rule, which an optimizer is made for.
        stage: consecutive blocks that are trained as one, or a number for every stage, such as (2, 2, 3); None: all.
        loss: the label's loss, one value per sample or per token.

    Raises:
        ValueError: it is no chain, or cannot be cut so; or it has parameters that no stage would own.
    """

    network: Chain

    trains_loss: ClassVar[bool] = True
    """Whether a loss with parameters would be trained."""

    late: ClassVar[bool] = False
    """Whether credit comes from other steps, which no step's graph shows."""

    def __init__(self, network: Chain, *, stage: int | Sequence[int] | None = 1, loss: Loss = cross_entropy) -> None:
        super().__init__()
        if not callable(loss):
            raise ValueError(f"loss is a function of predictions and labels; got {loss!r}")
        if not self.trains_loss and isinstance(loss, nn.Module) and is_trained(loss):
            raise ValueError("the loss has parameters, which this rule does not train: let the head have them")
        self.network = network
        self.loss = loss
        self.size = stage
        self._cut: tuple[list[object], tuple[Stage, ...]] | None = None
        self._compiled: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """The arguments with which all stages are compiled."""
        self.cut()  # what cannot be cut is said at once
        self._blocks = len(network.blocks)
        if isinstance(network, Chain) and (found := unowned(network)):
            raise ValueError(
                f"the network has parameters of which neither the embed nor a block nor the head is made "
                f"({', '.join(found)}), and no stage would train them: let one of these have them"
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Views of the network's stages, which are in no state_dict: to be compiled in place (``stage.compile()``), frozen,
        looked at. To wrap one, replace its blocks: a step that finds other modules than the last did makes stages anew."""
        if self._cut is None:
            self._renew()
        assert self._cut is not None
        return self._cut[1]

    def _renew(self) -> None:
        found: list[object] = []
        pending: list[nn.Module] = [self.network]
        while pending:  # in half of the time that modules() takes
            module = pending.pop()
            # Pruning and the like leave the module, and give it other parameters.
            found += (module, *module._parameters, *module._buffers)
            found += (*module._forward_hooks, *module._forward_pre_hooks)
            found += (*module._backward_hooks, *module._backward_pre_hooks)
            pending += filter(None, module._modules.values())
        if self._cut is None or self._cut[0] != found:
            if len(self.network.blocks) != self._blocks:
                raise ValueError(
                    f"the network had {self._blocks} blocks when the rule was made and has {len(self.network.blocks)}: make "
                    "the rule anew"
                )
            stages = self.cut()
            if self._compiled is not None:
                args, options = self._compiled
                for stage in stages:
                    stage.compile(*args, **options)
            self._cut = found, stages

    def cut(self) -> tuple[Stage, ...]:
        """The network's stages."""
        return cut(self.network, self.size)

    @abstractmethod
    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        """The losses of one training step, each walked back before the next is asked for.

        Args:
            x: a batch of what the network's embed takes; None if no new one enters, and what is in flight goes on.
            y: its labels, as the loss takes them.
            step: where the cost, and what is to be reported, is noted.
        """

    def stage_losses(
        self, stage: int, given: Message, step: Step, hand_on: Callable[[Message], None]
    ) -> Iterator[StageLoss]:
        """The losses of one stage alone, which reach nothing of other stages; for a stage in a process of its own.

        Args:
            stage: from 1 to S.
            given: what the stage before handed on.
            step: as for ``losses``.
            hand_on: takes what the next stage is given, before the first loss is yielded; not called by the last stage.

        Raises:
            ValueError: as ``check_apart``.
        """
        self.check_apart()
        raise NotImplementedError

    def check_apart(self) -> None:
        """Raises ValueError unless the loss of every stage reaches that stage alone, and waits for no later one."""
        raise ValueError(
            f"by {type(self).__name__} the loss of a stage reaches other stages, or waits for them: stages in processes of "
            "their own are for stream with copies, greedy, solo, dgl, predsim and cff, and subtrees of them, by "
            "hbll.distributed.TreeWorker, for paper and tree"
        )

    def build(self, x: Any) -> None:
        """Makes the modules of a rule that depend on the shapes of states, as a batch of inputs gives them."""

    def auxiliary(self, stage: int) -> list[nn.Module]:
        """The rule's own modules that belong to a stage: readouts, maps, predictors."""
        return []

    def near(self, stage: int) -> list[nn.Module]:
        """The modules beside its own that a stage's loss may reach and still be called local."""
        return []

    @final
    def own(self, stage: int) -> list[nn.Module]:
        """Everything that belongs to a stage, from 1 to S: its blocks and the rule's modules for it, and of the first one
        the embed, of the last one the head; all stages together have all parameters of the rule.

        Raises:
            ValueError: there is no such stage.
        """
        if not 1 <= stage <= len(self.stages):
            raise ValueError(f"there are stages 1 to {len(self.stages)}; got {stage}")
        embed = [self.network.embed] if stage == 1 else []
        head = [self.network.head] if stage == len(self.stages) else []
        head += [self.loss] if head and isinstance(self.loss, nn.Module) else []
        return [*embed, *self.stages[stage - 1].blocks, *self.auxiliary(stage), *head]

    @final
    def compile(self, *args: Any, **kwargs: Any) -> None:  # pyrefly: ignore[bad-override]
        """Compiles the stages in place, as ``stage.compile`` does, and so those that are made anew; a step itself is not
        compiled."""
        self._compiled = args, kwargs
        for stage in self.stages:
            stage.compile(*args, **kwargs)

    @final
    @torch._disable_dynamo
    def forward(self, x: Any, y: Any, scale: Tensor | float = 1.0) -> Step:
        """One training step up to the loss, which has the gradients of the whole step attached.

        Without gradients (``torch.no_grad()``) the loss alone, and nothing is kept of the step; in evaluation mode nothing
        is kept either.

        Args:
            x, y: a batch, as for ``losses``.
            scale: what gradients are multiplied by while they are found, and divided by afterwards: that of a GradScaler,
                which comes to the loss too late for gradients in float16.

        Raises:
            ValueError: a block returns no state, or a label is outside the classes; or the inputs have a graph whose
                gradient comes in a later step.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("a rule finds gradients even where only its loss is wanted: take torch.no_grad() instead")
        if not torch.is_grad_enabled():
            with torch.enable_grad(), evaluating(self):
                step = self._taken(x, y, lambda loss: None, Step())
            step.loss = step.loss.detach()
            return step
        if self.training and _processes() > 1 and not _averaged(self):
            warnings.warn(
                "several processes train together, and the rule is not called by what averages their gradients: call "
                "DistributedDataParallel(rule, find_unused_parameters=True) in its place",
                stacklevel=2,
            )
        if _narrow(x) and isinstance(scale, float) and scale == 1.0:
            warnings.warn(
                "by float16 autocast small gradients vanish before a GradScaler's factor is there: call rule(x, y, "
                "scale=scaler.get_scale()), or take bfloat16",
                stacklevel=2,
            )
        x, inputs = self._own_leaves(x)
        wanted = [*(p for p in self.parameters() if p.requires_grad), *inputs]
        gradients: dict[Tensor, Tensor] = {}

        def walk(loss: StageLoss) -> None:
            _add(gradients, _gradients(loss.scaled(scale), wanted))

        step = self._taken(x, y, walk, Step(scale=scale))
        gradients = {inputs.get(tensor, tensor): step.unscaled(gradient) for tensor, gradient in gradients.items()}
        if not gradients:  # while a pipeline fills a step may move nothing; its loss can be walked back all the same
            gradients[step.loss.new_zeros(()).requires_grad_()] = step.loss.new_zeros(())
        step.loss = attach_gradients(step.loss, list(gradients), list(gradients.values()))
        return step

    @final
    @torch._disable_dynamo
    def backward(self, x: Any, y: Any, scale: Tensor | float = 1.0) -> Step:
        """One training step whose gradients are added to ``.grad`` as they come: no graph, and no gradient beside those, is
        held for longer than its stage needs.

        Args:
            x, y: a batch, as for ``losses``.
            scale: what gradients are multiplied by, as a loss would be by a GradScaler or for an accumulation.

        Raises:
            ValueError: as ``forward``; or several processes train together, whose gradients nothing would reduce.
        """
        if not torch.is_grad_enabled():
            raise ValueError(
                "rule.backward finds gradients: call it outside of torch.no_grad(), where rule(x, y) has the loss"
            )
        if _processes() > 1:
            raise ValueError(
                "rule.backward does not average gradients over processes: wrap the rule, as in "
                "DistributedDataParallel(rule, find_unused_parameters=True), and call that"
            )

        x, inputs = self._own_leaves(x)
        step = self._taken(x, y, _into_grad(scale), Step(scale=scale))
        found = {tensor: leaf.grad for leaf, tensor in inputs.items() if leaf.grad is not None}
        torch.autograd.backward(list(found), list(found.values()))
        return step

    @property
    def input_waits(self) -> bool:
        """Whether the gradient of a batch's input comes in a later step."""
        return self.late

    def _own_leaves(self, x: Any) -> tuple[Any, dict[Tensor, Tensor]]:
        """A batch of inputs as leaves of its own graph, and of each leaf the tensor in whose place it is.

        Raises:
            ValueError: inputs require gradients, which come in a later step.
        """
        cut, leaves = gathering(x)
        if leaves and self.input_waits:
            raise ValueError(
                f"the input requires gradients, and by {type(self).__name__} those of a batch come in later steps: make "
                "what computes the input part of the embed, or hand over x.detach()"
            )
        return cut, {leaf: tensor for tensor, leaf in leaves.items()}

    @final
    def stage_backward(
        self, stage: int, given: Message, hand_on: Callable[[Message], None], scale: Tensor | float = 1.0
    ) -> Step:
        """A training step of one stage alone, whose gradients are added to ``.grad``.

        Args: as of ``stage_losses`` and ``backward``.

        Raises:
            ValueError: as ``stage_losses``.
        """
        self._renew()
        step = Step(scale=scale)
        walk_back(self.stage_losses(stage, given, step, hand_on), step)
        return step

    def _taken(self, x: Any, y: Any, walk: Callable[[StageLoss], None], step: Step) -> Step:
        """A whole step, whose losses are walked back by ``walk``."""
        self._renew()
        _check_batch(x, y)
        _check_whole(self)
        carries = list(self.carries().values())
        for carry in carries:
            carry.begin()
        total: Tensor | None = None
        try:
            for loss in self.losses(x, y, step):
                total = loss.value.detach() if total is None else total + loss.value.detach()
                walk(loss)
                del loss  # with all that its graph holds
        except LateError:
            self.reset()
            raise
        except Exception as error:
            if isinstance(error, RuntimeError):
                refuse_in_place("a block or the head", error)
            if self.in_flight:
                error.add_note(
                    "It may be of a mini-batch that came in some steps before; rule.reset() drops what is in flight."
                )
            raise
        if self.training and not step.look:
            for carry in carries:
                carry.complete()
        if total is not None:
            step.loss = total
        return step

    def diagnose(self, x: Any, y: Any) -> dict[int, Report]:
        """The reports of one batch with everything in them, ``cosine`` among it; costs about two steps.

        No gradient is left behind, no trace in running statistics, and what is kept from step to step stays as it was. A
        rule whose credit comes from other steps has no reports: it has no gradients of the batch at hand.
        """
        if self.late:
            return {}
        gradients: dict[Tensor, Tensor] = {}
        parameters = [p for p in self.parameters() if p.requires_grad]

        def walk(loss: StageLoss) -> None:
            _add(gradients, _gradients(loss, parameters, retain_graph=True))

        with torch.enable_grad(), evaluating(self):
            step = self._taken(x, y, walk, Step(look=True))
            x, y = step.batch or (x, y)
            exact = mean_loss(self.loss, self.network(x), y)
        owned = {k: [p for p in stage.parameters() if p.requires_grad] for k, stage in enumerate(self.stages, 1)}
        for k, cosine in _cosines(gradients, exact, owned).items():
            step.report([k], cosine=cosine.unsqueeze(0))
        return step.reports

    @property
    def readouts(self) -> list[Readout]:
        """The ways of reading the network that are measured of it, the chain first."""
        return self.network.readouts

    def exit(self, stage: int) -> Readout | None:
        """How the label is read off the output of a stage that is not the last; None if the rule trains nothing to do so."""
        return None

    def exit_by(self, stage: int, head: nn.Module, through: Path = (), own_blocks: int = 0) -> Readout:
        """The readout of a stage by a head, which may have blocks of its own, after further blocks of the network."""
        path = (*range(1, self.stages[stage - 1].numbers[-1] + 1), *through)
        return Readout(f"stage-{stage}", path, len(path) + own_blocks, head=head)

    @property
    def exits(self) -> list[Readout]:
        """The readouts of all stages, the last of which is the chain's; none if the rule trains no other.

        Raises:
            ValueError: they wait for the shapes of states.
        """
        last = len(self.stages)
        early = [readout for stage in range(1, last) if (readout := self.exit(stage))]
        return [*early, self.exit_by(last, self.network.head)] if early else []

    def readout(self, name: str) -> Readout:
        """The readout that a user names: of a stage, ``stage-2``, or a path of the network.

        Raises:
            ValueError: there is none like it.
        """
        if not name.startswith("stage-"):
            return self.network.readout(name)
        exits = {readout.name: readout for readout in self.exits}
        if not exits:
            raise ValueError(f"there is no {name}: the rule trains no readouts of stages, name a path")
        return exits[check_known(name, exits, "readout")]

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The network's parts by what messages call them, in the order of the chain."""
        stages = {f"stage {k}": stage for k, stage in enumerate(self.stages, 1)}
        return {"the embed": self.network.embed, **stages, "the head": self.network.head}

    @property
    def in_flight(self) -> bool:
        """Whether there are mini-batches from which some stage is still to learn.

        When no new one is to enter, ``rule.backward(None, None)`` moves them on.
        """
        return False

    def carries(self) -> Mapping[str, Carry]:
        """What is kept from step to step, by name."""
        return {}

    @final
    def carry(self) -> dict[str, Any]:
        """A nest of what is kept from step to step, for checkpoints; it is no part of the state_dict."""
        kept = {name: carry.nest for name, carry in self.carries().items() if carry.nest is not None}
        return {"stages": [len(stage.blocks) for stage in self.stages], "kept": own_copy(kept)} if kept else {}

    @final
    def load_carry(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``carry`` gave.

        Raises:
            ValueError: it is of other stages, or of another rule.
        """
        if state and "kept" not in state:
            raise ValueError("this is not what rule.carry() gave: it holds nothing as 'kept'")
        kept, sizes = state.get("kept", {}), [len(stage.blocks) for stage in self.stages]
        if kept and state.get("stages") != sizes:
            there, here = (", ".join(map(str, listed)) for listed in (state.get("stages", ()), sizes))
            raise ValueError(
                f"what was kept is of stages of {there} blocks, and the network is cut into stages of {here}: take the same "
                "stage=, or go on without it"
            )
        carries = self.carries()
        if unknown := set(kept) - set(carries):
            raise ValueError(
                f"what was kept is of another rule: this one keeps nothing as {', '.join(sorted(unknown))}"
            )
        for name, carry in carries.items():
            # Copies: tensors in a file's memory lie unaligned, on which kernels round otherwise.
            carry.nest = own_copy(kept.get(name))

    @final
    def reset(self) -> None:
        """Forgets what is kept from step to step, such as mini-batches on their way: the rule is ready for batches of
        another size."""
        for carry in self.carries().values():
            carry.nest = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for carry in self.carries().values():
            carry.nest = map_tensors(fn, carry.nest)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Stages are views, made again where they are needed; a copy is not compiled, as of any module of torch.
        return {**self.__dict__, "_cut": None, "_compiled": None}


def walk_back(losses: Iterator[StageLoss], step: Step) -> None:
    """Walks the losses of some stages back into ``.grad`` as they come; their sum is the step's loss."""
    walk = _into_grad(step.scale)
    values = []
    for loss in losses:
        values.append(loss.value.detach())
        walk(loss)
        del loss
    step.loss = torch.stack(values).sum()


def _into_grad(scale: Tensor | float) -> Callable[[StageLoss], None]:
    """Walks losses back into ``.grad``, their gradients multiplied by ``scale``."""

    def walk(loss: StageLoss) -> None:
        if loss.value.requires_grad:
            loss.scaled(scale).value.backward()

    return walk


def _narrow(x: Any) -> bool:
    """Whether a batch is evaluated in float16, by autocast."""
    devices = {leaf.device.type for leaf in tree_leaves(x) if isinstance(leaf, Tensor)}
    return any(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16 for device in devices
    )


def unowned(network: Chain) -> list[str]:
    """The names of a network's parameters that are trained and of which neither embed nor a block nor the head is made."""
    owned = {p for part in (network.embed, *network.blocks, network.head) for p in part.parameters()}
    return [
        name for name, parameter in network.named_parameters() if parameter.requires_grad and parameter not in owned
    ]


def _processes() -> int:
    """How many train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _averaged(rule: Rule) -> bool:
    """Whether the rule is called by what averages gradients over processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = fsdp is not None and isinstance(rule, fsdp.FSDPModule)
    return sharded or DistributedDataParallel._get_active_ddp_module() is not None


def _check_batch(x: Any, y: Any) -> None:
    """Raises ValueError if a batch is none, as far as can be told without the network."""
    if isinstance(y, Tensor) and y.ndim == 0:
        raise ValueError(
            "a label stands alone, without a dimension for the samples: hand over batches, one sample as x.unsqueeze(0) and "
            "y.unsqueeze(0)"
        )
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == 1 and len(x) != len(y):
        raise ValueError(
            f"inputs {tuple(x.shape)} have labels {tuple(y.shape)}: hand over batches, one sample as x.unsqueeze(0) with a "
            "label (1,)"
        )
    if any(isinstance(values, Tensor) and values.ndim and not len(values) for values in (x, y)):
        raise ValueError("the batch is empty: leave it out")


def _check_whole(rule: Rule) -> None:
    """Raises ValueError if parameters are spread over processes while a step is taken, which asks for their gradients."""
    tensor = sys.modules.get("torch.distributed.tensor")  # imported by whoever has such parameters
    if tensor and any(isinstance(parameter, tensor.DTensor) for parameter in rule.parameters()):
        raise ValueError(
            "parameters are spread over processes (DTensor, as fully_shard makes them), and a rule takes the gradients of "
            "whole ones: shard the rule as one, fully_shard(rule), or replicate it by DistributedDataParallel(rule, "
            "find_unused_parameters=True)"
        )


def _gradients(loss: StageLoss, parameters: Sequence[Tensor], retain_graph: bool = False) -> dict[Tensor, Tensor]:
    """The gradients of the parameters that a loss reaches; those of its leaves are added to their ``.grad``."""
    if not loss.value.requires_grad:
        return {}
    wanted = [*parameters, *loss.leaves]
    if not wanted:
        return {}
    found = torch.autograd.grad(loss.value, wanted, allow_unused=True, retain_graph=retain_graph)
    for leaf, gradient in zip(loss.leaves, found[len(parameters) :], strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    return {p: g for p, g in zip(parameters, found, strict=False) if g is not None}


def _add(sums: dict[Tensor, Tensor], found: Mapping[Tensor, Tensor]) -> None:
    for tensor, gradient in found.items():
        sums[tensor] = sums[tensor] + gradient if tensor in sums else gradient


def _cosines(ours: Mapping[Tensor, Tensor], exact: Tensor, owned: Mapping[int, Sequence[Tensor]]) -> dict[int, Tensor]:
    """The cosine between gradients and those of an exact loss, for every stage with trainable parameters."""
    flat = [p for parameters in owned.values() for p in parameters]
    if not flat:
        return {}
    found = torch.autograd.grad(exact, flat, materialize_grads=True)
    exactly = dict(zip(flat, found, strict=True))

    def joined(gradients: Mapping[Tensor, Tensor], parameters: Sequence[Tensor]) -> Tensor:
        return torch.cat([(gradients[p] if p in gradients else torch.zeros_like(p)).flatten() for p in parameters])

    return {
        k: torch.cosine_similarity(joined(ours, parameters), joined(exactly, parameters), dim=0)
        for k, parameters in owned.items()
        if parameters
    }
