from dataclasses import replace

import pytest

from hbll.recipes import RECIPES
from hbll.train import checkpoint
from hbll.train.run import Run, check_same, open_run, read_json, write_json

RECIPE = RECIPES["digits"](width=16, epochs=2)


@pytest.fixture
def run(tmp_path):
    return Run(recipe=RECIPE, method="bp", seed=0, folder=tmp_path)


@pytest.mark.parametrize("spelling", [{"depth": 3}, {"blocks": 7}, {}])
def test_a_depth_and_its_number_of_blocks_are_one_configuration(run, spelling):
    check_same(run, replace(run, recipe=replace(RECIPE, **spelling)))


@pytest.mark.parametrize("spelling", [{"depth": 2}, {"blocks": 3}])
def test_another_number_of_blocks_is_named(run, spelling):
    with pytest.raises(ValueError, match=r"--blocks 7, not 3"):
        check_same(run, replace(run, recipe=replace(RECIPE, **spelling)))


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'{"recipe"', b"3", b'{"recipe": "digits"}', b"\xff\xfe{"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "configuration.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"configuration\.json is damaged"):
        read_json(tmp_path, "configuration.json", "run")


def test_a_whole_file_is_read(tmp_path):
    write_json(tmp_path / "configuration.json", {"recipe": "digits"})
    assert read_json(tmp_path, "configuration.json", "run") == {"recipe": "digits"}


WRITTEN = {"recipe": "digits", "options": {"width": 16}, "method": "bp", "seed": 0, "data_dir": None}


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "letters"},
        {"recipe": ["digits"]},
        {"options": []},
        {"options": {"width": "wide"}},
        {"options": {"letters": 26}},
        {"seed": "first"},
        {"data_dir": 3},
        *({name: ...} for name in WRITTEN),
    ],
)
def test_a_configuration_of_another_version_is_told(tmp_path, change):
    changed = {name: value for name, value in (WRITTEN | change).items() if value is not ...}
    write_json(tmp_path / "configuration.json", changed)
    with pytest.raises(ValueError, match=r"was made by another version: .* is not known here"):
        open_run(tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_torch_cannot_take_is_refused(run, seed):
    with pytest.raises(ValueError, match=rf"--seed must be .*, not {seed}"):
        replace(run, seed=seed)


def test_a_checkpoint_says_of_which_run_it_is(run):
    checkpoint.save(run.checkpoint_file, {"run": run.mark})
    longer = replace(run, recipe=replace(RECIPE, epochs=9, depth=3))
    assert longer.load_checkpoint() == {"run": run.mark}
    others = {
        "--seed 0, not 1": replace(run, seed=1),
        "--method bp, not paper": replace(run, method="paper"),
        "the recipe digits, not mnist-mlp": replace(run, recipe=RECIPES["mnist-mlp"](width=16, epochs=2)),
        "--width 16, not 8": replace(run, recipe=replace(RECIPE, width=8)),
    }
    for said, other in others.items():
        with pytest.raises(ValueError, match=f"is of another run, with {said}"):
            other.load_checkpoint()


def test_options_that_a_checkpoint_of_an_earlier_version_does_not_know_are_no_difference(run):
    mark = {option: value for option, value in run.mark.items() if option != "rim"}
    checkpoint.save(run.checkpoint_file, {"run": mark})
    assert run.load_checkpoint() == {"run": mark}
