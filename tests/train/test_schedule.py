import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hbll.train.schedule import scheduler


def rates(name, steps, highest=0.1):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=highest)
    schedule = scheduler(name, optimizer, steps)
    taken = []
    for _ in range(steps):
        taken.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return taken


@given(st.integers(1, 50))
def test_learning_rates_follow_their_formulas(steps):
    closed_forms = {
        "constant": lambda step: 0.1,
        "linear": lambda step: 0.1 * (1 - step / steps),
        "cosine": lambda step: 0.1 * (1 + math.cos(math.pi * step / steps)) / 2,
    }
    for name, formula in closed_forms.items():
        assert rates(name, steps) == pytest.approx([formula(step) for step in range(steps)], abs=1e-9)
