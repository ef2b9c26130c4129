"""Tables made again, on the embedded digits: the figures are those of the runs, and what is done is kept."""

import json
import os
import signal
import statistics
from dataclasses import replace
from typing import ClassVar

import pytest

from hbll.reproduce import TABLES, Reproduction, reproduce
from hbll.reproduce.reproduction import columns, texts, write_results
from hbll.reproduce.tables import Figure, Row, Table, language, training
from hbll.train import metrics
from hbll.train.loop import Interrupted
from hbll.train.rates import MOST_RATES
from hbll.train.run import open_run

PAPER, BP, SHORT = (
    training("digits", "paper", blocks=3),
    training("digits", "bp", blocks=3),
    training("digits", "bp", blocks=1),
)
TABLE = Table(
    "Digits",
    "accuracy",
    ("3 blocks", "1 block"),
    (
        Row("plain", "paper", (Figure(PAPER, "chain", 91.25), Figure(PAPER, 1, 90.0))),
        Row("plain", "bp", (Figure(BP), Figure(SHORT))),
    ),
    "Trained on few samples.",
)
TINY = {"width": 8, "epochs": 2, "train_samples": 128}


@pytest.fixture
def made(tmp_path):
    return Reproduction(table=TABLE, folder=tmp_path / "table", seeds=2, options=TINY)


def accuracy(folder, name, seed, path=0):
    return 100 * metrics.read(folder / f"{name}-s{seed}" / "metrics.jsonl")[-1].paths[path]["accuracy"]


def test_figures_are_those_of_the_runs_beside_the_papers(made):
    results = reproduce(made)
    expected = {
        ("paper", "3 blocks"): ("digits-paper-blocks-3", 0, 91.25),
        ("paper", "1 block"): ("digits-paper-blocks-3", 1, 90.0),
        ("bp", "3 blocks"): ("digits-bp-blocks-3", 0, None),
        ("bp", "1 block"): ("digits-bp-blocks-1", 0, None),
    }
    found = {(row["rule"], one["column"]): one for row in results for one in row["figures"]}
    assert set(found) == set(expected)
    for key, (name, path, paper) in expected.items():
        assert found[key]["paper"] == paper
        assert found[key]["measured"] == [pytest.approx(accuracy(made.folder, name, seed, path)) for seed in (0, 1)]
    assert metrics.read(made.folder / "digits-paper-blocks-3-s0" / "metrics.jsonl")[-1].paths[1]["blocks"] == 1
    assert json.loads((made.folder / "table.json").read_text())["rows"] == results
    assert len([path for path in made.folder.iterdir() if path.is_dir()]) == 6

    assert columns(made) == ["setting", "rule", "3 blocks", "paper", "1 block", "paper"]
    first, second = texts(made, results)
    values = found["paper", "3 blocks"]["measured"]
    assert first[:4] == ["plain", "paper", f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}", "91.25"]
    assert second[3] == second[5] == ""
    page = (made.folder / "report.html").read_text()
    assert all(f"<td>{cell}</td>" in page for cell in (*first, *second))
    assert "6 of 6 runs are finished" in page
    assert TABLE.text in page


def test_what_is_done_is_kept(made, monkeypatch):
    results = reproduce(made)
    before = {file: file.stat().st_mtime_ns for file in made.folder.glob("*-s*/*")}
    monkeypatch.setattr("hbll.train.several.train", None)
    assert reproduce(made) == results
    assert {file: file.stat().st_mtime_ns for file in made.folder.glob("*-s*/*")} == before


def test_an_interrupted_table_goes_on_and_ends_as_one_that_was_not(made, tmp_path):
    whole = reproduce(replace(made, folder=tmp_path / "whole"))
    runs = []

    def stop(run, done, steps):
        if len(runs) == 2 and done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        reproduce(made, on_run=runs.append, on_step=stop)
    assert "1 of 6 runs are finished" in (made.folder / "report.html").read_text()
    assert json.loads((made.folder / "table.json").read_text())["rows"][1]["figures"][0]["measured"] == []
    assert reproduce(made) == whole


def test_rows_and_seeds_can_be_added(made):
    first = reproduce(replace(made, rules=["paper"], seeds=1))
    assert [row["rule"] for row in first] == ["paper"]
    assert "Rows that were not asked for: bp." in (made.folder / "report.html").read_text()
    results = reproduce(made)
    assert [row["rule"] for row in results] == ["paper", "bp"]
    assert results[0]["figures"][0]["measured"][:1] == first[0]["figures"][0]["measured"]
    assert "not asked for" not in (made.folder / "report.html").read_text()


def test_other_runs_in_the_folder_are_left_alone(made):
    reproduce(replace(made, seeds=1))
    other = replace(made, seeds=1, options={**TINY, "width": 16})
    with pytest.raises(ValueError, match="was trained with --width 8, not 16"):
        reproduce(other)
    assert open_run(made.folder / "digits-bp-blocks-1-s0").recipe.width == 8


def test_speed_is_how_many_times_as_fast_an_epoch_is(made):
    rows = (Row("", "paper", (Figure(PAPER, faster_than=BP),)),)
    table = Table("Speed", "speed", ("speed-up",), rows, "")
    speed = Reproduction(table=table, folder=made.folder, options=TINY)
    ((value,),) = [one["measured"] for row in reproduce(speed) for one in row["figures"]]
    seconds = [
        sum(line.seconds for line in metrics.read(made.folder / name / "metrics.jsonl"))
        for name in ("digits-bp-blocks-3-s0", "digits-paper-blocks-3-s0")
    ]
    assert value == pytest.approx(seconds[0] / seconds[1])
    assert columns(speed) == ["rule", "speed-up"]


def test_a_run_that_diverges_leaves_its_figures_out_and_the_others_are_made(made):
    wild = training("digits", "bp", blocks=3, learning_rate=1e30)
    table = replace(TABLE, rows=(Row("wild", "bp", (Figure(wild), Figure(SHORT))),))
    said = []
    (row,) = reproduce(replace(made, table=table, seeds=1), on_end=lambda run, said_of_it: said.append(said_of_it))
    assert [len(figure["measured"]) for figure in row["figures"]] == [0, 1]
    assert len(said) == 2
    assert "became NaN or infinite" in said[0]
    assert said[1] is None
    assert "Diverged: digits-bp-blocks-3-learning-rate-1e+30-s0." in (made.folder / "report.html").read_text()


def test_what_cannot_be_is_one_sentence(made):
    with pytest.raises(ValueError, match="unknown rule of this table 'papr'; did you mean paper"):
        replace(made, rules=["papr"])
    with pytest.raises(ValueError, match="--seeds must be at least 1, not 0"):
        replace(made, seeds=0)
    with pytest.raises(ValueError, match="--epochs must be at least 1, not 0"):
        replace(made, options={"epochs": 0})
    with pytest.raises(ValueError, match=r"--rates must be above 0 and finite, not -0\.1"):
        replace(made, rates=[1e-3, -0.1])
    with pytest.raises(ValueError, match="this table is of speed"):
        replace(made, table=TABLES["table9"], options={}, rates=[1e-3])


def held_out(folder, training, rate):
    name = f"{training.name}-learning-rate-{rate}-s0"
    return metrics.read(folder / name / "metrics.jsonl")[-1].validation["accuracy"]


class TestRates:
    OPTIONS: ClassVar = {**TINY, "epochs": 1, "validation_samples": 200}

    @pytest.fixture
    def searching(self, made):
        return replace(made, rules=["bp"], rates=[1e-6, 2e-3], options=self.OPTIONS)

    def test_every_training_is_made_at_its_own_and_at_the_next_while_the_best_is_at_the_edge(self, searching):
        counts = []
        (row,) = reproduce(searching, on_count=lambda *count: counts.append(count))
        assert counts[-1] == (counts[-1][1],) * 2
        for one, figure in zip((BP, SHORT), row["figures"], strict=True):
            first = [path.name for path in searching.folder.iterdir() if path.name.startswith(f"{one.name}-l")]
            rates = sorted({float(name.removesuffix("-s0").rpartition("rate-")[2]) for name in first if "-s0" in name})
            scores = {rate: held_out(searching.folder, one, rate) for rate in rates}
            assert scores[figure["rate"]] == max(scores.values())
            assert {1e-6, 2e-3, 4e-3} <= set(rates)  # at 10^-6 nothing is learned
            assert figure["edge"] == (figure["rate"] in (rates[0], rates[-1]))
            assert not figure["edge"] or len(rates) == MOST_RATES
            chosen = f"{one.name}-learning-rate-{figure['rate']}"
            assert {name for name in first if "-s1" in name} == {f"{chosen}-s1"}  # other seeds at the best alone
            assert figure["measured"] == [pytest.approx(accuracy(searching.folder, chosen, seed)) for seed in (0, 1)]
            run = open_run(searching.folder / f"{chosen}-s1")
            assert (run.recipe.validation_samples, run.recipe.learning_rate) == (200, figure["rate"])
        assert columns(searching)[:3] == ["setting", "rule", "rate"]
        texts_of = [f"{one['rate']:g}" + "*" * one["edge"] for one in row["figures"]]
        expected = texts_of[0] if len(set(texts_of)) == 1 else ", ".join(texts_of)
        assert texts(searching, [row])[0][2] == expected
        assert "200 training images that are held out" in (searching.folder / "report.html").read_text()

    def test_what_is_done_is_kept(self, searching, monkeypatch):
        results = reproduce(searching)
        monkeypatch.setattr("hbll.train.several.train", None)
        assert reproduce(searching) == results

    def test_with_one_nothing_is_searched(self, searching):
        (row,) = reproduce(replace(searching, rates=[1e-3], seeds=1))
        assert [(one["rate"], one["edge"]) for one in row["figures"]] == [(1e-3, True)] * 2
        assert len([path for path in searching.folder.iterdir() if path.is_dir()]) == 2

    def test_one_at_which_a_rule_diverges_is_not_taken(self, searching):
        (row,) = reproduce(replace(searching, rates=[1e-4, 1e-3, 1e30], seeds=1))
        assert all(one["rate"] < 1 and one["measured"] for one in row["figures"])
        assert "Diverged: digits-bp-blocks-3-learning-rate-1e+30-s0" in (searching.folder / "report.html").read_text()

    def test_where_it_was_stopped_the_best_so_far_is_told(self, searching):
        def stop(run, done, steps):
            if run.recipe.learning_rate == 4e-3:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(Interrupted):
            reproduce(searching, on_step=stop)
        (row,) = json.loads((searching.folder / "table.json").read_text())["rows"]
        assert [(one["rate"], one["edge"]) for one in row["figures"]] == [(2e-3, True)] * 2
        assert [len(one["measured"]) for one in row["figures"]] == [1, 1]

    def test_of_texts_the_validation_part_decides(self, tmp_path):
        table = language("novels")
        searching = Reproduction(table=table, folder=tmp_path, rates=[1e-3, 2e-3])
        assert not hasattr(searching.recipe(table.trainings[0], 1e-3), "validation_samples")
        assert searching.recipe(table.trainings[0], 2e-3).learning_rate == 2e-3
        write_results(searching)
        assert "was best on the text's validation part" in (tmp_path / "report.html").read_text()

    def test_of_images_five_thousand_are_held_out(self, tmp_path):
        table = TABLES["table2"]
        searching = Reproduction(table=table, folder=tmp_path, rates=[1e-3, 2e-3])
        assert searching.recipe(table.trainings[0], 1e-3).validation_samples == 5000
        assert searching.recipe(table.trainings[0], None).validation_samples is None


class TestWorkers:
    def test_they_make_what_one_process_makes(self, made, tmp_path):
        whole = reproduce(replace(made, folder=tmp_path / "whole", seeds=1))
        begun, ended, told = [], [], []
        results = reproduce(
            replace(made, seeds=1),
            workers=2,
            on_run=lambda run: begun.append((run, len(ended))),
            on_step=lambda run, done, steps: told.append((run.folder.name, steps)),
            on_end=lambda run, diverged: ended.append((run, diverged)),
        )
        assert results == whole
        assert [count for _, count in begun[:2]] == [0, 0]  # two at once
        assert {run.folder.name for run, _ in ended} == {f"{one.name}-s0" for one in TABLE.trainings}
        assert {name for name, _ in told} == {run.folder.name for run, _ in ended}

    def test_ctrl_c_saves_all_and_the_same_call_goes_on(self, made):
        endless = replace(made, seeds=1, rules=["bp"], options={**TINY, "epochs": 10**6})
        begun, steps_of = [], {}

        def press(run, done, steps):
            steps_of[run.folder] = steps // 10**6
            if len(steps_of) == 2:  # both are under way
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            reproduce(endless, workers=2, on_run=begun.append, on_step=press)
        states = {run.folder: run.load_checkpoint() for run in begun}
        stood = {folder: state["epoch"] * steps_of[folder] + state["position"] for folder, state in states.items()}
        assert sum(stood.values()) > 0

        def stop(run, done, steps):
            assert done == stood[run.folder]
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(Interrupted):
            reproduce(endless, on_step=stop)

    def test_wrong_data_are_told_before_there_are_processes(self, made, monkeypatch):
        monkeypatch.setattr("hbll.train.several.ProcessPoolExecutor", None)
        with pytest.raises(ValueError, match="--train-samples 99999 is more than"):
            reproduce(replace(made, options={**TINY, "train_samples": 99999}), workers=2)

    def test_what_cannot_be_is_one_sentence(self, made):
        with pytest.raises(ValueError, match="--workers must be at least 1, not 0"):
            reproduce(made, workers=0)
        with pytest.raises(ValueError, match="tell nothing of their speed"):
            reproduce(replace(made, table=TABLES["table9"], options={}), workers=2)


def test_rules_are_made_in_the_order_in_which_they_are_named(made):
    named = replace(made, rules=["bp", "paper"], rates=[1e-3, 2e-3])
    names = [(run.method, run.recipe.block_count, run.recipe.learning_rate, run.seed) for run in named.runs()]
    assert names[:3] == [("bp", 3, 1e-3, 0), ("bp", 1, 1e-3, 0), ("paper", 3, 1e-3, 0)]
    assert names[3:] == [("bp", 3, 2e-3, 0), ("bp", 1, 2e-3, 0), ("paper", 3, 2e-3, 0)]  # no second seed yet
    assert [row.rule for row in named.rows] == ["paper", "bp"]


def test_a_rule_stands_with_its_options(made):
    staged = training("digits", "stream", blocks=7, stage=(3, 4))
    noisy = training("digits", "paper", blocks=3, noise=0.5)
    rows = (Row("", "stream", (Figure(staged),)), Row("", "paper", (Figure(noisy),)), Row("", "bp", (Figure(BP),)))
    one = replace(made, table=Table("", "accuracy", ("chain",), rows, ""))
    results = write_results(one)
    assert [row["options"] for row in results] == [{"stage": [3, 4]}, {"noise": 0.5}, {}]
    assert [row[0] for row in texts(one, results)] == ["stream (stage 3 4)", "paper (noise 0.5)", "bp"]
