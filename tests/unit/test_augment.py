"""Crops and colours: against per-image Pillow, torch, numpy and colorsys, and on drawn patterns."""

import colorsys
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from histoscale.augment import augment
from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD, Colour, apply_colour, normalise
from histoscale.augment.geometry import GEOMETRY_DRAWS, Places, cut, draw_places, planes_of, window_sizes
from histoscale.augment.stain import draw_stains, restain
from histoscale.config.recipe import CropSection, ExtendedContext, Recipe
from histoscale.seeding import key, uniforms

REGION_PX = 98
PLAIN = {"jitter_p": 0.0, "grayscale_p": 0.0, "solarize_p": 0.0, "blur_p": (0.0, 0.0, 0.0)}
SMALL = {"global_px": 56, "local_px": 28, "local_count": 3}
WINDOWS = {
    "side": {"kind": "extended_context"},
    "area": {"kind": "extended_context", "scale_of": "area", "scale": (0.5, 1.4), "aspect": (0.75, 1.3)},
    "resized": {"kind": "random_resized"},
    "any_size": {"kind": "random_resized", "global_scale": (0.02, 1.0), "local_scale": (0.01, 1.0), "aspect": (0.5, 2)},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def recipe_of(region_px: int = REGION_PX, **sections: Any) -> Recipe:
    base = {"data": {"region_px": region_px}, "model": {"arch": "vit_test14"}, "crops": SMALL}
    return Recipe.model_validate(base | sections)


def pattern(region_px: int, tiles: int) -> torch.Tensor:
    """uint8 [tiles, R, R, 3]: red grows to the right, green downwards, blue is noise that differs by tile."""
    line = np.arange(region_px)
    x, y = np.meshgrid(line, line)
    noise = np.random.default_rng(0).integers(0, 256, (tiles, region_px, region_px))
    return torch.from_numpy(np.stack([np.stack([x, y, blue], axis=-1) for blue in noise]).astype(np.uint8))


def unnormalised(images: torch.Tensor) -> np.ndarray:
    channels_last = images.permute(0, 2, 3, 1).double().numpy()
    return channels_last * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)


def colour_of(images: int = 1, **changes: Any) -> Colour:
    """The changes that are named, of every image."""
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "blur_sigma_px": 0.0}
    flags = {"jittered": True, "gray": False, "solarize": False}
    return Colour(stains=None, **{name: np.full(images, value) for name, value in (neutral | flags | changes).items()})


def random_images(count: int = 2, side_px: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def window_by_pillow(tile: np.ndarray, box: tuple[float, float, float, float], side_px: int) -> np.ndarray:
    """Float64 [S, S, 3] in [0, 1], resampled by Pillow in floating point."""
    bands = [Image.fromarray(np.ascontiguousarray(tile[..., band], dtype=np.float32)) for band in range(3)]
    cut_bands = [band.resize((side_px, side_px), Image.Resampling.BICUBIC, box=box) for band in bands]
    return np.stack([np.asarray(band, dtype=np.float64) for band in cut_bands], axis=-1).clip(0, 255) / 255


def posed(image: np.ndarray, pose: int) -> np.ndarray:
    image = image.transpose(1, 0, 2) if pose >= 4 else image
    image = image[::-1] if pose % 4 >= 2 else image
    return image[:, ::-1] if pose % 2 else image


def box_by_hand(draws: list[float], crops: CropSection, region_px: int, local: bool) -> tuple[float, ...]:
    scale_draw, aspect_draw, x, y, _ = draws
    window, side_px = crops.window, crops.local_px if local else crops.global_px
    if window.kind == "random_resized":
        low, high = window.local_scale if local else window.global_scale
        area = (low + scale_draw * (high - low)) * region_px**2
    else:
        scale = window.scale[0] + scale_draw * (window.scale[1] - window.scale[0])
        area = side_px**2 * (scale**2 if window.scale_of == "side" else scale)
    low, high = window.aspect
    aspect = math.exp(math.log(low) + aspect_draw * (math.log(high) - math.log(low)))
    width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    too_long = max(1.0, width / region_px, height / region_px)
    width, height = min(width / too_long, region_px), min(height / too_long, region_px)
    left, top = x * (region_px - width), y * (region_px - height)
    return left, top, min(left + width, region_px), min(top + height, region_px)


@pytest.mark.parametrize("poses", ["dihedral", "flips", "none"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_crops_are_those_of_pillow_for_each_image_alone(kind: str, poses: str) -> None:
    recipe = recipe_of(augment=PLAIN, crops=SMALL | {"window": WINDOWS[kind], "poses": poses})
    ids = np.arange(24, dtype=np.int64)
    tiles = pattern(REGION_PX, len(ids))
    views = augment(tiles, ids, recipe)
    assert views.local_crops is not None
    groups = [*views.global_crops.chunk(2), *views.local_crops.chunk(3)]
    for crop, images in enumerate(groups):
        for place, got in enumerate(unnormalised(images)):
            draws = uniforms(key(0, "augment", "place", crop), ids[place : place + 1], GEOMETRY_DRAWS)[0].tolist()
            box = box_by_hand(draws, recipe.crops, REGION_PX, local=crop >= 2)
            expected = window_by_pillow(tiles[place].numpy(), box, got.shape[0])
            pose = int({"dihedral": 8, "flips": 4, "none": 1}[poses] * draws[4])
            np.testing.assert_allclose(got, posed(expected, pose), atol=2e-5)


@pytest.mark.parametrize(("region_px", "side_px"), [(392, 98), (224, 98), (128, 128), (60, 96)])
def test_a_whole_region_is_resized_as_by_torch(region_px: int, side_px: int) -> None:
    planes = planes_of(pattern(region_px, 2), "none")
    whole = np.tile([0.0, region_px], (2, 1))
    got = cut(planes, np.arange(2), Places(whole, whole, np.zeros(2, bool)), side_px, region_px)
    expected = F.interpolate(
        planes.double(), (side_px, side_px), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 255)
    torch.testing.assert_close(got.double(), expected / 255, atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("pose", range(8))
@pytest.mark.parametrize("window_px", [40.0, 70.0])
def test_a_crop_of_a_ramp_reads_its_own_coordinates(pose: int, window_px: float) -> None:
    window = ExtendedContext(scale=(window_px / 56, window_px / 56), aspect=(1.0, 1.0))
    sizes = window_sizes(CropSection(local_px=56, window=window), REGION_PX, local=True)
    places = draw_places(np.array([[0.5, 0.5, 0.25, 0.6, (pose + 0.5) / 8]]), sizes, REGION_PX, "dihedral")
    got = cut(planes_of(pattern(REGION_PX, 1), "dihedral"), np.zeros(1, np.int64), places, 56, window_px + 1)
    x_px, y_px = 255 * got[0, :2].double().numpy() + 0.5
    line = (np.arange(56) + 0.5) / 56
    left, top = 0.25 * (REGION_PX - window_px), 0.6 * (REGION_PX - window_px)
    along_columns, along_rows = np.meshgrid(line[:: -1 if pose % 2 else 1], line[:: -1 if pose % 4 >= 2 else 1])
    across, down = (along_rows, along_columns) if pose >= 4 else (along_columns, along_rows)
    corners = np.ix_([0, -1], [0, -1])
    for values, origin, along in ((x_px, left, across), (y_px, top, down)):
        np.testing.assert_allclose(values, origin + window_px * along, atol=0.03)
        middle = window_px / 112  # corners of the crop are pixels whose middles lie half a pixel inside the window
        assert set(np.round(values[corners] - origin).ravel()) == {round(middle), round(window_px - middle)}


@pytest.mark.parametrize(("kind", "longest"), [("random_resized", 64.0), ("extended_context", 32.0)])
def test_a_window_that_shrinks_is_averaged_not_aliased(kind: str, longest: float) -> None:
    board = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    board[:, ::2, 1::2] = board[:, 1::2, ::2] = 255
    share = {"random_resized": {"local_scale": (longest**2 / 64**2,) * 2}, "extended_context": {"scale": (2.0, 2.0)}}
    crops = CropSection(local_px=16, window={"kind": kind, "aspect": (1.0, 1.0)} | share[kind])
    sizes = window_sizes(crops, 64, local=True)
    for place in (0.1, 0.5, 0.52):
        places = draw_places(np.array([[0.5, 0.5, place, place, 0.0]]), sizes, 64, "none")
        crop = cut(planes_of(board, "none"), np.zeros(1, np.int64), places, 16, sizes.longest_px(64))
        assert crop[..., 2:-2, 2:-2].std().item() < 0.1
        assert crop.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_tiles_crops_do_not_depend_on_its_neighbours(kind: str) -> None:
    recipe = recipe_of(crops=SMALL | {"window": WINDOWS[kind]}, augment={"hed_p": 0.5})
    ids = np.array([4, 900, 17, 2**40, 3, *range(100, 140)], dtype=np.int64)
    tiles = pattern(REGION_PX, len(ids))
    together = augment(tiles, ids, recipe)
    assert together.local_crops is not None
    for order in ([3, 0], [44], [20, 19, 18, 2]):
        apart = augment(tiles[order], ids[order], recipe)
        assert apart.local_crops is not None
        for ours, theirs in ((apart.global_crops, together.global_crops), (apart.local_crops, together.local_crops)):
            of_tile = theirs.unflatten(0, (-1, len(ids)))[:, order].flatten(0, 1)
            torch.testing.assert_close(ours, of_tile, atol=1e-6, rtol=1e-6)


def test_crops_follow_seed_sample_and_crop_number() -> None:
    tiles, ids = pattern(REGION_PX, 1).repeat(2, 1, 1, 1), np.array([1, 2], dtype=np.int64)
    views = augment(tiles, ids, recipe_of())
    assert views.global_crops.dtype == torch.float32
    assert torch.equal(views.global_crops, augment(tiles, ids, recipe_of()).global_crops)
    assert not torch.equal(views.global_crops, augment(tiles, ids, recipe_of(seed=1)).global_crops)
    assert not torch.equal(views.global_crops[0], views.global_crops[1])
    assert not torch.equal(views.global_crops[0], views.global_crops[2])
    assert views.local_crops is not None
    assert len({crop.numpy().tobytes() for crop in views.local_crops}) == 6


def test_without_local_crops_there_are_none() -> None:
    views = augment(pattern(REGION_PX, 2), np.arange(2), recipe_of(crops=SMALL | {"local_count": 0}))
    assert views.local_crops is None
    assert views.global_crops.shape == (4, 3, 56, 56)


def test_threads_change_no_bit_and_are_as_many_afterwards() -> None:
    tiles, ids = pattern(REGION_PX, 60), np.arange(60)
    alone = augment(tiles, ids, recipe_of())
    torch.set_num_threads(3)
    shared = augment(tiles, ids, recipe_of())
    assert torch.get_num_threads() == 3
    assert torch.equal(shared.global_crops, alone.global_crops)
    assert shared.local_crops is not None
    assert alone.local_crops is not None
    assert torch.equal(shared.local_crops, alone.local_crops)
    with pytest.raises(IndexError):  # a failure in a thread arrives, and the threads are given back
        augment(tiles[:5], ids, recipe_of())
    assert torch.get_num_threads() == 3


def test_tiles_are_left_as_they_were() -> None:
    tiles = pattern(REGION_PX, 2)
    before = tiles.clone()
    augment(tiles, np.arange(2), recipe_of(augment={"hed_p": 1.0}))
    assert torch.equal(tiles, before)


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
    got = apply_colour(images.clone(), colour_of(2, **change)).double()
    ((name, factor),) = change.items()
    for image, result in zip(images.double(), got, strict=True):
        luma = 0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        other = {"brightness": torch.zeros(()), "contrast": luma.mean(), "saturation": luma}[name]
        expected = (factor * image + (1.0 - factor) * other).clamp(0.0, 1.0)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("turn", [-0.5, -0.3, -0.1, 0.0, 0.07, 0.4, 0.5])
def test_hue_turns_as_in_colorsys(turn: float) -> None:
    images = random_images()
    images[0, :, 0, 0] = 0.3  # gray, black, white and two equal channels have no or an ambiguous hue
    images[0, :, 0, 1] = 0.0
    images[0, :, 0, 2] = 1.0
    images[0, :, 0, 3] = torch.tensor([0.7, 0.7, 0.2])
    images[0, :, 0, 4] = torch.tensor([0.7, 0.2, 0.7])
    images[0, :, 0, 5] = torch.tensor([0.2, 0.7, 0.7])
    got = apply_colour(images.clone(), colour_of(2, hue=turn))
    for image in range(2):
        for row in range(6):
            for column in range(6):
                hue, saturation, value = colorsys.rgb_to_hsv(*images[image, :, row, column].tolist())
                expected = colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)
                assert got[image, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_an_image_that_was_not_drawn_is_left_alone() -> None:
    images = random_images(3)
    drawn = np.array([False, True, False])
    for name in ("jittered", "gray", "solarize"):
        changes = colour_of(3, brightness=0.5, contrast=1.2, saturation=0.7, hue=0.1, jittered=False)
        got = apply_colour(images.clone(), Colour(**(vars(changes) | {name: drawn})))
        assert [torch.equal(ours, theirs) for ours, theirs in zip(got, images, strict=True)] == [True, False, True]


def test_grayscale_gives_three_equal_channels_of_the_luma() -> None:
    images = random_images()
    got = apply_colour(images.clone(), colour_of(2, gray=True))
    luma = 0.2989 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    torch.testing.assert_close(got, luma[:, None].expand(-1, 3, -1, -1))


def test_solarisation_inverts_values_from_half_on() -> None:
    image = torch.tensor([0.2, 127 / 255, 128 / 255, 0.9]).expand(1, 3, 1, 4)
    got = apply_colour(image.clone(), colour_of(solarize=True))
    torch.testing.assert_close(got[0, 0, 0], torch.tensor([0.2, 127 / 255, 127 / 255, 0.1]))


@pytest.mark.parametrize("sigma_px", [0.1, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("side_px", [42, 41])
def test_blur_is_gaussian_for_each_image_alone(sigma_px: float, side_px: int) -> None:
    images = random_images(2, side_px)
    changes = Colour(**(vars(colour_of(2)) | {"blur_sigma_px": np.array([0.0, sigma_px])}))
    got = apply_colour(images.clone(), changes)
    torch.testing.assert_close(got[0], images[0])
    # A border of zeros, and the same blur of ones, is what a kernel renormalised at the border comes to.
    sigmas, image = (0, sigma_px, sigma_px), images[1].double().numpy()
    soft, weight = (
        ndimage.gaussian_filter(values, sigmas, mode="constant", truncate=20.0)
        for values in (image, np.ones_like(image))
    )
    np.testing.assert_allclose(got[1].numpy(), soft / weight, atol=1e-4)
    flat = torch.full((2, 3, 9, 9), 0.4)
    torch.testing.assert_close(apply_colour(flat.clone(), changes), flat)


def test_normalise_is_per_channel() -> None:
    got = normalise(torch.full((1, 3, 1, 1), 0.5)).flatten().tolist()
    assert got == pytest.approx([(0.5 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])


def test_stains_change_in_optical_density() -> None:
    draws = uniforms(key(0, "test"), np.arange(4), 7)
    images = (random_images(4) * 254 + 1) / 255
    got = restain(images.clone(), draw_stains(draws, 1.0, 0.2)).double().numpy()
    matrix = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    for number in range(4):
        factor, offset = 0.8 + 0.4 * draws[number, 1:4], 0.4 * draws[number, 4:] - 0.2
        for row in range(6):
            for column in range(6):
                stains = -np.log10(images[number, :, row, column].double().numpy()) @ np.linalg.inv(matrix)
                expected = np.minimum(10.0 ** -((stains * factor + offset) @ matrix), 1.0)
                np.testing.assert_allclose(got[number, :, row, column], expected, rtol=1e-4)


def test_stains_of_strength_zero_are_the_identity_black_and_white_too() -> None:
    images = random_images(4)
    images[0], images[1] = 0.0, 1.0
    changes = draw_stains(uniforms(key(0, "test"), np.arange(4), 7), 1.0, 0.0)
    torch.testing.assert_close(restain(images.clone(), changes), images, atol=1e-6, rtol=0.0)
    tiles, ids = pattern(REGION_PX, 2), np.arange(2)
    still = augment(tiles, ids, recipe_of(augment=PLAIN | {"hed_p": 1.0, "hed_strength": 0.0}))
    torch.testing.assert_close(still.global_crops, augment(tiles, ids, recipe_of(augment=PLAIN)).global_crops)


def test_stains_are_changed_before_the_jitter_and_only_where_drawn() -> None:
    images = random_images(2)
    stains = draw_stains(uniforms(key(0, "test"), np.arange(2), 7), 1.0, 0.3) * np.array([0.0, 1.0])[:, None, None]
    changes = Colour(**(vars(colour_of(2, saturation=1.9)) | {"stains": stains}))
    expected = images.clone()
    expected[1:] = restain(images[1:].clone(), stains[1:])
    expected = apply_colour(expected, colour_of(2, saturation=1.9))
    torch.testing.assert_close(apply_colour(images.clone(), changes), expected)
