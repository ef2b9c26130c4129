import json
from dataclasses import replace

import pytest

from hbll.recipes import RECIPES
from hbll.train.run import Run, check_same, read_json

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


@pytest.mark.parametrize("content", ["{}", "[1]", '{"recipe"', "3"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "configuration.json").write_text(content)
    with pytest.raises(ValueError, match=r"configuration\.json is damaged"):
        read_json(tmp_path, "configuration.json", "run")


def test_a_whole_file_is_read(tmp_path):
    (tmp_path / "configuration.json").write_text(json.dumps({"recipe": "digits"}))
    assert read_json(tmp_path, "configuration.json", "run") == {"recipe": "digits"}
