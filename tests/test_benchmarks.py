"""What benchmarks share: the gate before them, arms in words, rates that are bracketed, the leaderboard."""

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.networks import mlp

from hbll.rules import RULES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class TestGate:
    def test_every_rule_has_a_contract_and_a_file_of_its_own(self):
        from gate import oracle_tests

        for rule in RULES:
            *classes, own = oracle_tests(rule)
            assert classes
            assert all(test.partition("::")[0].endswith("test_contract.py") for test in classes)
            assert Path(own).exists()
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
        from leaderboard import best_rate, tables

        lines = [line(0.1, 0, 0.7, 0.1, metric="accuracy"), line(0.2, 0, 0.8, 0.2, metric="accuracy")]
        assert best_rate(lines) == (0.2, True)
        lines.append(line(0.2, 0, 0.1, 0.9, metric="accuracy", rule="stream"))
        assert [row.split(" | ")[3] for row in tables(lines).splitlines()[4:]] == ["90.00", "20.00"]


def test_a_run_is_a_line(tmp_path):
    import full_depth

    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be. " * 400)
    options = argparse.Namespace(task="characters", data_dir=tmp_path, batch_size=2, train_samples=None, augment=False)
    vars(options).update(device="cpu", workers=1, commit="abc", looks=2)
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
