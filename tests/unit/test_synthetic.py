"""Synthetic slides and tiles: what OpenSlide makes of them, what was drawn where, and what colour does not tell."""

from pathlib import Path

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from histoscale.errors import DatasetError, SlideError
from histoscale.slides.synthetic import (
    GLASS,
    MAP_UM_PER_PX,
    SCANNERS,
    SyntheticSlide,
    make_labelled_tiles,
    make_slides,
    scan,
)
from histoscale.slides.synthetic_tissue import TISSUES, StainMaps, draw_tissue


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[SyntheticSlide]:
    return make_slides(tmp_path_factory.mktemp("slides"), seed=3, count=2)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiles")
    make_labelled_tiles(directory, seed=7, per_class=40)
    return directory


def read_level(path: Path, level: int) -> NDArray[np.uint8]:
    with openslide.OpenSlide(path) as slide:
        region = slide.read_region((0, 0), level, slide.level_dimensions[level])
        return np.asarray(region.convert("RGB"))


def pixels_of(slide: SyntheticSlide, level_1: NDArray[np.uint8], tissue: str) -> NDArray[np.uint8]:
    """Colours [N, 3] of level 1 at points well inside the patches of one tissue."""
    code = 0 if tissue == GLASS else 1 + TISSUES.index(tissue)
    same = slide.tissue_map == code
    inside = same.copy()
    for axis in (0, 1):
        for shift in (-3, 3):
            inside &= np.roll(same, shift, axis)
    y, x = (((places + 0.5) * MAP_UM_PER_PX / slide.mpp / 4).astype(int) for places in np.nonzero(inside))
    kept = (y < level_1.shape[0]) & (x < level_1.shape[1])
    return level_1[y[kept], x[kept]]


def test_openslide_reads_vendor_scale_and_levels(slides: list[SyntheticSlide]) -> None:
    for made, mpp, power in zip(slides, (0.2525, 0.499), ("40", "20"), strict=True):
        with openslide.OpenSlide(made.path) as slide:
            assert slide.properties["openslide.vendor"] == "aperio"
            assert float(slide.properties["openslide.mpp-x"]) == float(slide.properties["openslide.mpp-y"]) == mpp
            assert slide.properties["openslide.objective-power"] == power
            assert slide.level_downsamples == (1.0, 4.0, 16.0)
            assert slide.dimensions == (made.width_px0, made.height_px0)
            assert made.mpp == mpp


def test_each_level_is_the_mean_of_level_0(slides: list[SyntheticSlide]) -> None:
    level_0 = read_level(slides[1].path, 0).astype(np.float32)
    for level, factor in ((1, 4), (2, 16)):
        height, width = (side // factor for side in level_0.shape[:2])
        pooled = level_0.reshape(height, factor, width, factor, 3).mean((1, 3))
        read = read_level(slides[1].path, level).astype(np.float32)
        assert np.abs((read - pooled).mean((0, 1))).max() < 1.5
        agreement = np.corrcoef(read.ravel(), pooled.ravel())[0, 1]
        assert agreement > 0.97
        for axis in (0, 1):
            shifted = np.roll(read, 1, axis)
            assert np.corrcoef(shifted.ravel(), pooled.ravel())[0, 1] < agreement - 0.03


def test_every_slide_holds_every_tissue_and_glass(slides: list[SyntheticSlide]) -> None:
    for slide in slides:
        areas_um2 = np.bincount(slide.tissue_map.ravel(), minlength=1 + len(TISSUES)) * MAP_UM_PER_PX**2
        assert len(areas_um2) == 1 + len(TISSUES)
        assert areas_um2.min() > 0.05e6
        assert areas_um2[1:].sum() > 2.5e6


def test_map_says_what_was_drawn(slides: list[SyntheticSlide]) -> None:
    for slide in slides:
        level_1 = read_level(slide.path, 1)
        brightness = {name: pixels_of(slide, level_1, name).mean() for name in (*TISSUES, GLASS)}
        assert brightness[GLASS] > 225.0
        assert min(brightness[GLASS], brightness["adipose"]) > max(
            brightness[name] for name in TISSUES if name != "adipose"
        )
        dark = {name: (pixels_of(slide, level_1, name)[:, 0] < 110.0).mean() for name in (*TISSUES, GLASS)}
        assert dark[GLASS] == 0.0
        assert min(dark["lymphoid"], dark["tumour"]) > max(dark["muscle"], dark["stroma"], dark["adipose"])


def test_tissue_at_looks_up_the_map(slides: list[SyntheticSlide]) -> None:
    slide = slides[0]
    assert slide.tissue_at(0, 0) == GLASS
    assert slide.tissue_at(slide.width_px0 - 1, slide.height_px0 - 1) == GLASS
    row, column = np.argwhere(slide.tissue_map == 1 + TISSUES.index("muscle"))[0]
    scale = MAP_UM_PER_PX / slide.mpp
    assert slide.tissue_at((column + 0.5) * scale, (row + 0.5) * scale) == "muscle"


def test_same_seed_writes_the_same_bytes(slides: list[SyntheticSlide], tmp_path: Path) -> None:
    again = make_slides(tmp_path / "again", seed=3, count=1)
    assert again[0].path.read_bytes() == slides[0].path.read_bytes()
    np.testing.assert_array_equal(again[0].tissue_map, slides[0].tissue_map)
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        make_labelled_tiles(tmp_path / name, seed=seed, per_class=1, side_px=28)
    first, second, other = (
        [(tmp_path / name / tissue / "0000.png").read_bytes() for tissue in TISSUES]
        for name in ("first", "second", "other")
    )
    assert first == second
    assert not set(first) & set(other)


def test_slides_differ(slides: list[SyntheticSlide]) -> None:
    shape = np.minimum(slides[0].tissue_map.shape, slides[1].tissue_map.shape)
    first, second = (slide.tissue_map[: shape[0], : shape[1]] for slide in slides)
    assert (first != second).mean() > 0.3


def test_labelled_tiles_come_in_full_classes(tmp_path: Path) -> None:
    make_labelled_tiles(tmp_path, seed=1, per_class=3, side_px=56, mpp=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TISSUES)
    for tissue in TISSUES:
        paths = sorted((tmp_path / tissue).iterdir())
        assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"]
        for path in paths:
            with Image.open(path) as image:
                assert (image.mode, image.size) == ("RGB", (56, 56))


def test_colour_statistics_do_not_tell_the_tissues_apart(tiles: Path) -> None:
    statistics, labels = [], []
    for label, tissue in enumerate(TISSUES):
        for path in sorted((tiles / tissue).iterdir()):
            pixels = np.asarray(Image.open(path), dtype=np.float64)
            statistics.append(np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1))]))
            labels.append(label)
    x_NF, y_N = np.array(statistics), np.array(labels)
    x_NF = (x_NF - x_NF.mean(0)) / x_NF.std(0)
    held_out = np.arange(len(y_N)) % 2 == 1
    classifier = KNeighborsClassifier(n_neighbors=10).fit(x_NF[~held_out], y_N[~held_out])
    accuracy = balanced_accuracy_score(y_N[held_out], classifier.predict(x_NF[held_out]))
    assert accuracy < 0.6


def test_nuclei_have_their_size_in_microns() -> None:
    areas_um2 = []
    for um_per_px in (0.25, 0.5):
        maps = draw_tissue("lymphoid", (round(100 / um_per_px),) * 2, um_per_px, np.random.default_rng(5))
        areas_um2.append((maps.haematoxylin > 60).sum() * um_per_px**2)
    assert areas_um2[0] == pytest.approx(areas_um2[1], rel=0.1)


def test_scan_obeys_beer_and_lambert() -> None:
    amounts = np.array([[0, 128, 255]], dtype=np.uint8)
    maps = StainMaps(amounts, amounts[:, ::-1].copy())
    for scanner in SCANNERS:
        density = (
            maps.haematoxylin[..., None] / 255 * scanner.haematoxylin + maps.eosin[..., None] / 255 * scanner.eosin
        )
        np.testing.assert_allclose(scan(maps, scanner), scanner.white * 10.0**-density, atol=0.51)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="count of 1 or more"):
        make_slides(tmp_path, count=0)
    for arguments in ({"per_class": 0}, {"side_px": 0}, {"mpp": 0.0}):
        with pytest.raises(DatasetError, match="above zero"):
            make_labelled_tiles(tmp_path, **{"per_class": 1, **arguments})
    assert list(tmp_path.iterdir()) == []
