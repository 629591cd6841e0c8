"""The test of a tile at read time, on real tiles of every magnification and on faults made of them."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from histoscale.bench.tissue_derived import INKS, defocused, immunostained, inked, pigmented
from histoscale.bench.tissue_truth import picture
from histoscale.errors import SlideError
from histoscale.slides.tile_check import BACKGROUND, BLUR, FAULTS, PEN, TileCheck, sharpness, tile_fault

Pixels = NDArray[np.uint8]
CHECK = TileCheck(min_tissue=0.65, min_sharpness=0.45)
SIDE_PX = 392
CMU, TCGA = "slides/CMU-1-Small-Region.svs", "slides/TCGA-CR-7395-01A-01-TS1.svs"


def tile(data: Path, name: str, shrink: int = 1, at: tuple[float, float] = (0.5, 0.5)) -> Pixels:
    """A tile around a place (x, y as shares) of a picture that is averaged down."""
    image = picture(data / name).reduce(shrink)
    left, top = (round(place * side - SIDE_PX / 2) for place, side in zip(at, image.size, strict=True))
    return np.asarray(image.crop((left, top, left + SIDE_PX, top + SIDE_PX)))


@pytest.mark.parametrize(
    ("name", "shrink", "at", "mpp"),
    [
        (TCGA, 1, (0.35, 0.55), 0.25),
        (TCGA, 2, (0.35, 0.55), 0.5),
        (TCGA, 4, (0.35, 0.55), 1.0),
        (TCGA, 8, (0.5, 0.5), 2.0),
        (CMU, 1, (0.44, 0.8), 0.5),
        (CMU, 2, (0.45, 0.75), 1.0),
        ("sections/C2_5714_HE_BT_C2.jpg", 1, (0.6, 0.6), 0.69),
        ("sections/C2_5714_HE_BT_C2.jpg", 3, (0.6, 0.6), 2.07),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_tissue_is_fit_at_every_magnification_and_unfit_out_of_focus(
    shared_data: Path, name: str, shrink: int, at: tuple[float, float], mpp: float
) -> None:
    rgb = tile(shared_data, name, shrink, at)
    assert tile_fault(rgb, mpp, CHECK) is None
    for sigma_px in (2.5, 4.0, 8.0):
        assert tile_fault(defocused(rgb, sigma_px), mpp, CHECK) == BLUR
    assert sharpness(rgb, mpp) > sharpness(defocused(rgb, 1.0), mpp) > sharpness(defocused(rgb, 2.0), mpp)


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("name", [CMU, TCGA])
def test_a_tile_under_ink_is_refused(shared_data: Path, ink: str, name: str) -> None:
    rgb = tile(shared_data, name, at=(0.44, 0.8) if name == CMU else (0.35, 0.55))
    assert tile_fault(inked(rgb, ink, 2.0), 0.5, CHECK) == PEN
    half = rgb.copy()
    half[:, :200] = inked(rgb, ink, 2.0)[:, :200]
    assert tile_fault(half, 0.5, CHECK) == PEN


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("no-tissue-green-pen.png", PEN),
        ("no-tissue-red-pen.png", PEN),
        ("medium-nuclei-score-green-pen-level1.png", PEN),
        ("very-low-nuclei-score-red-pen-level1.png", PEN),
        ("no-tissue.png", BACKGROUND),
        ("no-tissue2.png", BACKGROUND),
        ("no-tissue-line.png", BACKGROUND),
        ("almost-white-1.png", BACKGROUND),
        ("almost-white-2.png", BACKGROUND),
    ],
)
def test_glass_and_pen_are_refused_with_their_reason(shared_data: Path, name: str, fault: str) -> None:
    rgb = tile(shared_data, f"tissue_fixtures/tiles/{name}")
    assert tile_fault(rgb, 1.0 if "level1" in name else 0.5, CHECK) == fault
    assert fault in FAULTS


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_glass_of_the_colour_of_a_stain_is_refused_for_it_shows_nothing_sharp(shared_data: Path) -> None:
    rgb = tile(shared_data, "sections/B4_BT10737_D2_HE.jpg", at=(0.6, 0.15))
    assert tile_fault(rgb, 0.69, CHECK) == BLUR


@pytest.mark.parametrize("dab", [0.0, 0.7, 1.5])
def test_brown_and_pale_blue_stains_are_tissue(shared_data: Path, dab: float) -> None:
    assert tile_fault(immunostained(tile(shared_data, TCGA, at=(0.35, 0.55)), dab), 0.25, CHECK) is None


@pytest.mark.parametrize("density", [0.5, 1.0, 2.0])
def test_melanin_is_no_ink(shared_data: Path, density: float) -> None:
    assert tile_fault(pigmented(tile(shared_data, CMU, at=(0.44, 0.8)), density), 0.5, CHECK) is None


@pytest.mark.parametrize(
    ("kind", "fit"), [("ADI", 10), ("LYM", 14), ("MUC", 14), ("MUS", 14), ("STR", 14), ("TUM", 14)]
)
def test_labelled_tissues_are_fit(shared_data: Path, kind: str, fit: int) -> None:
    tiles = [path for path in sorted(shared_data.glob("tiles/crc_val_he_7k_*/*")) if path.name.startswith(kind)]
    assert len(tiles) == 14
    assert sum(tile_fault(np.asarray(picture(path)), 0.5, CHECK) is None for path in tiles) >= fit


def test_zero_switches_a_test_off() -> None:
    blank = np.full((64, 64, 3), 240, np.uint8)
    inked_blank = np.full((64, 64, 3), (60, 160, 130), np.uint8)
    assert tile_fault(blank, 0.5, TileCheck(0.65, 0.0)) == BACKGROUND
    assert tile_fault(inked_blank, 0.5, TileCheck(0.65, 0.0)) == PEN
    assert tile_fault(blank, 0.5, TileCheck(0.0, 0.45)) == BLUR
    assert tile_fault(inked_blank, 0.5, TileCheck(0.0, 0.0)) is None


def test_the_share_of_tissue_is_that_of_the_area() -> None:
    noise = np.random.default_rng(0).integers(-30, 30, (384, 384, 1))
    rgb = np.where(np.arange(384)[None, :, None] < 192, np.array([200, 120, 170]) + noise, 240).astype(np.uint8)
    assert tile_fault(rgb, 0.5, TileCheck(0.49, 0.0)) is None
    assert tile_fault(rgb, 0.5, TileCheck(0.51, 0.0)) == BACKGROUND


def test_a_tile_is_left_as_it_was_and_may_be_a_view() -> None:
    wide = np.random.default_rng(0).integers(0, 255, (400, 800, 3), np.uint8)
    view, before = wide[4:396, 4:396], wide.copy()
    assert sharpness(view, 0.5) == sharpness(view.copy(), 0.5)
    assert tile_fault(view, 0.5, CHECK) == tile_fault(view.copy(), 0.5, CHECK)
    assert np.array_equal(wide, before)


@pytest.mark.parametrize(
    "rgb", [np.zeros((15, 64, 3), np.uint8), np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32)]
)
def test_what_is_no_tile_is_refused(rgb: Pixels) -> None:
    with pytest.raises(SlideError, match="cannot be checked"):
        tile_fault(rgb, 0.5, CHECK)


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tile_must_have_a_scale(mpp: float) -> None:
    with pytest.raises(SlideError, match="no scale"):
        tile_fault(np.zeros((64, 64, 3), np.uint8), mpp, CHECK)
