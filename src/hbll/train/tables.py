"""Results as people read them, in the terminal and on the page."""

from collections.abc import Sequence

from hbll.recipes import Measure
from hbll.train.compare import MethodResult
from hbll.train.evaluate import PathResult


def result_columns(measures: Sequence[Measure]) -> list[str]:
    """The columns of a table of methods."""
    first, *others = [measure.title for measure in measures]
    return ["method", first, "spread", *others, "seconds", "work", "span", "peak memory", "local"]


def result_row(result: MethodResult, measures: Sequence[Measure]) -> list[str]:
    """A method's results, under `result_columns`."""
    first, *others = [measure.text(result[measure.name]) for measure in measures]
    return [
        result["method"],
        first,
        "" if result["spread"] is None else f"± {measures[0].number(result['spread'])}",
        *others,
        f"{result['seconds']:.1f}",
        f"{result['work']:.1f}".removesuffix(".0"),
        f"{result['span']:.1f}".removesuffix(".0"),
        f"{result['memory'] / 2**20:.2f} MiB",
        result["local"],
    ]


def path_columns(measures: Sequence[Measure]) -> list[str]:
    """The columns of a table of paths."""
    return ["path", "blocks", *(measure.title for measure in measures)]


def path_row(path: PathResult, measures: Sequence[Measure]) -> list[str]:
    """What a path came to, under `path_columns`."""
    return [path["path"], str(path["blocks"]), *(measure.text(path[measure.name]) for measure in measures)]
