import math
import re
import shutil
import statistics
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from hbll.recipes import RECIPES
from hbll.train import metrics
from hbll.train.compare import Comparison, compare, open_comparison, open_results
from hbll.train.loop import Interrupted, train
from hbll.train.report import conclusion, write_report
from hbll.train.run import Run
from hbll.train.tables import result_columns, result_row

RECIPE = RECIPES["digits"](depth=2, width=16, epochs=2, train_samples=400)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    comparison = Comparison(
        recipe=RECIPE, methods=("paper", "bp"), seeds=2, folder=tmp_path_factory.mktemp("comparison") / "made"
    )
    return comparison, compare(comparison)


def test_a_method_is_summed_up_over_its_seeds(finished):
    comparison, results = finished
    for result, method in zip(results, ("paper", "bp"), strict=True):
        histories = [metrics.read(run.metrics_file) for run in comparison.runs(method)]
        chains = [history[-1].paths[0]["accuracy"] for history in histories]
        assert result["method"] == method
        assert result["seeds"] == 2
        assert result["accuracy"] == pytest.approx(statistics.mean(chains))
        assert result["spread"] == pytest.approx(abs(chains[0] - chains[1]) / 2**0.5)
        assert result["seconds"] == pytest.approx(sum(line.seconds for history in histories for line in history) / 2)
        assert result["paths"][0] == {"path": "1-2-3", "blocks": 3, "accuracy": result["accuracy"]}
        assert [path["path"] for path in result["paths"]] == ["1-2-3", "block-2", "2-3"]
    # Three blocks: backpropagation's work is 3 (N - 1) and its span 2 (N - 1); the tree's span 3 D - 1.
    assert [result["span"] for result in results] == [5, 6]
    assert results[1]["work"] == 9
    assert results[0]["memory"] > results[1]["memory"] > 0
    assert [result["local"] for result in results] == ["yes", "no: crosses 3 blocks"]


def test_methods_start_from_the_same_network(finished):
    comparison, _ = finished
    before = [run.recipe.initial_network(run.seed).state_dict() for run in comparison.runs("bp")]
    assert not before[0]["head.weight"].equal(before[1]["head.weight"])


def test_results_are_kept_with_the_comparison(finished):
    comparison, results = finished
    assert open_results(comparison.folder) == results
    assert open_comparison(comparison.folder) == comparison


def test_a_finished_comparison_is_not_trained_over_but_can_be_extended(finished, tmp_path):
    comparison, results = finished
    with pytest.raises(ValueError, match="holds a comparison already"):
        compare(comparison)
    steps = []
    copied = replace(comparison, folder=shutil.copytree(comparison.folder, tmp_path / "copy"))
    longer = replace(copied, methods=("paper", "bp", "tree"))
    extended = compare(longer, resume=True, on_step=lambda done, total: steps.append(done))
    assert extended[:2] == results
    assert len(steps) == 2 * 2 * 6  # the new method's: two seeds, two epochs of six steps
    assert compare(longer, resume=True) == extended
    with pytest.raises(ValueError, match="compares paper, bp, tree with --seeds 2: a comparison is resumed with all"):
        compare(copied, resume=True)
    assert open_results(copied.folder) == extended


def test_an_interrupted_comparison_ends_as_one_that_was_not(finished, tmp_path):
    comparison, results = finished
    stopped = replace(comparison, folder=tmp_path / "stopped")
    calls = iter(range(100))

    def on_step(done, steps):
        if next(calls) == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        compare(stopped, on_step=on_step)
    with pytest.raises(ValueError, match="is not finished"):
        open_results(stopped.folder)
    ended = compare(stopped, resume=True)
    assert [result["paths"] for result in ended] == [result["paths"] for result in results]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": ("bp", "papr")}, "did you mean paper"),
        ({"methods": ()}, "at least one rule"),
        ({"methods": ("bp", "bp")}, "each only once"),
        ({"seeds": 0}, "--seeds must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(finished, change, sentence):
    comparison, _ = finished
    with pytest.raises(ValueError, match=sentence):
        replace(comparison, **change)


class Page(HTMLParser):
    """Collects what a page would fetch, its text, and whether its tags are balanced."""

    def __init__(self, content):
        super().__init__()
        self.fetched, self.text, self.open = [], "", []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.open += [tag] if tag not in ("meta", "br") else []
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_of_a_comparison_stands_alone_and_says_it_all(finished):
    comparison, results = finished
    compare(comparison, resume=True)
    file = write_report(comparison.folder)
    content = file.read_text()
    page = Page(content)
    assert file == comparison.folder / "report.html"
    assert not page.open
    assert all(value.startswith(("#", "data:")) for value in page.fetched)
    assert not re.search(r"url\((?!#)|@import|<script", content)
    for result in results:
        assert result["method"] in page.text
        assert f"{100 * result['accuracy']:.2f} %" in page.text
        assert result["local"] in page.text
    for heading in ("Learning curves", "Accuracy by path", "Corrections", "3 (chain)"):
        assert heading in page.text
    opening, rest = page.text.split("2 seeds.")[0], page.text.split("What to try next")[1]
    assert conclusion(results, RECIPE.measures[0]) in opening
    assert f"hbll compare digits --run-dir {comparison.folder} --resume --rules paper bp .. --seeds 4" in rest
    assert f"hbll evaluate {comparison.folder / 'paper-s0'} --path block-2" in rest


def sums(method, accuracy, memory=1, work=1, span=1, spread=None):
    return {
        "method": method,
        "accuracy": accuracy,
        "spread": spread,
        "memory": memory,
        "work": work,
        "span": span,
    }


class TestConclusion:
    exact = sums("bp", 0.9, memory=200, work=21, span=14, spread=0.004)
    (measure,) = RECIPE.measures

    def test_names_the_rule_nearest_to_backpropagation_and_its_shares(self):
        rules = [
            sums("paper", 0.85, memory=1),
            sums("stream", 0.93, memory=100, work=42, span=7, spread=0.02),
            sums("dfa", None, memory=1),
        ]
        assert conclusion([*rules, self.exact], self.measure) == (
            "Nearest to backpropagation (accuracy 90.00 % ± 0.40) is stream (93.00 % ± 2.00), at 0.50 of its peak memory, "
            "2.00 of its work and 0.50 of its span."
        )

    def test_says_what_is_missing(self):
        rules = [sums("paper", 0.85), sums("bp", None)]
        assert conclusion(rules, self.measure).startswith("No run of backpropagation that ended well")
        assert conclusion([sums("dfa", None), self.exact], self.measure) == (
            "Backpropagation has 90.00 %; no other rule that ended well is beside it."
        )


def test_language_models_are_compared_by_bits(small_data, tmp_path):
    recipe = RECIPES["shakespeare-gpt"](blocks=1, width=4, context=16, epochs=1, train_samples=20, batch_size=20)
    comparison = Comparison(recipe=recipe, methods=("bp",), seeds=2, folder=tmp_path / "made", data_dir=small_data)
    (result,) = compare(comparison)
    bits = [metrics.read(run.metrics_file)[-1].chain["bits_per_character"] for run in comparison.runs("bp")]
    assert result["bits_per_character"] == pytest.approx(statistics.mean(bits))
    assert result["spread"] == pytest.approx(statistics.stdev(bits))
    assert result["paths"][0]["cross_entropy"] == pytest.approx(result["bits_per_character"] * math.log(2))
    assert 0 <= result["accuracy"] <= 1
    columns = ["method", "bits per character", "spread", "cross entropy", "accuracy"]
    assert result_columns(recipe.measures)[:5] == columns
    row = result_row(result, recipe.measures)
    assert row[1:3] == [f"{statistics.mean(bits):.3f}", f"± {statistics.stdev(bits):.3f}"]
    assert row[4] == f"{100 * result['accuracy']:.2f} %"
    page = Page(write_report(comparison.folder).read_text())
    for text in (*columns, *row[:5], "Bits per character by path"):
        assert text in page.text


def test_the_page_of_a_run_shows_its_paths(finished):
    comparison, _ = finished
    run = comparison.runs("bp")[0]
    page = Page(write_report(run.folder).read_text())
    for path in metrics.read(run.metrics_file)[-1].paths:
        assert path["path"] in page.text
        assert f"{100 * path['accuracy']:.2f} %" in page.text
    assert "Corrections" not in page.text  # backpropagation has none


def test_only_runs_and_comparisons_have_pages(finished, tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "configuration.json").write_text("{")
    with pytest.raises(ValueError, match=r"configuration\.json is damaged"):
        write_report(tmp_path)
    run = finished[0].runs("bp")[0]
    shutil.copy(run.configuration_file, tmp_path)
    with pytest.raises(ValueError, match="has not finished an epoch yet"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"recipe": replace(RECIPE, width=32)}, "--width 16, not 32"),
        ({"recipe": replace(RECIPE, width=32), "methods": ("tree",)}, "compares paper, bp with --seeds 2"),
        ({"methods": ("bp", "tree")}, "compares paper, bp with --seeds 2"),
        ({"seeds": 1}, "compares paper, bp with --seeds 2"),
    ],
)
def test_resuming_with_other_options_leaves_the_comparison_as_it_was(finished, change, sentence):
    comparison, _ = finished
    before = comparison.file.read_bytes()
    with pytest.raises(ValueError, match=sentence):
        compare(replace(comparison, **change), resume=True)
    assert comparison.file.read_bytes() == before


def test_a_folder_is_of_a_run_or_of_a_comparison(finished):
    comparison, _ = finished
    with pytest.raises(ValueError, match="holds a comparison already"):
        train(Run(recipe=RECIPE, method="bp", seed=0, folder=comparison.folder))
    with pytest.raises(ValueError, match="holds a run already"):
        compare(replace(comparison, folder=comparison.folder / "bp-s0"))


def test_a_comparison_under_way_is_not_resumed(tmp_path):
    recipe = replace(RECIPE, epochs=1)
    comparison = Comparison(recipe=recipe, methods=("bp",), seeds=1, folder=tmp_path)
    refused = []

    def meddle(run):
        with pytest.raises(ValueError, match="is being written by process"):
            compare(comparison, resume=True)
        refused.append(run)

    compare(comparison, on_run=meddle)
    assert len(refused) == 1


class DivergesWithDfa(RECIPES["digits"]):
    """Digits that dfa begins with weights which it cannot stand."""

    def rule(self, method, network, example):
        if method == "dfa":
            network.head.weight.data.fill_(3e38)
        return super().rule(method, network, example)


def test_a_method_that_diverges_ends_its_own_row_alone(tmp_path):
    comparison = Comparison(
        recipe=DivergesWithDfa(**vars(RECIPE)), methods=("dfa", "bp"), seeds=2, folder=tmp_path / "made"
    )
    results = compare(comparison)
    diverged, trained = results
    assert diverged["diverged"] == 1
    assert (diverged["accuracy"], diverged["spread"], diverged["seconds"], diverged["paths"]) == (None, None, None, [])
    assert "diverged" not in trained
    assert trained["accuracy"] > 0.1
    assert set(diverged) == {*trained, "diverged"}
    again = compare(comparison, resume=True)
    assert again == results
    row = result_row(diverged, RECIPE.measures)
    assert row[:6] == ["dfa", "diverged at step 1", "", "", "", ""]
    assert len(row) == len(result_columns(RECIPE.measures))
    page = Page(write_report(comparison.folder).read_text())
    assert "diverged at step 1" in page.text
    assert f"{100 * trained['accuracy']:.2f} %" in page.text


def test_a_comparison_of_what_diverges_alone_has_a_page_without_figures(tmp_path):
    recipe = DivergesWithDfa(**vars(RECIPE))
    comparison = Comparison(recipe=recipe, methods=("dfa",), seeds=1, folder=tmp_path / "made")
    compare(comparison)
    assert "<svg" not in write_report(comparison.folder).read_text()


def test_a_comparison_whose_runs_are_gone_is_told(finished, tmp_path):
    comparison, _ = finished
    folder = shutil.copytree(comparison.folder, tmp_path / "copy")
    shutil.rmtree(folder / "bp-s1")
    with pytest.raises(ValueError, match="bp-s1 has not finished an epoch yet"):
        write_report(folder)
