"""Engines: how the blocks of many nodes are evaluated at once.

``LoopEngine`` calls one block after the other. ``BatchedEngine`` stacks the parameters of blocks of one architecture
inside the autograd graph and evaluates them in one vmapped call, so that a level of the tree costs one call whatever its
width; gradients flow back into the blocks' own parameters. Both give the same numbers up to rounding.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree

from hbll.network import Context, apply, check_tensor, chosen, first_of

__all__ = ["BatchedEngine", "Engine", "Evaluation", "LoopEngine", "make_engine", "stack"]


@dataclass(frozen=True)
class Evaluation:
    """What one call of an engine returns.

    outputs: (n, B, ...), the outputs of n blocks, with graph.
    parameters: the trainable tensors that the outputs depend on, either the block's own or n of them stacked.
    """

    outputs: Tensor
    parameters: tuple[Tensor, ...]


class LoopEngine:
    """Evaluates blocks one by one: every group is a single node."""

    name = "loop"

    def __init__(self, blocks: Sequence[nn.Module], names: Sequence[str]) -> None:
        self.blocks = blocks
        self.names = names
        # Where each block keeps its parameters: looking them up anew costs more than evaluating a small block.
        self._slots = [
            [(module._parameters, key, name) for name, module, key in _parameter_slots(block)] for block in blocks
        ]

    def partition(self, nodes: Sequence[int], states: Sequence[Tensor]) -> list[list[int]]:
        """Splits positions in a list of nodes, each with the state that it is to take, into groups that one call evaluates
        together."""
        return [[position] for position in range(len(nodes))]

    def groups(self, nodes: Sequence[int]) -> list[tuple[int, ...]]:
        """Splits nodes whose states are of one shape into groups that one call evaluates together."""
        return [tuple(nodes[p] for p in group) for group in self.partition(nodes, ())]

    def __call__(self, nodes: tuple[int, ...], inputs: Tensor, contexts: Sequence[Context]) -> Evaluation:
        """Evaluates the blocks of one group.

        Args:
            nodes: a group; a node may occur more than once.
            inputs: (n, B, ...), one state per node.
            contexts: what each node's block takes beside its state.

        Raises:
            ValueError: a block returns no state; the message names it.
        """
        outputs = []
        parameters: list[Tensor] = []
        for n, state, context in zip(nodes, inputs.unbind(0), contexts, strict=True):
            outputs.append(apply(self.names[n - 1], self.blocks[n - 1], state, context))
            parameters += [p for p in self._parameters(n) if p.requires_grad]
        return Evaluation(stack(outputs), tuple(parameters))

    def _parameters(self, node: int) -> list[Tensor]:
        return [p for owner, key, _ in self._slots[node - 1] if (p := owner[key]) is not None]


class BatchedEngine(LoopEngine):
    """Evaluates blocks of one architecture in one call; a block without a twin is called by itself.

    The blocks' forward is vmapped over stacked parameters, recorded once per input shape as plain batched operations, and
    replayed from then on, because vmap and module calls cost more than the arithmetic of a small block. Plain attributes
    of blocks (a dropout rate) are therefore read once.
    """

    name = "batched"

    def __init__(self, blocks: Sequence[nn.Module], names: Sequence[str], *, fall_back: bool) -> None:
        super().__init__(blocks, names)
        self._fall_back = fall_back
        self._kinds = architectures(blocks)
        self._modules = [list(block.modules()) for block in blocks]
        self._recorded: dict[tuple, Callable[..., Tensor]] = {}

    def partition(self, nodes: Sequence[int], states: Sequence[Tensor]) -> list[list[int]]:
        kinds: dict[object, list[int]] = {}
        for position, n in enumerate(nodes):
            module = self.blocks[n - 1]
            alone = position if module._compiled_call_impl is not None else None  # compiled: called as it is
            shape = states[position].shape if states else None
            kinds.setdefault((self._kinds[n - 1], self._modes(n), shape, alone), []).append(position)
        return list(kinds.values())

    def _modes(self, node: int) -> tuple[bool, ...]:
        # Of all parts: users switch single ones, and a stage's container is not theirs.
        return tuple([module.training for module in self._modules[node - 1]])

    def __call__(self, nodes: tuple[int, ...], inputs: Tensor, contexts: Sequence[Context]) -> Evaluation:
        if len(nodes) == 1:
            return super().__call__(nodes, inputs, contexts)
        stacked = [torch.stack(same) for same in zip(*map(self._parameters, nodes), strict=True)]
        beside, form = _stacked_contexts(contexts)
        try:
            function = self._function(nodes, stacked, inputs, beside, form)
        except ValueError as refusal:
            if not self._fall_back:
                raise
            warnings.warn(f"{refusal}; they are evaluated one by one", stacklevel=2)
            self._kinds = list(range(len(self.blocks)))
            self.name = "loop"
            return super().__call__(nodes, inputs, contexts)
        outputs = function(*stacked, inputs, *beside)
        return Evaluation(outputs, tuple(p for p in stacked if p.requires_grad))

    def _function(
        self,
        nodes: tuple[int, ...],
        stacked: list[Tensor],
        inputs: Tensor,
        beside: Sequence[Tensor],
        form: "_Form",
    ) -> Callable[..., Tensor]:
        first = nodes[0] - 1
        device = inputs.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in (inputs, *beside))
        key = (self._kinds[first], self._modes(nodes[0]), shapes, device, autocast, form)
        if key not in self._recorded:
            names = [name for _, _, name in self._slots[first]]
            self._recorded[key] = record_batched(
                self.names[first], self.blocks[first], names, stacked, (inputs, *beside), form
            )
        return self._recorded[key]


@dataclass(frozen=True)
class _Form:
    """What of a context is no tensor, and where its tensors go."""

    structure: Any
    constants: tuple[object, ...]
    """At a tensor's place ``_TENSOR``."""

    def context(self, tensors: Iterable[Tensor]) -> Context:
        """The context with these tensors in it."""
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is _TENSOR else leaf for leaf in self.constants]
        return _pytree.tree_unflatten(leaves, self.structure)


_TENSOR = object()


def _stacked_contexts(contexts: Sequence[Context]) -> tuple[list[Tensor], _Form]:
    """The tensors of n contexts of one form, each (n, ...), and the form."""
    leaves, structure = _pytree.tree_flatten(dict(contexts[0]))
    rows = [leaves if c is contexts[0] else _pytree.tree_leaves(dict(c)) for c in contexts]
    stacked = []
    for column in zip(*rows, strict=True):
        if isinstance(column[0], Tensor):
            same = all(tensor is column[0] for tensor in column)
            stacked.append(column[0].expand(len(column), *column[0].shape) if same else torch.stack(column))
        elif any(value != column[0] for value in column):
            raise ValueError("batches in flight must agree in what of their context is no tensor")
    constants = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return stacked, _Form(structure, constants)


def record_batched(
    title: str,
    block: nn.Module,
    names: Sequence[str],
    stacked: Sequence[Tensor],
    inputs: Sequence[Tensor],
    form: _Form,
) -> Callable[..., Tensor]:
    """A block's forward for many sets of parameters at once, as a function of (*stacked parameters, *inputs).

    Args:
        title: what error messages call the block.
        names: of its parameters.
        stacked: those of n blocks, (n, ...) each.
        inputs: the states, then the tensors of their contexts, (n, ...) each.
        form: of the contexts.

    Raises:
        ValueError: the block does something that cannot be batched, such as a branch on values.
    """
    count = len(stacked)

    def call(parameters: Sequence[Tensor], state: Tensor, beside: Sequence[Tensor]) -> Tensor:
        parts = dict(zip(names, parameters, strict=True))
        output = first_of(functional_call(block, parts, (state,), chosen(block, form.context(beside))))
        check_tensor(title, output)
        return output

    def batched(*tensors: Tensor) -> Tensor:
        return vmap(call, randomness="different")(tensors[:count], tensors[count], tensors[count + 1 :])

    draws = random.getstate()
    try:
        with _attention(inputs[0].device.type), torch.random.fork_rng(_devices(inputs[0])):
            graph = make_fx(batched)(*(tensor.detach() for tensor in (*stacked, *inputs)))
        if random.getstate() != draws:
            raise RuntimeError("they draw from Python's random, of which one draw would be recorded")
    except RuntimeError as error:
        raise ValueError(
            f"{title} cannot be stacked with its like in one call ({str(error).splitlines()[0]})"
        ) from error
    # vmap leaves views that change nothing and products with 1; each would cost an operation forward and one backward.
    for node in graph.graph.nodes:
        if node.op == "call_function" and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph.forward if _same_gradients(graph.forward, batched, (*stacked, *inputs)) else batched


def _same_gradients(
    recorded: Callable[..., Tensor], original: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> bool:
    """Whether a recording has the original's values and gradients.

    It has not if the block uses torch.no_grad() or an autograd.Function with a backward of its own: neither leaves a trace
    in the operations recorded.
    """

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)  # blocks may draw random numbers
        leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
        output = function(*leaves)
        if not output.requires_grad:
            return [output]
        # Not a plain sum: a softmax or a norm at the end of a block would hide everything before it.
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [output.detach(), *torch.autograd.grad(output, wanted, cotangent, materialize_grads=True)]

    def close(first: Tensor, second: Tensor) -> bool:
        return bool(((first - second).abs() <= torch.finfo(second.dtype).eps ** 0.5 * second.abs().max()).all())

    with torch.random.fork_rng(_devices(tensors[0])), torch.enable_grad():
        first = results(recorded)
        try:
            with _attention(tensors[0].device.type):
                second = results(original)
        except RuntimeError:  # fused operations that vmap leaves without a derivative, but a recording takes apart
            return True
    return len(first) == len(second) and all(map(close, first, second))


def _devices(tensor: Tensor) -> list[torch.device]:
    # Those beside the CPU whose random state a recording must leave as it was, so that a resumed run draws the same.
    return [tensor.device] if tensor.device.type == "cuda" else []


def _attention(device: str) -> AbstractContextManager[object]:
    # The CPU's fused attention is one that vmap can only loop over, with a warning, and has no second derivative.
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


def _changes_nothing(node: torch.fx.Node) -> bool:
    aten = torch.ops.aten
    if node.target in (aten.expand.default, aten.view.default, aten._unsafe_view.default):
        source = node.args[0]
        return isinstance(source, torch.fx.Node) and node.meta["val"].shape == source.meta["val"].shape
    return node.target is aten.mul.Scalar and node.args[1] in (1, 1.0)


def _parameter_slots(block: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    seen = set()
    for prefix, module in block.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{prefix}.{key}" if prefix else key), module, key


def stack(states: Sequence[Tensor]) -> Tensor:
    """States of (B, ...) as one of (n, B, ...); a single one is not copied."""
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(list(states))


Engine: TypeAlias = LoopEngine | BatchedEngine


def architectures(blocks: Sequence[nn.Module]) -> list[int]:
    """A number per block, equal for blocks that compute the same function of their parameters and input.

    Two blocks are twins if their modules, plain attributes and parameters' shapes agree, and which of these are the same
    parameter. Blocks with buffers (running statistics change in place), hooks, tensors as plain attributes, or a module
    that occurs twice have no twin.
    """
    described: list[object] = []
    kinds = []
    for block in blocks:
        description = _describe(block)
        twins = (kind for kind, other in enumerate(described) if _equal(description, other))
        kind = next(twins, len(described))
        if kind == len(described):
            described.append(description)
        kinds.append(kind)
    return kinds


def _equal(first: object, second: object) -> bool:
    try:
        return first is not None and bool(first == second)
    except (RuntimeError, ValueError):  # arrays among the attributes, whose comparison is an array
        return False


_TORCH_INTERNALS = set(vars(nn.Module()))


def _describe(block: nn.Module) -> list | None:
    """Everything but the parameters' values that a block's function depends on, or None if that cannot be told."""
    if next(block.buffers(), None) is not None:
        return None
    parts = [part for _, part in block.named_modules(remove_duplicate=False)]
    if len(set(parts)) < len(parts):
        return None
    description = []
    seen: dict[nn.Parameter, int] = {}
    for name, module in block.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return None
        attributes = {key: value for key, value in vars(module).items() if key not in _TORCH_INTERNALS}
        if any(isinstance(value, Tensor) for value in attributes.values()):
            return None
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        shapes = [(key, p.shape, p.dtype, p.device, seen.setdefault(p, len(seen))) for key, p in parameters]
        description.append((name, type(module), attributes, shapes))
    return description


# The largest block, in parameters, for which one stacked call beats a loop; measured by benchmarks/engines.py.
_CPU_LIMIT = 100_000


def make_engine(blocks: Sequence[nn.Module], names: Sequence[str], choice: str) -> Engine:
    """The engine that a user asks for.

    Args:
        blocks: the blocks, or stages of them, of nodes 1..N-1.
        names: what error messages call them.
        choice: ``loop``, ``batched``, or ``auto``, which takes the faster by what benchmarks/engines.py measured: batched
            if the blocks have twins, none of them convolves channel by channel, and, on a CPU, they are small. Blocks
            that turn out impossible to stack are then evaluated one by one, with a warning.

    Raises:
        ValueError: an unknown choice, or ``batched`` for blocks of which no two can be stacked.
    """
    if choice not in ("auto", "loop", "batched"):
        raise ValueError(f"unknown engine {choice!r}: choose auto, loop or batched")
    if choice == "loop" or len(blocks) == 1:
        return LoopEngine(blocks, names)
    engine = BatchedEngine(blocks, names, fall_back=choice == "auto")
    stackable = len(engine.groups(range(1, len(blocks) + 1))) < len(blocks)
    if choice == "batched":
        if not stackable:
            raise ValueError(
                "no two blocks can be stacked: they need one architecture, equal plain attributes, "
                "and neither buffers nor hooks; engine='loop' evaluates them one by one"
            )
        return engine
    return engine if stackable and _stacking_pays(blocks) else LoopEngine(blocks, names)


def _stacking_pays(blocks: Sequence[nn.Module]) -> bool:
    for module in (m for block in blocks for m in block.modules()):
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
            return False
    parameters = [p for block in blocks for p in block.parameters()]
    on_cpu = all(p.device.type == "cpu" for p in parameters)
    return not on_cpu or sum(p.numel() for p in parameters) / len(blocks) <= _CPU_LIMIT
