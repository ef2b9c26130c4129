"""The tables of arXiv 2606.21497 as data: what is trained for each figure, and what the paper has there.

Tables 1 and 3 are numbered as there; the others follow the order of its results, recurrent networks last, and may have other
numbers there. `paper` is HBLL there, `bp` (of recurrent networks `bptt`) its backpropagation; rows of other rules are ours,
beside them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hbll.recipes import RECIPES, Recipe

__all__ = ["CORPORA", "TABLES", "Figure", "Row", "Scale", "Table", "Training", "language", "training"]

Scale = Literal["small", "paper"]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """What a run is made of, but for its seed and scale."""

    recipe: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Of its folder: `cifar10-vit-stream-stage-3-4`."""
        parts = [self.recipe, self.method]
        for option, value in self.options:
            parts += [option.replace("_", "-"), *map(str, value if isinstance(value, tuple) else [value])]
        return "-".join(parts)

    def at(self, scale: Scale, **options: Any) -> Recipe:
        """The recipe with all its options; those given here go before what the scale says."""
        kind = RECIPES[self.recipe]
        preset = scale if kind.presets else "small"
        own = BY_ADAMW if self.method == "paper" and kind.of_preset(preset).optimizer == "muon" else {}
        chosen = {**SCALES[scale].get(self.recipe, {}), **own, **dict(self.options), **options}
        return kind.of_preset(preset, **chosen)


@dataclass(frozen=True)
class Figure:
    """A figure of a table."""

    training: Training

    readout: str | int = "chain"
    """Along which path: `chain`, `tree` of recurrent networks, or the rim's path of so many blocks."""

    paper: float | None = None
    """What the paper has there, as people read it."""

    faster_than: Training | None = None
    """If given, the figure is how many times as fast an epoch of the training is as one of that other."""


@dataclass(frozen=True)
class Row:
    setting: str
    rule: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Table:
    title: str

    measure: str
    """By which of the recipe's measures; or `speed`."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    text: str
    """What has to be known to read it."""

    @property
    def rules(self) -> list[str]:
        """Those that rows are of."""
        return list(dict.fromkeys(row.rule for row in self.rows))

    @property
    def trainings(self) -> list[Training]:
        """All that its figures need, each once."""
        return trainings(self.rows)


def trainings(rows: Iterable[Row]) -> list[Training]:
    """All that the figures of some rows need, each once."""
    needed: dict[Training | None, None] = {}
    for row in rows:
        for figure in row.figures:
            needed |= {figure.training: None, figure.faster_than: None}
    return [training for training in needed if training is not None]


def training(recipe: str, method: str, **options: Any) -> Training:
    return Training(recipe, method, tuple(options.items()))


SCALES: Mapping[Scale, Mapping[str, Options]] = {
    "small": {"mnist-mlp": {"epochs": 6}, "sequential-mnist": {"epochs": 3}},
    "paper": {"sequential-mnist": {"epochs": 200, "width": 2048, "precision": "bfloat16"}},
}
"""What recipes without presets are trained with; otherwise their own defaults."""

BY_ADAMW: Options = {"optimizer": "adamw", "learning_rate": 1e-3}
"""The paper's optimizer for its rule, which hardly learns by Muon, where the others have that."""

BLOCKS = (7, 3, 2, 1)

PATHS = tuple("1 block" if blocks == 1 else f"{blocks} blocks" for blocks in BLOCKS)

BESIDE: Mapping[str, Options] = {
    "tree": {},
    "stream": {"stage": (3, 4)},
    "scan": {},
    "greedy": {"stage": (3, 4)},
}
"""Rules beside the paper's, with their options for seven residual blocks (docs/findings.md)."""


def by_path(
    recipe: str,
    figures: Mapping[str, Sequence[float]],
    beside: Mapping[str, Options],
    setting: str = "",
    **options: Any,
) -> tuple[Row, ...]:
    """A row a rule: seven blocks read along four paths; those of `bp` are networks of so many blocks, trained apart."""
    rows = []
    for rule, extra in {"paper": {}, **beside}.items():
        run = training(recipe, rule, **options, **extra)
        along = [Figure(run, "chain" if blocks == 7 else blocks) for blocks in BLOCKS]
        rows.append(Row(setting, rule, _with(along, figures.get(rule))))
    apart = [Figure(training(recipe, "bp", **options, **({} if n == 7 else {"blocks": n}))) for n in BLOCKS]
    return (*rows, Row(setting, "bp", _with(apart, figures.get("bp"))))


def _with(figures: Sequence[Figure], paper: Sequence[float] | None) -> tuple[Figure, ...]:
    values = paper or [None] * len(figures)
    return tuple(Figure(f.training, f.readout, value) for f, value in zip(figures, values, strict=True))


APART = "Short paths of bp are networks of so many blocks, trained for themselves, as in the paper."


def layers_and_widths() -> Table:
    figures = {  # layers, width: HBLL, backpropagation
        (4, 50): (97.20, 96.68), (4, 100): (97.66, 97.29), (4, 500): (98.32, 97.98),
        (8, 50): (97.08, 95.37), (8, 100): (97.60, 96.82), (8, 500): (98.02, 96.39),
        (16, 50): (94.76, 11.32), (16, 100): (95.52, 11.32), (16, 500): (97.09, 11.32),
    }  # fmt: skip
    beside = {"tree": {}, "stream": {"stage": 2}, "greedy": {"stage": 2}}
    rows = []
    for (layers, width), (hbll, bp) in figures.items():
        paper = {"paper": hbll, "bp": bp}
        for rule, extra in {"paper": {}, **beside, "bp": {}}.items():
            run = training("mnist-mlp", rule, depth=layers.bit_length() - 1, width=width, **extra)
            rows.append(Row(f"{layers} layers of {width}", rule, (Figure(run, "chain", paper.get(rule)),)))
    text = "Sigmoid layers without skips, on which scan, whose sweeps go along skips, has nothing to go on."
    return Table("MNIST, sigmoid networks without skips or norms", "accuracy", ("chain",), tuple(rows), text)


def corrupted() -> Table:
    settings = {
        "missing 50 %": ({"missing": 0.5, "test_missing": 0.5}, (83.12, 82.51)),
        "missing 80 %": ({"missing": 0.8, "test_missing": 0.8}, (74.77, 69.75)),
        "label noise 20 %": ({"label_noise": 0.2}, (80.17, 79.55)),
        "label noise 40 %": ({"label_noise": 0.4}, (72.70, 71.85)),
    }
    rows = []
    for setting, (options, (hbll, bp)) in settings.items():
        paper = {"paper": hbll, "bp": bp}
        for rule, extra in {"paper": {}, **BESIDE, "bp": {}}.items():
            run = training("cifar10-vit", rule, **options, **extra)
            rows.append(Row(setting, rule, (Figure(run, "chain", paper.get(rule)),)))
    text = (
        "Missing data are pixels erased from every training and test image, the same ones throughout. Wrong labels are "
        "among those to train on alone. The paper does not say what it erases, nor where."
    )
    return Table("CIFAR-10, corrupted data", "accuracy", ("chain",), tuple(rows), text)


CORPORA: Mapping[str, tuple[str, Options, str]] = {
    "wikitext-103": ("wikitext-gpt", {"corpus": "wikitext-103"}, "WikiText-103"),
    "wikitext-2": ("wikitext-gpt", {"corpus": "wikitext-2"}, "WikiText-2 in place of WikiText-103"),
    "novels": ("novels-gpt", {}, "a hundred novels in place of WikiText-103"),
}
"""What the table of language models can be made of: recipe, options, title."""


def language(corpus: str) -> Table:
    """Table 5 on one of `CORPORA`; the paper's figures are of WikiText-103."""
    recipe, options, title = CORPORA[corpus]
    figures = {"paper": (22.22, 21.98, 24.08, 34.22), "bp": (18.17, 20.99, 23.41, 32.78)}
    beside = {**BESIDE, "solo": {"stage": (3, 4)}, "scan": {"sweeps": 4, "credit_sweeps": 5}}
    rows = by_path(recipe, figures, beside, **options)
    text = f"Perplexity of a token, here a byte pair; the paper does not say what its tokens are. {APART}"
    return Table(f"{title}, transformers", "perplexity", PATHS, rows, text)


def sequences(title: str, options: Options, figures: Mapping[int, tuple[float, float, float]]) -> Table:
    """Recurrent networks: of the paper chain, tree and backpropagation through time, by the number of chunks."""
    rows = []
    for chunks, (chain, tree, bptt) in figures.items():
        runs = {
            rule: training("sequential-mnist", rule, depth=chunks.bit_length() - 1, **options)
            for rule in ("paper", "hbll", "bptt")
        }
        setting = f"{chunks} chunks"
        rows.append(Row(setting, "paper", (Figure(runs["paper"], "chain", chain), Figure(runs["paper"], "tree", tree))))
        rows.append(Row(setting, "hbll", (Figure(runs["hbll"]), Figure(runs["hbll"], "tree"))))
        rows.append(Row(setting, "bptt", (Figure(runs["bptt"], "chain", bptt), Figure(runs["bptt"], "tree"))))
    text = "hbll is the scan over time, beside the paper's rule."
    return Table(title, "accuracy", ("chain", "tree"), tuple(rows), text)


def speed() -> Table:
    rows = []
    for depth, paper in enumerate((0.47, 0.28, 0.40, 0.37, 0.87, 1.68, 2.58, 3.6), 1):
        options = {"depth": depth, "epochs": 1}
        exact = training("sequential-mnist", "bptt", **options)
        for rule, published in (("paper", paper), ("hbll", None)):
            figure = Figure(training("sequential-mnist", rule, **options), "chain", published, exact)
            rows.append(Row(f"{2**depth} chunks", rule, (figure,)))
    text = "How many times as fast a training epoch is as one of backpropagation through time with unfused cells."
    return Table("Sequential MNIST, speed of recurrent networks", "speed", ("speed-up",), tuple(rows), text)


TABLES: Mapping[str, Table] = {
    "table1": layers_and_widths(),
    "table2": Table(
        "CIFAR-10, vision transformers",
        "accuracy",
        PATHS,
        by_path("cifar10-vit", {"paper": (87.30, 87.57, 86.19, 78.58), "bp": (88.98, 86.86, 84.53, 77.99)}, BESIDE),
        APART,
    ),
    "table3": corrupted(),
    "table4": Table(
        "CIFAR-100, vision transformers, top 5",
        "top_5_accuracy",
        PATHS,
        by_path("cifar100-vit", {"paper": (86.09, 85.76, 86.20, 82.43), "bp": (85.96, 85.95, 85.55, 82.62)}, BESIDE),
        APART,
    ),
    "table5": language("wikitext-103"),
    "table6": sequences(
        "Sequential MNIST, GRU", {}, {16: (98.7, 98.7, 98.5), 64: (98.2, 98.7, 98.9), 256: (97.7, 98.7, 98.6)}
    ),
    "table7": sequences(
        "Permuted sequential MNIST, GRU",
        {"permuted": True},
        {16: (98.5, 98.5, 98.1), 64: (97.9, 98.7, 96.8), 128: (97.3, 98.7, 95.9), 256: (95.1, 98.7, 95.3)},
    ),
    "table8": sequences(
        "Permuted sequential MNIST, Elman network",
        {"permuted": True, "cell": "elman"},
        {16: (98.2, 98.6, 98.3), 64: (97.2, 98.4, 97.0)},
    ),
    "table9": speed(),
}
