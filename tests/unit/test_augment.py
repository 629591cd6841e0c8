"""Crops and colours: against per-image PIL, numpy and colorsys, and by statistics over some thousand draws."""

import colorsys
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from histoscale.augment import augment
from histoscale.augment.colour import (
    COLOUR_DRAWS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Colour,
    apply_colour,
    draw_colour,
    normalise,
)
from histoscale.augment.geometry import GEOMETRY_DRAWS, crop_maps, cut
from histoscale.config.recipe import AugmentSection, CropSection, Recipe
from histoscale.seeding import key, uniforms

CPU = torch.device("cpu")
POSES = [
    lambda image: image,
    lambda image: np.rot90(image, 1),
    lambda image: np.rot90(image, 2),
    lambda image: np.rot90(image, 3),
    lambda image: image[:, ::-1],
    lambda image: image.transpose(1, 0, 2),
    lambda image: image[::-1],
    lambda image: np.rot90(image, 2).transpose(1, 0, 2),
]
PLAIN = {"jitter_p": 0.0, "grayscale_p": 0.0, "solarize_p": 0.0, "blur_p": (0.0, 0.0, 0.0)}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def recipe_of(region_px: int = 98, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"region_px": region_px},
            "model": {"arch": "vit_test14"},
            "crops": {"global_px": 56, "local_px": 28, "local_count": 3},
        }
        | sections
    )


def pattern(region_px: int, tiles: int) -> torch.Tensor:
    """uint8 [tiles, R, R, 3]: red grows to the right, green downwards, blue is a wave that differs by tile."""
    line = np.arange(region_px) + 0.5
    x, y = np.meshgrid(line / region_px, line / region_px)
    wave = [0.5 + 0.4 * np.sin(2 * np.pi * (x + 2 * y) + tile) for tile in range(tiles)]
    return torch.from_numpy(np.stack([np.rint(255 * np.stack([x, y, b], axis=-1)) for b in wave]).astype(np.uint8))


def unnormalised(images: torch.Tensor) -> np.ndarray:
    channels_last = images.permute(0, 2, 3, 1).double().numpy()
    return channels_last * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)


def colour_of(images: int = 1, **changes: float) -> Colour:
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "gray": 0.0, "solarize": 0.0}
    fields = {name: torch.full((images, 1, 1, 1), value) for name, value in (neutral | changes).items()}
    return Colour(**({"blur_sigma_px": None} | fields))


def random_images(count: int = 2, side_px: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("first_id", [0, 10, 20, 30])
def test_crops_are_those_of_pil_for_each_image_alone(first_id: int) -> None:
    recipe = recipe_of(augment=PLAIN)
    ids = np.arange(first_id, first_id + 10, dtype=np.int64)
    tiles = pattern(98, len(ids))
    views = augment(tiles, ids, recipe)
    assert views.local_crops is not None
    groups = [(0, 56, views.global_crops[:10]), (1, 56, views.global_crops[10:])]
    groups += [(2 + n, 28, views.local_crops[10 * n : 10 * n + 10]) for n in range(3)]
    for crop, side_px, images in groups:
        for place, got in enumerate(unnormalised(images)):
            draws = uniforms(key(0, "augment", "place", crop), ids[place : place + 1], GEOMETRY_DRAWS)[0]
            side = side_px * (0.9 + 0.2 * draws[0])
            aspect = math.exp(math.log(0.95) + draws[1] * (math.log(1.05) - math.log(0.95)))
            width, height = side * math.sqrt(aspect), side / math.sqrt(aspect)
            left, top = draws[2] * (98 - width), draws[3] * (98 - height)
            window = Image.fromarray(tiles[place].numpy()).resize(
                (side_px, side_px), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
            )
            expected = POSES[int(8 * draws[4])](np.asarray(window) / 255.0)
            assert np.abs(got - expected).max() < 4.0 / 255.0  # PIL rounds, and its cubic is another one
            assert np.abs(got - expected).mean() < 1.0 / 255.0


def test_windows_have_their_sizes_stay_inside_and_reach_every_place() -> None:
    draws = uniforms(key(0, "test"), np.arange(8000), GEOMETRY_DRAWS)
    maps = crop_maps(draws, 224, 392, CropSection())
    linear, centre = maps[:, :, :2], maps[:, :, 2]
    extent = np.abs(linear).sum(axis=2)
    assert bool((extent + np.abs(centre) <= 1.0 + 1e-12).all())
    width, height = 392 * extent.T
    side, aspect = np.sqrt(width * height) / 224, width / height
    assert side.min() == pytest.approx(0.9, abs=1e-3)
    assert side.max() == pytest.approx(1.1, abs=1e-3)
    assert side.mean() == pytest.approx(1.0, abs=0.003)
    assert aspect.min() == pytest.approx(0.95, abs=1e-3)
    assert aspect.max() == pytest.approx(1.05, abs=1e-3)
    room = centre / (1.0 - extent)
    assert np.abs(np.histogram(room[:, 0], bins=8, range=(-1, 1))[0] / 8000 - 0.125).max() < 0.02
    assert np.abs(np.histogram(room[:, 1], bins=8, range=(-1, 1))[0] / 8000 - 0.125).max() < 0.02
    assert abs(np.corrcoef(room.T)[0, 1]) < 0.05


def test_the_eight_poses_are_equally_likely() -> None:
    draws = uniforms(key(0, "test"), np.arange(8000), GEOMETRY_DRAWS)
    poses = np.sign(crop_maps(draws, 224, 392, CropSection())[:, :, :2]).reshape(-1, 4)
    kinds, counts = np.unique(poses, axis=0, return_counts=True)
    assert len(kinds) == 8
    assert np.abs(counts / 8000 - 0.125).max() < 0.015


@pytest.mark.parametrize(
    ("scale", "left", "aliases"), [(2.0, 16.0, False), (2.0, 16.5, False), (2.0, 16.7, False), (1.0, 24.0, True)]
)
def test_a_window_that_shrinks_is_averaged_not_aliased(scale: float, left: float, aliases: bool) -> None:
    board = torch.zeros(1, 3, 64, 64)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = 1.0
    crops = CropSection(scale=(scale, scale), aspect=(1.0, 1.0))
    place = left / (64 - 16 * scale)
    crop = cut(board, crop_maps(np.array([[0.5, 0.5, place, place, 0.0]]), 16, 64, crops), 16, crops)
    assert (crop.std().item() > 0.4) == aliases
    assert crop.mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_tiles_crops_do_not_depend_on_its_neighbours() -> None:
    recipe = recipe_of(crops={"global_px": 56, "local_px": 28, "local_count": 2})
    tiles, ids = pattern(98, 5), np.array([4, 900, 17, 2**40, 3], dtype=np.int64)
    together = augment(tiles, ids, recipe)
    assert together.local_crops is not None
    order = [3, 0]
    apart = augment(tiles[order], ids[order], recipe)
    assert apart.local_crops is not None
    torch.testing.assert_close(apart.global_crops, together.global_crops.view(2, 5, 3, 56, 56)[:, order].flatten(0, 1))
    torch.testing.assert_close(apart.local_crops, together.local_crops.view(2, 5, 3, 28, 28)[:, order].flatten(0, 1))


def test_crops_follow_seed_sample_and_crop_number() -> None:
    tiles, ids = pattern(98, 1).repeat(2, 1, 1, 1), np.array([1, 2], dtype=np.int64)
    views = augment(tiles, ids, recipe_of())
    assert views.global_crops.dtype == torch.float32
    assert torch.equal(views.global_crops, augment(tiles, ids, recipe_of()).global_crops)
    assert not torch.equal(views.global_crops, augment(tiles, ids, recipe_of(seed=1)).global_crops)
    assert not torch.equal(views.global_crops[0], views.global_crops[1])
    assert not torch.equal(views.global_crops[0], views.global_crops[2])
    assert views.local_crops is not None
    assert len({crop.numpy().tobytes() for crop in views.local_crops}) == 6


def test_without_local_crops_there_are_none() -> None:
    views = augment(pattern(98, 2), np.arange(2), recipe_of(crops={"global_px": 56, "local_px": 28, "local_count": 0}))
    assert views.local_crops is None
    assert views.global_crops.shape == (4, 3, 56, 56)


@pytest.mark.parametrize(("crop", "blur", "solarize"), [(0, 0.0, 0.0), (1, 0.9, 0.2), (2, 0.5, 0.0)])
def test_each_kind_of_crop_has_its_probabilities(crop: int, blur: float, solarize: float) -> None:
    strengths, count = AugmentSection(), 8000
    draws = uniforms(key(0, "augment", "colour", crop), np.arange(count), COLOUR_DRAWS)
    colour = draw_colour(draws, strengths, strengths.blur_p[crop], solarize, CPU)
    blurred = colour.blur_sigma_px
    assert (blurred is None) == (blur == 0.0)
    if blurred is not None:
        assert (blurred > 0).double().mean().item() == pytest.approx(blur, abs=0.015)
        positive = blurred[blurred > 0]
        assert positive.min().item() >= 0.1
        assert positive.max().item() <= 2.0
        assert positive.mean().item() == pytest.approx(1.05, abs=0.03)
    assert colour.solarize.mean().item() == pytest.approx(solarize, abs=0.015)
    assert colour.gray.mean().item() == pytest.approx(0.2, abs=0.015)
    for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        factor = getattr(colour, name)
        assert (factor != 1.0).double().mean().item() == pytest.approx(0.8, abs=0.015)
        assert factor.min().item() == pytest.approx(1.0 - strength, abs=0.01)
        assert factor.max().item() == pytest.approx(1.0 + strength, abs=0.01)
        assert factor.mean().item() == pytest.approx(1.0, abs=0.01)
    assert colour.hue.min().item() == pytest.approx(-0.1, abs=0.005)
    assert colour.hue.max().item() == pytest.approx(0.1, abs=0.005)


def test_augment_gives_each_kind_of_crop_its_own_blur_and_solarisation() -> None:
    tiles, ids = torch.full((300, 32, 32, 3), 200, dtype=torch.uint8), np.arange(300)
    crops = {"global_px": 14, "local_px": 14, "local_count": 1}
    always = recipe_of(32, crops=crops, augment=PLAIN | {"solarize_p": 1.0})
    views = augment(tiles, ids, always)
    assert views.local_crops is not None
    first, second = (unnormalised(half) for half in views.global_crops.chunk(2))
    np.testing.assert_allclose(first, 200 / 255, atol=1e-5)
    np.testing.assert_allclose(second, 55 / 255, atol=1e-5)
    np.testing.assert_allclose(unnormalised(views.local_crops), 200 / 255, atol=1e-5)
    noise = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sharp = augment(noise, ids, recipe_of(32, crops=crops, augment=PLAIN))
    for place in range(3):
        blur_p = tuple(float(kind == place) for kind in range(3))
        soft = augment(noise, ids, recipe_of(32, crops=crops, augment=PLAIN | {"blur_p": blur_p}))
        assert sharp.local_crops is not None
        assert soft.local_crops is not None
        pairs = list(zip(sharp.global_crops.chunk(2), soft.global_crops.chunk(2), strict=True))
        pairs.append((sharp.local_crops, soft.local_crops))
        assert [torch.equal(before, after) for before, after in pairs] == [kind != place for kind in range(3)]


@pytest.mark.parametrize(
    "change", [{"brightness": 1.4}, {"brightness": 0.6}, {"contrast": 1.4}, {"contrast": 0.6}, {"saturation": 1.2}]
)
def test_blends_are_torchvisions(change: dict[str, float]) -> None:
    images = random_images()
    got = apply_colour(images, colour_of(2, **change)).double()
    ((name, factor),) = change.items()
    for image, result in zip(images.double(), got, strict=True):
        luma = 0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        other = {"brightness": torch.zeros(()), "contrast": luma.mean(), "saturation": luma}[name]
        expected = (factor * image + (1.0 - factor) * other).clamp(0.0, 1.0)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.4])
def test_hue_turns_as_in_colorsys(turn: float) -> None:
    images = random_images()
    images[0, :, 0, 0] = 0.3  # gray, black, white and two equal channels have no or an ambiguous hue
    images[0, :, 0, 1] = 0.0
    images[0, :, 0, 2] = 1.0
    images[0, :, 0, 3] = torch.tensor([0.7, 0.7, 0.2])
    got = apply_colour(images, colour_of(2, hue=turn))
    for image in range(2):
        for row in range(6):
            for column in range(6):
                hue, saturation, value = colorsys.rgb_to_hsv(*images[image, :, row, column].tolist())
                expected = colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)
                assert got[image, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_grayscale_gives_three_equal_channels_of_the_luma() -> None:
    images = random_images()
    colour = colour_of(2)
    colour.gray[1] = 1.0
    got = apply_colour(images, colour)
    torch.testing.assert_close(got[0], images[0])
    luma = 0.2989 * images[1, 0] + 0.587 * images[1, 1] + 0.114 * images[1, 2]
    torch.testing.assert_close(got[1], luma.expand(3, -1, -1))


def test_solarisation_inverts_values_from_half_on() -> None:
    image = torch.tensor([0.2, 127 / 255, 128 / 255, 0.9]).expand(1, 3, 1, 4)
    got = apply_colour(image, colour_of(solarize=1.0))
    torch.testing.assert_close(got[0, 0, 0], torch.tensor([0.2, 127 / 255, 127 / 255, 0.1]))


@pytest.mark.parametrize("sigma_px", [0.3, 1.0, 2.0])
def test_blur_is_gaussian_for_each_image_alone(sigma_px: float) -> None:
    images = random_images(2, 40)
    sigmas = torch.tensor([0.0, sigma_px]).view(2, 1, 1, 1)
    got = apply_colour(images, Colour(**(vars(colour_of(2)) | {"blur_sigma_px": sigmas})))
    torch.testing.assert_close(got[0], images[0])
    expected = ndimage.gaussian_filter(images[1].double().numpy(), (0, sigma_px, sigma_px), truncate=10.0)
    inner = slice(14, 26)
    np.testing.assert_allclose(got[1, :, inner, inner].numpy(), expected[:, inner, inner], atol=1e-4)
    flat = torch.full((2, 3, 9, 9), 0.4)
    torch.testing.assert_close(apply_colour(flat, Colour(**(vars(colour_of(2)) | {"blur_sigma_px": sigmas}))), flat)


def test_normalise_is_per_channel() -> None:
    got = normalise(torch.full((1, 3, 1, 1), 0.5)).flatten().tolist()
    assert got == pytest.approx([(0.5 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
