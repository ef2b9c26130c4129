"""`hbll sublinear bench` and `hbll sublinear fit`: flat options, and a function that runs them.

Bad input raises ValueError with one sentence. Nothing heavy is imported before a command runs.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hbll.machine import refuse_beyond

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BenchOptions", "FitOptions", "bench", "fit"]


@dataclass(frozen=True)
class BenchOptions:
    """Time the engines side by side on random points: per iteration and whole fits, best of several runs."""

    width: int = 2**16
    """Neurons."""
    points: int = 256
    """Training points."""
    features: int = 64
    """Features of a point."""
    kappa: float = 0.24
    """Threshold sqrt(2 kappa ln width): the larger, the fewer neurons fire."""
    engines: tuple[Literal["tree", "slack", "compact", "dense"], ...] = ("slack", "compact", "dense")
    """Engines to time; the trees take 2 x width x points numbers of memory."""
    iterations: int = 6
    """Gauss-Newton steps of a fit."""
    repeats: int = 3
    """Runs of each engine, of which the best counts."""
    seed: int = 0
    """Of the points and the weights."""


@dataclass(frozen=True)
class FitOptions:
    """Fit a table of numbers: the iterations, then the error on held-out rows."""

    data: Path
    """A .csv of numbers, with or without a header, or an .npz with an array X of shape (rows, features)."""
    target: str
    """What to predict: a column's name or its index (from 0, negative from the end), or the name of an array in the .npz."""
    width: int = 2**14
    """Neurons."""
    kappa: float = 0.4
    """Threshold sqrt(2 kappa ln width): the larger, the fewer neurons fire."""
    engine: Literal["auto", "tree", "slack", "compact", "dense"] = "auto"
    """How the neurons that fire are found; all give the same result."""
    method: Literal["gauss-newton", "levenberg-marquardt", "gradient-descent"] = "levenberg-marquardt"
    """How far a step goes; levenberg-marquardt copes with clustered points."""
    max_iter: int = 100
    """Iterations at most."""
    tol: float = 1e-6
    """Loss, half the sum of squares of the standardised target, at which to stop."""
    ridge: float = 0.0
    """Added to the Gram matrix, in units of its mean diagonal."""
    dtype: Literal["float32", "float64"] = "float32"
    """Data type of the search and the weights."""
    test_share: float = 0.2
    """Share of the rows held out; 0 for none."""
    seed: int = 0
    """Of the weights and the held-out rows."""


def bench(options: BenchOptions) -> None:
    """Print a table of the engines' times."""
    from rich.console import Console
    from rich.table import Table

    from .bench import random_task, time_engines

    for name in ("points", "features", "iterations", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; at least 1 is needed")
    _check_seed(options.seed)
    refuse_beyond(8.0 * options.points * options.features, f"{options.points} points of {options.features} features")
    X, y = random_task(options.points, options.features, options.seed)
    timings = time_engines(
        X, y, options.width, options.kappa, options.engines, options.iterations, options.repeats, options.seed
    )
    slowest = max(timing.iteration for timing in timings)
    table = Table(
        "engine",
        "ms / iteration",
        "speed-up",
        "whole fit, s",
        "operations / iteration",
        "loss",
        title=f"width {options.width}, {options.points} points x {options.features}, kappa {options.kappa}, float32",
    )
    for timing in timings:
        table.add_row(
            timing.engine,
            f"{timing.iteration * 1e3:.2f}",
            f"{slowest / timing.iteration:.1f}",
            f"{timing.whole:.3f}",
            f"{timing.operations:.3g}",
            f"{timing.loss:.1e}",
        )
    Console().print(table)


def fit(options: FitOptions) -> None:
    """Print the iterations and the errors of a fit of options.target to all other columns, both standardised."""
    import warnings

    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    from .estimator import SublinearRegressor

    if not 0 <= options.test_share < 1:
        raise ValueError(f"test_share is {options.test_share}; at least 0 and less than 1 is needed")
    _check_seed(options.seed)
    X, y = read_table(options.data, options.target)
    held_out = math.ceil(options.test_share * len(X))
    if held_out >= len(X):
        raise ValueError(f"{options.data} has {len(X)} rows, and {held_out} of them are to be held out")
    train, test = np.arange(len(X)), np.arange(0)
    if held_out:
        train, test = train_test_split(train, test_size=held_out, random_state=options.seed)
    scaler = StandardScaler().fit(X[train])
    regressor = SublinearRegressor(
        options.width,
        options.kappa,
        options.engine,
        options.method,
        options.max_iter,
        options.tol,
        ridge=options.ridge,
        dtype=options.dtype,
        random_state=options.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told below
        regressor.fit(scaler.transform(X[train]), y[train])

    model, console = regressor.model_, Console()
    table = Table("iteration", "loss", "ms", "neurons alive", "operations", "of the dense")
    for k, entry in enumerate(model.history, 1):
        table.add_row(
            str(k),
            f"{entry['loss']:.3e}",
            f"{entry['seconds'] * 1e3:.1f}",
            str(entry["alive"]),
            f"{entry['operations']:.3g}",
            f"{entry['operations'] / entry['dense_operations']:.1%}",
        )
    console.print(table)
    console.print(f"engine {model.engine}, {'converged' if model.converged else 'not converged'}")
    for name, rows in (("training", train), ("held-out", test)):
        if len(rows):
            error = np.sqrt(np.mean((regressor.predict(scaler.transform(X[rows])) - y[rows]) ** 2))
            console.print(f"RMSE on {len(rows)} {name} rows: {error:.4g} (standard deviation of y {y[rows].std():.4g})")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:  # as scikit-learn takes it
        raise ValueError(f"seed is {seed}; at least 0 and less than 2^32 is needed")


def read_table(path: Path, target: str) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Features (rows, d) and target (rows,) of a .csv or .npz. Raises ValueError for what is not a table of numbers."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.suffix == ".csv":
        return _read_csv(path, target)
    if path.suffix == ".npz":
        return _read_npz(path, target)
    raise ValueError(f"{path} ends in {path.suffix!r}; a .csv or an .npz is needed")


def _read_csv(path: Path, target: str) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    import numpy as np

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table of comma-separated values: {error}") from None
    if not lines:
        raise ValueError(f"{path} is empty")
    header = None if all(map(_is_number, lines[0])) else [name.strip() for name in lines.pop(0)]
    width = len(header or lines[0])
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            raise ValueError(f"{path}: row {number} has {len(line)} values, and {width} are needed")
        if not all(map(_is_number, line)):
            wrong = next(value for value in line if not _is_number(value))
            raise ValueError(f"{path}: row {number} holds {wrong!r}, which is not a number")
    return _split(np.array(lines, np.float64).reshape(len(lines), width), header or [], target, path)


def _read_npz(path: Path, target: str) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    import zipfile

    import numpy as np

    try:
        with np.load(path) as archive:
            arrays = {name: np.asarray(archive[name], np.float64) for name in archive.files if name in ("X", target)}
    except (zipfile.BadZipFile, ValueError, TypeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as arrays of numbers: {error}") from None
    if "X" not in arrays or arrays["X"].ndim != 2:
        raise ValueError(f"{path} holds no array X of shape (rows, features)")
    if target not in arrays or target == "X":
        return _split(arrays["X"], [], target, path)
    y = arrays[target]
    if y.shape != (len(arrays["X"]),):
        raise ValueError(f"{path}: {target} has shape {y.shape}, and X has {len(arrays['X'])} rows")
    return arrays["X"], y


def _split(
    table: "NDArray[np.float64]", names: list[str], target: str, path: Path
) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    import numpy as np

    columns = table.shape[1]
    if target in names:
        column = names.index(target)
    elif target.removeprefix("-").isdecimal() and -columns <= int(target) < columns:
        column = int(target) % columns
    else:
        known = f" ({', '.join(names[:20])})" if names else ""
        raise ValueError(f"{path} has no column {target!r} among its {columns}{known}")
    if columns < 2:
        raise ValueError(f"{path} has one column; a target and at least one feature are needed")
    return np.delete(table, column, axis=1), table[:, column]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
