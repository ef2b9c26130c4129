"""What all tests share."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("hbll", deadline=None)  # machines are shared: time is no property of the code
hypothesis.settings.load_profile("hbll")

# The networks of the tests are too small for several threads to pay.
torch.set_num_threads(1)


@pytest.fixture
def mnist_folder() -> Path:
    """The folder that holds `mnist/`; skips the test where there is none."""
    folder = os.environ.get("HBLL_DATA")
    if folder is None or not (Path(folder) / "mnist").is_dir():
        pytest.skip("HBLL_DATA names no folder that holds mnist/")
    return Path(folder)
