"""Tokens generated along any path of a network, with caches of keys and values; and self-speculative decoding, in which a
short way through the network drafts and a long one verifies.

Drafts are accepted and replaced as in Leviathan et al., arXiv 2211.17192, so that tokens are distributed as by the long way
alone. Blocks that both ways begin with are evaluated once for both, and so share one cache; a stage's readout has its whole
stage in common with the chain, a path along the rim nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll.calls import Context, PathLike, Readout, first_of, names, picked, takes
from hbll.models.gpt import KeyValueCache
from hbll.modes import evaluating
from hbll.names import check_number

__all__ = ["Generation", "generate", "verified"]

Draw: TypeAlias = Callable[[Tensor], Tensor]
"""Takes one token of each distribution (B, V): (B, 1)."""


class Network(Protocol):
    """What of a ``Chain`` generation needs."""

    embed: nn.Module
    blocks: nn.ModuleList

    def embedded(self, x: Any, **options: Any) -> tuple[Tensor, Context]: ...
    def way(self, path: PathLike) -> Readout: ...
    def reader(self, readout: Readout) -> nn.Module: ...


@dataclass(frozen=True)
class Generation:
    """Generated tokens, and what they took."""

    tokens: Tensor
    """Those given and the new ones, (B, T + new)."""

    drafted: int
    """Tokens of each sequence that were drafted."""

    accepted: int
    """Those of them that were kept."""

    passes: int
    """Evaluations of the way that verifies, one after the other; without a draft one for each new token."""

    seconds: float
    """Of the generation, the tokens given among it."""

    tokens_per_second: float
    """New tokens, those of all sequences."""

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that were kept; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None


@torch.no_grad()
def generate(
    network: Network,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    path: PathLike = None,
    draft: PathLike = None,
    num_draft_tokens: int = 4,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Tokens that go on from those given, in evaluation mode.

    Args:
        network: a language model whose embed is called as ``embed(tokens, start=position)``, and whose blocks take a
            ``cache``, as those of ``hbll.models.gpt`` do. Its head treats every token by itself.
        tokens: integers, (B, T).
        max_new_tokens: how many follow.
        path: the way to read the network: a path as ``Chain.resolve`` takes it, or a readout; by default the chain.
        draft: another one, which guesses what ``path`` will say; by default none.
        num_draft_tokens: how many tokens it guesses before they are verified in one pass. Of several sequences those are
            kept that are accepted in all.
        temperature: what logits are divided by; 0 takes the likeliest token. In float32 greedy tokens are those without a
            draft, unless logits are equal up to rounding.
        top_k: draw among so many of the likeliest tokens alone.
        generator: of the draws.

    Raises:
        ValueError: an option has no such value, a path is none, the network cannot generate, or tokens are not of its
            vocabulary or too many for its context.
    """
    check_number("max_new_tokens", max_new_tokens, least=1)
    check_number("num_draft_tokens", num_draft_tokens, least=1)
    check_number("temperature", temperature, least=0.0)
    if top_k is not None:
        check_number("top_k", top_k, least=1)
    check_tokens(network, tokens, max_new_tokens)
    ways = [_modules(network, way) for way in ([path] if draft is None else [path, draft])]
    common = 0 if draft is None else _common(*ways)
    trunk = _Trunk(network, ways[0][:common], [modules[common:] for modules in ways])

    def odds(logits: Tensor) -> Tensor:
        return probabilities(logits, temperature, top_k)

    # At temperature 0 there is nothing to draw, which would take as long as a block.
    draw: Draw = likeliest if temperature == 0 else partial(torch.multinomial, num_samples=1, generator=generator)
    first, end = tokens.shape[1], tokens.shape[1] + max_new_tokens
    drafted = accepted = passes = 0
    start = time.perf_counter()
    with evaluating(nn.ModuleList([network.embed, *(module for modules in ways for module in modules)])):
        while (length := tokens.shape[1]) < end:
            guesses = []
            for _ in range(0 if draft is None else min(num_draft_tokens, end - length - 1)):
                guesses.append(odds(trunk.logits(1, tokens)[:, -1]))
                tokens = torch.cat([tokens, draw(guesses[-1])], 1)
            truths = odds(trunk.logits(0, tokens)[:, -len(guesses) - 1 :])
            kept, following = verified(truths, guesses, tokens[:, length:], draw, generator)
            tokens = torch.cat([tokens[:, : length + kept], following], 1)
            trunk.cut(length + kept)
            drafted, accepted, passes = drafted + len(guesses), accepted + kept, passes + 1
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    seconds = time.perf_counter() - start
    rate = len(tokens) * (end - first) / seconds
    return Generation(tokens, drafted, accepted, passes, seconds, rate)


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """The distribution (..., V) that tokens are drawn from; at temperature 0 all of it is on the likeliest one."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.float()
    # Beyond float32's normal numbers the largest logit, or one of minus infinity, would become none.
    bounds = torch.finfo(logits.dtype)
    scaled = (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, bounds.tiny), bounds.max)
    if top_k is not None and top_k < logits.shape[-1]:
        places = logits.topk(top_k).indices
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, places, scaled.gather(-1, places))
    return scaled.softmax(-1)


def likeliest(distribution: Tensor) -> Tensor:
    """The likeliest token of each distribution (B, V), (B, 1)."""
    return distribution.argmax(-1, keepdim=True)


def verified(
    truths: Tensor, guesses: Sequence[Tensor], drafted: Tensor, draw: Draw, generator: torch.Generator | None
) -> tuple[int, Tensor]:
    """How many of the drafted tokens are kept, and what follows them, (B, 1).

    Whatever is drafted, what is kept and what follows are distributed as the truths are: a token is accepted with
    probability min(1, p / q), and else replaced by one from max(0, p - q), normalised. Where the first sequence has a token
    replaced, all end; the others keep what they have accepted at that place.

    Args:
        truths: p, the distributions after the tokens known and after each drafted one, (B, k + 1, V).
        guesses: q, what each of the k tokens was drawn from, (B, V) each.
        drafted: (B, k).
        draw: what draws from distributions that are not of drafted tokens.
        generator: of the numbers that acceptance is drawn by.
    """
    count = len(guesses)
    if not count:
        return 0, draw(truths[:, 0])
    chosen = drafted.unsqueeze(-1)
    p = truths[:, :-1].gather(-1, chosen).squeeze(-1)
    q = torch.stack(list(guesses), 1).gather(-1, chosen).squeeze(-1)
    accepted = torch.rand(p.shape, generator=generator, device=p.device) * q < p
    kept = int(accepted.cumprod(1).sum(1).min())
    if kept == count:
        return kept, draw(truths[:, -1])
    wrong = ~accepted[:, kept : kept + 1]
    rest = (truths[:, kept] - guesses[kept]).clamp_min(0)
    usable = wrong & (rest.sum(1, keepdim=True) > 0)  # which it may not be where p is less than q by rounding alone
    replaced = draw(torch.where(usable, rest, truths[:, kept]))
    return kept, torch.where(wrong, replaced, drafted[:, kept : kept + 1])


def check_tokens(network: Network, tokens: Tensor, more: int = 0) -> None:
    """Raises ValueError unless the embed takes tokens (B, T) and ``more`` of them, as its ``vocabulary`` and its ``context``
    tell if it has them."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.ndim != 2 or not tokens.numel():
        got = f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise ValueError(f"tokens to go on from are integers (B, T), one at least in each sequence; got {got}")
    vocabulary, context = (getattr(network.embed, name, None) for name in ("vocabulary", "context"))
    if vocabulary is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(
            f"the network knows tokens 0 to {vocabulary - 1}; got {int(tokens.min())} to {int(tokens.max())}: they are of "
            "another vocabulary"
        )
    length = tokens.shape[1]
    if context is not None and length + more - 1 > context:  # the last one is not read
        raise ValueError(
            f"{length} tokens and {more} new ones are more than the context of {context} tokens that the network was "
            f"trained with: after so many there is room for {max(context + 1 - length, 0)}"
        )


def _modules(network: Network, way: PathLike) -> list[nn.Module]:
    """What states pass along a way, the head last.

    Raises:
        ValueError: the way is none, or embed or a block does not say where in a sequence tokens are.
    """
    readout = network.way(way)
    if readout.scores:
        raise ValueError(f"{readout.name} reads whole inputs: tokens are generated along a path")
    blocks = {f"block {n}": network.blocks[n - 1] for n in readout.path}
    for name, module, keyword in [("the embed", network.embed, "start"), *((n, b, "cache") for n, b in blocks.items())]:
        if not names(module, keyword):  # by **kwargs it might be swallowed, and the tokens before forgotten
            raise ValueError(
                f"{name}, a {type(module).__name__}, names no {keyword}=, by which a network goes on with a sequence; "
                "hbll.models.gpt has blocks that do"
            )
    return [*blocks.values(), network.reader(readout)]


def _common(path: Sequence[nn.Module], draft: Sequence[nn.Module]) -> int:
    """How many modules both begin with; neither head among them."""
    count = 0
    while count < min(len(path), len(draft)) - 1 and path[count] is draft[count]:
        count += 1
    return count


class _Part:
    """Modules that states pass one after the other, each with what it keeps of the tokens that have passed."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = [(module, takes(module), KeyValueCache()) for module in modules]
        self.length = 0
        """Tokens that have passed."""

    def __call__(self, state: Tensor, context: Context) -> Tensor:
        self.length += state.shape[1]
        for module, taken, cache in self.modules:
            state = first_of(module(state, **picked({**context, "cache": cache.rewound()}, taken)))
        return state

    def cut(self, length: int) -> None:
        self.length = min(self.length, length)
        for _, _, cache in self.modules:
            cache.cut(length)


class _Trunk:
    """What all ways have in common, and the ways on from there."""

    def __init__(self, network: Network, common: Sequence[nn.Module], ways: Sequence[Sequence[nn.Module]]) -> None:
        self.network = network
        self.common = _Part(common)
        self.ways = [_Part(modules) for modules in ways]
        self.states: Tensor | None = None  # of the last tokens in common, (B, n, ..): those that some way has not read

    def logits(self, way: int, tokens: Tensor) -> Tensor:
        """Those that follow each of the tokens (B, T) that a way has not read yet, (B, n, V)."""
        part, known = self.ways[way], self.common.length
        context: Context = {}
        if known < tokens.shape[1]:
            state, context = self.network.embedded(tokens[:, known:], start=known)
            state = self.common(state, context)
            self.states = state if self.states is None else torch.cat([self.states, state], 1)
        if part.length != known:  # its context is that of other tokens
            context = self.network.embedded(tokens[:, part.length :], start=part.length)[1]
        assert self.states is not None
        return part(self.states[:, part.length - self.common.length :], context)

    def cut(self, length: int) -> None:
        """Forgets all tokens but the first ``length``."""
        before = self.common.length
        for part in (self.common, *self.ways):
            part.cut(length)
        assert self.states is not None
        first = before - self.states.shape[1]
        unread = min(part.length for part in self.ways)
        self.states = self.states[:, unread - first : length - first]
