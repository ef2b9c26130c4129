"""Tables made again, on the embedded digits: the figures are those of the runs, and what is done is kept."""

import json
import signal
import statistics
from dataclasses import replace

import pytest

from hbll.reproduce import Reproduction, reproduce
from hbll.reproduce.reproduction import columns, texts
from hbll.reproduce.tables import Figure, Row, Table, training
from hbll.train import metrics
from hbll.train.loop import Interrupted
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

    assert columns(TABLE) == ["setting", "rule", "3 blocks", "paper", "1 block", "paper"]
    first, second = texts(TABLE, results)
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
    monkeypatch.setattr("hbll.reproduce.reproduction.train", None)
    assert reproduce(made) == results
    assert {file: file.stat().st_mtime_ns for file in made.folder.glob("*-s*/*")} == before


def test_an_interrupted_table_goes_on_and_ends_as_one_that_was_not(made, tmp_path):
    whole = reproduce(replace(made, folder=tmp_path / "whole"))
    runs = []

    def stop(done, steps):
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
    assert columns(table) == ["rule", "speed-up"]


def test_a_run_that_diverges_leaves_its_figures_out_and_the_others_are_made(made):
    wild = training("digits", "bp", blocks=3, learning_rate=1e30)
    table = replace(TABLE, rows=(Row("wild", "bp", (Figure(wild), Figure(SHORT))),))
    said = []
    (row,) = reproduce(replace(made, table=table, seeds=1), on_diverged=lambda error: said.append(str(error)))
    assert [len(figure["measured"]) for figure in row["figures"]] == [0, 1]
    assert len(said) == 1
    assert "became NaN or infinite" in said[0]
    assert "Diverged: digits-bp-blocks-3-learning-rate-1e+30-s0." in (made.folder / "report.html").read_text()


def test_what_cannot_be_is_one_sentence(made):
    with pytest.raises(ValueError, match="unknown rule of this table 'papr'; did you mean paper"):
        replace(made, rules=["papr"])
    with pytest.raises(ValueError, match="--seeds must be at least 1, not 0"):
        replace(made, seeds=0)
    with pytest.raises(ValueError, match="--epochs must be at least 1, not 0"):
        replace(made, options={"epochs": 0})
