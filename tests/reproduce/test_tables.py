"""The paper's tables as data: what they train, and that it can be trained."""

import pytest

from hbll.recipes import RECIPES
from hbll.reproduce.tables import CORPORA, TABLES, Figure, Row, Table, language, training

VISION = ("table2", "table4")


def figure(table, setting, rule, column):
    (row,) = [row for row in TABLES[table].rows if (row.setting, row.rule) == (setting, rule)]
    return row.figures[TABLES[table].columns.index(column)]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_trained_and_has_a_figure_in_every_column(name):
    table = TABLES[name]
    assert all(len(row.figures) == len(table.columns) for row in table.rows)
    folders = [one.name for one in table.trainings]
    assert len(set(folders)) == len(folders)
    for one in table.trainings:
        recipe = one.at("small")
        recipe.check([one.method])
        assert {option: getattr(recipe, option) for option, _ in one.options} == dict(one.options)
        assert one.at("paper").epochs >= recipe.epochs
        measures = [measure.name for measure in RECIPES[one.recipe].measures]
        assert table.measure in [*measures, "speed"]


@pytest.mark.parametrize(
    ("table", "setting", "rule", "column", "paper"),
    [
        ("table1", "16 layers of 100", "paper", "chain", 95.52),
        ("table1", "16 layers of 500", "bp", "chain", 11.32),
        ("table2", "", "paper", "7 blocks", 87.30),
        ("table2", "", "bp", "1 block", 77.99),
        ("table3", "missing 80 %", "bp", "chain", 69.75),
        ("table3", "label noise 20 %", "paper", "chain", 80.17),
        ("table4", "", "paper", "2 blocks", 86.20),
        ("table5", "", "bp", "3 blocks", 20.99),
        ("table6", "64 chunks", "bptt", "chain", 98.9),
        ("table7", "256 chunks", "paper", "tree", 98.7),
        ("table8", "16 chunks", "paper", "chain", 98.2),
        ("table9", "64 chunks", "paper", "speed-up", 1.68),
    ],
)
def test_figures_of_the_paper(table, setting, rule, column, paper):
    assert figure(table, setting, rule, column).paper == paper


def test_rules_beside_the_papers():
    for name in (*VISION, "table3", "table5"):
        beside = {"solo"} if name == "table5" else set()
        assert set(TABLES[name].rules) == {"paper", "tree", "stream", "scan", "greedy", "bp"} | beside
        for row in TABLES[name].rows:
            if row.rule not in ("paper", "bp"):
                assert all(one.paper is None for one in row.figures)


def test_the_papers_rule_has_the_papers_optimizer():
    for name, usual in (("table2", "muon"), ("table3", "muon"), ("table5", "muon"), ("table1", "adamw")):
        for one in TABLES[name].trainings:
            assert one.at("small").optimizer == ("adamw" if one.method == "paper" else usual)
            assert one.at("paper").optimizer == "adamw"
        rate = 0.5
        assert {one.at("small", learning_rate=rate).learning_rate for one in TABLES[name].trainings} == {rate}


@pytest.mark.parametrize("name", VISION)
def test_short_paths_are_the_rules_own_and_of_backpropagation_networks_of_their_own(name):
    by_rule = {row.rule: row.figures for row in TABLES[name].rows}
    for rule in ("paper", "stream"):
        assert len({one.training for one in by_rule[rule]}) == 1
        assert [one.readout for one in by_rule[rule]] == ["chain", 3, 2, 1]
    assert [one.training.at("small").block_count for one in by_rule["bp"]] == [7, 3, 2, 1]
    assert {one.readout for one in by_rule["bp"]} == {"chain"}


def test_layers_are_the_embed_and_the_blocks():
    for row in TABLES["table1"].rows:
        layers, width = map(int, row.setting.split(" layers of "))
        recipe = row.figures[0].training.at("paper")
        assert (recipe.block_count + 1, recipe.width, recipe.epochs) == (layers, width, 100)


@pytest.mark.parametrize("name", ["table6", "table7", "table8", "table9"])
def test_chunks_are_steps_of_the_network(name):
    for row in TABLES[name].rows:
        assert row.figures[0].training.at("small").length == int(row.setting.split()[0])


def test_the_text_that_stands_in_is_what_is_trained_on():
    for corpus, folder in (("wikitext-103", "wikitext-103"), ("wikitext-2", "wikitext-2"), ("novels", "novels")):
        table = language(corpus)
        assert {one.at("paper").corpus for one in table.trainings} == {folder}
        assert ("in place of WikiText-103" in table.title) == (corpus != "wikitext-103")
    assert set(CORPORA) == {"wikitext-103", "wikitext-2", "novels"}


def test_a_run_that_several_figures_need_is_made_once():
    first, other = training("digits", "bp", blocks=1), training("digits", "paper", stage=(1, 2))
    rows = (Row("", "bp", (Figure(first), Figure(first, 1))), Row("", "paper", (Figure(other, faster_than=first),)))
    assert Table("", "accuracy", ("a", "b"), rows, "").trainings == [first, other]
    assert (first.name, other.name) == ("digits-bp-blocks-1", "digits-paper-stage-1-2")
