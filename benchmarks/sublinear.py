"""Every figure of docs/sublinear.md: speed, memory, exactness, convergence, exponents and generalisation of hbll.sublinear.

    python benchmarks/sublinear.py             # about ten minutes on two cores; writes benchmarks/results/sublinear.md
    python benchmarks/sublinear.py --quick     # small sizes, a minute, printed only

What is compared is timed in turns within one process, and the best of the repeats counts, so that a busy machine slows all
alike. NUMBA_NUM_THREADS and OMP_NUM_THREADS set the threads of the engines and of plain NumPy; give both the same number.
"""

import argparse
import os
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import ledger
import numpy as np
from gate import gate
from numpy.typing import NDArray
from scipy import linalg
from sklearn.datasets import load_diabetes, load_digits
from threadpoolctl import threadpool_info, threadpool_limits

from hbll.sublinear import fit
from hbll.sublinear.bench import random_task, time_engines
from hbll.sublinear.compact import Compact
from hbll.sublinear.engine import ENGINES
from hbll.sublinear.pairs import tally
from hbll.sublinear.problem import Problem, unit_rows
from hbll.sublinear.screen import screen
from hbll.sublinear.solvers import System, cholesky, sketched
from hbll.sublinear.threads import thread_count

ITERATIONS = 6
Array = NDArray[np.float64]
CELLS = [  # (log2 m, n, d, kappa)
    (12, 256, 64, 0.24),
    (14, 256, 64, 0.24),
    (16, 256, 64, 0.24),
    (18, 256, 64, 0.24),
    (20, 256, 64, 0.24),
    (20, 64, 16, 0.2),
    (20, 64, 128, 0.24),
    (20, 256, 64, 0.4),
]
TREE_CELLS = [(12, 64, 16, 0.2), (16, 256, 64, 0.24), (16, 256, 64, 0.4), (18, 64, 64, 0.4)]
WIDTHS = [2**12, 2**14, 2**16, 2**18, 2**20]
QUICK = (CELLS[:2], TREE_CELLS[:1], WIDTHS[:3])


class NumpyNetwork:
    """A Gauss-Newton step as one would write it down: matrix product, threshold, Gram matrix, Cholesky."""

    def __init__(self, X: Array, y: Array, width: int, kappa: float) -> None:
        rng = np.random.default_rng(0)
        self.X = unit_rows(X, "X").astype(np.float32)
        self.y = y.astype(np.float32)
        self.weights = rng.standard_normal((width, X.shape[1]), dtype=np.float32)
        self.signs = rng.choice(np.array([-1, 1], np.float32), width)
        self.threshold = np.float32(np.sqrt(2 * kappa * np.log(width)))

    def step(self) -> None:
        root = np.float32(len(self.weights) ** 0.5)
        z = self.X @ self.weights.T
        fires = z > self.threshold
        outputs = np.where(fires, z - self.threshold, 0) @ self.signs / root
        mask = fires.astype(np.float32)
        gram = (self.X @ self.X.T) * (mask @ mask.T) / root**2
        g = linalg.cho_solve(linalg.cho_factor(gram), outputs - self.y)
        self.weights -= (self.signs / root)[:, None] * ((mask * g[:, None]).T @ self.X)


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def numpy_seconds(network: NumpyNetwork, repeats: int) -> float:
    """The best single step, with BLAS on all threads and on one, which is the faster where the cores are shared."""
    seconds = [best_seconds(network.step, repeats)]
    with threadpool_limits(1, user_api="blas"):
        seconds.append(best_seconds(network.step, repeats))
    return min(seconds)


def peak_bytes(X: Array, y: Array, width: int, kappa: float, engine: str) -> int:
    tracemalloc.start()
    fit(X, y, width, kappa, engine, max_iter=2, tol=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def speed(cells: list[tuple], repeats: int) -> Iterator[str]:
    yield f"## Time per iteration and whole fits ({ITERATIONS} Gauss-Newton iterations, float32, {thread_count()} threads)\n"
    yield (
        "Per iteration: mean over a fit, best of the repeats (numpy: the best single step, BLAS on one thread or all). "
        "Whole: the fit with its initialisation, best of the repeats. Peak: of all arrays during a fit.\n"
    )
    yield (
        "| m, n, d, kappa | numpy, ms | dense, ms | compact, ms | slack, ms | dense / slack | numpy / slack "
        "| whole dense, s | whole slack, s | whole dense / slack | auto picks | peak dense, MB | peak slack, MB |"
    )
    yield "|" + "---|" * 13
    for log_width, n, d, kappa in cells:
        X, y = random_task(n, d, 0)
        width = 2**log_width
        rounds = repeats if log_width < 20 else max(2, repeats // 2)
        timings = {
            t.engine: t for t in time_engines(X, y, width, kappa, ("slack", "compact", "dense"), ITERATIONS, rounds)
        }
        plain = numpy_seconds(NumpyNetwork(X, y, width, kappa), 1 if log_width > 16 else repeats)
        slack, compact, dense = (timings[name] for name in ("slack", "compact", "dense"))
        picked = fit(X, y, width, kappa, max_iter=0).engine
        memory = [peak_bytes(X, y, width, kappa, name) / 2**20 for name in ("dense", "slack")]
        yield (
            f"| 2^{log_width}, {n}, {d}, {kappa} | {plain * 1e3:.1f} | {dense.iteration * 1e3:.1f} "
            f"| {compact.iteration * 1e3:.1f} | {slack.iteration * 1e3:.1f} | {dense.iteration / slack.iteration:.1f}x "
            f"| {plain / slack.iteration:.1f}x | {dense.whole:.2f} | {slack.whole:.2f} | {dense.whole / slack.whole:.1f}x "
            f"| {picked} | {memory[0]:.0f} | {memory[1]:.0f} |"
        )
    yield ""


def trees(cells: list[tuple], repeats: int) -> Iterator[str]:
    yield "## The paper's trees\n"
    yield "| m, n, d, kappa | tree, ms | dense, ms | compact, ms | dense / tree | visited | touched |"
    yield "|" + "---|" * 7
    for log_width, n, d, kappa in cells:
        X, y = random_task(n, d, 0)
        width = 2**log_width
        names = ("tree", "compact", "dense")
        timings = {t.engine: t for t in time_engines(X, y, width, kappa, names, ITERATIONS, max(2, repeats // 2))}
        history = fit(X, y, width, kappa, "tree", max_iter=2, tol=0).history
        nodes = n * (2 * width - 1)
        visited, touched = (
            np.mean([entry[name] for entry in history]) / nodes for name in ("nodes_visited", "nodes_touched")
        )
        tree, compact, dense = (timings[name].iteration for name in names)
        yield (
            f"| 2^{log_width}, {n}, {d}, {kappa} | {tree * 1e3:.1f} | {dense * 1e3:.1f} | {compact * 1e3:.1f} "
            f"| {dense / tree:.2f}x | {visited:.1%} | {touched:.1%} |"
        )
    yield "\nVisited by the queries and touched by the updates of an iteration, as a share of all n (2m - 1) nodes.\n"


def exactness(quick: bool) -> Iterator[str]:
    yield "## One trajectory\n"
    yield "Largest difference of the outputs on the training points from `dense`, iterations 1, 2, 3 and 6, over max |y|.\n"
    yield "| m, n, d, kappa | dtype | tree | slack | compact |"
    yield "|---|---|---|---|---|"
    for log_width, n, d, kappa in [(12, 64, 16, 0.2)] if quick else [(12, 64, 16, 0.2), (16, 256, 64, 0.24)]:
        X, y = random_task(n, d, 0)
        for dtype in ("float64", "float32"):
            outputs = {
                name: np.array(
                    [
                        fit(X, y, 2**log_width, kappa, name, max_iter=k, tol=0, dtype=dtype).predict(X)
                        for k in (1, 2, 3, 6)
                    ]
                )
                for name in ENGINES
            }
            gaps = [np.abs(outputs[name] - outputs["dense"]).max() / np.abs(y).max() for name in ENGINES[:3]]
            yield f"| 2^{log_width}, {n}, {d}, {kappa} | {dtype} | " + " | ".join(f"{gap:.1e}" for gap in gaps) + " |"
    yield ""


def clusters(radius: float) -> tuple[Array, Array]:
    """16 centres with 8 points each; the target is the centre's, plus a tenth of noise."""
    rng = np.random.default_rng(0)
    centres, level = rng.standard_normal((16, 16)), rng.standard_normal(16)
    X = np.repeat(centres, 8, axis=0) + radius * rng.standard_normal((128, 16))
    return X, np.repeat(level, 8) + 0.1 * rng.standard_normal(128)


def diabetes() -> tuple[Array, Array]:
    """Standardised, with the constant feature that SublinearRegressor appends."""
    X, y = load_diabetes(return_X_y=True)
    return np.column_stack([X / X.std(axis=0), np.ones(len(X))]), (y - y.mean()) / y.std()


def convergence(quick: bool) -> Iterator[str]:
    digits = load_digits()
    tasks = [
        ("random, n 64, d 16", *random_task(64, 16, 0), 2**12, 0.2),
        ("digits as regression, n 64", digits.data[:64], (digits.target[:64] - 4.5) / 4.5, 2**12, 0.2),
        ("clusters, radius 0.3", *clusters(0.3), 2**14, 0.1),
        ("clusters, radius 0.1", *clusters(0.1), 2**14, 0.1),
        ("diabetes", *diabetes(), 2**16, 0.1),
        ("diabetes", *diabetes(), 2**16, 0.2),
    ]
    most = {"gauss-newton": 100, "levenberg-marquardt": 100, "gradient-descent": 1000}
    yield "## Convergence\n"
    yield "Iterations to a loss (half the sum of squares) of 1e-10 in float64, or the loss after the iterations allowed.\n"
    yield "| task | m, kappa | loss before | gauss-newton (100) | levenberg-marquardt (100) | gradient-descent (1000) |"
    yield "|---|---|---|---|---|---|"
    for name, X, y, width, kappa in tasks[:2] if quick else tasks:
        row, start = [], 0.0
        for method, limit in most.items():
            try:
                model = fit(X, y, width, kappa, method=method, max_iter=limit, dtype="float64")
            except ValueError as error:
                row.append(str(error).split(":")[0])
                continue
            start = model.start["loss"]
            row.append(f"{len(model.history)}" if model.converged else f"{model.history[-1]['loss']:.1e}")
        yield f"| {name} | 2^{width.bit_length() - 1}, {kappa} | {start:.1f} | " + " | ".join(row) + " |"
    yield ""


def exponents(widths: list[int]) -> Iterator[str]:
    X, y = random_task(256, 64, 0)
    yield "## Exponent of the pairs that fire at the start, from counters\n"
    yield f"m from 2^{widths[0].bit_length() - 1} to 2^{widths[-1].bit_length() - 1}, n 256, d 64.\n"
    yield "| kappa | pairs at each m | exponent | 1 - kappa |"
    yield "|---|---|---|---|"
    for kappa in (0.2, 0.24, 0.4):
        fired = [fit(X, y, width, kappa, "compact", max_iter=0).start["fired"] for width in widths]
        slope = np.polyfit(np.log(widths), np.log(fired), 1)[0]
        yield f"| {kappa} | {', '.join(map(str, fired))} | {slope:.3f} | {1 - kappa:.2f} |"
    yield ""


def solvers(repeats: int) -> Iterator[str]:
    yield "## Exact Cholesky and the sketched preconditioner with conjugate gradients (m = 2^16, kappa 0.24, first step)\n"
    yield "Each with what it needs from the pairs: the counts C for Cholesky, the sketch for the other.\n"
    yield "| n | tally and Cholesky, ms | tally, sketch and CG, ms | largest difference, over max |g| |"
    yield "|---|---|---|---|"
    for n in (64, 128, 256, 512):
        X, y = random_task(n, 64, 0)
        problem = Problem.of(unit_rows(X, "X"), 2**16, 0.24, 0, np.float32)
        engine = Compact(problem, screen(problem, np.zeros(n)))
        fired = engine.fired()
        answers, seconds = [], []
        for solve, exact in ((cholesky, True), (sketched, False)):

            def run(
                solve=solve, exact=exact, problem=problem, engine=engine, fired=fired, y=y, answers=answers
            ) -> None:
                system = System(problem, fired, tally(fired, engine.signs, problem, with_shared=exact))
                answers.append(solve(system, y, 0.0))

            seconds.append(best_seconds(run, repeats) * 1e3)
        gap = np.abs(answers[0] - answers[-1]).max() / np.abs(answers[0]).max()
        yield f"| {n} | {seconds[0]:.1f} | {seconds[1]:.1f} | {gap:.0e} |"
    yield ""


def generalisation(quick: bool) -> Iterator[str]:
    kappas = (0.0, 0.1, 0.2, 0.24, 0.3, 0.4)
    yield "## Generalisation\n"
    yield (
        "Root mean square error on 1000 new points, in units of the target's deviation: n = 256 Gaussian points with a "
        "constant feature, m = 2^14, levenberg-marquardt to 1e-6 or 40 iterations, mean of three seeds.\n"
    )
    yield "| teacher | " + " | ".join(f"kappa {kappa}" for kappa in kappas) + " |"
    yield "|---|" + "---|" * len(kappas)
    for d in (4,) if quick else (4, 8, 16):
        for name in ("linear", "sine", "eight ReLUs", "product"):
            errors = np.array([[error(name, d, kappa, seed) for kappa in kappas] for seed in range(1 if quick else 3)])
            yield f"| {name}, d {d} | " + " | ".join(f"{value:.2f}" for value in errors.mean(axis=0)) + " |"
    yield ""


def error(teacher: str, d: int, kappa: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    X, u = rng.standard_normal((1256, d)), rng.standard_normal(d)
    hidden, outer = rng.standard_normal((d, 8)), rng.standard_normal(8)
    y = {
        "linear": X @ u,
        "sine": np.sin(2 * X @ u / np.linalg.norm(u)),
        "eight ReLUs": np.maximum(X @ hidden, 0) @ outer,
        "product": X[:, 0] * X[:, 1],
    }[teacher]
    y, A = (y - y.mean()) / y.std(), np.column_stack([X, np.ones(len(X))])
    model = fit(A[:256], y[:256], 2**14, kappa, method="levenberg-marquardt", max_iter=40, tol=1e-6)
    return float(np.sqrt(np.mean((model.predict(A[256:]) - y[256:]) ** 2)))


def second_layer() -> Iterator[str]:
    yield "## Beyond the paper: the second layer trained too (plain NumPy, float64, m = 2^13, n = 128, eight ReLUs, d 8)\n"
    yield "Gauss-Newton iterations to a loss of 1e-10 (at most 12), and RMSE on 500 new points, seeds 0, 1, 2.\n"
    yield "| kappa | first layer only | both layers |"
    yield "|---|---|---|"
    for kappa in (0.1, 0.24, 0.4):
        runs = [[second_layer_run(both, kappa, seed) for seed in range(3)] for both in (False, True)]
        cells = (", ".join(f"{iterations}: {error:.2f}" for iterations, error in row) for row in runs)
        yield f"| {kappa} | " + " | ".join(cells) + " |"
    yield ""


def second_layer_run(both: bool, kappa: float, seed: int, n: int = 128, m: int = 2**13) -> tuple[int, float]:
    """Gauss-Newton on w, or on w and a: G gains Phi^T Phi / m, and C counts a_r^2. Asserts that the dead stay dead."""
    rng = np.random.default_rng(seed)
    X = np.column_stack([rng.standard_normal((n + 500, 8)), np.ones(n + 500)])
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    y = np.maximum(X @ rng.standard_normal((9, 8)), 0) @ rng.standard_normal(8)
    y = (y - y.mean()) / y.std()
    points, target, gram = X[:n], y[:n], X[:n] @ X[:n].T
    weights, signs = rng.standard_normal((m, 9)), rng.choice([-1.0, 1.0], m)
    threshold, alive = np.sqrt(2 * kappa * np.log(m)), np.ones(m, bool)
    for iteration in range(13):
        z = weights @ points.T
        fires, values = z > threshold, np.maximum(z - threshold, 0)
        assert not (fires.any(axis=1) & ~alive).any()
        alive = fires.any(axis=1)
        residual = values.T @ signs / np.sqrt(m) - target
        if residual @ residual / 2 <= 1e-10 or iteration == 12:
            break
        jacobian = gram * ((fires * (signs**2)[:, None]).T @ fires) + (values.T @ values if both else 0)
        g = np.linalg.solve(jacobian / m, residual)
        weights -= signs[:, None] * ((fires * g) @ points) / np.sqrt(m)
        if both:
            signs = signs - values @ g / np.sqrt(m)
    outputs = np.maximum(X[n:] @ weights.T - threshold, 0) @ signs / np.sqrt(m)
    return iteration, float(np.sqrt(np.mean((outputs - y[n:]) ** 2)))


def header(arguments: list[str]) -> Iterator[str]:
    cpu = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    blas = {(info["internal_api"], info["num_threads"]) for info in threadpool_info() if info["user_api"] == "blas"}
    yield "# hbll.sublinear, measured\n"
    commit = ledger.commit() or "unknown"
    yield f"- {date.today()}, commit {commit}, `python benchmarks/sublinear.py {' '.join(arguments)}`".replace(
        " `", " `"
    )
    yield f"- {cpu}, {os.cpu_count()} cores; engines on {thread_count()} threads, BLAS {sorted(blas)}"
    yield f"- Python {platform.python_version()}, NumPy {np.__version__}"
    yield f"- load average at the start {os.getloadavg()[0]:.1f} (before the benchmark's own threads)\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each engine, of which the best counts")
    names = ("speed", "trees", "exactness", "convergence", "exponents", "solvers", "generalisation", "second-layer")
    parser.add_argument("--only", nargs="+", choices=names, help="these sections, printed only")
    options = parser.parse_args()
    gate(["sublinear/test_engines.py", "sublinear/test_rules.py"])
    cells, tree_cells, widths = QUICK if options.quick else (CELLS, TREE_CELLS, WIDTHS)
    sections = {
        "speed": speed(cells, options.repeats),
        "trees": trees(tree_cells, options.repeats),
        "exactness": exactness(options.quick),
        "convergence": convergence(options.quick),
        "exponents": exponents(widths),
        "solvers": solvers(options.repeats),
        "generalisation": generalisation(options.quick),
        "second-layer": second_layer(),
    }
    lines = []
    for section in (header(sys.argv[1:]), *(sections[name] for name in options.only or sections)):
        for line in section:
            print(line, flush=True)
            lines.append(line)
    closing = f"Load average at the end {os.getloadavg()[0]:.1f}, the benchmark's own threads included."
    print(closing)
    if not (options.quick or options.only):
        results = Path(__file__).parent / "results" / "sublinear.md"
        results.write_text("\n".join([*lines, closing, ""]))


if __name__ == "__main__":
    main()
