"""Exact scale, position, borders, levels and refusals of slide reads, against drawn rulers and OpenSlide."""

import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histoscale.errors import SlideError
from histoscale.slides import resample
from histoscale.slides.openslide_reader import open_slide

RULER_UM = 32.0
LINE_SIGMA_UM = 2.5
Pixels = NDArray[np.uint8]


def write_pyramid(
    path: Path,
    levels: list[Pixels],
    description: str | None,
    *,
    resolution: tuple[float, float] = (1, 1),
    unit: str = "NONE",
) -> None:
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate(levels):
            tiff.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                compressionargs={"level": 1},
                description=description,
                metadata=None,
                subfiletype=0 if i == 0 else 1,
                resolution=resolution,
                resolutionunit=unit,
            )


def aperio(mpp: float | None) -> str:
    return "Aperio Image Library v12.0.0\r\n" + ("x" if mpp is None else f"x|AppMag = 20|MPP = {mpp}")


def ruler(width: int, height: int, mpp: float) -> Pixels:
    def profile(length: int) -> NDArray[np.float64]:
        at_um = (np.arange(length) + 0.5) * mpp
        from_line_um = (at_um + RULER_UM / 2) % RULER_UM - RULER_UM / 2
        return np.asarray(1 - 0.7 * np.exp(-0.5 * (from_line_um / LINE_SIGMA_UM) ** 2))

    gray = 240 * profile(height)[:, None] * profile(width)[None, :]
    return np.repeat(gray.round().astype(np.uint8)[..., None], 3, axis=2)


def box_reduced(image: Pixels, factor: int) -> Pixels:
    h, w = image.shape[0] // factor, image.shape[1] // factor
    blocks = image[: h * factor, : w * factor].reshape(h, factor, w, factor, 3).astype(np.float64)
    return np.asarray(blocks.mean(axis=(1, 3)).round(), np.uint8)


@pytest.fixture(scope="module", params=[0.25, 0.2525, 0.499, 0.5])
def ruler_slide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    mpp: float = request.param
    path = tmp_path_factory.mktemp("ruler") / "ruler.svs"
    # Sizes that 4 does not divide: OpenSlide then estimates a downsample of 4.0026.
    image = ruler(3075, 3073, mpp)
    write_pyramid(path, [image, box_reduced(image, 4), box_reduced(image, 16)], aperio(mpp))
    return path, mpp


def line_centres_px(
    profile: NDArray[np.float64], expected_px: NDArray[np.float64], reach: float
) -> NDArray[np.float64]:
    centres = []
    for expected in expected_px:
        low, high = round(expected - reach), round(expected + reach)
        dark = profile[low:high].max() - profile[low:high]
        centres.append(float((dark * (np.arange(low, high) + 0.5)).sum() / dark.sum()))
    return np.array(centres)


@pytest.mark.parametrize("wanted", [0.25, 0.5, 1.0, 2.0])
def test_ruler_lines_have_the_wanted_spacing_and_place(ruler_slide: tuple[Path, float], wanted: float) -> None:
    path, native = ruler_slide
    side_px = int(400 / wanted)
    # The far end of the slide, where an error of the downsample would have added up.
    corner_px0 = (3000 - 400 / native - 0.3, 3000 - 400 / native - 31.7)
    slide = open_slide(path)
    tile = slide.read(*corner_px0, side_px, wanted).astype(np.float64)
    slide.close()
    for axis in (0, 1):
        profile = tile.mean(axis=(axis, 2))
        start_um = corner_px0[axis] * native
        lines_um = np.arange(RULER_UM, 3000.0, RULER_UM)
        expected_px = (lines_um - start_um) / wanted
        reach = 0.4 * RULER_UM / wanted
        expected_px = expected_px[(expected_px > reach + 1) & (expected_px < side_px - reach - 1)]
        centres = line_centres_px(profile, expected_px, reach)
        assert len(centres) >= 9
        spacing_px, _ = np.polyfit(np.arange(len(centres)), centres, 1)
        assert spacing_px * wanted == pytest.approx(RULER_UM, rel=0.005)
        assert np.abs(centres - expected_px).max() < 0.6


def test_thumbnail_has_the_exact_scale_and_covers_the_slide(ruler_slide: tuple[Path, float]) -> None:
    path, native = ruler_slide
    thumbnail = open_slide(path).thumbnail(3.0).astype(np.float64)
    assert thumbnail.shape == (int(np.ceil(3073 * native / 3)), int(np.ceil(3075 * native / 3)), 3)
    lines_px = np.arange(RULER_UM, 3073 * native - RULER_UM, RULER_UM) / 3.0
    for axis in (0, 1):
        centres = line_centres_px(thumbnail.mean(axis=(axis, 2)), lines_px, 4.2)
        spacing_px, _ = np.polyfit(np.arange(len(centres)), centres, 1)
        assert spacing_px * 3.0 == pytest.approx(RULER_UM, rel=0.005)
        assert np.abs(centres - lines_px).max() < 0.6


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Levels 1, 4, 16 at 0.25 um/px, each of its own colour, so that a read shows where it came from."""
    path = tmp_path / "patient-0042.svs"
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    levels = [np.full((2048 // f, 2048 // f, 3), c, np.uint8) for f, c in zip((1, 4, 16), colours, strict=True)]
    write_pyramid(path, levels, aperio(0.25))
    return path


@pytest.mark.parametrize(
    ("mpp", "level"), [(0.2, 0), (0.25, 0), (0.5, 0), (0.99, 0), (1.0, 1), (1.5, 1), (3.9, 1), (4.0, 2), (8.0, 2)]
)
def test_reads_come_from_the_nearest_finer_level(coloured: Path, mpp: float, level: int) -> None:
    slide = open_slide(coloured)
    inside = slide.read(512, 512, 16, mpp)
    assert inside.dtype == np.uint8
    assert inside.shape == (16, 16, 3)
    assert (inside.argmax(axis=2) == level).all()
    assert (slide.thumbnail(mpp)[1:-1, 1:-1].argmax(axis=2) == level).all()


def test_beyond_the_border_is_white(coloured: Path) -> None:
    slide = open_slide(coloured)
    tile = slide.read(-100, 2048 - 30, 200, 0.25)
    assert (tile[:30, 100:] == (200, 10, 10)).all()
    assert (tile[30:] == 255).all()
    assert (tile[:, :100] == 255).all()
    assert (slide.read(-90_000, 90_000, 64, 0.7) == 255).all()


def test_info_holds_geometry_optics_and_vendor(coloured: Path) -> None:
    info = open_slide(coloured).info
    assert (info.width_px0, info.height_px0) == (2048, 2048)
    assert (info.mpp, info.mpp_origin, info.vendor) == (0.25, "vendor", "aperio")
    assert info.level_downsamples == (1.0, 4.0, 16.0)


def test_downsample_that_no_whole_number_explains_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "odd.svs"
    write_pyramid(path, [np.full((n, n, 3), 99, np.uint8) for n in (2000, 800)], aperio(0.25))
    assert open_slide(path).info.level_downsamples == (1.0, 2.5)


def test_blocks_leave_no_seam(ruler_slide: tuple[Path, float], monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(ruler_slide[0])
    whole = slide.thumbnail(2.9).astype(np.int16)
    tile = slide.read(100.3, 200.7, 300, 0.7).astype(np.int16)
    monkeypatch.setattr(resample, "_BLOCK_PX", 97)
    # OpenSlide reaches a place of these levels only to an eighth of a pixel, and blends by that much.
    assert np.abs(slide.thumbnail(2.9) - whole).max() <= 10
    assert np.abs(slide.read(100.3, 200.7, 300, 0.7) - tile).max() <= 1


def test_native_reads_equal_openslide_bit_for_bit(shared_data: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    slide, oracle = open_slide(path), openslide.OpenSlide(path)
    assert slide.info.mpp == 0.499
    for x, y in [(0, 0), (501, 703), (1700, 2500)]:
        expected = np.asarray(oracle.read_region((x, y), 0, (392, 392)).convert("RGB"))
        assert np.array_equal(slide.read(x, y, 392, 0.499), expected)
        assert np.array_equal(slide.read(x + 0.4, y - 0.4, 392, 0.499), expected)


def test_reads_of_a_coarser_level_are_not_blurred(ruler_slide: tuple[Path, float]) -> None:
    path, native = ruler_slide
    oracle = openslide.OpenSlide(path)
    # At the far end OpenSlide's own mapping is off by a quarter pixel at most; near the corner it is exact.
    expected = np.asarray(oracle.read_region((0, 0), 1, (128, 128)).convert("RGB"))
    assert np.array_equal(open_slide(path).read(1.7, 0.4, 128, 4 * native), expected)


@pytest.mark.parametrize("mpp", [0.499, 0.7, 1.0, 2.0])
def test_dicom_copy_agrees_with_the_svs(shared_data: Path, mpp: float) -> None:
    svs = open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs")
    dicom = open_slide(shared_data / "slides" / "CMU-1-Small-Region-dicom" / "level-2-frames-0-4.dcm")
    assert dicom.info.vendor == "dicom"
    assert dicom.info.mpp == pytest.approx(0.499)
    assert dicom.info.level_downsamples[:6] == (1, 2, 4, 8, 16, 32)
    a = svs.read(700, 1500, 256, mpp).astype(float)
    # This sample is labelled RGB but holds YCbCr, so every reader shows it in false colours.
    b = np.asarray(Image.fromarray(dicom.read(700, 1500, 256, mpp), "YCbCr").convert("RGB")).astype(float)
    assert a.std() > 20
    difference = {
        (dx, dy): float(np.abs(a - np.roll(b, (dy, dx), (0, 1)))[2:-2, 2:-2].mean())
        for dx in (-1, 0, 1)
        for dy in (-1, 0, 1)
    }
    assert min(difference, key=lambda shift: difference[shift]) == (0, 0)
    # From 1.0 on the sample's own lower levels are read, which it made with another filter.
    assert difference[0, 0] < (6 if mpp < 1 else 16)


def test_slide_without_mpp_needs_the_sidecar(shared_data: Path) -> None:
    path = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(SlideError, match=r"no microns per pixel.*sidecar CSV.*slide,mpp") as caught:
        open_slide(path)
    assert "TCGA" not in str(caught.value)
    slide = open_slide(path, mpp=0.25)
    assert (slide.info.mpp, slide.info.mpp_origin) == (0.25, "sidecar")
    assert slide.info.level_downsamples == (1.0, 2.0)
    slide.verify()


def test_sidecar_wins_over_the_file(coloured: Path) -> None:
    info = open_slide(coloured, mpp=0.5).info
    assert (info.mpp, info.mpp_origin) == (0.5, "sidecar")


@pytest.mark.parametrize("mpp", [0.0, -1.0, 0.01, 25.0, float("nan")])
def test_implausible_sidecar_is_refused(coloured: Path, mpp: float) -> None:
    with pytest.raises(SlideError, match="sidecar are not plausible"):
        open_slide(coloured, mpp=mpp)


def plain_tiff(path: Path, x: float, y: float, unit: str, description: str | None = None) -> Path:
    image = np.full((600, 600, 3), 200, np.uint8)
    write_pyramid(path, [image], description, resolution=(x, y), unit=unit)
    return path


@pytest.mark.parametrize(("per_unit", "unit"), [(20_000, "CENTIMETER"), (50_800, "INCH")])
@pytest.mark.parametrize("description", [None, aperio(None)])
def test_tiff_resolution_gives_mpp(tmp_path: Path, per_unit: int, unit: str, description: str | None) -> None:
    info = open_slide(plain_tiff(tmp_path / "a.tif", per_unit, per_unit, unit, description)).info
    assert info.mpp == pytest.approx(0.5)
    assert info.mpp_origin == "tiff"
    assert info.vendor == ("generic-tiff" if description is None else "aperio")


def test_implausible_tiff_resolution_is_no_mpp(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="no microns per pixel"):
        open_slide(plain_tiff(tmp_path / "a.tif", 72, 72, "INCH"))


@pytest.mark.parametrize(("y_per_cm", "square"), [(20_200, True), (21_000, False)])
def test_pixels_must_be_square(tmp_path: Path, y_per_cm: int, square: bool) -> None:
    path = plain_tiff(tmp_path / "a.tif", 20_000, y_per_cm, "CENTIMETER")
    if square:
        assert open_slide(path).info.mpp == pytest.approx((0.5 + 0.5 / 1.01) / 2)
        return
    with pytest.raises(SlideError, match="not square"):
        open_slide(path)


def assert_names_no_file(error: pytest.ExceptionInfo[SlideError], path: Path) -> None:
    assert path.stem not in str(error.value)
    assert str(path.parent) not in str(error.value)
    # A chained error of OpenSlide would be printed with its text.
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="missing") as missing:
        open_slide(tmp_path / "patient-1.svs")
    assert_names_no_file(missing, tmp_path / "patient-1.svs")
    foreign = tmp_path / "patient-2.svs"
    foreign.write_bytes(b"not a slide" * 100)
    with pytest.raises(SlideError, match=r"cannot be opened.*format is not known") as unknown:
        open_slide(foreign)
    assert_names_no_file(unknown, foreign)


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_truncated_real_slide_is_refused(shared_data: Path, tmp_path: Path, name: str, share: float) -> None:
    data = (shared_data / "slides" / name).read_bytes()
    cut = tmp_path / "patient-3.svs"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlideError) as caught:
        open_slide(cut, mpp=0.5).verify()
    assert_names_no_file(caught, cut)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_slide_that_still_opens_is_found_by_verify(tmp_path: Path, share: float) -> None:
    path = tmp_path / "patient-4.tif"
    noise = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), np.uint8)
    write_pyramid(path, [noise], None, resolution=(20_000, 20_000), unit="CENTIMETER")
    open_slide(path).verify()
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    openslide.OpenSlide(path).close()
    slide = open_slide(path)
    with pytest.raises(SlideError, match="damaged data") as caught:
        slide.verify()
    assert_names_no_file(caught, path)


def test_truncated_dicom_is_found_by_verify(shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "patient-5"
    shutil.copytree(shared_data / "slides" / "CMU-1-Small-Region-dicom", folder)
    first = folder / "level-0-frames-0-30.dcm"
    first.write_bytes(first.read_bytes()[: int(first.stat().st_size * 0.9)])
    slide = open_slide(folder / "level-1-frames-0-9.dcm")
    with pytest.raises(SlideError, match="damaged data") as caught:
        slide.verify()
    assert_names_no_file(caught, folder / "level-0-frames-0-30.dcm")


@pytest.fixture
def scarred(tmp_path: Path) -> Path:
    """A slide whose tile in the middle holds garbage."""
    path = tmp_path / "patient-6.tif"
    noise = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), np.uint8)
    write_pyramid(path, [noise], None, resolution=(20_000, 20_000), unit="CENTIMETER")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        middle = len(page.dataoffsets) // 2 + 1
        offset, length = page.dataoffsets[middle], page.databytecounts[middle]
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = b"\xaa" * length
    path.write_bytes(data)
    return path


def test_good_regions_are_read_after_a_damaged_one(scarred: Path) -> None:
    slide = open_slide(scarred)
    before = slide.read(10, 10, 100, 0.5)
    for _ in range(2):
        with pytest.raises(SlideError, match="damaged data") as caught:
            slide.read(0, 0, 1800, 0.5)
        assert_names_no_file(caught, scarred)
        assert np.array_equal(slide.read(10, 10, 100, 0.5), before)


def test_slide_that_vanishes_after_a_failed_read_is_reported(scarred: Path) -> None:
    slide = open_slide(scarred)
    with pytest.raises(SlideError, match="damaged data"):
        slide.read(0, 0, 1800, 0.5)
    scarred.unlink()
    with pytest.raises(SlideError, match="missing"):
        slide.read(0, 0, 100, 0.5)


def test_closed_slide_refuses_reads(coloured: Path) -> None:
    slide = open_slide(coloured)
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="slide is closed"):
        slide.read(0, 0, 16, 0.5)


@pytest.mark.parametrize("mpp", [0.0, -0.5, float("inf"), float("nan")])
def test_scale_must_be_positive(coloured: Path, mpp: float) -> None:
    slide = open_slide(coloured)
    with pytest.raises(SlideError, match="scale is not valid"):
        slide.read(0, 0, 16, mpp)
    with pytest.raises(SlideError, match="scale is not valid"):
        slide.thumbnail(mpp)


def test_region_must_have_a_place_and_a_size(coloured: Path) -> None:
    slide = open_slide(coloured)
    with pytest.raises(SlideError, match="region has no size"):
        slide.read(0, 0, 0, 0.5)
    with pytest.raises(SlideError, match="region has no place"):
        slide.read(float("nan"), 0, 16, 0.5)
