"""What recipes are made of: the options that all have, those of rules for chains, those of networks of others' papers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from hbll.calls import Readout
from hbll.cut import even
from hbll.data import Splits
from hbll.data.vocabulary import Vocabulary
from hbll.machine import refuse_beyond
from hbll.names import check_known
from hbll.network import Chain
from hbll.recipes.measures import ACCURACY, Measure
from hbll.rule import Rule
from hbll.rules import RULES, make_rule, options_of
from hbll.rules.backprop import Backpropagation
from hbll.rules.local import LocalRule
from hbll.rules.pipeline import Pipeline

Schedule = Literal["constant", "linear", "cosine"]

OptimizerName = Literal["adamw", "muon", "nadam"]

WEIGHT_BYTES, BLOCK_BYTES = 16, 2**13
"""What training takes at least: for a weight itself, its gradient and two moments; for a block Python's objects."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Options that every recipe has; ValueError for a value that cannot be."""

    name: ClassVar[str]
    """What the command line calls it."""

    methods: ClassVar[tuple[str, ...]] = ("paper", "tree", "bp")
    """The training rules that are compared unless others are asked for; the first is the one that trains."""

    threads: ClassVar[int | None] = None
    """CPU threads that training takes; None: torch's own number. Layers of a few hundred units are as fast on one thread,
    and then do not wait for each other's threads where other work runs beside."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the name of a preset, of recipes that have an option `preset`; its default, `small`, has the defaults."""

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY,)
    """What networks are measured by on the test samples; curves and spreads are of the first."""

    usual_depth: ClassVar[int] = 3
    """The depth where neither a depth nor a number of blocks is given."""

    depth: int | None = None
    """Depth D of the tree: N = 2^D nodes after the input, 2^D - 1 blocks and the head (3 unless --blocks is given)."""

    blocks: int | None = None
    """Number of blocks, any from 1, instead of a depth."""

    width: int
    """Units of every state."""

    epochs: int
    """Passes over the training samples."""

    batch_size: int = 64
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    optimizer: OptimizerName = "adamw"
    """What moves the weights: adamw; muon the matrices inside blocks, and adamw the rest at the same rate and decay; or
    nadam with a beta1 of .99, for gradients that come late."""

    error_feedback: bool = False
    """Correct each update by its change since the last one, for gradients that come late."""

    learning_rate: float = 1e-3
    """The optimizer's, at its highest."""

    schedule: Schedule = "constant"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    weight_decay: float = 0.01
    """The optimizer's."""

    gradient_clip: float | None = None
    """Norm that the gradients of the network, and those of the rule's own weights, are each cut down to."""

    accumulate: int = 1
    """Batches of a training step, over which gradients are averaged."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: training steps under autocast, which lowers what may be lowered to it."""

    train_samples: int | None = None
    """Train on the first so many samples alone."""

    @classmethod
    def of_preset(cls, name: str, **options: Any) -> Self:
        """The recipe with the options of a preset, but for those that are given; ValueError when it has none like it."""
        check_known(name, ["small", *cls.presets], "preset")
        make: Any = cls  # which has a default for every option
        return make(**{"preset": name, **cls.presets.get(name, {}), **options} if cls.presets else options)

    def __post_init__(self) -> None:
        if self.depth is not None and self.blocks is not None:
            raise ValueError("give --depth or --blocks, not both")
        for option in ("depth", "blocks", "width", "epochs", "batch_size", "accumulate", "train_samples"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{flag(option)} must be at least 1, not {value}")
        if self.depth is not None and self.depth > 12:
            raise ValueError(f"--depth must be at most 12, not {self.depth}: it would need {2**self.depth - 1} blocks")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate must be above 0 and finite, not {self.learning_rate}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"--gradient-clip must be above 0, not {self.gradient_clip}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"--weight-decay must be at least 0 and finite, not {self.weight_decay}")

    @property
    def block_count(self) -> int:
        """Number of blocks of the network, N - 1."""
        return self.blocks if self.blocks is not None else 2 ** (self.depth or self.usual_depth) - 1

    def splits(self, data_dir: Path | None) -> Splits:
        """The samples to train and test on; ValueError when the data set is missing, damaged or too small."""
        splits = self.load(data_dir)
        if self.train_samples is not None and self.train_samples > len(splits.train):
            raise ValueError(f"--train-samples {self.train_samples} is more than the {len(splits.train)} there are")
        splits = replace(splits, train=splits.train[: self.train_samples])
        step = self.batch_size * self.accumulate
        if self.train_samples is not None and step > self.train_samples:
            raise ValueError(f"--train-samples {self.train_samples} is less than the {step} samples of a step")
        if step > len(splits.train):
            size = f"--batch-size {self.batch_size}" + (f" x {self.accumulate}" if self.accumulate > 1 else "")
            raise ValueError(f"{size} is more than the {len(splits.train)} training samples")
        return splits

    def vocabulary(self, data_dir: Path | None) -> Vocabulary | None:
        """The tokens that inputs and labels are numbers of, where they are a text's."""
        return None

    def initial_network(self, seed: int) -> nn.Module:
        """The network before training; the same for every method, so that methods differ in nothing else.

        ValueError where to train it would take more memory than there is.
        """
        needed = WEIGHT_BYTES * self.parameter_count() + BLOCK_BYTES * self.block_count
        refuse_beyond(needed, f"to train {self.block_count} blocks of width {self.width}")
        torch.manual_seed(seed)
        return self.network()

    def parameter_count(self) -> int:
        """Parameters of the network, none of which is made; 2^63 where they are more than torch can count."""
        try:
            with torch.device("meta"):
                return sum(parameter.numel() for parameter in self.network().parameters())
        except (RuntimeError, TypeError) as error:
            if "overflow" not in str(error).lower():
                raise
            return 2**63

    def augment(self, inputs: Tensor, draw: np.random.Generator) -> Tensor:
        """The inputs of a training batch as the network is to see them in this step, varied by `draw`; here as they are."""
        return inputs

    def reads(self, method: str, option: str) -> bool:
        """Whether a training rule depends on an option, which may be there for other rules."""
        return True

    def check(self, methods: Sequence[str]) -> None:
        """ValueError unless all of these methods can train the network, and one of them reads each option that was given."""
        network = self.initial_network(0)
        for method in methods:
            self.rule(method, network, None)
        usual = self.of_preset(getattr(self, "preset", "small"))
        for field in fields(self):
            given = getattr(self, field.name) != getattr(usual, field.name)
            if given and not any(self.reads(method, field.name) for method in methods):
                raise ValueError(f"{flag(field.name)} does nothing for {', '.join(methods)}: leave it out")

    def readouts(self, rule: Rule) -> list[Readout]:
        """The ways of reading a trained network that are measured, the chain first."""
        return rule.readouts

    def all_readouts(self, rule: Rule) -> list[Readout]:
        """Those, and the others that show what each costs: of every stage that has one, and a path of each length."""
        return [*self.readouts(rule), *rule.exits[:-1]]

    def other_readout(self, rule: Rule, name: str) -> Readout:
        """A readout by a user's name for it; ValueError when there is none like it."""
        return rule.readout(name)

    def rule_options(self, method: str) -> dict[str, Any]:
        """Those options of a training rule that are not its own defaults, as recipes name them."""
        return {}

    @abstractmethod
    def rule(self, method: str, network: Any, example: Any) -> Rule:
        """The training rule of that name for the recipe's network; ValueError when there is none.

        `example` is a batch of inputs, by which rules see the shapes of states; None if the rule is not to train yet.
        """

    @abstractmethod
    def load(self, data_dir: Path | None) -> Splits:
        """The whole data set."""

    @abstractmethod
    def network(self) -> nn.Module:
        """A network with newly drawn weights."""


@dataclass(frozen=True, kw_only=True)
class ChainRecipe(Recipe):
    """A recipe whose network is a chain of blocks, with options of the training rule that a user may choose."""

    suited: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options of rules, by method, that suit the states of the recipe's network better than the rules' own."""

    stage: int | tuple[int, ...] | None = None
    """Consecutive blocks that are trained as one, evaluated one after the other, or a number for each stage: 3 4 (the
    method's own number: 1)."""

    cuts: int | None = None
    """Stages that the network is cut into for local rules such as bll, of about as many blocks each, instead of --stage."""

    sweeps: int | None = None
    """Of the method scan: evaluations of all stages that correct its guess of the states (its own number: 3)."""

    credit_sweeps: int | None = None
    """Of the method scan: products that carry the head's gradient back, from all stages at once (its own number: 3)."""

    tolerance: float | None = None
    """Of the method scan: end its sweeps as soon as one changes states or credit by less than this share of their norm; the
    numbers of sweeps are then the most (the method's own: none)."""

    readout: Literal["spine", "head", "solo"] | None = None
    """Of the method stream: how a stage's output reaches the label: along a spine of later blocks, by the head alone, or by
    blocks of its own and the head's last layer of some steps before (its own: spine)."""

    readout_depth: int | None = None
    """Of stream and solo: blocks that a readout passes of every stage of its spine, or has of its own (1; solo 2)."""

    copies: bool = False
    """Of stream: whether readouts are copies that belong to the stage: nothing but states then goes from stage to stage."""

    refresh: int | None = None
    """Of stream with copies, and solo: steps after which copies and originals meet (never; solo: reads the head, 1)."""

    meet: Literal["mean", "original"] | None = None
    """Of stream with copies that are refreshed: whether all become their mean, or copies the original (mean)."""

    noise: float | None = None
    """Of the methods paper and tree: standard deviation of the noise on every target (the methods' own: 0)."""

    rim: float | None = None
    """Weight of the mean loss of the rim's paths, which keeps short paths accurate (the method's own: 0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage is not None and self.cuts is not None:
            raise ValueError("give --stage or --cuts, not both")
        for option, value in self.chosen().items():
            if isinstance(value, str):
                continue
            least = 1 if option in ("stage", "cuts", "sweeps", "readout_depth", "refresh") else 0
            for number in value if isinstance(value, tuple) else [value]:
                if not least <= number < math.inf:
                    finite = " and finite" if option in ("tolerance", "noise", "rim") else ""
                    raise ValueError(f"{flag(option)} must be at least {least}{finite}, not {number}")

    def chosen(self) -> dict[str, Any]:
        """The rule's options that were given."""
        given = {option: getattr(self, option) for option in RULE_OPTIONS}
        return {option: value for option, value in given.items() if value is not None and value is not False}

    def parameter_count(self) -> int:
        if (self.blocks is None and self.depth is None) or self.block_count <= 2:
            return super().parameter_count()
        one, two = (replace(self, depth=None, blocks=blocks).parameter_count() for blocks in (1, 2))
        return one + (two - one) * (self.block_count - 1)  # blocks are alike

    def reads(self, method: str, option: str) -> bool:
        kind = RULES[check_known(method, RULES, "rule")]
        if option == "cuts":
            return issubclass(kind, LocalRule)
        return option not in RULE_OPTIONS or option in options_of(method)

    def all_readouts(self, rule: Rule) -> list[Readout]:
        paths = [rule.network.way(blocks) for blocks in range(1, len(rule.network.blocks))]
        found = [*self.readouts(rule), *rule.exits[:-1], *paths]
        return list({readout.name: readout for readout in found}.values())

    def rule_options(self, method: str) -> dict[str, Any]:
        given = {option: value for option, value in self.chosen().items() if self.reads(method, option)}
        return {**self.suited.get(method, {}), **given}

    def rule(self, method: str, network: Chain, example: Any) -> Rule:
        options = self.rule_options(method)
        if "cuts" in options:
            options["stage"] = even(network, options.pop("cuts"))
        return make_rule(method, network, example, **options)


RULE_OPTIONS = (
    "stage",
    "cuts",
    "sweeps",
    "credit_sweeps",
    "tolerance",
    "readout",
    "readout_depth",
    "copies",
    "refresh",
    "meet",
    "noise",
    "rim",
)
"""Those options of a chain's recipe that its rule reads."""

ANY_SHAPE = tuple(name for name, kind in RULES.items() if issubclass(kind, (Backpropagation, Pipeline, LocalRule)))
"""The rules for states that change shape from block to block."""


@dataclass(frozen=True, kw_only=True)
class LayeredRecipe(ChainRecipe):
    """A recipe whose network has its own number of layers, between which states change shape."""

    methods: ClassVar[tuple[str, ...]] = ("bll", "bp")

    layers: ClassVar[int]
    """Layers before the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None or self.blocks is not None:
            raise ValueError(f"{self.name} has its own number of layers: leave out --depth and --blocks")

    @property
    def block_count(self) -> int:
        return self.layers

    def reads(self, method: str, option: str) -> bool:
        return option != "rim" and super().reads(method, option)  # the rim calls blocks out of order

    def rule(self, method: str, network: Chain, example: Any) -> Rule:
        if check_known(method, RULES, "rule") not in ANY_SHAPE:
            raise ValueError(
                f"the states of {self.name} change shape, which {method} is not for: take one of {', '.join(ANY_SHAPE)}"
            )
        return super().rule(method, network, example)

    def readouts(self, rule: Rule) -> list[Readout]:
        """The chain, and other ways along it: there is no other path."""
        chain, *others = rule.readouts
        return [replace(chain, name="chain"), *(readout for readout in others if readout.path == chain.path)]

    def all_readouts(self, rule: Rule) -> list[Readout]:
        return Recipe.all_readouts(self, rule)

    def other_readout(self, rule: Rule, name: str) -> Readout:
        if not name.startswith("stage-"):
            raise ValueError(f"{name!r} is not a path: states change shape, and there is one, the chain")
        return rule.readout(name)


@dataclass(frozen=True, kw_only=True)
class PredsimRecipe(Recipe):
    """The tuning of Nøkland & Eidnes (arXiv 1901.06656), with a cosine in place of its four steps of the learning rate."""

    dropout: float
    """Share of a layer's inputs that is dropped, except of the first one's."""

    batch_size: int = 128
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    learning_rate: float = 5e-4
    """The optimizer's, at its highest."""

    schedule: Schedule = "cosine"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    weight_decay: float = 0.0
    """The optimizer's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and less than 1, not {self.dropout}")


def flag(option: str) -> str:
    """The command line's spelling of an option: `batch_size` -> `--batch-size`."""
    return "--" + option.replace("_", "-")
