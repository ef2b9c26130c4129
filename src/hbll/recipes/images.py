"""What every recipe on images has: the shape of an image, and data that are corrupted for a test of robustness."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hbll.data import Samples, Splits, mnist
from hbll.data.augment import crop_and_flip
from hbll.data.cifar import CIFAR10_STATISTICS, CIFAR100_STATISTICS, cifar10, cifar100
from hbll.data.corrupt import erase, noisy_labels
from hbll.data.randaugment import rand_augment
from hbll.recipes.base import Recipe, Schedule, flag

PATCH = 4
"""Pixels of a side of what is erased as a patch."""

CIFAR = {10: (cifar10, CIFAR10_STATISTICS), 100: (cifar100, CIFAR100_STATISTICS)}
"""By the number of classes, the reader of the data and the statistics that it standardises by."""


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """A recipe on labelled images, which are the same corrupted ones for every run with the same options."""

    image: ClassVar[tuple[int, int, int]]
    """Channels, rows and columns; inputs may be flat."""

    classes: ClassVar[int] = 10

    missing: float = 0.0
    """Share of the pixels of every training image that is erased."""

    test_missing: float = 0.0
    """The same of every test and validation image."""

    missing_unit: Literal["pixels", "patches"] = "pixels"
    """What is erased: single pixels, or patches of 4 x 4."""

    label_noise: float = 0.0
    """Share of the training labels that are another class, drawn uniformly."""

    test_label_noise: float = 0.0
    """The same of the test and validation labels."""

    corruption_seed: int = 0
    """Of what is erased and which labels are wrong."""

    validation_samples: int | None = None
    """Hold out the last so many training samples; the weights of the epoch that is best on them are kept beside the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("missing", "test_missing", "label_noise", "test_label_noise"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{flag(option)} is a share from 0 to 1, not {getattr(self, option)}")
        if self.corruption_seed < 0:
            raise ValueError(f"--corruption-seed must be at least 0, not {self.corruption_seed}")
        if self.validation_samples is not None and self.validation_samples < 1:
            raise ValueError(f"--validation-samples must be at least 1, not {self.validation_samples}")

    @abstractmethod
    def images(self, data_dir: Path | None) -> Splits:
        """The whole data set as published."""

    def load(self, data_dir: Path | None) -> Splits:
        splits = self.images(data_dir)
        held = self.validation_samples or 0
        border = len(splits.train) - held
        if border < 1:
            raise ValueError(f"--validation-samples {held} leaves none of the {len(splits.train)} to train on")
        train, valid = splits.train[:border], splits.train[border:]
        return Splits(
            self._corrupted(train, self.missing, self.label_noise, 0),
            self._corrupted(splits.test, self.test_missing, self.test_label_noise, 1),
            self._corrupted(valid, self.test_missing, self.test_label_noise, 2) if held else None,
        )

    def _corrupted(self, samples: Samples, missing: float, label_noise: float, part: int) -> Samples:
        draws = [np.random.default_rng([self.corruption_seed, part, use]) for use in (1, 2)]
        if missing:
            images = samples.inputs.view(-1, *self.image)
            patch = 1 if self.missing_unit == "pixels" else PATCH
            erased = erase(images, missing, draws[0], patch)
            samples = replace(samples, inputs=erased.view_as(samples.inputs))
        if label_noise:
            samples = replace(samples, labels=noisy_labels(samples.labels, label_noise, self.classes, draws[1]))
        return samples


@dataclass(frozen=True, kw_only=True)
class MnistImages(ImageRecipe):
    """MNIST, flat."""

    image: ClassVar[tuple[int, int, int]] = (1, 28, 28)

    def images(self, data_dir: Path | None) -> Splits:
        return mnist(data_dir)


@dataclass(frozen=True, kw_only=True)
class CifarImages(ImageRecipe):
    """CIFAR-10, or with 100 classes CIFAR-100, shifted and mirrored at random."""

    image: ClassVar[tuple[int, int, int]] = (3, 32, 32)

    batch_size: int = 128
    """Samples of a step. What an epoch leaves over, fewer than that, waits for the next: rules may keep batches."""

    schedule: Schedule = "cosine"
    """How the learning rate goes on over the steps: as it is, down to 0 in a straight line, or along a cosine."""

    rand_augment: int = 0
    """Random operations of RandAugment on every training image (the usual number is 2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rand_augment < 0:
            raise ValueError(f"--rand-augment must be at least 0, not {self.rand_augment}")

    def images(self, data_dir: Path | None) -> Splits:
        read, _ = CIFAR[self.classes]
        return read(data_dir)

    def augment(self, inputs: Tensor, draw: np.random.Generator) -> Tensor:
        if self.rand_augment:
            _, statistics = CIFAR[self.classes]
            mean, deviation = (torch.tensor(values).to(inputs).view(3, 1, 1) for values in statistics)
            pixels = (inputs * deviation + mean).clamp(0, 1)  # of erased ones the mean, which is 0 when standardised
            inputs = (rand_augment(pixels, draw, self.rand_augment) - mean) / deviation
        return crop_and_flip(inputs, draw)
