"""Adapters for models of others: cut at some of their modules, or made of functions around modules."""

import copy
import dis
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from hbll.modes import evaluating
from hbll.names import check_known

__all__ = ["Part", "part", "split"]


class Part(nn.Module):
    """What ``part`` makes."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.used = nn.ModuleList(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part":
        # A function is copied as it is: the copy of the part would call the modules of the original.
        return Part(_copied(self.function, memo), [copy.deepcopy(module, memo) for module in self.used])


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy in which functions, partial ones and those in lists, tuples and dicts among them, have copies of what they
    have around them."""
    if id(value) in memo:
        return memo[id(value)]
    made: Any
    if type(value) is partial:
        given = _copied(value.keywords, memo)
        made = partial(_copied(value.func, memo), *_copied(value.args, memo), **given)
        made.__dict__.update(_copied(vars(value), memo))
        return memo.setdefault(id(value), made)
    if type(value) is tuple:
        return memo.setdefault(id(value), tuple(_copied(own, memo) for own in value))
    if type(value) is list:
        made = memo[id(value)] = []  # before what is in it, where it may be itself
        made.extend(_copied(own, memo) for own in value)
        return made
    if type(value) is dict:
        made = memo[id(value)] = {}
        made.update((key, _copied(own, memo)) for key, own in value.items())
        return made
    if not isinstance(value, FunctionType):
        return copy.deepcopy(value, memo)
    for name in _names(value.__code__):
        if isinstance(value.__globals__.get(name), nn.Module):
            raise ValueError(
                f"a part cannot be copied whose function finds its module {name} as a global variable: make the part within "
                "a function, around the module"
            )
    cells = tuple(CellType() for _ in value.__closure__ or ())
    made = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = made  # before what is around it, where it may be itself
    for own, cell in zip(cells, value.__closure__ or (), strict=True):
        own.cell_contents = _copied(cell.cell_contents, memo)
    made.__defaults__ = _copied(value.__defaults__, memo)
    made.__kwdefaults__ = _copied(value.__kwdefaults__, memo)
    return made


def _names(code: CodeType) -> Iterator[str]:
    """The global names that a function uses, and those that the functions within it do."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def part(function: Callable[..., Any], *modules: nn.Module) -> nn.Module:
    """A module that calls a function and registers the modules that the function uses: an embed, a block or a head of a
    model whose own ``forward`` does more than hand one tensor on.

    Args:
        function: what the part computes; of the context it is given what it names. It should be made around the modules
            themselves, and not around a whole model that has them: copies of the part copy what its function is around.
        modules: those whose parameters are to be the part's.

    Raises:
        ValueError: the function is made around modules with parameters, and none is handed over to be trained.
    """
    if isinstance(function, nn.Module):
        return Part(function, (function, *modules))
    around = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if not modules and any(isinstance(held, nn.Module) and any(True for _ in held.parameters()) for held in around):
        raise ValueError("the modules that the function uses are to be handed over too, or nothing would train them")
    return Part(function, modules)


def split(model: nn.Module, at: Sequence[str]) -> list[nn.Module]:
    """The pieces of a model before, between and from some of its modules on; see ``Chain.cut``.

    Raises:
        ValueError: as ``Chain.cut``.
    """
    modules = dict(model.named_modules())
    for path in at:
        check_known(path, [name for name in modules if name], "module")
    if len(at) < 2:
        raise ValueError("name the modules that start each block, and the one that starts the head: two at least")
    graph = _traced(model, at)
    nodes = [node for node in graph.nodes if node.op != "output"]
    starts = []
    for path in at:
        called = [i for i, node in enumerate(nodes) if node.op == "call_module" and _within(node.target, path)]
        if not called:
            raise ValueError(
                f"the model does not call {path}, or calls what is in it elsewhere: it cannot start a block"
            )
        starts.append(called[0])
    if any(a >= b for a, b in pairwise(starts)):
        raise ValueError(f"the model runs through these modules in another order: {', '.join(at)}")
    if not any(node.op not in ("placeholder", "get_attr") for node in nodes[: starts[0]]):
        raise ValueError(f"nothing lies before {at[0]}: the embed would be empty; let the first block start later")
    return [_piece(model, nodes[a:b], nodes, b) for a, b in pairwise([0, *starts, len(nodes)])]


def _within(target: Any, path: str) -> bool:
    return target == path or str(target).startswith(path + ".")


def _traced(model: nn.Module, at: Sequence[str]) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            # Opened up are only those in which a cut lies.
            return not any(path.startswith(module_qualified_name + ".") for path in at)

    drawn = _random_states()
    try:
        with evaluating(model):
            graph = Tracer().trace(model)
            model.train()
            training = Tracer().trace(model)
    except Exception as error:  # whatever a forward does with a proxy that it cannot
        raise ValueError(
            f"a {type(model).__name__} does more than hand one tensor on ({str(error).splitlines()[0]}): cut it by hand, "
            "hbll.Chain(embed=hbll.part(function, *modules), blocks=.., head=..)"
        ) from error
    for node in (*graph.nodes, *training.nodes):
        if node.op == "get_attr" and not _registered(model, str(node.target)):
            raise ValueError(
                f"a {type(model).__name__} computes with a tensor, {node.target}, that is neither its parameter nor its "
                "buffer and that the parts would keep as it is: register it as a buffer, or cut by hand with hbll.part and "
                "a context"
            )
    if _random_states() != drawn:
        raise ValueError(
            f"a {type(model).__name__} draws random numbers between these modules, as layer drop does, and the parts would "
            "keep what was drawn once: make that a module, or cut it by hand with hbll.part"
        )
    if str(training) != str(graph):
        raise ValueError(
            f"what a {type(model).__name__} computes between these modules depends on whether it trains, as "
            "F.dropout(x, training=self.training) does: make that a module (nn.Dropout), or cut it by hand with hbll.part"
        )
    return graph


def _random_states() -> tuple[Any, ...]:
    """Where the random numbers stand that a forward may draw, but for generators of its own."""
    name, keys, *rest = np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.tolist() for state in (torch.get_rng_state(), *on_gpus)]
    return states, random.getstate(), (name, np.asarray(keys).tolist(), *rest)


def _registered(model: nn.Module, name: str) -> bool:
    """Whether a tensor is a parameter or a buffer of the model's own; those that tracing found elsewhere have such names."""
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return name in known and not name.startswith("_tensor_constant")


def _piece(model: nn.Module, own: Sequence[fx.Node], nodes: Sequence[fx.Node], end: int) -> nn.Module:
    """The nodes of one piece as a module, from what the piece before computed last to what it computes last."""
    inside = set(own)
    outside = dict.fromkeys(a for node in own for a in node.all_input_nodes if a not in inside)
    weights = [node for node in outside if node.op == "get_attr"]  # which every piece that uses them has
    taken = [node for node in outside if node.op != "get_attr"]
    begins = nodes.index(own[0])
    crossing = [
        node
        for node in nodes[:end]
        if node.op != "get_attr" and any(user.op == "output" or nodes.index(user) >= end for user in node.users)
    ]
    if len(taken) > (begins > 0) or len(crossing) != 1:
        raise ValueError(
            f"more than one state crosses a cut of the model ({', '.join(map(str, crossing or taken))}): move the cut, or "
            "cut by hand with hbll.part and a context"
        )
    calls = [node for node in own if node.op != "placeholder"]
    if len(calls) == 1 and calls[0].op == "call_module" and len(calls[0].args) == 1 and not calls[0].kwargs:
        return model.get_submodule(str(calls[0].target))  # the user's own module
    graph = fx.Graph()
    copies = {node: graph.placeholder("state") for node in taken}
    for node in (*weights, *own):
        copies[node] = graph.node_copy(node, lambda before: copies[before])
    graph.output(copies[crossing[0]])
    return fx.GraphModule(model, graph)
