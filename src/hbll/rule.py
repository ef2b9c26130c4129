"""A training rule by its options: which states, which credit, which local update, and their parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from torch import nn

from hbll.losses import Loss, cross_entropy
from hbll.names import check_known

__all__ = ["PRESETS", "Rule", "make_rule"]


@dataclass(frozen=True)
class Rule:
    """The options of a training rule (arXiv 2606.21497, section 3, and what was found since: see the README).

    Raises:
        ValueError: an option has no such value, or two of them exclude each other.
    """

    states: Literal["tree", "chain", "scan", "stream"] = "tree"
    """What a node is evaluated on: its left parent in the tree, or an estimate of its predecessor in the chain: exact, one
    after the other; by parallel sweeps; or left there by the step before."""
    boundary: Literal["posterior", "prior"] = "posterior"
    """What a node of the tree hands to its children: its target, or what its block computed."""
    stage: int | Sequence[int] = 1
    """Consecutive blocks that form one node, evaluated one after the other with exact gradients inside; or a number for
    every node, such as (2, 2, 3)."""
    credit: Literal["arcs", "exact", "scan", "spine", "late"] = "arcs"
    """Inverted right arcs; the exact gradient through the whole chain; parallel sweeps of vector-Jacobian products; the
    gradient through a few jumps to the head; or the exact gradient of an earlier step's batch."""
    scope: Literal["block", "triplet", "tree"] = "block"
    """How far the gradient of a node's error reaches: the right neighbour (f_n then moves to its target), also the node's
    own block, or everything that the node's state was computed from."""
    inversion: Literal["none", "taylor", "exact"] = "taylor"
    """How a target is found: not at all, by one gradient step, or by conjugate gradients on the linearised arc."""
    step: float = 0.5
    """The length of the gradient step; 1/2 is exact for orthogonal linear arcs."""
    iterations: int = 8
    """Conjugate-gradient iterations of the exact inversion."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise on every target, in units of the state."""
    family: Literal["gaussian", "bernoulli", "categorical"] = "gaussian"
    """The exponential family of the states, whose means the blocks exchange: embed and blocks must end in what yields such
    means, a sigmoid for bernoulli, a softmax over features for categorical."""
    variance: float = 1.0
    """sigma^2 of Gaussian states; a larger one weighs the states' errors less against the label's."""
    label_variance: float = 1.0
    """The label's error is loss / label_variance."""
    loss: Loss = cross_entropy
    """The label's loss."""
    sweeps: int = 3
    """Sweeps of scan states, the last one, with graph, included; at most so many if there is a tolerance."""
    credit_sweeps: int = 3
    """Sweeps of scan credit; at most so many if there is a tolerance."""
    tolerance: float | None = None
    """Sweeps, of states and of credit, end as soon as one moves them by less than this, relative to their norm."""
    guess: Literal["ahead", "mean", "tree", "star"] = "ahead"
    """Where the sweeps of states start: the batch's own states, computed ahead with the weights of the steps before; a
    running mean over steps; or predictors with parameters of their own, a tree of them or each on the embedded input."""
    jumps: Sequence[nn.Module] = ()
    """The blocks of the predictors, one per stage; by default fresh copies of each stage's last block."""
    coarse: Literal["skip", "none"] = "skip"
    """How a sweep carries a correction across a stage: unchanged, as skip connections do, or not at all."""
    spine: Literal["doubling", "right", "last", "none"] = "doubling"
    """The stages whose last blocks spine credit passes on its way to the head: 1, 3, 7, .. on; the right parents; the last
    one alone; none."""
    spine_share: float = 1.0
    """Share of the stages, drawn anew each step, that receive spine credit; theirs is scaled up to make up for it."""
    heads: Literal["shared", "own"] = "shared"
    """Whether a spine ends at the network's head or, except the last stage's, at a fresh copy of the stage's own."""
    rim: float = 0.0
    """Weight of the mean loss of the rim's paths, trained end to end beside the rule; keeps short paths accurate."""
    path: str | int | Sequence[int] | None = None
    """The path that chain states follow; by default the whole chain."""
    engine: Literal["auto", "loop", "batched"] = "auto"
    """How the blocks of a level are evaluated: one by one, or stacked in one call."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise ValueError(f"{field.name} is one of {', '.join(get_args(field.type))}; got {value!r}")
            if field.type is int and not isinstance(value, int):
                raise ValueError(f"{field.name} is a whole number; got {value!r}")
            if field.type is float and not isinstance(value, int | float):
                raise ValueError(f"{field.name} is a number; got {value!r}")
        sizes = [self.stage] if isinstance(self.stage, int) else self.stage
        if not isinstance(sizes, Sequence) or not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"stage is a whole number, or one for every node; got {self.stage!r}")
        if not all(isinstance(jump, nn.Module) for jump in self.jumps):
            raise ValueError(f"jumps are modules, one per stage; got {self.jumps!r}")
        if not callable(self.loss):
            raise ValueError(f"loss is a function of predictions and labels; got {self.loss!r}")
        own = self.loss.parameters() if isinstance(self.loss, nn.Module) else ()
        if self.credit != "exact" and any(parameter.requires_grad for parameter in own):
            raise ValueError("the loss has parameters, which this rule does not train: let the head have them")
        for name in ("step", "variance", "label_variance", "spine_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if min(sizes, default=0) < 1:
            raise ValueError(f"stage must be at least 1; got {self.stage}")
        for name in ("iterations", "sweeps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("noise", "rim", "credit_sweeps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if self.tolerance is not None and not (isinstance(self.tolerance, int | float) and self.tolerance >= 0):
            raise ValueError(f"tolerance is a number and not negative; got {self.tolerance!r}")
        if self.spine_share > 1:
            raise ValueError(f"spine_share is at most 1; got {self.spine_share}")
        if self.noise and self.family != "gaussian":
            raise ValueError("noise is for Gaussian states: it would take other families' means out of their range")
        if self.inversion == "exact" and self.family != "gaussian":
            raise ValueError("the exact inversion is for Gaussian states; take inversion='taylor' for other families")
        if self.boundary == "posterior" and (self.states, self.credit) != ("tree", "arcs"):
            raise ValueError("posterior boundaries are targets of inverted arcs in the tree: take boundary='prior'")
        if self.credit == "exact" and self.states != "chain":
            raise ValueError("exact credit needs the states of the chain: take states='chain'")
        if self.states == "stream" and self.credit not in ("spine", "late"):
            raise ValueError("stream states hold a mini-batch per stage: take credit='spine' or 'late'")
        if self.credit == "late" and self.states != "stream":
            raise ValueError("late credit belongs to a pipeline: take states='stream'")
        if self.scope == "tree" and (self.states in ("scan", "stream") or self.credit == "scan"):
            raise ValueError("scan and stream states carry no gradient across stages: take scope='triplet'")
        for field in fields(self):
            if getattr(self, field.name) != field.default and not self.reads(field.name):
                readers = _READERS[field.name]
                wanted = " or ".join(f"{option}={value!r}" for option, value in readers)
                here = ", ".join(f"{option}={getattr(self, option)!r}" for option in dict(readers))
                raise ValueError(f"{field.name} is for {wanted}, and does nothing with {here}")
        if self.path is not None and not (self.states == "chain" and self.credit == "exact"):
            raise ValueError("a path other than the whole chain can be trained by states='chain', credit='exact' only")

    def reads(self, name: str) -> bool:
        """Whether anything depends on the option of that name."""
        return name not in _READERS or any(getattr(self, option) == value for option, value in _READERS[name])


_READERS: dict[str, tuple[tuple[str, str], ...]] = {
    "inversion": (("credit", "arcs"), ("scope", "block")),
    "noise": (("credit", "arcs"), ("scope", "block")),
    "sweeps": (("states", "scan"),),
    "credit_sweeps": (("credit", "scan"),),
    "tolerance": (("states", "scan"), ("credit", "scan")),
    "guess": (("states", "scan"),),
    "jumps": (("guess", "tree"), ("guess", "star")),
    "coarse": (("states", "scan"), ("credit", "scan")),
    "spine": (("credit", "spine"),),
    "spine_share": (("credit", "spine"),),
    "heads": (("credit", "spine"),),
}
"""Options that not every rule reads, each with the choices that do."""


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tree": {"boundary": "prior", "scope": "triplet"},
    "scan": {"states": "scan", "boundary": "prior", "credit": "scan", "scope": "triplet"},
    "stream": {"states": "stream", "boundary": "prior", "credit": "spine", "scope": "triplet"},
    "pipeline": {"states": "stream", "boundary": "prior", "credit": "late", "scope": "triplet"},
    "bp": {"states": "chain", "boundary": "prior", "credit": "exact", "scope": "tree", "engine": "loop"},
}
"""The named rules: HBLL as published, its variant without leaks from the label, the two whose chain is accurate at full
depth, the asynchronous pipeline, and backpropagation."""


def make_rule(name: str, options: dict[str, Any]) -> Rule:
    """The preset of that name with some of its options replaced.

    Raises:
        ValueError: an unknown preset, option or value; the message names the nearest one.
    """
    known = [field.name for field in fields(Rule)]
    check_known(name, PRESETS, "rule")
    for option in options:
        check_known(option, known, "option")
    return Rule(**{**PRESETS[name], **options})
