"""RandAugment. Oracles: Pillow's operations, and pixels moved one by one."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from hbll.data.randaugment import OPERATIONS, rand_augment


@pytest.fixture
def image():
    """(1, 3, 12, 12) in [0, 1], of 256 levels, and smooth enough for a histogram to be uneven."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(40, 200, (12, 12, 3)) // 3 + 30
    return torch.from_numpy(pixels / 255).float().permute(2, 0, 1)[None]


def by_pillow(image, operation):
    pixels = (255 * image[0].permute(1, 2, 0)).round().to(torch.uint8).numpy()
    changed = np.asarray(operation(Image.fromarray(pixels)))
    return torch.from_numpy(changed / 255).float().permute(2, 0, 1)[None]


def applied(name, image, strength):
    return OPERATIONS[name](image, torch.full((1, 1, 1, 1), strength))


@pytest.mark.parametrize("strength", [0.3, -0.3, 1.0])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("color", ImageEnhance.Color),
        ("contrast", ImageEnhance.Contrast),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
def test_blends_are_pillows_up_to_its_rounding(image, name, enhance, strength):
    expected = by_pillow(image, lambda picture: enhance(picture).enhance(1 + 0.9 * strength))
    torch.testing.assert_close(applied(name, image, strength), expected, rtol=0, atol=2.1 / 255)


@pytest.mark.parametrize("strength", [0.3, -0.3, 1.0])
def test_point_operations_are_pillows(image, strength):
    bits, threshold = 8 - round(4 * abs(strength)), 255 * (1 - abs(strength))
    for name, operation in [
        ("posterize", lambda picture: ImageOps.posterize(picture, bits)),
        ("solarize", lambda picture: ImageOps.solarize(picture, threshold)),
        ("equalize", ImageOps.equalize),
    ]:
        torch.testing.assert_close(applied(name, image, strength), by_pillow(image, operation), rtol=0, atol=1e-5)
    found = applied("autocontrast", image, strength)
    torch.testing.assert_close(found, by_pillow(image, ImageOps.autocontrast), rtol=0, atol=1.1 / 255)


def test_equalize_leaves_an_image_of_one_level_as_it_is():
    flat = torch.full((1, 3, 12, 12), 51 / 255)
    for name in ("equalize", "autocontrast"):
        torch.testing.assert_close(applied(name, flat, 0.3), flat)


@pytest.mark.parametrize("strength", [0.4, -0.4])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_a_pixel_comes_from_where_the_matrix_says(name, strength):
    # Of an image that is linear in its coordinates, linear interpolation is exact wherever the source lies within.
    size = 11
    places = torch.linspace(-1 + 1 / size, 1 - 1 / size, size)
    y, x = torch.meshgrid(places, places, indexing="ij")
    angle, shear, way = math.pi / 6 * strength, 0.3 * strength, 2 * 150 / 331 * strength
    sources = {
        "shear_x": (x + shear * y, y),
        "shear_y": (x, y + shear * x),
        "translate_x": (x + way, y),
        "translate_y": (x, y + way),
        "rotate": (math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y),
    }
    from_x, from_y = sources[name]
    found = applied(name, torch.stack([x, y, x + y])[None] / 4 + 0.5, strength)[0]
    within = (from_x.abs().maximum(from_y.abs())) <= places[-1]
    assert within.sum() > 30
    for channel, value in enumerate((from_x, from_y, from_x + from_y)):
        torch.testing.assert_close(found[channel][within], (value / 4 + 0.5)[within], rtol=0, atol=1e-5)
    beyond = from_x.abs().maximum(from_y.abs()) >= 1 + 1 / size
    assert not found[:, beyond].any()


def test_every_image_is_changed_by_operations_of_its_own_and_the_generator_decides_which():
    image = torch.rand(3, 8, 8).mul(255).round() / 255
    images = image.expand(300, 3, 8, 8)
    first, again, other = (rand_augment(images, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6
    # 14 operations, nine of them with a sign; twice: that many are not drawn by one draw for all.
    assert len(first.flatten(1).unique(dim=0)) > 100
    assert rand_augment(images, np.random.default_rng(0), operations=0).equal(images)


def test_one_operation_gives_the_variants_that_there_are():
    image = torch.rand(1, 3, 8, 8).mul(255).round() / 255
    expected = {
        tuple(applied(name, image, sign * 0.3).mul(1e4).round().flatten().tolist())
        for name in OPERATIONS
        for sign in (1, -1)
    }
    found = rand_augment(image.expand(600, 3, 8, 8), np.random.default_rng(0), operations=1)
    assert {tuple(one.mul(1e4).round().flatten().tolist()) for one in found} == expected
