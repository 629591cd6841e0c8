"""The tissue mask on labelled thumbnails and tiles, and on drawn stains, inks and backgrounds."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histoscale.bench.tissue_derived import INKS as REAL_INKS
from histoscale.bench.tissue_derived import bubble, defocused, inked, pigmented
from histoscale.bench.tissue_truth import THUMBNAILS, TISSUE, Box, cut, picture, thumbnail
from histoscale.errors import SlideError
from histoscale.slides.tissue import MASK_UM_PER_PX, tissue_mask

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def fixture(shared_data: Path, name: str, um_per_px: float) -> tuple[Pixels, float]:
    """A fixture on white at the mask's scale, or at its own where that is coarser; its um/px is an estimate."""
    rgba = Image.open(shared_data / "tissue_fixtures" / name).convert("RGBA")
    image = Image.new("RGB", rgba.size, "white")
    image.paste(rgba, mask=rgba.getchannel("A"))
    if um_per_px < MASK_UM_PER_PX:
        scale = um_per_px / MASK_UM_PER_PX
        size = (round(image.width * scale), round(image.height * scale))
        image, um_per_px = image.resize(size, Image.Resampling.BICUBIC), MASK_UM_PER_PX
    return np.asarray(image), um_per_px


def mask_of(shared_data: Path, name: str, um_per_px: float) -> Mask:
    rgb, scale = fixture(shared_data, name, um_per_px)
    mask = tissue_mask(rgb, scale)
    assert mask.shape == rgb.shape[:2]
    assert mask.dtype == np.bool_
    return mask


@pytest.mark.parametrize(
    ("name", "um_per_px"),
    [
        ("tiles/no-tissue.png", 1),
        ("tiles/no-tissue2.png", 1),
        ("tiles/no-tissue-line.png", 1),
        ("tiles/no-tissue-green-pen.png", 1),
        ("tiles/no-tissue-red-pen.png", 1),
        ("tiles/almost-white-1.png", 1),
        ("tiles/almost-white-2.png", 1),
        ("tiles/almost-white-ihc.png", 20),
        ("tiles/liver-level2-38626-13514-39426-14315.png", 8),
    ],
)
def test_tiles_without_tissue_are_rejected(shared_data: Path, name: str, um_per_px: float) -> None:
    assert mask_of(shared_data, name, um_per_px).mean() < 0.02


@pytest.mark.parametrize(
    ("name", "um_per_px", "low", "high"),
    [
        ("tiles/high-nuclei-score-level0.png", 0.5, 0.98, 1),
        ("tiles/medium-nuclei-score-level0.png", 0.5, 0.98, 1),
        ("tiles/very-low-nuclei-score-level0.png", 0.5, 0.98, 1),
        ("tiles/medium-nuclei-score-level1-2.png", 1, 0.98, 1),
        ("tiles/medium-nuclei-score-level1.png", 1, 0.6, 0.98),
        ("tiles/low-nuclei-score-level0.png", 0.5, 0.45, 1),  # fat
        ("tiles/low-nuclei-score-level1.png", 1, 0.85, 1),  # fat
        ("tiles/high-nuclei-score-level2.png", 4, 0.11, 0.18),
        ("tiles/medium-nuclei-score-level2.png", 4, 0.76, 0.86),
        ("tiles/tissue-level0-4302-10273-4814-10785.png", 0.5, 0.95, 1),
        ("tiles/tissue-level0-7352-11762-7864-12274.png", 0.5, 0.85, 0.97),
        ("tiles/tissue-level2-1784-6289-5880-10386.png", 4, 0.7, 0.85),
        ("tiles/tissue-level2-3000-7666-7096-11763.png", 4, 0.75, 0.9),
        ("tiles/tissue-level2-4640-4649-8736-8746.png", 4, 0.72, 0.87),
        ("tiles/tissue-level2-4760-5241-8856-9338.png", 4, 0.72, 0.87),
        ("tiles/liver-level2-10907-7808-11707-8608.png", 8, 0.98, 1),
        ("tiles/liver-level2-20914-13715-21714-14515.png", 8, 0.12, 0.22),
        ("tiles/liver-level2-57138-8209-57938-9009.png", 8, 0.65, 0.78),
        ("tiles/kidney-ihc-level0-310-500-360-530.png", 20, 0.75, 1),
        ("tiles/kidney-ihc-level0-330-480-380-510.png", 20, 0.3, 0.5),
        ("tiles/kidney-ihc-level0-340-520-390-550.png", 20, 0.85, 1),
        ("tiles/kidney-ihc-level0-350-530-360-540.png", 20, 0.98, 1),
        ("pil-images-rgb/tcga-lung-rgb.png", 0.5, 0.98, 1),
    ],
)
def test_tissue_is_accepted_to_its_share(
    shared_data: Path, name: str, um_per_px: float, low: float, high: float
) -> None:
    assert low <= mask_of(shared_data, name, um_per_px).mean() <= high


FAINT = {"very-low-nuclei-score-red-pen-level1.png": 0.3, "medium-nuclei-score-level1.png": 0.7}
"""Pictures with strands so pale that not all of what they span is found, and the share that is."""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "um_per_px", "boxes"), THUMBNAILS, ids=[name for name, _, _ in THUMBNAILS])
def test_boxes_labelled_by_eye(shared_data: Path, name: str, um_per_px: float, boxes: dict[str, list[Box]]) -> None:
    rgb, scale = thumbnail(shared_data, name, um_per_px)
    mask = tissue_mask(rgb, scale)
    # Thumbnails coarser than the masks of an index are held to less.
    accepted, refused = (0.9, 0.05) if scale < 10 else (0.8, 0.15)
    accepted = FAINT.get(Path(name).name, accepted)
    for category, places in boxes.items():
        for box in places:
            share = float(cut(mask, box).mean())
            assert share > accepted if category in TISSUE else share < refused, (category, box)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_sections_are_found_on_tinted_glass(shared_data: Path) -> None:
    sections = sorted((shared_data / "sections").glob("*.jpg"))
    assert len(sections) == 2
    # Shares of the picture that the sections cover, from their outlines drawn by hand.
    for path, (low, high) in zip(sections, [(0.24, 0.31), (0.16, 0.21)], strict=True):
        with Image.open(path) as image:
            image.draft("RGB", (image.width // 8, image.height // 8))
            rgb = np.asarray(image.convert("RGB"))
        mask = tissue_mask(rgb, 0.69 * 8)
        assert low < mask.mean() < high
        height = mask.shape[0]
        assert mask[: height // 4].mean() < 0.01


@pytest.fixture(scope="module")
def slide(shared_data: Path) -> tuple[Pixels, Box, Box]:
    """A slide at 8 um/px, a box of its tissue and one of its glass."""
    name, um_per_px, boxes = next(row for row in THUMBNAILS if row[0].startswith("slides/CMU"))
    return thumbnail(shared_data, name, um_per_px)[0], boxes["H&E"][0], boxes["glass"][0]


def changed(rgb: Pixels, box: Box, part: Pixels) -> Pixels:
    copy = rgb.copy()
    cut(copy, box)[:] = part
    return copy


@pytest.mark.parametrize("ink", REAL_INKS)
def test_translucent_ink_is_refused_on_glass_and_denser_ink_on_tissue(slide: tuple[Pixels, Box, Box], ink: str) -> None:
    rgb, tissue, glass = slide
    on_glass = changed(rgb, glass, inked(cut(rgb, glass), ink, 1.6 if ink == "black" else 0.8))
    assert cut(tissue_mask(on_glass, 8.0), glass).mean() < 0.02
    on_tissue = changed(rgb, tissue, inked(cut(rgb, tissue), ink, 1.6))
    assert cut(tissue_mask(on_tissue, 8.0), tissue).mean() < 0.1


@pytest.mark.parametrize("density", [0.5, 1.0, 2.0])
def test_melanin_is_tissue(slide: tuple[Pixels, Box, Box], density: float) -> None:
    rgb, tissue, _ = slide
    pigment = changed(rgb, tissue, pigmented(cut(rgb, tissue), density))
    assert cut(tissue_mask(pigment, 8.0), tissue).mean() > 0.95


@pytest.mark.parametrize("sigma_px", [1.5, 2.0])
@pytest.mark.parametrize("um_per_px", [4.0, 8.0, 16.0])
def test_areas_out_of_focus_are_no_tissue(shared_data: Path, um_per_px: float, sigma_px: float) -> None:
    image = picture(shared_data / "slides" / "CMU-1-Small-Region.svs").reduce(round(um_per_px * 2))
    box = (0.4, 0.6, 0.48, 0.9)
    assert cut(tissue_mask(np.asarray(image), um_per_px), box).mean() > 0.98
    assert cut(tissue_mask(defocused(np.asarray(image), sigma_px), um_per_px), box).mean() < 0.15


@pytest.mark.parametrize("rim_px", [4, 8, 15])
def test_air_bubbles_are_no_tissue(slide: tuple[Pixels, Box, Box], rim_px: float) -> None:
    rgb, _, glass = slide
    bare = cut(rgb, glass)
    centre = (bare.shape[0] / 2, bare.shape[1] / 2)
    under = changed(rgb, glass, bubble(bare, centre, 0.8 * min(centre), rim_px))
    assert cut(under, glass).min() < 120
    assert cut(tissue_mask(under, 8.0), glass).mean() == 0


def test_an_even_film_of_stain_is_no_tissue_and_even_tissue_is() -> None:
    film = painted((238, 218, 230), noise=1)
    assert tissue_mask(film, 8.0)[100:300, 100:300].mean() == 0
    assert tissue_mask(painted((222, 160, 190), noise=1), 8.0)[100:300, 100:300].mean() == 1


def painted(colour: tuple[int, int, int], *, noise: float = 4, glass: tuple[int, int, int] = (242, 242, 242)) -> Pixels:
    """A field of 3.2 mm with one block of a colour in its middle, 8 um/px."""
    picture = np.empty((400, 400, 3))
    picture[:] = glass
    picture[50:350, 50:350] = colour
    picture = ndimage.gaussian_filter(picture, (1.5, 1.5, 0))
    picture += np.random.default_rng(0).normal(0, noise, picture.shape)
    return np.asarray(picture.clip(0, 255).round(), np.uint8)


STAINS = {
    "haematoxylin and eosin": (205, 140, 180),
    "pale eosin": (232, 212, 222),
    "strong eosin": (215, 90, 135),
    "dense nuclei": (80, 55, 125),
    "pale DAB": (200, 165, 130),
    "DAB": (150, 105, 75),
    "dense DAB": (90, 55, 40),
    "blue counterstain": (150, 165, 205),
    "grey counterstain": (143, 148, 169),
}
INKS = {
    "green": (60, 160, 130),
    "dark green": (0, 120, 60),
    "red": (210, 40, 50),
    "blue": (50, 90, 200),
    "light blue": (90, 150, 230),
    "black": (35, 35, 40),
}


@pytest.mark.parametrize("colour", STAINS.values(), ids=STAINS)
@pytest.mark.parametrize("glass", [(242, 242, 242), (255, 255, 255), (245, 235, 241)])
def test_stains_are_tissue(colour: tuple[int, int, int], glass: tuple[int, int, int]) -> None:
    mask = tissue_mask(painted(colour, glass=glass), 8.0)
    assert mask[55:345, 55:345].mean() > 0.95
    assert mask[:40].mean() == 0


@pytest.mark.parametrize("colour", INKS.values(), ids=INKS)
def test_inks_are_not_tissue(colour: tuple[int, int, int]) -> None:
    assert tissue_mask(painted(colour), 8.0).mean() < 0.01


@pytest.mark.parametrize("colour", [(245, 228, 238), (235, 205, 222), (232, 212, 205), (225, 225, 235)])
def test_tinted_background_is_not_tissue(colour: tuple[int, int, int]) -> None:
    y, x = np.mgrid[0:400, 0:400] / 400
    shading = 6 * (x + y - 1)
    noise = np.random.default_rng(0).normal(0, 3, (400, 400, 3))
    background = (np.array(colour) + shading[..., None] + noise).clip(0, 255).astype(np.uint8)
    assert tissue_mask(background, 8.0).mean() < 0.01
    background[:, :60] = 255
    assert tissue_mask(background, 8.0).mean() < 0.01


def test_specks_and_thin_lines_are_dropped_by_their_size_in_um() -> None:
    picture = np.full((200, 200, 3), 242, np.uint8)
    picture[100:112, 100:112] = (180, 100, 150)
    picture[40:42] = (120, 120, 125)
    assert not tissue_mask(picture, 8.0).any()
    assert tissue_mask(picture, 32.0)[100:112, 100:112].all()


@pytest.mark.parametrize(
    "rgb", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_not_an_rgb_image_is_refused(rgb: Pixels) -> None:
    with pytest.raises(SlideError, match="not an RGB image"):
        tissue_mask(rgb, 8.0)


@pytest.mark.parametrize("um_per_px", [0.0, -8.0, float("nan")])
def test_thumbnail_must_have_a_scale(um_per_px: float) -> None:
    with pytest.raises(SlideError, match="no scale"):
        tissue_mask(np.zeros((4, 4, 3), np.uint8), um_per_px)
