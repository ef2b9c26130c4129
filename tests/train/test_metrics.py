import json
from dataclasses import replace

import pytest

from hbll.files import sealed
from hbll.train import metrics
from hbll.train.metrics import Metrics

LINE = Metrics(
    epoch=1,
    loss=0.1 + 0.2,
    learning_rate=1e-3,
    paths=[{"path": "1-2-3", "blocks": 3, "accuracy": 2 / 3}, {"path": "2", "blocks": 1, "accuracy": None}],
    seconds=1.5,
    work=9,
    span=6.5,
    defect=0.01,
    nodes={"1": {"error": 1e-30, "cosine": None}},
)


def test_what_was_appended_is_read_to_the_last_bit(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [replace(LINE, epoch=epoch, loss=1 / epoch) for epoch in (1, 2, 3)]
    for line in lines:
        metrics.append(file, line)
    assert metrics.read(file) == lines


def test_a_file_is_cut_after_some_epochs(tmp_path):
    file = tmp_path / "metrics.jsonl"
    digests = [metrics.digest(file)]
    for epoch in (1, 2, 3):
        metrics.append(file, replace(LINE, epoch=epoch))
        digests.append(metrics.digest(file))
    metrics.cut(file, 2, digests[2])
    assert [line.epoch for line in metrics.read(file)] == [1, 2]
    metrics.cut(file, 0, digests[0])
    assert metrics.read(file) == []


def test_lines_that_are_not_those_that_stay_are_told_and_left(tmp_path):
    file, other = tmp_path / "metrics.jsonl", tmp_path / "other.jsonl"
    for epoch in (1, 2):
        metrics.append(file, replace(LINE, epoch=epoch))
        metrics.append(other, replace(LINE, epoch=epoch, loss=2.0))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged, or of another run"):
        metrics.cut(file, 1, metrics.digest(other))
    assert file.read_bytes() == before


def test_a_changed_line_is_told(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics.append(file, LINE)
    file.write_text(file.read_text().replace('"work": 9', '"work": 8'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        metrics.read(file)


def test_lines_of_another_version_are_told(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(sealed({"epoch": 1, "accuracy": {"1-2-3": 0.5}})) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl was made by another version"):
        metrics.read(file)


def test_the_chain_is_the_first_path():
    assert LINE.chain == {"path": "1-2-3", "blocks": 3, "accuracy": 2 / 3}


def test_no_file_has_no_lines(tmp_path):
    assert metrics.read(tmp_path / "none") == []
    metrics.cut(tmp_path / "none", 0, metrics.digest(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_has_no_number_for_is_null(tmp_path, value):
    file = tmp_path / "metrics.jsonl"
    metrics.append(file, replace(LINE, nodes={"1": {"error": value}}))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(file.read_text(), parse_constant=refuse)["nodes"] == {"1": {"error": None}}


@pytest.mark.parametrize("content", [b'{"epoch": 1', b'"unterminated\n', b'{"epoch": 1}', b"[]", b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        metrics.read(file)


def test_a_history_shorter_than_the_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"fewer lines than the 2 epochs"):
        metrics.cut(tmp_path / "metrics.jsonl", 2, "")
