"""Learning rates: which is best, and which is tried next."""

import math

import pytest

from hbll.train.rates import best_rate, next_rate


@pytest.mark.parametrize(
    ("scores", "best", "following"),
    [
        ({1.0: 3.0, 2.0: 5.0, 4.0: 4.0}, (2.0, False), None),
        ({1.0: 3.0, 2.0: 5.0, 4.0: 6.0}, (4.0, True), 8.0),
        ({4.0: 6.0, 2.0: 5.0, 1.0: 7.0}, (1.0, True), 0.5),
        ({1.0: 3.0, 2.0: math.nan, 4.0: -math.inf}, (1.0, True), 0.5),
        ({1.0: 3.0, 2.0: 5.0, 4.0: math.nan}, (2.0, False), None),
        ({2.0: math.nan, 1.0: math.nan}, (1.0, True), 0.5),  # all of them diverge: lower
        ({1.0: 3.0}, (1.0, True), None),  # nothing was searched
    ],
)
def test_the_best_and_what_lies_beyond_it(scores, best, following):
    assert best_rate(scores) == best
    assert next_rate(scores) == following


def test_a_score_that_rises_without_end_is_followed_for_so_many_rates():
    scores = {1.0: 1.0, 2.0: 2.0}
    while (rate := next_rate(scores, most=5)) is not None:
        scores[rate] = rate
    assert sorted(scores) == [1.0, 2.0, 4.0, 8.0, 16.0]
