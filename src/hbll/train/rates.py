"""Learning rates bracketed: every rule at the one that suits it, found on samples that are held out."""

import math
from collections.abc import Mapping

MOST_RATES = 7
"""How many are tried, if the best is the highest or lowest one again and again."""


def best_rate(scores: Mapping[float, float]) -> tuple[float, bool]:
    """The learning rate with the highest score, and whether it is the highest or lowest one tried.

    NaN, of a run that diverged, is the worst score there is; among equals the lowest rate is taken.
    """
    worst = -math.inf
    chosen = max(sorted(scores), key=lambda rate: worst if math.isnan(scores[rate]) else scores[rate])
    return chosen, chosen in (min(scores), max(scores))


def next_rate(scores: Mapping[float, float], most: int = MOST_RATES) -> float | None:
    """The rate to try next: twice the best if that is the highest one, half of it if it is the lowest. None where the best
    lies inside, where `most` have been tried, or where a single rate leaves nothing to compare."""
    best, edge = best_rate(scores)
    if not edge or not 1 < len(scores) < most:
        return None
    return best * 2 if best == max(scores) else best / 2
