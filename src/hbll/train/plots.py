"""The figures of a report, as SVG text that needs nothing from outside.

A history is a run's metrics, epoch by epoch; `histories` has those of each method's seeds, by method.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hbll.recipes import Measure
from hbll.train.evaluate import PathResult
from hbll.train.metrics import Metrics

Histories = Mapping[str, Sequence[Sequence[Metrics]]]

_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d", "#64748b")
_MARKERS = "osD^vPX*"
_LOOKS = [{"color": colour, "linestyle": line} for line in ("-", "--", ":") for colour in _COLOURS]

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "text.color": "#334155",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def learning_curves(histories: Histories, measure: Measure) -> str:
    """The chain over the epochs: mean over the seeds, and the range they span."""
    curves = {
        method: _scaled([[line.chain for line in run] for run in runs], measure) for method, runs in histories.items()
    }
    return _curves(curves, f"chain: {measure.axis}", height=4.0)


def by_path(histories: Histories, measure: Measure) -> str:
    """The paths that were measured after the last epoch, by their number of blocks."""
    with mpl.rc_context(_STYLE):
        figure = Figure((7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        ticks: set[int] = set()  # methods may differ in their paths
        styles = zip(cycle(_LOOKS), cycle(_MARKERS), histories.items(), strict=False)
        for look, marker, (method, runs) in styles:
            paths = [sorted(run[-1].paths, key=lambda path: path["blocks"]) for run in runs]
            values = _scaled(paths, measure)
            middle = values.mean(0)
            ranges = np.maximum(0, [middle - values.min(0), values.max(0) - middle])  # a mean is rounded
            blocks = [path["blocks"] for path in paths[0]]
            axes.errorbar(blocks, middle, ranges, **look, marker=marker, capsize=3, label=method)
            ticks.update(blocks)
        *shorter, chain = sorted(ticks)
        axes.set_xscale("log", base=2)
        axes.set_xticks([*shorter, chain], [*map(str, shorter), f"{chain} (chain)"])
        axes.minorticks_off()
        axes.set(xlabel="blocks", ylabel=measure.axis)
        figure.legend(loc="outside upper left", ncols=6)
        return _svg(figure)


def by_cost(paths: Sequence[PathResult], measure: Measure) -> str:
    """A network's readouts by what they cost: blocks, parameters, and milliseconds for a sample."""
    kinds = {"path": [p for p in paths if not p["path"].startswith("stage-")]}
    if stages := [p for p in paths if p["path"].startswith("stage-")]:
        kinds["stage"] = stages
    with mpl.rc_context(_STYLE):
        figure = Figure((10.0, 3.6), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        titles = {"blocks": "blocks", "parameters": "parameters", "milliseconds": "milliseconds for a sample"}
        for axes, (cost, title) in zip(panels, titles.items(), strict=True):
            for look, marker, (kind, found) in zip(_LOOKS, _MARKERS, kinds.items(), strict=False):
                found = sorted(found, key=lambda path: path[cost])
                values = _scaled([found], measure)[0]
                axes.plot([path[cost] for path in found], values, **look, marker=marker, label=kind)
            axes.set(xlabel=title)
        panels[0].set_ylabel(measure.axis)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        return _svg(figure)


def defects(histories: Histories) -> str | None:
    """How far the last sweep still moved the states, over the epochs; None when no method sweeps."""
    found = {
        method: 100 * np.array([[line.defect for line in run] for run in runs])
        for method, runs in histories.items()
        if runs[0][0].defect is not None
    }
    return _curves(found, "defect, %", height=3.0, bottom=0) if found else None


def corrections(histories: Histories) -> str | None:
    """Mean correction of each stage over the epochs, a map for each method that corrects; None when none does."""
    maps = {method: _by_stage(runs, "correction") for method, runs in histories.items()}
    maps = {method: values for method, values in maps.items() if (values > 0).any()}
    if not maps:
        return None
    positive = [values[values > 0] for values in maps.values()]
    norm = LogNorm(min(values.min() for values in positive), max(values.max() for values in positive))
    return _maps(maps, norm, "size of the correction")


def cosines(histories: Histories) -> str | None:
    """Cosine of each stage's gradient with backpropagation's over the epochs, likewise; None when no method has several."""
    maps = {method: _by_stage(runs, "cosine") for method, runs in histories.items()}
    maps = {method: values for method, values in maps.items() if len(values) > 1 and not np.isnan(values).all()}
    if not maps:
        return None
    return _maps(maps, Normalize(min(0, *(np.nanmin(values) for values in maps.values())), 1), "cosine")


def growing(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Seconds a step against N, both in powers, for each scheme."""
    with mpl.rc_context(_STYLE):
        figure = Figure((7.2, 4.5), layout="constrained")
        axes = figure.subplots()
        for look, marker, (scheme, points) in zip(cycle(_LOOKS), cycle(_MARKERS), curves.items(), strict=False):
            axes.plot(*zip(*points, strict=True), **look, marker=marker, label=scheme)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="N: blocks, as many on every device, and the head", ylabel="seconds a step, simulated")
        figure.legend(loc="outside upper left", ncols=6)
        return _svg(figure)


def _curves(curves: Mapping[str, np.ndarray], label: str, height: float, bottom: float | None = None) -> str:
    """Each method's mean over the seeds, of values (seeds, epochs), and the range they span."""
    with mpl.rc_context(_STYLE):
        figure = Figure((7.2, height), layout="constrained")
        axes = figure.subplots()
        for look, (method, values) in zip(cycle(_LOOKS), curves.items(), strict=False):
            epochs = np.arange(1, values.shape[1] + 1)
            axes.plot(epochs, values.mean(0), **look, label=method)
            axes.fill_between(epochs, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_ylim(bottom=bottom)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper left", ncols=6)
        return _svg(figure)


def _maps(maps: Mapping[str, np.ndarray], norm: Normalize, label: str) -> str:
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure((7.2, 1.0 + 2.4 * len(maps)), layout="constrained")
        rows = figure.subplots(len(maps), squeeze=False, sharex=True)[:, 0]
        for axes, (method, values) in zip(rows, maps.items(), strict=True):
            extent = (0.5, values.shape[1] + 0.5, 0.5, len(values) + 0.5)
            image = axes.imshow(
                values, norm=norm, cmap="viridis", aspect="auto", origin="lower", interpolation="nearest", extent=extent
            )
            axes.set(title=method, ylabel="stage")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        rows[-1].set_xlabel("epoch")
        figure.colorbar(image, ax=list(rows), label=label)
        return _svg(figure)


def _by_stage(runs: Iterable[Sequence[Metrics]], field: str) -> np.ndarray:
    """(stages, epochs), mean over the runs, NaN where a rule has no such figure."""
    values = [[[stage[field] for stage in line.nodes.values()] for line in run] for run in runs]
    return np.array(values, dtype=float).mean(0).T


def _scaled(results: Sequence[Sequence[PathResult]], measure: Measure) -> np.ndarray:
    """A run a row, NaN where the measure is not finite."""
    return measure.scale * np.array([[result[measure.name] for result in run] for run in results], dtype=float)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
