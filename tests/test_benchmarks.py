"""What benchmarks share: the gate before them, arms in words, rates that are bracketed, the leaderboard."""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.networks import mlp

from hbll.recipes import RECIPES
from hbll.reproduce import Reproduction, Table
from hbll.reproduce.tables import Figure, Row, training
from hbll.rules import RULES
from hbll.train import metrics
from hbll.train.loop import train
from hbll.train.run import Run, open_run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class TestGate:
    def test_every_rule_has_a_contract_and_a_file_of_its_own(self):
        from gate import oracle_tests

        for rule in RULES:
            tests = oracle_tests(rule)
            classes, files = [t for t in tests if "::" in t], [t for t in tests if "::" not in t]
            assert classes
            assert all(test.partition("::")[0].endswith("test_contract.py") for test in classes)
            assert files
        assert [Path(file).name for file in oracle_tests("solo")[1:]] == ["test_stream.py", "test_readouts.py"]
        assert [test.rpartition("::")[2] for test in oracle_tests("scan")[:2]] == ["TestScan", "TestScanFromATree"]
        assert oracle_tests("recurrent") == [str(Path(__file__).parent / "recurrent")]

    @pytest.mark.parametrize("passes", [True, False])
    def test_it_opens_if_the_tests_pass(self, passes, tmp_path, monkeypatch, capsys):
        import gate

        (tmp_path / "tests").mkdir()
        (tmp_path / "tests" / "test_one.py").write_text(f"def test_one():\n    assert {passes}, 'off by one'\n")
        monkeypatch.setattr(gate, "TESTS", tmp_path / "tests")
        if passes:
            gate.gate(["test_one.py"])
            assert capsys.readouterr().out == "gate: the oracle tests of test_one.py pass\n"
        else:
            with pytest.raises(SystemExit, match=r"(?s)off by one.*an oracle test failed, so nothing is measured"):
                gate.gate(["test_one.py"])

    def test_without_tests_it_says_so(self, tmp_path, monkeypatch, capsys):
        import gate

        monkeypatch.setattr(gate, "TESTS", tmp_path / "tests")
        gate.gate(["bp"])
        assert "there is no tests/ here; what follows has not been checked" in capsys.readouterr().out


class TestArms:
    @pytest.mark.parametrize(
        ("arm", "expected"),
        [
            ("bp", ("bp", {}, False)),
            ("2bw delay=2 ef", ("2bw", {"delay": 2}, True)),
            ("stream (3, 4) solo", ("stream", {"stage": (3, 4), "readout": "solo", "refresh": 1}, False)),
            ("stream refresh=16 solo", ("stream", {"readout": "solo", "refresh": 16}, False)),
            ("stream (3,4) copies", ("stream", {"stage": (3, 4), "copies": True}, False)),
            ("stream (2)", ("stream", {"stage": 2}, False)),
            ("scan stages=3 guess=mean leak=.2", ("scan", {"stage": (3, 2, 2), "guess": "mean", "leak": 0.2}, False)),
        ],
    )
    def test_what_they_stand_for(self, arm, expected):
        from full_depth import parsed

        assert parsed(arm, mlp(8)[0]) == expected

    def test_a_word_without_meaning(self):
        from full_depth import parsed

        with pytest.raises(ValueError, match="'stream sollo' has no meaning at 'sollo'"):
            parsed("stream sollo", mlp(8)[0])


def line(rate, seed, held_out, test=0.0, rule="bp", **other):
    fixed = {"task": "characters", "blocks": 7, "width": 64, "samples": None, "batch_size": 16, "steps": 100}
    fixed |= {"augment": False, "rule": rule, "optimizer": "muon", "metric": "loss", "span": 14, "work": 21}
    fixed |= {"seconds": 3.0, "peak_mib": 5.0, "device": "cpu", "commit": "abc", "curve": [{"cosine": [0.5]}]}
    return fixed | {"rate": rate, "seed": seed, "held_out": held_out, "test": test} | other


class TestBracket:
    @pytest.mark.parametrize(
        ("rates", "best"), [([1.0, 2.0], 16.0), ([64.0, 128.0], 16.0), ([16.0], 16.0), ([1.0], 1.0)]
    )
    def test_rates_are_tried_until_the_best_is_inside(self, rates, best, monkeypatch, tmp_path):
        import full_depth

        # A loss that is least at 16, on held-out samples alone.
        def run(job, options):
            return line(job["rate"], job["seed"], abs(math.log2(job["rate"]) - 4), test=-job["rate"]) | job

        monkeypatch.setattr(full_depth, "run", run)
        options = argparse.Namespace(seeds=[3, 4], rates=rates, most_rates=9, out=tmp_path)
        with ThreadPoolExecutor(1) as pool:
            found = full_depth.Study({"rule": "bp"}, options, pool, []).finish()
        assert [made["rate"] for made in found if made["seed"] == 4] == [best]
        tried = {made["rate"] for made in found if made["seed"] == 3}
        assert tried == {best} if len(rates) == 1 else tried >= {best / 2, best, best * 2}
        # What stands in the file is not made again.
        monkeypatch.delattr(full_depth, "run")
        lines = full_depth.ledger.read(tmp_path / "full_depth.jsonl")
        with ThreadPoolExecutor(1) as pool:
            again = full_depth.Study({"rule": "bp"}, options, pool, lines).finish()
        assert again == found


class TestLeaderboard:
    def test_rows(self):
        from leaderboard import tables

        lines = [line(0.1, 0, 1.0, 1.5), line(0.2, 0, 0.5, math.log(4)), line(0.2, 1, 0.6, math.log(6))]
        lines += [line(0.4, 0, math.nan, math.nan), line(0.3, 0, 0.1, math.log(3), rule="stream", span=7, work=42)]
        _, _, _, _, *rows = tables(lines).splitlines()
        assert rows == [
            "| stream | muon | 0.3* | 3.00 | 1 | 0.50 | 2.00 | 5 | 0.50, 0.50 | 3 (cpu) | abc |",
            "| bp | muon | 0.2 | 5.00 ± 1.41 | 2 | 1.00 | 1.00 | 5 | 0.50, 0.50 | 3 (cpu) | abc |",
        ]

    def test_of_accuracies_the_highest_comes_first(self):
        from leaderboard import scores, tables

        lines = [line(0.1, 0, 0.7, 0.1, metric="accuracy"), line(0.2, 0, 0.8, 0.2, metric="accuracy")]
        assert scores(lines) == {0.1: 0.7, 0.2: 0.8}
        lines.append(line(0.2, 0, 0.1, 0.9, metric="accuracy", rule="stream"))
        assert [row.split(" | ")[3] for row in tables(lines).splitlines()[4:]] == ["90.00", "20.00"]

    def test_what_diverged_is_said(self):
        from leaderboard import tables

        lines = [line(0.1, 0, 1.0, 1.5), line(0.1, 1, 1.0, 800.0)]  # exp(800) is no float
        assert tables(lines).splitlines()[-1].split(" | ")[3] == "diverged"


def test_a_run_of_another_schedule_or_length_is_no_run_of_table_1(tmp_path, monkeypatch, capsys):
    import table1

    def line(**job):
        fixed = {"seed": 0, "layers": 2, "width": 5, "method": "bp", "schedule": "constant", "epochs": 3, "epoch": 3}
        return fixed | {"written_out": False, "look": 0, "chain": 0.9} | job

    class Pool:
        """In place of processes."""

        def __init__(self, workers, maxtasksperchild):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def starmap(self, function, jobs, chunksize):
            trained.extend(job for job, _ in jobs)

    trained = []
    monkeypatch.setattr(table1, "gate", list)
    monkeypatch.setattr(table1.multiprocessing.get_context("spawn"), "Pool", Pool)
    for known in (line(), line(epochs=9), line(schedule="cosine", epochs=9), line(seed=1, schedule="cosine")):
        table1.ledger.append(tmp_path / "table1.jsonl", known)
    words = f"table1.py --layers 2 --widths 5 --methods bp --epochs 3 --seeds 0 1 --out {tmp_path} --schedule"
    for schedule, missing in (("constant", [1]), ("cosine", [0])):
        trained.clear()
        monkeypatch.setattr("sys.argv", [*words.split(), schedule])
        table1.main()
        assert [job["seed"] for job in trained] == missing
        assert "| 2 | 5 | 90.00 |  |" in capsys.readouterr().out


def test_byte_pairs_are_those_of_the_training_file(small_data):
    import full_depth
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = small_data / "wikitext-2"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, show_progress=False)
    lines = {part: (folder / f"wiki.{part}.tokens").read_text().splitlines(keepends=True) for part in ("train", "test")}
    tokenizer.train_from_iterator(lines["train"], trainer)
    expected = {
        part: [token for line in found for token in tokenizer.encode(line).ids] for part, found in lines.items()
    }
    for _ in range(2):  # made, and kept without the text
        found = full_depth.Subwords.read(small_data)
        assert {part: found[part].tolist() for part in expected} == expected
        for file in folder.glob("*.tokens"):
            file.unlink()


class TestVision:
    """The paper's tables where there is no command line."""

    @pytest.fixture
    def reproduction(self, tmp_path):
        one, other = (training("digits", rule, blocks=1) for rule in ("paper", "bp"))
        rows = (Row("", "paper", (Figure(one, "chain", 90.5),)), Row("", "bp", (Figure(other),)))
        table = Table("Digits", "accuracy", ("chain",), rows, "")
        options = {"width": 8, "epochs": 1, "train_samples": 128, "validation_samples": 100}
        return Reproduction(table=table, folder=tmp_path, rates=[1e-3], options=options)

    def test_a_table_is_printed(self, reproduction, capsys):
        from vision import reproduce_for

        title, blank, head, line, *rows = reproduce_for(reproduction, workers=1, minutes=9).splitlines()
        assert (title, blank) == ("## Digits, scale small: 2 of 2 runs", "")
        assert head == "| rule | rate | chain | paper |"
        assert line == "| --- | --- | --- | --- |"
        found = [
            one["figures"][0]["measured"][0]
            for one in json.loads((reproduction.folder / "table.json").read_text())["rows"]
        ]
        assert rows == [f"| paper | 0.001* | {found[0]:.2f} | 90.50 |", f"| bp | 0.001* | {found[1]:.2f} |  |"]
        assert "digits-bp-blocks-1-learning-rate-0.001-s0: " in capsys.readouterr().out

    def test_after_its_time_it_is_saved_and_what_there_is_is_printed(self, reproduction, capsys):
        from vision import reproduce_for

        endless = replace(reproduction, options={**reproduction.options, "epochs": 10**6})
        text = reproduce_for(endless, workers=1, minutes=0.01)
        assert text.splitlines()[0].endswith(": 0 of 2 runs")
        assert text.splitlines()[-1] == "| bp | 0.001* |  |  |"
        assert "stopped and saved" in capsys.readouterr().out
        (run,) = [open_run(path) for path in endless.folder.iterdir() if path.is_dir()]
        assert run.load_checkpoint()["epoch"] == len(metrics.read(run.metrics_file))

    def test_it_needs_nothing_of_the_command_line(self):
        hidden = ["rich", "tyro", "matplotlib", "sklearn", "tokenizers"]
        code = (
            f"import sys; sys.modules |= dict.fromkeys({hidden}); sys.path[:0] = [{str(BENCHMARKS)!r}]; import vision"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_a_line(tmp_path):
    import full_depth

    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be. " * 400)
    options = argparse.Namespace(task="characters", data_dir=tmp_path, batch_size=2, train_samples=None, augment=False)
    vars(options).update(device="cpu", workers=1, commit="abc", gate=True, looks=2)
    job = {"task": "characters", "blocks": 2, "width": 4, "steps": 41, "optimizer": "muon", "rate": 0.01, "seed": 0}
    full_depth._tasks.clear()
    lines = [full_depth.run(job | {"rule": rule}, options) for rule in ("bp", "bp", "2bw ef", "stream stages=2")]
    full_depth._tasks.clear()
    bp, again, late, stream = lines
    assert bp["test"] == again["test"]  # of one seed all is alike
    assert [point["step"] for point in bp["curve"]] == [20, 41]
    assert all(found["curve"][-1]["held_out"] == found["held_out"] < math.log(11) for found in lines)
    assert [found["curve"][0]["cosine"] for found in (bp, late)] == [[1.0], []]
    assert len(stream["curve"][0]["cosine"]) == 2
    assert (bp["work"], bp["span"]) == (late["work"], late["span"]) == (6, 4)
    assert torch.tensor([found["peak_mib"] for found in lines]).gt(0).all()


def started(script, *arguments):
    """Runs a benchmark's script, with the arguments; what it printed."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    found = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent / "src"), *sys.path])
    environment = os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


SCRIPT = """
import sys
import processes
name, *arguments = sys.argv[1:]
sys.argv = [name, *arguments]
sys.exit(processes.launch(2))
"""
"""Two processes of a benchmark, without the gate before it."""


class TestRivals:
    def test_stages_are_cut_with_their_readouts(self):
        from arms import local_sizes

        # The first stage of 7 blocks has one block more by stream, two by solo.
        assert [local_sizes(7, 2, name) for name in ("stream", "solo", "greedy")] == [(3, 4), (2, 5), (3, 4)]

    def test_rows_are_of_the_median_round(self):
        from parallel import base, rivals_row

        fixed = {"width": 8, "batch": 4, "bytes": 2e6, "counted": 1.5e6, "simulated": 0.5, "sizes": []}
        lines = [{"arm": "bp", **fixed, "seconds": seconds} for seconds in (1.0, 2.0, 9.0)]
        mine = [{"arm": "solo", **fixed, "sizes": [2, 5], "seconds": seconds} for seconds in (0.1, 1.0, 1.2)]
        assert rivals_row(mine, base(lines)) == "| 8 | 4 | solo (2, 5) | 1.0000 | 2.00 | 2.00 | 1.50 | 0.5000 | -50 % |"
        assert rivals_row(mine[:1], None) == "| 8 | 4 | solo (2, 5) | 0.1000 |  | 2.00 | 1.50 | 0.5000 | +400 % |"
        refused = {"arm": "DDP", "width": 8, "batch": 1, "refused": "it cannot"}
        assert rivals_row([refused], 1.0) == "| 8 | 1 | DDP | it cannot | | | | | |"

    def test_a_timing_is_kept_as_soon_as_it_is_there(self, tmp_path):
        # So many steps that the stages of solo meet in the last one of a round.
        arms = ["bp", "1F1B, m = 2", "DiLoCo, H = 50", "DDP", "solo, R = 16"]
        arguments = ["--blocks", 3, "--widths", 64, "--batches", 2, "--steps", 8, "--rounds", 2, "--arms", *arms]
        said = started(SCRIPT, BENCHMARKS / "parallel.py", "rivals", *arguments, "--out", tmp_path / "lines")
        lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
        assert [line["arm"] for line in lines] == 2 * arms
        assert all(line["seconds"] > 0 and line["bytes"] > 0 for line in lines)
        assert [line["arm"] for line in lines if line["simulated"] is None] == ["DiLoCo, H = 50"] * 2
        run = [sys.executable, BENCHMARKS / "parallel.py", "table", tmp_path / "lines"]
        again = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        rows = [row for row in said.splitlines() if row.startswith("| 64 ")]
        # A row is printed when the others' last round is still to come.
        cells = [[row.split(" | ")[i] for i in (1, 2, 3, 5)] for row in rows]
        assert cells == [
            [row.split(" | ")[i] for i in (1, 2, 3, 5)] for row in again.splitlines() if row.startswith("| 64 ")
        ]


def curve(*held_out):
    """Looks every 10 steps of 3 seconds."""
    return [{"step": 10 * k, "seconds": 3.0 * k, "held_out": value} for k, value in enumerate(held_out, 1)]


class TestTimes:
    @pytest.mark.parametrize(
        ("metric", "looks", "target", "expected"),
        [
            ("loss", (4.0, 2.0, 1.0), 3.0, (4.5, 15.0)),
            ("loss", (4.0, 2.0, 1.0), 1.0, (9.0, 30.0)),
            ("loss", (4.0, 2.0, 5.0, 1.0), 2.5, (5.25, 17.5)),
            ("loss", (4.0, 2.0), 4.5, (3.0, 10.0)),
            ("loss", (4.0, 2.0), 1.9, None),
            ("loss", (math.nan, math.nan), 1.9, None),
            ("accuracy", (0.1, 0.5), 0.4, (5.25, 17.5)),
            ("accuracy", (0.1, 0.5), 0.6, None),
        ],
    )
    def test_the_first_look_that_is_as_good(self, metric, looks, target, expected):
        from wallclock import reached

        found = reached({"metric": metric, "curve": curve(*looks)}, target)
        assert found == (None if expected is None else pytest.approx(expected))

    def test_rows_are_beside_backpropagation_of_the_same_seed(self):
        from wallclock import table

        fixed = {"task": "images", "blocks": 7, "width": 4, "batch_size": 8, "train_samples": 100, "steps": 20}
        fixed |= {"rate": 0.1, "looks": 2, "metric": "accuracy", "test": 0.25}
        runs = [("bp", 0, (0.1, 0.3)), ("bp", 1, (0.2, 0.4)), ("late", 0, (0.1, 0.2)), ("late", 1, (0.3, 0.5))]
        runs += [("never", 0, (0.1, 0.2)), ("alone", 2, (0.9, 0.9))]
        lines = [fixed | {"rule": rule, "seed": seed, "curve": curve(*looks)} for rule, seed, looks in runs]
        assert table(lines).splitlines()[4:] == [
            "| bp | 2 | 0.3000 | 35.00 ± 7.07 | 25.00 ± 0.00 | 6.00 ± 0.00 | 160 | 1.00 ± 0.00 |",
            "| late | 2 | 0.3000 | 35.00 ± 21.21 | 25.00 ± 0.00 | 4.50 (1 of 2 seeds) | 120 | 0.75 |",
            "| never | 1 | 0.3000 | 20.00 | 25.00 | never | - | - |",
            "| alone | 1 | 0.3000 | 90.00 | 25.00 | - | - | - |",
        ]

    @pytest.mark.parametrize(
        ("arm", "size", "sentence"),
        [
            ("2BW m=3", 16, "a batch of 16 cannot be split into 3"),
            ("2BW ef", 6, "a batch of 6 cannot be split into 4"),
            ("1F1B m=1", 16, "it needs as many micro-batches as processes, 2"),
            ("1F1B m=0", 16, "a batch of 16 cannot be split into 0"),
        ],
    )
    def test_batches_that_no_pipeline_takes(self, tmp_path, monkeypatch, capsys, arm, size, sentence):
        import wallclock

        given = ["characters", "--data-dir", tmp_path, "--batch-size", size, "--arms", arm]
        monkeypatch.setattr("sys.argv", ["wallclock.py", *map(str, given)])
        with pytest.raises(SystemExit) as stop:
            wallclock.main()
        assert stop.value.code == 2
        assert f"error: '{arm}': {sentence}\n" in capsys.readouterr().err

    def test_arms_train_what_they_say(self, tmp_path):
        """DDP and 1F1B are backpropagation; 2BW is a network in two pieces whose gradients are those of the weights before
        the last update; replicas that have never met are two runs on half of each batch, of which the mean is measured. What
        stands in the file is not made again."""
        import full_depth
        from wallclock import SETTING

        from hbll import make_rule
        from hbll.train import make_optimizers

        (tmp_path / "tinyshakespeare").mkdir()
        (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be. " * 400)
        known = "bp threads=2"
        arms = [
            "bp",
            known,
            "DDP",
            "1F1B m=2",
            "2BW m=2 ef",
            "DiLoCo H=99",
            "solo (1,2) refresh=2",
            "stream (1,2) copies",
        ]
        setting = {"blocks": 3, "width": 4, "batch_size": 4, "steps": 4, "rate": 0.01, "looks": 2}
        stored = {"task": "characters", "train_samples": None, "rule": known, "seed": 0, **setting}
        stored |= {"metric": "loss", "test": 5.0, "curve": curve(6.0, 5.0)}
        (tmp_path / "lines").write_text(json.dumps(stored) + "\n")
        given = [word for key, value in setting.items() for word in (f"--{key.replace('_', '-')}", value)]
        given += ["--data-dir", tmp_path, "--out", tmp_path / "lines", "--arms", *arms]
        said = started(SCRIPT, BENCHMARKS / "wallclock.py", "characters", *given)
        lines = {line["rule"]: line for line in map(json.loads, (tmp_path / "lines").read_text().splitlines())}
        assert list(lines) == [known, *(arm for arm in arms if arm != known)]
        assert lines[known] == stored
        assert f"| {known} | 1 | 1.5000 | 5.0000 | 5.0000 | never | - | - |" in said
        assert all([line[key] for key in SETTING] == [stored[key] for key in SETTING] for line in lines.values())
        found = {rule: [point["held_out"] for point in line["curve"]] for rule, line in lines.items()}
        for rule in ("DDP", "1F1B m=2"):
            assert found[rule] == pytest.approx(found["bp"], rel=1e-5)
            assert lines[rule]["test"] == pytest.approx(lines["bp"]["test"], rel=1e-5)
        assert found["solo (1,2) refresh=2"] != pytest.approx(found["bp"], rel=1e-4)

        options = argparse.Namespace(data_dir=tmp_path, batch_size=4)
        task = full_depth.Characters(options, torch.device("cpu"))
        seen = list(itertools.islice(task.batches(0, torch.device("cpu")), 4))

        def trained(gradients, parts=lambda network: [network], feedback=False):
            """A network whose parts are each clipped and moved by themselves, after so many calls of ``gradients``."""
            torch.manual_seed(0)
            network = task.network(3, 4)
            rule, updates = make_rule("bp", network), []
            for part in parts(network):
                decay, own = full_depth.WEIGHT_DECAY, list(part.parameters())
                optimizers = make_optimizers(rule, "muon", 0.01, decay, error_feedback=feedback, parameters=own)
                rates = [
                    torch.optim.lr_scheduler.OneCycleLR(o, 0.01, 4, pct_start=0.05, cycle_momentum=False)
                    for o in optimizers
                ]
                updates.append((own, optimizers, rates))
            for x, y in seen:
                rule.zero_grad()
                gradients(network, x, y)
                for own, optimizers, rates in updates:
                    torch.nn.utils.clip_grad_norm_(own, 1.0)
                    for optimizer, rate in zip(optimizers, rates, strict=True):
                        optimizer.step()
                        rate.step()
            return network

        def loss(network, x, y):
            return torch.nn.functional.cross_entropy(network(x).flatten(0, 1), y.flatten())

        replicas = [
            trained(lambda network, x, y, r=rank: loss(network, x[r::2], y[r::2]).backward()) for rank in (0, 1)
        ]
        with torch.no_grad():
            for p, q in zip(*(replica.parameters() for replica in replicas), strict=True):
                p.add_(q).div_(2)
        assert lines["DiLoCo H=99"]["test"] == pytest.approx(task.measure(replicas[0], "test"), rel=1e-5)

        before = []

        def late(network, x, y):
            """The gradient at the weights as they were before the last update."""
            old = copy.deepcopy(before[-1] if before else network)
            before.append(copy.deepcopy(network))
            loss(old, x, y).backward()
            for p, q in zip(network.parameters(), old.parameters(), strict=True):
                p.grad = q.grad

        def halves(network):
            parts = [network.embed, *network.blocks[:2]], [network.blocks[2], network.head]
            return [torch.nn.ModuleList(part) for part in parts]

        exact = task.measure(trained(late, halves, feedback=True), "test")
        assert lines["2BW m=2 ef"]["test"] == pytest.approx(exact, rel=1e-5)
        assert lines["bp"]["test"] != pytest.approx(exact, rel=1e-4)


class TestTable1:
    def network(self, blocks):
        from torch import nn

        import hbll
        from hbll.models.mlp import sigmoid_layer

        torch.manual_seed(0)
        return hbll.Chain(sigmoid_layer(12, 5), [sigmoid_layer(5, 5) for _ in range(blocks)], nn.Linear(5, 3))

    def batch(self, count=20):
        from hbll.data import Samples

        return Samples(torch.rand(count, 12), torch.randint(3, (count,)))

    @pytest.mark.parametrize("blocks", [1, 3, 7])
    @pytest.mark.parametrize("options", [{}, {"variance": 0.3, "step": 0.7}, {"boundary": "posterior"}])
    @pytest.mark.parametrize("rule", ["paper", "tree"])
    def test_written_out_gradients_are_the_rules(self, rule, options, blocks):
        from written_out import WrittenOut

        import hbll

        made = hbll.make_rule(rule, self.network(blocks), **options)
        samples = self.batch()
        assert WrittenOut.deviation(made, samples.inputs, samples.labels) < 1e-12

    def test_another_rule_deviates(self):
        from written_out import WrittenOut

        import hbll

        samples = self.batch()
        made = hbll.make_rule("tree", self.network(7), scope="tree")
        assert WrittenOut.deviation(made, samples.inputs, samples.labels) > 1e-3

    def test_a_step_by_them_moves_the_network_as_one_by_the_rule(self):
        from written_out import WrittenOut

        import hbll

        samples, networks = self.batch(), [self.network(7).double() for _ in range(2)]
        rules = [hbll.make_rule("paper", network) for network in networks]
        for taught in (rules[0], WrittenOut(rules[1])):
            parameters = rules[0].parameters() if taught is rules[0] else taught.parameters
            optimizer = torch.optim.AdamW(parameters, lr=0.1)
            taught.backward(samples.inputs.double(), samples.labels)
            optimizer.step()
        for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # Adam divides tiny gradients by themselves

    def test_a_look_goes_from_the_rim_to_the_chain(self):
        from table1 import accuracy, look

        import hbll
        from hbll.data import Splits

        data = Splits(self.batch(600), self.batch(200))
        network = self.network(7)
        found = look(hbll.make_rule("tree", network), data)
        assert found["mixed"][0] == accuracy(network, data.test, "rim")
        assert found["mixed"][1:] == [
            accuracy(network, data.test, path) for path in ("1-2-3-4-6-7", "1-2-3-4-5-6-7", "chain")
        ]
        with torch.no_grad():
            states = [network.along(path, network.embed(data.test.inputs), {}) for path in ((1, 2), (2,))]
        apart = (states[0] - states[1]).square().sum(1).mean() / states[1].var(0, correction=0).sum()
        assert found["gap"][:2] == [0, pytest.approx(apart.item())]
        assert len(found["gap"]) == len(found["cosine"]) == 7


class TestSpeculation:
    @pytest.fixture
    def sweep(self, small_data, tmp_path, monkeypatch, capsys):
        """Runs the benchmark, without its gate: its lines, its rows, and what it refuses."""
        import speculation

        gates = []
        monkeypatch.setattr(speculation, "gate", gates.append)
        sizes = {"blocks": 3, "width": 8, "context": 24, "epochs": 1, "train_samples": 64}
        recipe = RECIPES["shakespeare-gpt"](stage=1, **sizes)
        train(Run(recipe=recipe, method="greedy", seed=0, folder=tmp_path / "run", data_dir=small_data))
        file = tmp_path / "out.jsonl"

        def run(*arguments, folder=tmp_path / "run", refused=False):
            monkeypatch.setattr(sys, "argv", ["speculation.py", str(folder), "--out", str(file), *arguments])
            gates.clear()
            with pytest.raises(SystemExit, match="2") if refused else contextlib.nullcontext():
                speculation.main()
            assert gates == ([] if refused else [["test_generate.py"]])
            output = capsys.readouterr()
            rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in output.out.splitlines()]
            return speculation.ledger.read(file), rows, output.err

        return run

    def test_a_sweep_goes_on_with_what_is_missing_alone(self, sweep):
        small = ["--prompts", "2", "--prompt-tokens", "4", "--new-tokens", "8", "--num-draft-tokens", "2"]
        lines, rows, _ = sweep(*small)
        names = ["block-2", "2-3", "stage-1", "stage-2"]
        assert sorted(line["draft"] for line in lines) == sorted(names)
        assert all(line["same"] == 2 for line in lines)
        assert all(len(row) == len(rows[0]) for row in rows)
        assert sweep(*small)[0] == lines
        for option, value in (("new-tokens", 9), ("prompts", 3), ("prompt-tokens", 5), ("temperature", 1.0)):
            before = len(lines)
            lines, rows, _ = sweep(*small, "--drafts", "2-3", f"--{option}", str(value))
            assert len(lines) == before + 1
            assert lines[-1][option.replace("-", "_")] == value
            assert rows[-1][rows[0].index(option.replace("-", " "))] == str(value)
            assert sweep(*small, "--drafts", "2", f"--{option}", str(value))[0] == lines  # of two blocks, the same

    def test_one_new_token_has_no_draft(self, sweep):
        (line,), (head, _, row), _ = sweep("--new-tokens", "1", "--drafts", "1", "--num-draft-tokens", "1")
        assert (line["draft"], line["blocks"], line["acceptance_rate"]) == ("block-2", 1, None)
        assert row[head.index("accepted")] == ""

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ("--drafts 1-3", "1-3 is not a path: the tree has no arc from 1 to 3"),
            ("--new-tokens 96", "16 tokens and 96 new ones are more than the context of 24 tokens"),
            ("--new-tokens 0", "argument --new-tokens: must be at least 1, not 0"),
            ("--prompts 0", "argument --prompts: must be at least 1, not 0"),
            ("--temperature -1", "temperature must not be negative; got -1.0"),
        ],
    )
    def test_what_cannot_be_is_one_sentence(self, sweep, arguments, sentence):
        lines, rows, err = sweep("--new-tokens", "4", *arguments.split(), refused=True)
        assert (lines, rows) == ([], [])
        assert f"error: {sentence}" in err.splitlines()[-1]

    def test_another_folder_is_told(self, sweep, tmp_path):
        assert "is not the folder of a run" in sweep(folder=tmp_path, refused=True)[2].splitlines()[-1]
