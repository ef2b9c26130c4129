"""Results as people read them, in the terminal and on the page."""

from collections.abc import Sequence

from hbll.recipes import Measure
from hbll.recipes.measures import ACCURACY
from hbll.train.compare import MethodResult
from hbll.train.evaluate import ExitResult, PathResult


def result_columns(measures: Sequence[Measure]) -> list[str]:
    """The columns of a table of methods."""
    first, *others = [measure.title for measure in measures]
    return ["method", first, "spread", *others, "seconds", "work", "span", "peak memory", "local"]


def result_row(result: MethodResult, measures: Sequence[Measure]) -> list[str]:
    """A method's results, under `result_columns`."""
    first, *others = [measure.text(result[measure.name]) for measure in measures]
    if "diverged" in result:
        first = f"diverged at step {result['diverged']}"
    return [
        result["method"],
        first,
        "" if result["spread"] is None else f"± {measures[0].number(result['spread'])}",
        *others,
        "" if result["seconds"] is None else f"{result['seconds']:.1f}",
        _evaluations(result["work"]),
        _evaluations(result["span"]),
        f"{result['memory'] / 2**20:.2f} MiB",
        result["local"],
    ]


def _evaluations(count: float | None) -> str:
    return "" if count is None else f"{count:.1f}".removesuffix(".0")


def path_columns(measures: Sequence[Measure], costs: bool = False) -> list[str]:
    """The columns of a table of paths."""
    return [
        "path",
        "blocks",
        *(["parameters", "ms a sample"] if costs else []),
        *(measure.title for measure in measures),
    ]


def path_row(path: PathResult, measures: Sequence[Measure]) -> list[str]:
    """What a path came to, under `path_columns`."""
    costs = [f"{path['parameters']:,}", f"{path['milliseconds']:.3g}"] if "parameters" in path else []
    return [path["path"], str(path["blocks"]), *costs, *(measure.text(path[measure.name]) for measure in measures)]


EXIT_COLUMNS = ("exits", "loss borne", "confidence", "accuracy", "of the chain", "blocks", "of", "left at each, %")
"""The columns of a table of confidence exits."""


def exit_row(found: ExitResult) -> list[str]:
    """What leaving early came to, under `EXIT_COLUMNS`."""
    return [
        found["exits"],
        f"{100 * found['loss']:g} points",
        "" if found["threshold"] is None else f"{found['threshold']:.4f}",
        ACCURACY.text(found["accuracy"]),
        ACCURACY.text(found["full_accuracy"]),
        f"{found['blocks']:.2f}",
        str(found["full_blocks"]),
        " ".join(f"{100 * share:.0f}" for share in found["shares"].values()),
    ]
