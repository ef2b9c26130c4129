"""The command line: `hbll train | evaluate | generate | compare | reproduce | report | plan | sublinear | --version`.

Parsing is tyro's, from the option classes below; a recipe's own options come flat among them. What a command needs is
imported when it runs, so that `hbll --help` answers at once. Results go to stdout, progress and errors to stderr.
"""

import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import version
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NoReturn, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction

from hbll.names import check_known
from hbll.terminal import terminal

if TYPE_CHECKING:
    from hbll.recipes import Recipe
    from hbll.train.compare import Comparison
    from hbll.train.run import Run

RecipeT = TypeVar("RecipeT", bound="Recipe")
"""A TypeVar, because the option classes are made for one recipe at a time: `TrainOptions[Digits]`."""

RUNS = Path("runs")

GROWN = tuple(4**k for k in range(6))
"""The numbers of devices that a plan's plot grows by."""

TEXT = "--prompt"
"""The option whose value may be empty; of others it would be a folder, and mean the one where the command was called."""

ALIASES = {"method": "--rule", "methods": "--rules"}
"""Other spellings of options."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Generic[RecipeT]):
    recipe: RecipeT

    method: Annotated[str, tyro.conf.arg(aliases=[ALIASES["method"]])]
    """The training rule: paper, tree, scan, stream, greedy, solo, pipeline, 2bw or bp; bll, dgl, predsim, ff, cff or dfa,
    which give every stage a loss of its own; of recurrent networks hbll, paper, bptt, bptt-fused or deer."""

    seed: int = 0
    """Of the initial weights, the order of the samples and the rule's noise."""

    data_dir: Path | None = None
    """Folder that holds the data sets ($HBLL_DATA, else ~/.cache/hbll)."""

    run_dir: Path | None = None
    """The run's folder (runs/RECIPE-METHOD-sSEED-TIME)."""

    start_from: Path | None = None
    """Folder of a run, or of what a network's save wrote, whose weights the network begins with, by any rule and any cut;
    of several processes the first one reads it."""

    resume: FlagCreatePairsOff[bool] = False
    """Go on with the run in --run-dir; options not given are as the run has them."""

    parallel: Literal["none", "stages", "data"] = "none"
    """What each of several processes has, which torchrun has started: a stage (with more processes than stages, as many
    replicas of each), or a replica of the whole network, which learns from its share of every batch."""

    balance: Literal["time"] | None = None
    """Of --parallel stages, instead of --stage: cut the network into as many stages as there are processes, none of which
    takes much longer than another, by times that the first process measures; a run that goes on keeps its stages."""

    wire: Literal["float32", "bfloat16"] = "float32"
    """Of --parallel stages: precision of states on the links; float32 is their own."""

    timeout: float = 30.0
    """Of several processes: seconds for which one waits for another before it ends, longer than any step takes, and
    than the first one takes to read its data."""

    wait_for_stages: float | None = None
    """Of several processes that were started one by one: seconds for which they wait at the start until all are there, and
    for a lost one until it is started again with --resume (they end)."""

    backend: Literal["gloo", "nccl"] | None = None
    """What carries messages between processes (nccl where each of a machine has a GPU of its own, else gloo)."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout < 10**9:
            raise ValueError(f"--timeout must be above 0 and below 10^9 seconds, not {self.timeout}")
        if self.wait_for_stages is not None and not 1 <= self.wait_for_stages < 10**9:
            raise ValueError(f"--wait-for-stages must be at least 1 and below 10^9 seconds, not {self.wait_for_stages}")
        for option, given in (("--timeout", self.timeout != 30), ("--backend", self.backend is not None)):
            if given and self.parallel == "none":
                raise ValueError(f"{option} is of several processes: leave it out, or give --parallel stages or data")
        if self.balance and self.parallel != "stages":
            raise ValueError("--balance is of stages in processes: leave it out, or give --parallel stages too")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Generic[RecipeT]):
    recipe: RecipeT

    methods: Annotated[tuple[str, ...], tyro.conf.arg(aliases=[ALIASES["methods"]])]
    """The training rules to compare."""

    seeds: int = 3
    """Runs of each method, with seeds from 0."""

    data_dir: Path | None = None
    """Folder that holds the data sets ($HBLL_DATA, else ~/.cache/hbll)."""

    run_dir: Path | None = None
    """Folder of the comparison, with a run's folder for each method and seed (runs/RECIPE-compare-TIME)."""

    resume: FlagCreatePairsOff[bool] = False
    """Go on with the comparison in --run-dir."""

    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    run: Annotated[Path, tyro.conf.arg(metavar="RUN"), Positional]
    """Folder of the run."""

    path: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Paths to evaluate, each by its blocks (4-6-7; of one block, block-4) or their number (3), or `chain`, or `rim`, or by
    the network's own name for it (`tree`), or a stage's readout (`stage-2`)."""

    paths: Literal["usual", "all"] = "usual"
    """Without --path: the chain, and the rim cut short at every length (of recurrent networks the chain and, where the
    method has one, the tree); or all, with what each costs: also a path of every number of blocks, and the readouts of
    all stages."""

    exits: tuple[float, ...] = ()
    """Instead of paths: classify each sample at the first readout that is sure enough to lose so many points of accuracy."""

    best: FlagCreatePairsOff[bool] = False
    """The weights that were best by the validation samples, in place of the last."""

    test_missing: float | None = None
    """Share of the pixels, or patches, of every test image that is erased, in place of the run's own."""

    test_label_noise: float | None = None
    """Share of the test labels that are another class, in place of the run's own."""

    data_dir: Path | None = None
    """Folder that holds the data sets (the run's own, else $HBLL_DATA, else ~/.cache/hbll)."""

    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        for points in self.exits:
            if not 0 <= points < float("inf"):
                raise ValueError(f"--exits must be at least 0 and finite, not {points}")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    run: Annotated[Path, tyro.conf.arg(metavar="RUN"), Positional]
    """Folder of the run of a language model."""

    prompt: str
    """The text to go on from."""

    max_new_tokens: int = 100
    """How many tokens follow."""

    temperature: float = 1.0
    """What logits are divided by before a token is drawn; 0 takes the likeliest one."""

    top_k: int | None = None
    """Draw among so many of the likeliest tokens (all)."""

    seed: int = 0
    """Of the draws."""

    path: str | None = None
    """The path to generate along: its blocks (4-6-7; of one block, block-4) or their number (3), or a stage's readout,
    stage-2 (the chain)."""

    draft: str | None = None
    """A path, named likewise, that drafts tokens for the other to verify (none)."""

    num_draft_tokens: int = 4
    """Tokens that are drafted before they are verified."""

    best: FlagCreatePairsOff[bool] = False
    """The weights that were best by the validation samples, in place of the last."""


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    table: Annotated[str, tyro.conf.arg(metavar="TABLE"), Positional]
    """table1 to table9, as of the paper."""

    scale: Literal["small", "paper"] = "small"
    """What is trained: small, for minutes a run on two cores; or with the paper's hyper-parameters."""

    rules: tuple[str, ...] = ()
    """The rules whose rows are made (all of the table's)."""

    seeds: int = 1
    """Runs of each training, with seeds from 0."""

    rates: tuple[float, ...] = ()
    """Learning rates to compare for every training, on held-out samples and with the first seed; the best has the figures
    and the other seeds. While it is the highest or lowest, the next one is tried too (the recipe's own, for all alike)."""

    workers: int = 1
    """Runs that are made at once; if several, each in a process of its own, on a CPU with one thread."""

    corpus: Literal["wikitext-103", "wikitext-2", "novels"] = "wikitext-103"
    """Of table5, the text; where the paper's cannot be had the hundred novels stand in for it."""

    epochs: int | None = None
    """Passes over the training samples, in place of what the scale says."""

    train_samples: int | None = None
    """Train on the first so many samples alone."""

    data_dir: Path | None = None
    """Folder that holds the data sets ($HBLL_DATA, else ~/.cache/hbll)."""

    run_dir: Path | None = None
    """Folder of the table, with a run's folder for each training and seed; the same command goes on with what lies there
    (runs/TABLE-SCALE)."""

    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER"), Positional]
    """Of a run or of a comparison."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Generic[RecipeT]):
    recipe: RecipeT

    devices: int = 2
    """Devices that the network is to be spread over, all like this machine."""

    mbit: float = 1000.0
    """Megabits that a device sends in a second; 0 for no limit."""

    delay_ms: float = 1.0
    """Milliseconds that a message is on its way, beside what its size takes."""

    memory_mib: float | None = None
    """MiB of a device; any amount unless given."""

    data_dir: Path | None = None
    """Folder that holds the data sets ($HBLL_DATA, else ~/.cache/hbll)."""

    plot: Path | None = None
    """File for the plot of seconds a step as the network grows with its devices (runs/RECIPE-plan-TIME.svg)."""

    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"--devices must be at least 1, not {self.devices}")
        for name, value in (("--mbit", self.mbit), ("--delay-ms", self.delay_ms)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, not {value}")
        if self.memory_mib is not None and not self.memory_mib > 0:
            raise ValueError(f"--memory-mib must be above 0, not {self.memory_mib}")


def train(arguments: Sequence[str]) -> None:
    """RECIPE [OPTIONS]      train a network"""
    from hbll.distributed.launch import launched, processes_of
    from hbll.train.console import train_shown
    from hbll.train.run import open_run

    recipe, options = _recipe_options("train", arguments, TrainOptions, open_run)
    name = f"{recipe.name}-{options.method}-s{options.seed}"
    alone = (_value_of("--parallel", arguments) or "none") == "none" and not launched(os.environ)
    if options.wait_for_stages is not None and (alone or options.parallel == "none"):
        raise ValueError("--wait-for-stages is of several processes: leave it out, or give --parallel stages or data")
    if options.resume and alone and open_run(options.run_dir).parallel != "none":
        from hbll.train.together import put_together

        options = replace(options, parallel="none", wire="float32", balance=None)
        put_together(_run_of(options, options.run_dir))
    if options.parallel != "none":
        _train_parallel(options, name)
    if (count := processes_of(os.environ)) > 1:
        raise ValueError(
            f"a launcher has started {count} processes, each of which would train a run of its own: give --parallel stages "
            "or data, or start one"
        )
    if not options.resume:  # else options are those that were checked when the run began, or told to be others
        options.recipe.check([options.method])
    with _folder(options.run_dir, name) as folder:
        train_shown(_run_of(options, folder), resume=options.resume)


def _train_parallel(options: Any, name: str) -> NoReturn:
    """This process's part of a run on several; results and progress are the first one's."""
    from hbll.distributed.launch import first_says, join, rank_of
    from hbll.train.console import train_shown
    from hbll.train.parallel import apart, stages_by_time, train_parallel
    from hbll.train.planning import check_balanced
    from hbll.train.waiting import waiting

    options = replace(options, recipe=apart(options.recipe, options.method, options.parallel))
    options.recipe.check([options.method])
    balances = options.balance and not options.resume
    if balances:
        check_balanced(options.recipe, options.method)
    leads = rank_of(os.environ) == 0
    patience = options.wait_for_stages

    def work() -> None:
        with (
            _folder(options.run_dir, name) if leads else contextlib.nullcontext() as folder,
            waiting(patience, options.run_dir, options.resume) if patience else contextlib.nullcontext(),
        ):
            join(options.timeout, options.backend, patience)
            run = _run_of(options, options.run_dir or first_says(folder))
            if balances:
                sizes = stages_by_time(run)
                run = replace(run, recipe=replace(options.recipe, stage=sizes))
                if leads:
                    print("stages by measured time: --stage", *sizes, file=sys.stderr)
            if leads:
                train_shown(run, resume=options.resume, by=train_parallel)
            else:
                train_parallel(run, resume=options.resume)

    code = _status(work)
    sys.stderr.flush()
    os._exit(code)  # at the interpreter's end gloo's threads may stumble over each other


def _run_of(options: Any, folder: Path) -> "Run":
    from hbll.train.run import Run

    return Run(
        recipe=options.recipe,
        method=options.method,
        seed=options.seed,
        folder=folder,
        data_dir=options.data_dir,
        parallel=options.parallel,
        wire=options.wire,
        start_from=options.start_from,
    )


def evaluate(arguments: Sequence[str]) -> None:
    """RUN [OPTIONS]         measure a run's network along paths of its tree"""
    from hbll.files import write_atomically
    from hbll.train.console import evaluate_shown, show_exits, show_paths
    from hbll.train.evaluate import evaluate_exits
    from hbll.train.run import open_run

    options = _parse(EvaluateOptions, arguments, "hbll evaluate")
    names, every = [path for group in options.path for path in group], options.paths == "all"
    if (names != []) + every + (options.exits != ()) > 1:
        raise ValueError("give --path, --paths all or --exits, one of them")
    shares = {"test_missing": options.test_missing, "test_label_noise": options.test_label_noise}
    given = {"data_dir": options.data_dir, "best": options.best}
    given["corruption"] = {option: share for option, share in shares.items() if share is not None}
    if options.exits:
        found = evaluate_exits(options.run, [points / 100 for points in options.exits], **given)
        if options.json:
            print(json.dumps({"exits": found}))
        else:
            show_exits(found)
        return
    paths = evaluate_shown(options.run, names, every=every, **given)
    measures = open_run(options.run).recipe.measures
    plot = options.run / "paths.svg"
    plotted = every and not given["corruption"]  # which would take the place of the run's own
    if plotted:
        from hbll.train.plots import by_cost

        write_atomically(plot, by_cost(paths, measures[0]))
    if options.json:
        print(json.dumps({"paths": paths}))
    else:
        show_paths(paths, measures)
        if plotted:
            print(f"plot: {plot}")


def generate(arguments: Sequence[str]) -> None:
    """RUN [OPTIONS]         let a run's language model go on with a text"""
    from hbll.train.console import show_rates
    from hbll.train.generate import generate_run

    options = vars(_parse(GenerateOptions, arguments, "hbll generate"))
    text, generation = generate_run(options.pop("run"), **options)
    print(text)
    show_rates(generation)


def compare(arguments: Sequence[str]) -> None:
    """RECIPE [OPTIONS]      train methods side by side, over several seeds"""
    from hbll.train.compare import Comparison, open_comparison
    from hbll.train.console import compare_shown, show_results
    from hbll.train.report import write_report

    recipe, options = _recipe_options("compare", arguments, CompareOptions, open_comparison)
    with _folder(options.run_dir, f"{recipe.name}-compare") as folder:
        comparison = Comparison(
            recipe=options.recipe,
            methods=options.methods,
            seeds=options.seeds,
            folder=folder,
            data_dir=options.data_dir,
        )
        results = compare_shown(comparison, resume=options.resume)
    page = write_report(comparison.folder)
    if options.json:
        print(json.dumps({"methods": results}))
    else:
        show_results(results, comparison.recipe.measures, page)


def reproduce(arguments: Sequence[str]) -> None:
    """TABLE [OPTIONS]       make a table of the paper again, beside its figures"""
    from hbll.reproduce import TABLES, Reproduction
    from hbll.reproduce.shown import reproduce_shown, show_table_of
    from hbll.reproduce.tables import language

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise ValueError(f"hbll reproduce needs a table first: {', '.join(TABLES)}")
    options = _parse(ReproduceOptions, arguments, "hbll reproduce")
    table = TABLES[check_known(options.table, TABLES, "table")]
    name = f"{options.table}-{options.scale}"
    if options.corpus != "wikitext-103":
        if options.table != "table5":
            raise ValueError("--corpus is of table5 alone: leave it out")
        table, name = language(options.corpus), f"{name}-{options.corpus}"
    given = {option: getattr(options, option) for option in ("epochs", "train_samples")}
    reproduction = Reproduction(
        table=table,
        scale=options.scale,
        folder=options.run_dir or RUNS / name,
        rules=options.rules,
        seeds=options.seeds,
        rates=options.rates,
        options={option: value for option, value in given.items() if value is not None},
        data_dir=options.data_dir,
    )
    results = reproduce_shown(reproduction, options.workers)
    if options.json:
        print(json.dumps({"title": table.title, "rows": results}))
    else:
        show_table_of(reproduction, results)


def report(arguments: Sequence[str]) -> None:
    """FOLDER                write the page of a run or a comparison"""
    from hbll.train.report import write_report

    print(write_report(_parse(ReportOptions, arguments, "hbll report").folder))


def plan(arguments: Sequence[str]) -> None:
    """RECIPE [OPTIONS]      say how a network is best spread over several devices"""
    from hbll.distributed import plan as planning
    from hbll.distributed.simulate import Network
    from hbll.files import write_atomically
    from hbll.train.console import show_table
    from hbll.train.planning import check_planned, recipe_costs
    from hbll.train.plots import growing

    recipe, options = _recipe_options("plan", arguments, PlanOptions)
    check_planned(options.recipe)
    costs = recipe_costs(options.recipe, options.data_dir)
    network = Network(options.mbit * 1e6 / 8 or float("inf"), options.delay_ms / 1e3)
    memory = None if options.memory_mib is None else options.memory_mib * 2**20
    batch, refresh = options.recipe.batch_size, options.recipe.refresh
    found = planning.make_plan(costs, batch, options.devices, network, memory, refresh)
    each = -(-len(costs.blocks) // options.devices)
    curves = dict(planning.growth(costs, batch, network, each, GROWN, refresh))
    page = options.plot or RUNS / f"{recipe.name}-plan-{_now()}.svg"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, growing(curves))
    if options.json:
        print(json.dumps(planning.as_json(found) | {"growth": curves}))
        return
    show_table(planning.COLUMNS, planning.table(found))
    print("", *planning.reasons(found), f"plot: {page}", sep="\n")


def sublinear(arguments: Sequence[str]) -> None:
    """bench|fit [OPTIONS]   train wide networks in time that does not grow with their weights"""
    from hbll.sublinear import command

    actions = {"bench": (command.BenchOptions, command.bench), "fit": (command.FitOptions, command.fit)}
    if arguments and arguments[0] in ("-h", "--help"):
        rows = [f"  {name:6} {options.__doc__}" for name, (options, _) in actions.items()]
        _print_usage("hbll sublinear ACTION", rows)
        return
    if not arguments:
        raise ValueError(f"hbll sublinear needs an action first: {', '.join(actions)}")
    options, run = actions[check_known(arguments[0], actions, "action")]
    chosen = _parse(options, arguments[1:], f"hbll sublinear {arguments[0]}")
    try:
        run(chosen)
    except ModuleNotFoundError as missing:
        raise ValueError(f'hbll sublinear needs {missing.name}: pip install "hbll[sublinear]"') from missing


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command for command in (train, evaluate, generate, compare, reproduce, report, plan, sublinear)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0, 2 after an error of the user's (one sentence on stderr), 130 after Ctrl-C or SIGTERM, 1
    if whoever reads its output has closed it."""
    # What ends processes that train together is told in a sentence; torch would add a page.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    with terminal():
        code = _status(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments))
    if code:
        sys.exit(code)


def _status(work: Callable[[], None]) -> int:
    """Works, and says what ended it; the exit code."""
    try:
        try:
            work()
        finally:
            sys.stdout.flush()
    except ValueError as error:
        print(f"hbll: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConnectionError as error:  # of processes that train together
        print(f"hbll: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that is a file, a full disk
        print(f"hbll: {error.strerror}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"hbll: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _dispatch(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_usage("hbll COMMAND", [f"  {name:9} {command.__doc__}" for name, command in COMMANDS.items()])
        return
    if arguments[0] == "--version":
        print(f"hbll {version('hbll')}")
        return
    COMMANDS[check_known(arguments[0], COMMANDS, "command")](arguments[1:])


def _print_usage(usage: str, rows: Iterable[str]) -> None:
    print(f"usage: {usage} [OPTIONS]\n", *rows, f"\n`{usage} --help` says more.", sep="\n")


def _recipe_options(
    command: str, arguments: Sequence[str], kind: Any, open_stored: "Callable[[Path], Run | Comparison] | None" = None
) -> "tuple[type[Recipe], Any]":
    """The recipe that the first argument names, and the options; those not given on resuming are the stored ones, where
    there is something to resume."""
    from hbll.recipes import RECIPES

    if arguments and arguments[0] in ("-h", "--help"):
        rows = [f"  {name:16} {recipe.__doc__}" for name, recipe in RECIPES.items()]
        _print_usage(f"hbll {command} RECIPE", rows)
        sys.exit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"hbll {command} needs the name of a recipe first: {', '.join(RECIPES)}")
    recipe = RECIPES[check_known(arguments[0], RECIPES, "recipe")]
    prog = f"hbll {command} {recipe.name}"
    preset = _value_of("--preset", arguments) if recipe.presets else None  # what the options that are not given are
    usual = {"method": recipe.methods[0], "methods": recipe.methods}
    known = {field.name for field in fields(kind)}
    default = kind(
        recipe=recipe.of_preset(preset or "small"), **{name: value for name, value in usual.items() if name in known}
    )
    options = _parse(kind[recipe], arguments[1:], prog, default)
    if open_stored and options.resume:
        if options.run_dir is None:
            raise ValueError("--resume needs --run-dir, the folder to go on in")
        stored = open_stored(options.run_dir)
        if type(stored.recipe) is not recipe:
            raise ValueError(f"{options.run_dir} was begun with the recipe {stored.recipe.name}, not {recipe.name}")
        begun = {field.name: getattr(stored, field.name) for field in fields(kind) if hasattr(stored, field.name)}
        if {"--depth", "--blocks"} & {argument.split("=")[0] for argument in arguments}:  # two spellings of one option
            begun["recipe"] = replace(stored.recipe, depth=None, blocks=None)
        options = _parse(kind[recipe], arguments[1:], prog, kind(**begun))
    return recipe, options


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What an option is given, before the arguments are parsed."""
    for word, following in pairwise([*arguments, ""]):
        if word == option or word.startswith(f"{option}="):
            return following if word == option else word.removeprefix(f"{option}=")
    return None


def _parse(options: Any, arguments: Sequence[str], prog: str, default: Any = None) -> Any:
    """The options that the arguments give; ValueError with one sentence when they do not."""
    for before, argument in pairwise((prog, *arguments)):
        named, value = (argument[:-1], "") if re.fullmatch("--.*=", argument) else (before, argument)
        if not value and named != TEXT:
            raise ValueError(f"what follows {named} is empty")
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            parsed, unknown = tyro.cli(
                options,
                prog=prog,
                args=list(arguments),
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_sentence(output.getvalue())) from None
        raise
    flags = _flags(parsed)
    for word in unknown:
        if word.startswith("-"):
            check_known(word.split("=")[0], flags, "option")
    if unknown:
        raise ValueError(f"{prog} does not know what to do with {' '.join(unknown)}")
    for flag, value in flags.items():
        several = flag in arguments and isinstance(value, tuple)  # of which there may be none
        if several and (not value or () in value):
            raise ValueError(f"{flag} needs a value")
    return parsed


def _flags(options: Any) -> dict[str, Any]:
    """The values of options by their spellings; what has a place instead is none."""
    flags = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            flags |= _flags(value)
        elif Positional not in getattr(field.type, "__metadata__", ()):
            flags["--" + field.name.replace("_", "-")] = value
            flags |= {ALIASES[field.name]: value} if field.name in ALIASES else {}
    return flags


def _sentence(box: str) -> str:
    """What tyro's framed error says first, without the words for programmers; frames are drawn in lines or in ASCII."""
    paragraphs = [""]
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines():  # coloured on a terminal
        text = line.strip(" │╰╯")
        if line.startswith("╭") or not text.strip("─-"):
            paragraphs.append("")
        else:
            paragraphs[-1] += f" {text}"
    said = re.sub(r"^Error parsing \w+: ", "", paragraphs[1].strip())
    if bad_value := re.match(r"Error parsing (--\S+): [^']*('[^']*')", said):
        option, value = bad_value.groups()
        return f"{option} cannot be {value}"
    return said


@contextlib.contextmanager
def _folder(chosen: Path | None, name: str) -> Iterator[Path]:
    """The chosen folder, or a new one under `runs` that no other process has; what stays empty is taken away."""
    if chosen is not None:
        yield chosen
        return
    named = RUNS / f"{name}-{_now()}"
    folder = named
    for number in count(2):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
        folder = named.with_name(f"{named.name}-{number}")
    try:
        yield folder
    finally:
        for empty in (folder, RUNS):
            with contextlib.suppress(OSError):  # what holds anything stays
                empty.rmdir()


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
