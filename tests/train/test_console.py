import pytest

from hbll.recipes.measures import ACCURACY, CHARACTER_MEASURES
from hbll.train.console import show_paths, show_results

RESULT = {
    "method": "bptt-fused",
    "bits_per_character": 2.3456,
    "cross_entropy": 1.6259,
    "accuracy": 0.5123,
    "spread": 0.0123,
    "seconds": 12.34,
    "work": 1234.0,
    "span": 567.25,
    "memory": 2**20,
    "local": "no: crosses 3 blocks",
    "paths": [],
}


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_table_keeps_all_its_figures_in_every_terminal(capsys, monkeypatch, tmp_path, columns):
    monkeypatch.setenv("COLUMNS", columns)
    show_results([RESULT], CHARACTER_MEASURES, tmp_path)
    head, row, page = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == (
        "method bits per character spread cross entropy accuracy seconds work span peak memory local"
    )
    assert (
        " ".join(row.split()) == "bptt-fused 2.346 ± 0.012 1.626 51.23 % 12.3 1234 567.2 1.00 MiB no: crosses 3 blocks"
    )
    assert page == f"page: {tmp_path}"


def test_a_long_path_is_folded_on_a_terminal_alone(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "-".join(map(str, range(1, 32)))
    show_paths([{"path": name, "blocks": 31, "accuracy": 0.5}], [ACCURACY])
    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == [name, "31", "50.00", "%"]
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes anything for a terminal
    show_paths([{"path": name, "blocks": 31, "accuracy": 0.5}], [ACCURACY])
    _, first, *others = capsys.readouterr().out.splitlines()
    assert first.split()[1:] == ["31", "50.00", "%"]
    assert "".join([first.split()[0], *(line.strip() for line in others)]) == name
