from hbll.training import plots
from hbll.training.metrics import Metrics


def history(share, correction, epochs=3):
    return [
        Metrics(
            epoch=epoch,
            loss=1.0,
            learning_rate=0.1,
            accuracy={"1-2-3": share, "2": share / 2},
            seconds=1.0,
            work=9,
            span=6,
            nodes={str(node): {"correction": correction} for node in (1, 2, 3)},
        )
        for epoch in range(1, epochs + 1)
    ]


def test_seeds_that_agree_are_drawn_although_their_mean_is_rounded():
    # The mean of three times 0.1 is above it.
    assert "<svg" in plots.accuracy_by_path({"paper": [history(0.001, 1.0)] * 3})


def test_more_methods_than_colours_are_drawn():
    text = plots.learning_curves({f"method{number}": [history(number / 20, None)] for number in range(12)})
    assert all(f"method{number}" in text for number in range(12))


def test_methods_without_corrections_have_no_map():
    assert plots.corrections({"bp": [history(0.9, None)], "none": [history(0.9, 0.0)]}) is None
    text = plots.corrections({"bp": [history(0.9, None)], "paper": [history(0.9, 0.5), history(0.8, 0.1)]})
    assert "paper" in text
    assert "bp" not in text


def test_a_run_of_one_epoch_is_drawn():
    histories = {"paper": [history(0.9, 0.5, epochs=1)]}
    assert all("<svg" in draw(histories) for draw in (plots.learning_curves, plots.accuracy_by_path, plots.corrections))
