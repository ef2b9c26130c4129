"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn bundles (UCI, Alpaydin & Kaynak 1998)."""

import numpy as np
import torch

from hbll.data.splits import Samples, Splits

TEST_SAMPLES = 360
"""A fifth of the set."""

_SPLIT_SEED = 0


def digits() -> Splits:
    """1,437 samples to train on and 360 to test on, every class in proportion: inputs (n, 64) in [0, 1], 10 classes.

    The split is always the same, whatever the seed of a run, so that all runs are measured on the same samples.
    """
    from sklearn.datasets import load_digits  # slow to import, and every command imports every recipe
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_SAMPLES, stratify=labels, random_state=_SPLIT_SEED
    )
    return Splits(_samples(train_images, train_labels), _samples(test_images, test_labels))


def _samples(images: np.ndarray, labels: np.ndarray) -> Samples:
    return Samples(torch.from_numpy(images / 16).float(), torch.from_numpy(labels).long())
