"""Results as people read them, in the terminal and on the page."""

from hbll.training.compare import MethodResult
from hbll.training.evaluate import PathAccuracy

RESULT_COLUMNS = ["method", "accuracy", "spread", "seconds", "work", "span", "peak memory"]


def result_row(result: MethodResult) -> list[str]:
    """A method's results, under RESULT_COLUMNS."""
    spread = "" if result["spread"] is None else f"± {100 * result['spread']:.2f}"
    return [
        result["method"],
        f"{100 * result['accuracy']:.2f} %",
        spread,
        f"{result['seconds']:.1f}",
        str(result["work"]),
        str(result["span"]),
        f"{result['memory'] / 2**20:.2f} MiB",
    ]


PATH_COLUMNS = ["path", "blocks", "accuracy"]


def path_row(path: PathAccuracy) -> list[str]:
    """A path's accuracy under PATH_COLUMNS."""
    return [path["path"], str(path["blocks"]), f"{100 * path['accuracy']:.2f} %"]
