"""Data sets as tensors: readers of the published files, and what scikit-learn bundles."""

from hbll.data.digits import digits
from hbll.data.location import data_folder
from hbll.data.mnist import mnist
from hbll.data.splits import Samples, Splits

__all__ = ["Samples", "Splits", "data_folder", "digits", "mnist"]
