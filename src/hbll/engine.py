"""Engines: how the blocks of many nodes are evaluated at once.

``LoopEngine`` calls one block after the other. ``BatchedEngine`` stacks the parameters of blocks of one architecture
inside the autograd graph and evaluates them in one vmapped call, so that a level of the tree costs one call whatever its
width; gradients flow back into the blocks' own parameters. Both give the same numbers up to rounding.
"""

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from hbll.calls import Context, apply, call, check_tensor, chosen, first_of

__all__ = ["BatchedEngine", "Engine", "Evaluation", "LoopEngine", "make_engine", "stack"]

RECORDINGS = 128
"""How many recordings an engine keeps, those used last: one for every number of blocks and shape of their inputs."""

LOOKS = 4
"""How often blocks are called again before they are recorded: a coin that is tossed in them falls the same way at times."""

CHANGING = "they compute something else at every call, of which one would be recorded"


@dataclass(frozen=True)
class Evaluation:
    """What one call of an engine returns.

    outputs: (n, B, ...), the outputs of n blocks, with graph.
    parameters: the trainable tensors that the outputs depend on, each once: either the blocks' own or n of them stacked.
    """

    outputs: Tensor
    parameters: tuple[Tensor, ...]


class LoopEngine:
    """Evaluates blocks one by one: every group is a single node."""

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

    def groups(self, nodes: Sequence[int], states: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """The same as groups of nodes."""
        return [tuple(nodes[p] for p in group) for group in self.partition(nodes, states)]

    def name(self, state: Tensor) -> str:
        """How blocks are evaluated on such a state: ``loop`` or ``batched``."""
        return "loop"

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
        return Evaluation(stack(outputs), tuple(dict.fromkeys(parameters)))  # which blocks may share

    def _parameters(self, node: int) -> list[Tensor]:
        return [p for owner, key, _ in self._slots[node - 1] if (p := owner[key]) is not None]


class BatchedEngine(LoopEngine):
    """Evaluates blocks of one architecture in one call; a block without a twin is called by itself.

    The blocks' forward is vmapped over stacked parameters, recorded once per input shape as plain batched operations, and
    replayed from then on, because vmap and module calls cost more than the arithmetic of a small block. Plain attributes
    that were read then (a dropout rate) are looked at before every replay: from when one changes blocks are called one by
    one. What else a recording would freeze, such as a number drawn by NumPy, is found by comparing it with the blocks
    called one by one, and is not recorded.
    """

    def __init__(self, blocks: Sequence[nn.Module], names: Sequence[str], *, fall_back: bool) -> None:
        super().__init__(blocks, names)
        self._fall_back = fall_back
        self._fallen = False
        self._kinds = architectures(blocks)
        # Blocks that differ in all their numbers, as by their own, may have a forward that does not read them.
        self._differ = len(set(self._kinds)) == len(blocks)
        if self._differ:
            self._kinds = architectures(blocks, attributes=False)
        self._modules = [list(block.modules()) for block in blocks]
        self._recorded: dict[tuple, Callable[..., Tensor]] = {}
        self._read: dict[int, dict[str, tuple[nn.Module, str, Any]]] = {}
        """By kind the attributes of its blocks that recordings have read: whose each is, its name and its value."""

    @property
    def stackable(self) -> bool:
        """Whether two of the blocks can be stacked."""
        kinds = [(self._kinds[n - 1], self._modes(n)) for n in range(1, len(self.blocks) + 1) if not self._compiled(n)]
        return len(set(kinds)) < len(kinds)

    def partition(self, nodes: Sequence[int], states: Sequence[Tensor]) -> list[list[int]]:
        kinds: dict[object, list[int]] = {}
        for position, (n, state) in enumerate(zip(nodes, states, strict=True)):
            alone = position if self._compiled(n) or self.name(state) == "loop" else None
            kinds.setdefault((self._kinds[n - 1], self._modes(n), state.shape, alone), []).append(position)
        return list(kinds.values())

    def name(self, state: Tensor) -> str:
        large = self._fall_back and state.device.type == "cpu" and state.numel() > _CPU_STATE_LIMIT
        return "loop" if self._fallen or large else "batched"

    def _compiled(self, node: int) -> bool:
        # By its user, and called as it is.
        return self.blocks[node - 1]._compiled_call_impl is not None

    def _modes(self, node: int) -> tuple[bool, ...]:
        # Of all parts: users switch single ones, and a stage's container is not theirs.
        return tuple([module.training for module in self._modules[node - 1]])

    def __call__(self, nodes: tuple[int, ...], inputs: Tensor, contexts: Sequence[Context]) -> Evaluation:
        if len(nodes) == 1:
            return super().__call__(nodes, inputs, contexts)
        stacked = [torch.stack(same) for same in zip(*map(self._parameters, nodes), strict=True)]
        beside, form = _stacked_contexts(contexts)
        try:
            self._check_read(self._kinds[nodes[0] - 1])
            function = self._function(nodes, stacked, inputs, beside, form)
        except ValueError as refusal:
            if not self._fall_back:
                raise
            warnings.warn(f"{refusal}; they are evaluated one by one", stacklevel=2)
            self._fallen = True
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
        recorded = self._recorded.pop(key, None)
        if recorded is None:
            names = [name for _, _, name in self._slots[first]]
            blocks = [self.blocks[n - 1] for n in nodes]
            with self._told_apart(blocks) if self._differ else nullcontext():
                recorded = record_batched(self.names[first], blocks, names, stacked, (inputs, *beside), form)
            self._note(first, inputs[0], form.context([tensor[0] for tensor in beside]))
            while len(self._recorded) >= RECORDINGS:
                del self._recorded[next(iter(self._recorded))]
        self._recorded[key] = recorded  # behind all others, which are dropped before it
        return recorded

    @contextmanager
    def _told_apart(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Raises ValueError if something is read inside of the first block in which the others differ."""
        try:
            with _reads(blocks[0]) as read:
                yield
        finally:
            if difference := _difference(blocks, read):
                raise ValueError(
                    f"no two blocks can be stacked: {self.names[self.blocks.index(blocks[0])]} and its like differ in "
                    f"{difference}, which their forward reads"
                )

    def _note(self, place: int, state: Tensor, context: Context) -> None:
        """Notes the attributes that one block reads of all blocks of its kind."""
        block, kind = self.blocks[place], self._kinds[place]
        before = {name: dict(vars(module)) for name, module in block.named_modules()}
        read: set[tuple[str, str]] = set()
        # What does not let itself be looked at, such as a class that has no others below it, is not watched.
        with suppress(Exception), torch.no_grad(), _same_draws(state), _reads(block) as found:
            call(block, state, context)
            read = found
        # Without what the forward itself changes, such as a counter.
        after = {name: vars(module) for name, module in block.named_modules()}
        steady = [(name, key) for name, key in read if before[name].get(key) is after[name].get(key)]
        known = self._read.setdefault(kind, {})
        for title, other, own in zip(self.names, self.blocks, self._kinds, strict=True):
            for name, key in steady if own == kind else ():
                module = other.get_submodule(name)
                if key not in _TORCH_INTERNALS and _is_value(module, key):
                    known.setdefault(f"{title}: {name}.{key}", (module, key, _snapshot(getattr(module, key))))

    def _check_read(self, kind: int) -> None:
        """Raises ValueError if an attribute that was recorded has another value by now."""
        for title, (module, key, value) in self._read.get(kind, {}).items():
            now = _snapshot(getattr(module, key, None))
            if now is not value and not _equal(now, value):
                raise ValueError(
                    f"blocks of which an attribute changes cannot be evaluated in one recorded call ({title} was {value!r} "
                    f"and is {now!r})"
                )


def _is_value(module: nn.Module, key: str) -> bool:
    """Whether an attribute, of the module or its class, is no function and no part."""
    if key.startswith("__"):
        return False
    if key in vars(module):
        return not callable(vars(module)[key])
    value = getattr(type(module), key, None)
    return value is not None and not callable(value) and not isinstance(value, property)


def _snapshot(value: Any) -> Any:
    """A value, or what is in it now, that is compared with what is in it later."""
    if isinstance(value, list | dict | set):
        return copy.copy(value)
    return dict(vars(value)) if hasattr(value, "__dict__") else value


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
    blocks: Sequence[nn.Module],
    names: Sequence[str],
    stacked: Sequence[Tensor],
    inputs: Sequence[Tensor],
    form: _Form,
) -> Callable[..., Tensor]:
    """The forward of many blocks at once, as a function of (*stacked parameters, *inputs).

    Args:
        title: what error messages call the first block.
        blocks: n of them, of one architecture.
        names: of the parameters of each.
        stacked: these parameters, (n, ...) each.
        inputs: the states, then the tensors of their contexts, (n, ...) each.
        form: of the contexts.

    Raises:
        ValueError: the blocks do something that cannot be batched, such as a branch on values, or that a recording would
            freeze or leave out.
    """
    count = len(stacked)

    def call(block: nn.Module, parameters: Sequence[Tensor], state: Tensor, beside: Sequence[Tensor]) -> Tensor:
        parts = dict(zip(names, parameters, strict=True))
        output = first_of(functional_call(block, parts, (state,), chosen(block, form.context(beside))))
        check_tensor(title, output)
        return output

    def batched(*tensors: Tensor) -> Tensor:
        def one(*own: Any) -> Tensor:
            return call(blocks[0], *own)

        return vmap(one, randomness="different")(tensors[:count], tensors[count], tensors[count + 1 :])

    def looped(*tensors: Tensor) -> Tensor:
        rows = zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
        return torch.stack(
            [call(b, row[:count], row[count], row[count + 1 :]) for b, row in zip(blocks, rows, strict=True)]
        )

    tensors = [tensor.detach() for tensor in (*stacked, *inputs)]
    try:
        with _attention(), _same_draws(tensors[0]):
            graph, again = make_fx(batched)(*tensors), make_fx(batched)(*tensors)
            _check_constants(graph, again)
            return _faithful(graph, batched, looped, tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{title} cannot be stacked with its like in one call ({str(error).splitlines()[0]})"
        ) from error


@contextmanager
def _same_draws(tensor: Tensor) -> Iterator[None]:
    """Leaves the states of random numbers as they were, so that a resumed run draws the same.

    Raises:
        RuntimeError: other numbers than torch's were drawn, of which a recording would have one draw for ever.
    """
    drawn, sampled = random.getstate(), np.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(_devices(tensor)):
            yield
    finally:
        others = {
            "Python's": random.getstate() != drawn,
            "NumPy's": str(np.random.get_state(legacy=False)) != str(sampled),
        }
        random.setstate(drawn)
        np.random.set_state(sampled)
        for whose, moved in others.items():
            if moved:
                raise RuntimeError(f"they draw from {whose} random, of which one draw would be recorded")


def _check_constants(graph: fx.GraphModule, again: fx.GraphModule) -> None:
    """RuntimeError if a recording has something in it that would be another one at another call, or that may be."""
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(graph, node.target)
        # A tensor that the forward made of plain numbers is copied before it is used.
        made = all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not made:
            raise RuntimeError(
                f"they compute with a tensor {tuple(value.shape)} that is neither their parameter nor handed to them, and "
                "that would be recorded: let embed return it in the context"
            )
    if str(graph.graph) != str(again.graph) or not all(map(_equal_constants, _constants(graph), _constants(again))):
        raise RuntimeError(CHANGING)


def _constants(graph: fx.GraphModule) -> list[Any]:
    return [getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"]


def _equal_constants(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return True  # such as a generator, which goes on drawing


def _faithful(
    graph: fx.GraphModule,
    batched: Callable[..., Tensor],
    looped: Callable[..., Tensor],
    tensors: Sequence[Tensor],
) -> Callable[..., Tensor]:
    """The recording if it has the values and gradients of the blocks called one by one, or else the vmapped call.

    A recording has not if the block uses torch.no_grad() or an autograd.Function with a backward of its own: neither leaves
    a trace in the operations recorded.

    Raises:
        RuntimeError: the vmapped call has others too.
    """
    draws = any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in graph.graph.nodes)
    with _Hooks() as hooks, torch.enable_grad():
        expected = _results(looped, tensors)
    if hooks.found:
        raise RuntimeError("they hook gradients, which a stacked call has not block by block")
    with torch.no_grad():
        if not all(_agree(_results(looped, tensors), expected[:1]) for _ in range(LOOKS)):
            raise RuntimeError(CHANGING)
    if draws:  # of which blocks that are called one by one have others: the vmapped call has the recording's
        with torch.enable_grad():
            try:
                expected = _results(batched, tensors)
            except RuntimeError:  # fused operations that vmap leaves without a derivative, but a recording takes apart
                return _replayed(graph)
    with torch.enable_grad():
        if _agree(_results(graph.forward, tensors), expected):
            return _replayed(graph)
        if draws or _agree(_results(batched, tensors), expected):
            return batched
    raise RuntimeError("stacked, they compute something else than one by one")


class _Hooks(TorchFunctionMode):
    """Sees hooks being put on tensors."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
        return func(*args, **(kwargs or {}))


def _results(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The output of a function and its gradients in all that it is of."""
    torch.manual_seed(0)  # blocks may draw random numbers
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    output = function(*leaves)
    if not output.requires_grad:
        return [output]
    # Not a plain sum: a softmax or a norm at the end of a block would hide everything before it.
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, cotangent, materialize_grads=True)]


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    device = expected[0].device.type
    precision = max(torch.finfo(tensor.dtype).eps for tensor in expected)
    if torch.is_autocast_enabled(device):
        precision = max(precision, torch.finfo(torch.get_autocast_dtype(device)).eps)
    # Beside the largest gradient one that is 0 but for rounding counts as such. Where a run diverges there is no number.
    numbers = [other.isfinite() for other in expected]
    scales = [torch.where(number, other, 0).abs().max() for number, other in zip(numbers, expected, strict=True)]
    rounding = 8 * precision * torch.stack(scales).max()
    return len(found) == len(expected) and all(
        bool(torch.where(number, (one - other).abs() <= precision**0.5 * scale + rounding, ~one.isfinite()).all())
        for one, other, number, scale in zip(found, expected, numbers, scales, strict=True)
    )


def _replayed(graph: fx.GraphModule) -> Callable[..., Tensor]:
    """A recording without the operations that change nothing, each of which would cost one more backward."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph.forward


def _devices(tensor: Tensor) -> list[torch.device]:
    # Those beside the CPU whose random state a recording must leave as it was, so that a resumed run draws the same.
    return [tensor.device] if tensor.device.type == "cuda" else []


def _attention() -> AbstractContextManager[object]:
    # The CPU's fused attention is one that vmap can only loop over, with a warning, and has no second derivative; a GPU's
    # cannot be walked back once it is recorded ("LSE is not correctly aligned", torch 2.11 on an H200).
    return sdpa_kernel(SDPBackend.MATH)


def _changes_nothing(node: fx.Node) -> bool:
    # vmap leaves views and products with 1.
    aten = torch.ops.aten
    if node.target in (aten.expand.default, aten.view.default, aten._unsafe_view.default):
        source = node.args[0]
        return isinstance(source, fx.Node) and node.meta["val"].shape == source.meta["val"].shape
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


def architectures(blocks: Sequence[nn.Module], attributes: bool = True) -> list[int]:
    """A number per block, equal for blocks that compute the same function of their parameters and input.

    Two blocks are twins if their modules, plain attributes and parameters' shapes agree, and which of these are the same
    parameter. Blocks with buffers (running statistics change in place), hooks, tensors as plain attributes, or a module
    that occurs twice have no twin.

    Args:
        attributes: whether numbers and words among the plain attributes count.
    """
    described: list[object] = []
    kinds = []
    for block in blocks:
        description = _describe(block, attributes)
        twins = (kind for kind, other in enumerate(described) if _equal(description, other))
        kind = next(twins, len(described))
        if kind == len(described):
            described.append(description)
        kinds.append(kind)
    return kinds


@contextmanager
def _reads(block: nn.Module) -> Iterator[set[tuple[str, str]]]:
    """What is read of a block inside: the names of modules, each with that of an attribute."""
    found: set[tuple[str, str]] = set()
    kinds = [(module, name, type(module)) for name, module in block.named_modules()]
    try:
        for module, name, kind in kinds:

            def read(self: nn.Module, key: str, name: str = name, kind: Any = kind) -> Any:
                found.add((name, key))
                return kind.__getattribute__(self, key)

            module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read})
        yield found
    finally:
        for module, _, kind in kinds:
            module.__class__ = kind


def _difference(blocks: Sequence[nn.Module], read: Iterable[tuple[str, str]]) -> str | None:
    """The first plain attribute in which blocks differ, with its values, among those that were read."""
    for name, key in sorted(read):
        values = [_plain(block.get_submodule(name)).get(key) for block in blocks]
        if not all(_equal(values[0], value) for value in values if value is not values[0]):
            return f"{name}.{key} ({', '.join(map(repr, values))})".removeprefix(".")
    return None


def _equal(first: object, second: object) -> bool:
    try:
        return first is not None and bool(first == second)
    except (RuntimeError, ValueError):  # arrays among the attributes, whose comparison is an array
        return False


_TORCH_INTERNALS = set(vars(nn.Module()))


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are not torch's own."""
    return {key: value for key, value in vars(module).items() if key not in _TORCH_INTERNALS}


def _describe(block: nn.Module, plain: bool) -> list | None:
    """Everything but the parameters' values that a block's function depends on, or None if that cannot be told.

    plain: whether with the numbers and words among the plain attributes.
    """
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
        attributes = _plain(module)
        if any(isinstance(value, Tensor) for value in attributes.values()):
            return None
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        shapes = [(key, p.shape, p.dtype, p.device, seen.setdefault(p, len(seen))) for key, p in parameters]
        if not plain:
            attributes = {k: v for k, v in attributes.items() if not isinstance(v, int | float | str | None)}
        description.append((name, type(module), attributes, shapes))
    return description


# The largest block, in parameters, and the largest state, in numbers, for which one stacked call beats a loop; measured by
# benchmarks/engines.py on CPUs, on GPUs a guess: larger ones keep one busy by themselves, and have fused attention only one
# by one.
_CPU_LIMIT, _GPU_LIMIT = 100_000, 1_000_000
_CPU_STATE_LIMIT = 2**14


def make_engine(blocks: Sequence[nn.Module], names: Sequence[str], choice: str) -> Engine:
    """The engine that a user asks for.

    Args:
        blocks: the blocks, or stages of them, of nodes 1..N-1.
        names: what error messages call them.
        choice: ``loop``, ``batched``, or ``auto``, which takes the faster by what benchmarks/engines.py measured: batched
            if the blocks have twins, none of them convolves channel by channel, and, on a CPU, they and their states are
            small. Blocks that turn out impossible to stack are then evaluated one by one, with a warning.

    Raises:
        ValueError: an unknown choice, or ``batched`` for blocks of which no two can be stacked.
    """
    if choice not in ("auto", "loop", "batched"):
        raise ValueError(f"unknown engine {choice!r}: choose auto, loop or batched")
    if choice == "loop" or len(blocks) == 1:
        return LoopEngine(blocks, names)
    engine = BatchedEngine(blocks, names, fall_back=choice == "auto")
    if choice == "batched":
        if not engine.stackable:
            raise ValueError(
                "no two blocks can be stacked: they need one architecture, equal plain attributes, "
                "and neither buffers nor hooks; engine='loop' evaluates them one by one"
            )
        return engine
    return engine if engine.stackable and _stacking_pays(blocks) else LoopEngine(blocks, names)


def _stacking_pays(blocks: Sequence[nn.Module]) -> bool:
    for module in (m for block in blocks for m in block.modules()):
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
            return False
    parameters = [p for block in blocks for p in block.parameters()]
    limit = _CPU_LIMIT if all(p.device.type == "cpu" for p in parameters) else _GPU_LIMIT
    return sum(p.numel() for p in parameters) / len(blocks) <= limit
