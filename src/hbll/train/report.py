"""One self-contained HTML page about a run or a comparison."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from hbll.files import write_atomically
from hbll.recipes import Measure, Recipe, flag
from hbll.recipes.base import ChainRecipe
from hbll.train import metrics, plots
from hbll.train.compare import Comparison, MethodResult, open_comparison, open_results
from hbll.train.metrics import Metrics
from hbll.train.page import page, section, table_of
from hbll.train.run import COMPARISON, TABLE, Run, open_run
from hbll.train.tables import path_columns, path_row, result_columns, result_row

BACKPROPAGATION = ("bp", "bptt", "bptt-fused")
"""The rules with exact gradients, by which others are measured."""


def write_report(folder: Path) -> Path:
    """Writes `report.html` into the folder of a run or a comparison; ValueError when it is neither, or has no epoch."""
    file = folder / "report.html"
    if (folder / TABLE).exists():
        raise ValueError(f"{folder} is the folder of a table, whose page is {file}: name one of its runs")
    write_atomically(file, _comparison_page(folder) if (folder / COMPARISON).exists() else _run_page(folder))
    return file


def _comparison_page(folder: Path) -> str:
    results, comparison = open_results(folder), open_comparison(folder)
    measures = comparison.recipe.measures
    rows = [result_row(result, measures) for result in results]
    finished = [result["method"] for result in results if "diverged" not in result]
    histories = {
        method: [_history(run, comparison.recipe.epochs) for run in comparison.runs(method)] for method in finished
    }
    return page(
        title=f"{comparison.recipe.name}: {', '.join(comparison.methods)}",
        lead=conclusion(results, measures[0]),
        summary=f"{_network(comparison.recipe)} {_seeds(comparison.seeds)}",
        sections=[
            section("Results", _results_text(measures), table_of(result_columns(measures), rows)),
            *(_figures(histories, measures[0]) if histories else []),
            _options(comparison.recipe),
            section("What to try next", "From here on:", _list(_next_steps(comparison, results))),
        ],
    )


def _run_page(folder: Path) -> str:
    run = open_run(folder)
    history = _history(run, 1)
    last = history[-1]
    measures = run.recipe.measures
    text = f"Along every path, on the test samples, after epoch {last.epoch} of {run.recipe.epochs}."
    rows = [path_row(path, measures) for path in last.paths]
    return page(
        title=f"{run.recipe.name}, method {run.method}",
        summary=f"{_network(run.recipe)} Seed {run.seed}.",
        sections=[
            section("Results", text, table_of(path_columns(measures), rows)),
            *_figures({run.method: [history]}, measures[0]),
            _options(run.recipe),
        ],
    )


def _history(run: Run, least: int) -> list[Metrics]:
    """Of a run that has finished so many epochs; ValueError if it has not."""
    history = metrics.read(run.metrics_file)
    if not history:
        raise ValueError(f"the run in {run.folder} has not finished an epoch yet")
    if len(history) < least:
        raise ValueError(
            f"the run in {run.folder} has finished {len(history)} of {least} epochs: go on with it by --resume"
        )
    return history


def conclusion(results: Sequence[MethodResult], measure: Measure) -> str:
    """The sentence that sums up a comparison: which rule comes nearest to backpropagation, and what it needs for that."""
    exact = _backpropagation(results, measure)
    if exact is None:
        return "No run of backpropagation that ended well is among these, by which the rules could be measured."
    others = [r for r in results if r["method"] not in BACKPROPAGATION and r[measure.name] is not None]
    if not others:
        return f"Backpropagation has {measure.text(exact[measure.name])}; no other rule that ended well is beside it."
    nearest = min(others, key=lambda r: abs(r[measure.name] - exact[measure.name]))
    memory, work, span = (f"{nearest[cost] / exact[cost]:.2f}" for cost in ("memory", "work", "span"))
    return (
        f"Nearest to backpropagation ({measure.title} {_with_spread(exact, measure)}) is {nearest['method']} "
        f"({_with_spread(nearest, measure)}), at {memory} of its peak memory, {work} of its work and {span} of its span."
    )


def _backpropagation(results: Sequence[MethodResult], measure: Measure) -> MethodResult | None:
    return next((r for r in results if r["method"] in BACKPROPAGATION and r[measure.name] is not None), None)


def _with_spread(result: MethodResult, measure: Measure) -> str:
    spread = "" if result["spread"] is None else f" ± {measure.number(result['spread'])}"
    return measure.text(result[measure.name]) + spread


def _next_steps(comparison: Comparison, results: Sequence[MethodResult]) -> list[str]:
    """What a reader may do next, in HTML."""
    recipe, first = comparison.recipe.name, results[0]
    again = f"hbll compare {recipe} --run-dir {comparison.folder} --resume --rules {' '.join(comparison.methods)}"
    steps = [f"More rules or seeds beside these, which are kept: {_code(f'{again} .. --seeds {comparison.seeds + 2}')}"]
    if len(first["paths"]) > 1:
        run, path = comparison.runs(first["method"])[0].folder, first["paths"][1]["path"]
        steps.append(f"A shorter path of a trained network: {_code(f'hbll evaluate {run} --path {path}')}")
    if isinstance(comparison.recipe, ChainRecipe):
        steps += [
            f"Other cuts: {_code(f'hbll compare {recipe} --stage N')}. Longer stages learn more like backpropagation, "
            "shorter ones need less memory and wait for less.",
            "A network of your own: "
            + _code(f'rule = hbll.make_rule("{first["method"]}", hbll.Chain(embed, blocks, head))')
            + ", as the documentation's tutorial has it.",
        ]
    return steps


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _results_text(measures: Sequence[Measure]) -> str:
    first, *others = [measure.title for measure in measures]
    more = f" ({', '.join(others)} likewise)" if others else ""
    return (
        f"{first.capitalize()} of the chain of all blocks on the test samples after the last epoch, with its standard "
        f"deviation over the seeds{more}; time of a run's training steps; work and span of a step in block evaluations; "
        "the most memory a step held beyond weights, gradients, optimizer and batch; and whether its losses are local, as "
        "read off autograd's graph: if not, how many blocks the credit of one stage crosses."
    )


def _figures(histories: plots.Histories, measure: Measure) -> list[str]:
    sections = [
        section(
            "Learning curves",
            "The chain on the test samples: mean over the seeds, and the range they span.",
            plots.learning_curves(histories, measure),
        ),
        section(
            f"{measure.title.capitalize()} by path",
            "A path uses some of the blocks: the chain all of them, the others those that the tree leads through.",
            plots.by_path(histories, measure),
        ),
    ]
    if curves := plots.defects(histories):
        text = (
            "How far the last sweep of a step still moved the states, relative to their norm. With a few percent gradients "
            "are right; with more, let it take more sweeps."
        )
        sections.append(section("Defect", text, curves))
    if heat_maps := plots.cosines(histories):
        text = (
            "Between each stage's gradient and backpropagation's, on the same training samples every epoch (scan: on those "
            "that are due next). 1: the stage learns what backpropagation would teach it."
        )
        sections.append(section("Cosines", text, heat_maps))
    if heat_maps := plots.corrections(histories):
        text = "How far each stage's target lies from what it computed, on the same training samples every epoch."
        sections.append(section("Corrections", text, heat_maps))
    return sections


def _options(recipe: Recipe) -> str:
    rows = [[flag(option), str(value)] for option, value in asdict(recipe).items() if value is not None]
    return section("Options", "What every run was trained with.", table_of(["option", "value"], rows))


def _network(recipe: Recipe) -> str:
    return f"{recipe.block_count} blocks of width {recipe.width}, trained for {recipe.epochs} epochs."


def _seeds(seeds: int) -> str:
    return "One seed." if seeds == 1 else f"{seeds} seeds."


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
