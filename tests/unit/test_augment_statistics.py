"""Every probability and every range of the augmentation, over 10,000 draws each: within four standard errors."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from histoscale.augment.colour import COLOUR_DRAWS, Colour, draw_colour
from histoscale.augment.geometry import GEOMETRY_DRAWS, Places, draw_places, window_sizes
from histoscale.augment.stain import STAIN_DRAWS, draw_stains
from histoscale.config.recipe import AugmentSection, CropSection, ExtendedContext, RandomResized
from histoscale.seeding import key, uniforms

COUNT = 10_000
REGION_PX = 392
WINDOWS = {
    "side": ExtendedContext(),
    "area": ExtendedContext(scale=(0.5, 1.5), scale_of="area", aspect=(0.8, 1.1)),
    "resized": RandomResized(),
}
DENSITIES = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def draws_of(width: int, purpose: str = "test") -> NDArray[np.float64]:
    return uniforms(key(0, purpose), np.arange(COUNT), width)


def places_of(window: ExtendedContext | RandomResized, *, local: bool = False, poses: str = "dihedral") -> Places:
    sizes = window_sizes(CropSection(window=window), REGION_PX, local=local)
    return draw_places(draws_of(GEOMETRY_DRAWS), sizes, REGION_PX, poses)


def colours_of(strengths: AugmentSection, blur_p: float = 0.5, solarize_p: float = 0.2) -> Colour:
    return draw_colour(draws_of(COLOUR_DRAWS), strengths, np.full(COUNT, blur_p), np.full(COUNT, solarize_p))


def spans(places: Places) -> tuple[NDArray[np.float64], ...]:
    """Left, top, width and height in px of the region."""
    turned = places.turned[:, None]
    x, y = np.where(turned, places.rows, places.columns), np.where(turned, places.columns, places.rows)
    return np.minimum(x[:, 0], x.sum(axis=1)), np.minimum(y[:, 0], y.sum(axis=1)), np.abs(x[:, 1]), np.abs(y[:, 1])


def assert_uniform(values: NDArray[np.float64], low: float, high: float) -> None:
    """In range, filling it, and by the Kolmogorov-Smirnov test, at the significance of four standard errors."""
    assert values.min() >= low - 1e-6 * abs(low) - 1e-9
    assert values.max() <= high + 1e-6 * abs(high) + 1e-9
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 6e-5


def assert_share(chosen: NDArray[np.bool_], probability: float) -> None:
    assert abs(chosen.mean() - probability) <= 4.0 * math.sqrt(probability * (1.0 - probability) / len(chosen))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kind", ["side", "area"])
def test_windows_of_extended_context_have_their_sizes(kind: str, local: bool) -> None:
    window, side_px = WINDOWS[kind], 98 if local else 224
    _, _, width, height = spans(places_of(window, local=local))
    area = width * height / side_px**2
    assert_uniform(np.sqrt(area) if kind == "side" else area, *window.scale)
    assert_uniform(np.log(width / height), *np.log(window.aspect))


@pytest.mark.parametrize(("local", "scale"), [(False, (0.32, 0.7)), (True, (0.05, 0.32))])
def test_windows_of_a_random_resized_crop_are_shares_of_the_region(local: bool, scale: tuple[float, float]) -> None:
    # All of these fit, for the largest is sqrt(0.7 * 4 / 3) of the region's side.
    _, _, width, height = spans(places_of(RandomResized(global_scale=(0.32, 0.7)), local=local))
    assert_uniform(width * height / REGION_PX**2, *scale)
    assert_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3))


def test_a_window_that_would_not_fit_is_shrunk_to_the_region_and_keeps_its_aspect() -> None:
    _, _, width, height = spans(places_of(RandomResized()))
    draws = draws_of(GEOMETRY_DRAWS)
    area = (0.32 + 0.68 * draws[:, 0]) * REGION_PX**2
    aspect = np.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
    np.testing.assert_allclose(width / height, aspect, rtol=1e-9)
    fits = np.maximum(np.sqrt(area * aspect), np.sqrt(area / aspect)) <= REGION_PX
    assert 0.05 < (~fits).mean() < 0.3
    np.testing.assert_allclose((width * height)[fits], area[fits], rtol=1e-9)
    np.testing.assert_allclose(np.maximum(width, height)[~fits], REGION_PX, rtol=1e-12)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_stay_inside_and_reach_every_place(kind: str, local: bool) -> None:
    window = WINDOWS[kind]
    places = places_of(window, local=local)
    left, top, width, height = spans(places)
    longest_px = window_sizes(CropSection(window=window), REGION_PX, local=local).longest_px(REGION_PX)
    for start, extent in ((left, width), (top, height)):
        assert start.min() >= -1e-9
        assert (start + extent).max() <= REGION_PX + 1e-9
        assert extent.max() <= longest_px * (1.0 + 1e-12)
        room = REGION_PX - extent
        free = room > 1.0
        assert_uniform(start[free] / room[free], 0.0, 1.0)
    free = np.minimum(REGION_PX - width, REGION_PX - height) > 1.0
    rooms = np.stack([left / np.maximum(REGION_PX - width, 1e-9), top / np.maximum(REGION_PX - height, 1e-9)])
    assert abs(np.corrcoef(rooms[:, free])[0, 1]) < 4.0 / math.sqrt(free.sum())


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize(("poses", "count"), [("dihedral", 8), ("flips", 4), ("none", 1)])
def test_poses_are_equally_likely(poses: str, count: int, kind: str) -> None:
    places = places_of(WINDOWS[kind], poses=poses)
    signs = np.stack([places.turned, places.rows[:, 1] < 0, places.columns[:, 1] < 0], axis=1)
    kinds, counts = np.unique(signs, axis=0, return_counts=True)
    assert len(kinds) == count
    assert places.turned.any() == (poses == "dihedral")
    for each in counts:
        assert abs(each / COUNT - 1 / count) <= 4.0 * math.sqrt(1 / count * (1 - 1 / count) / COUNT)


@pytest.mark.parametrize(
    "strengths",
    [
        AugmentSection(),
        AugmentSection(brightness=0.7, contrast=0.1, saturation=1.4, hue=0.5, jitter_p=0.35, grayscale_p=0.5),
    ],
)
def test_jitter_has_its_probabilities_and_ranges(strengths: AugmentSection) -> None:
    colour = colours_of(strengths)
    assert_share(colour.jittered, strengths.jitter_p)
    assert_share(colour.gray, strengths.grayscale_p)
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(strengths, name)
        assert_uniform(getattr(colour, name)[colour.jittered], max(0.0, 1.0 - strength), 1.0 + strength)
    assert_uniform(colour.hue[colour.jittered], -strengths.hue, strengths.hue)


@pytest.mark.parametrize(("blur_p", "solarize_p"), [(0.0, 0.0), (0.9, 0.2), (0.5, 1.0), (1.0, 0.5)])
def test_blur_and_solarisation_have_their_shares(blur_p: float, solarize_p: float) -> None:
    colour = colours_of(AugmentSection(), blur_p, solarize_p)
    assert_share(colour.blur_sigma_px > 0.0, blur_p)
    assert_share(colour.solarize, solarize_p)
    if blur_p:
        assert_uniform(colour.blur_sigma_px[colour.blur_sigma_px > 0.0], 0.1, 2.0)


def test_the_changes_of_an_image_are_independent() -> None:
    colour = colours_of(AugmentSection())
    columns = np.stack([np.asarray(each, dtype=np.float64) for each in vars(colour).values() if each is not None])
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(COUNT)  # the largest of 28 pairs


@pytest.mark.parametrize(("probability", "strength"), [(0.0, 0.05), (0.3, 0.05), (1.0, 0.2)])
def test_stains_have_their_share_and_ranges(probability: float, strength: float) -> None:
    changes = draw_stains(draws_of(STAIN_DRAWS), probability, strength)
    changed = (changes != 0.0).any(axis=(1, 2))
    assert_share(changed, probability)
    if not probability:
        return
    # Undone: the linear part is similar to the diagonal of factors, and the constant is made of the offsets.
    linear = changes[changed, :, :3].transpose(0, 2, 1) + np.eye(3)
    factors = DENSITIES @ linear @ np.linalg.inv(DENSITIES)
    offsets = changes[changed, :, 3] / -math.log(10.0) @ np.linalg.inv(DENSITIES)
    np.testing.assert_allclose(factors * (1 - np.eye(3)), 0.0, atol=1e-12)
    for stain in range(3):
        assert_uniform(factors[:, stain, stain], 1.0 - strength, 1.0 + strength)
        assert_uniform(offsets[:, stain], -strength, strength)
    both = np.corrcoef(np.concatenate([np.einsum("bii->ib", factors), offsets.T])) - np.eye(6)
    assert np.abs(both).max() < 4.5 / math.sqrt(changed.sum())


def test_draws_of_different_purposes_and_crops_are_independent() -> None:
    purposes = [key(0, "augment", purpose, crop) for purpose in ("place", "colour", "stain") for crop in range(10)]
    columns = np.concatenate([uniforms(each, np.arange(COUNT), 5) for each in purposes], axis=1)
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    # The largest of 11,175 pairs: about 4 standard errors are expected, and 5.5 come once in 2,000 tries.
    assert np.abs(correlation).max() < 5.5 / math.sqrt(COUNT)
