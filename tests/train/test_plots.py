from dataclasses import replace

from hbll.recipes.measures import ACCURACY, BITS_PER_CHARACTER
from hbll.train import plots
from hbll.train.metrics import Metrics


def history(share, correction, epochs=3, defect=None, cosine=None):
    return [
        Metrics(
            epoch=epoch,
            loss=1.0,
            learning_rate=0.1,
            paths=[
                {"path": "1-2-3", "blocks": 3, "accuracy": share},
                {"path": "2", "blocks": 1, "accuracy": None if share is None else share / 2},
            ],
            seconds=1.0,
            work=9,
            span=6,
            defect=defect,
            nodes={str(node): {"correction": correction, "cosine": cosine} for node in (1, 2, 3)},
        )
        for epoch in range(1, epochs + 1)
    ]


def readout(path, blocks, accuracy):
    cost = {"parameters": 100 * blocks, "milliseconds": 0.1 * blocks}
    return {"path": path, "blocks": blocks, **cost, "accuracy": accuracy}


def test_readouts_are_drawn_by_cost_and_those_of_stages_apart():
    paths = [readout("1-2-3", 3, 0.9), readout("2", 1, 0.5), readout("2-3", 2, None)]
    text = plots.by_cost(paths, ACCURACY)
    assert all(title in text for title in ("blocks", "parameters", "milliseconds for a sample", "accuracy, %", "path"))
    assert "stage" not in text
    assert "stage" in plots.by_cost([*paths, readout("stage-1", 1, 0.8)], ACCURACY)


def test_seeds_that_agree_are_drawn_although_their_mean_is_rounded():
    # The mean of three times 0.1 is above it.
    assert "<svg" in plots.by_path({"paper": [history(0.001, 1.0)] * 3}, ACCURACY)


def test_more_methods_than_colours_are_drawn():
    text = plots.learning_curves({f"method{number}": [history(number / 20, None)] for number in range(12)}, ACCURACY)
    assert all(f"method{number}" in text for number in range(12))


def test_methods_without_corrections_have_no_map():
    assert plots.corrections({"bp": [history(0.9, None)], "none": [history(0.9, 0.0)]}) is None
    text = plots.corrections({"bp": [history(0.9, None)], "paper": [history(0.9, 0.5), history(0.8, 0.1)]})
    assert "paper" in text
    assert "bp" not in text


def test_methods_without_cosines_have_no_map():
    assert plots.cosines({"pipeline": [history(0.9, None)]}) is None
    text = plots.cosines({"pipeline": [history(0.9, None)], "tree": [history(0.9, 0.5, cosine=c) for c in (-0.5, 0.7)]})
    assert "tree" in text
    assert "pipeline" not in text


def test_methods_without_sweeps_have_no_defect():
    assert plots.defects({"bp": [history(0.9, None)]}) is None
    text = plots.defects({"bp": [history(0.9, None)], "scan": [history(0.9, 0.5, defect=d) for d in (0.01, 0.02)]})
    assert "scan" in text
    assert "bp" not in text


def test_a_run_of_one_epoch_is_drawn():
    histories = {"paper": [history(0.9, 0.5, epochs=1, defect=0.02)]}
    assert "<svg" in plots.defects(histories)
    assert "<svg" in plots.learning_curves(histories, ACCURACY)
    assert "<svg" in plots.by_path(histories, ACCURACY)
    assert "<svg" in plots.corrections(histories)


def test_axes_say_what_was_measured():
    line = replace(history(0.5, None)[0], paths=[{"path": "chain", "blocks": 4, "bits_per_character": 2.5}])
    for draw in (plots.learning_curves, plots.by_path):
        assert ">bits per character<" in draw({"bp": [[line]]}, BITS_PER_CHARACTER).replace("chain: ", "")
        assert "accuracy, %" in draw({"bp": [history(0.5, None)]}, ACCURACY)


def test_a_measure_that_was_not_finite_is_left_out():
    for draw in (plots.learning_curves, plots.by_path):
        assert "<svg" in draw({"bp": [history(None, None)], "paper": [history(0.5, None)]}, ACCURACY)


def test_the_ticks_are_those_of_every_method():
    line = history(0.5, None)[0]
    longer = replace(line, paths=[{"path": "chain", "blocks": 7, "accuracy": 0.5}])
    text = plots.by_path({"paper": [[longer]], "bp": [[line]]}, ACCURACY)
    assert all(f">{tick}<" in text for tick in ("1", "3", "7 (chain)"))
