"""Synthetic whole-slide images for the quickstart and the tests: pyramidal Aperio-style SVS files, and labelled tiles.

The slides come from two make-believe scanners with stains of their own, half at 40x and half at 20x. Everything is a
function of the seed: the same seed writes the same bytes with the same versions of numpy, Pillow and imagecodecs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histoscale.errors import DatasetError, SlideError
from histoscale.seeding import key
from histoscale.slides.synthetic_tissue import TISSUES, StainMaps, draw_tissue, finish_section, smooth_noise

Colour = tuple[float, float, float]

GLASS = "glass"
MAP_UM_PER_PX = 8.0

_TILE_PX = 256
_LEVEL_DOWNSAMPLES = (1, 4, 16)
_JPEG_QUALITY = 85
_SLIDE_MPPS = (0.2525, 0.499)  # what scanners report at 40x and at 20x
_SLIDE_UM = (2320.0, 1810.0)
_DRAWN_UM_PER_PX = 0.5  # the finest scale that the tissue has detail at; a 40x scan shows it twice enlarged
_SENSOR_NOISE = 2.0
_PATCH_GRID = (4, 5)


@dataclass(frozen=True)
class Scanner:
    """Colours of one laboratory and scanner.

    Attributes:
        haematoxylin: Optical density of the full stain in red, green and blue.
        eosin: The same of eosin.
        white: Grey values of bare glass.
    """

    haematoxylin: Colour
    eosin: Colour
    white: Colour


# Directions of the stain vectors: Ruifrok and Johnston 2001, and Macenko et al. 2009; the lengths are ours.
SCANNERS = (
    Scanner(haematoxylin=(1.10, 1.20, 0.50), eosin=(0.09, 1.00, 0.16), white=(245.0, 243.0, 246.0)),
    Scanner(haematoxylin=(1.20, 1.55, 0.88), eosin=(0.20, 0.72, 0.50), white=(238.0, 234.0, 226.0)),
)


@dataclass(frozen=True)
class SyntheticSlide:
    """One slide that was written, and what was drawn on it.

    Attributes:
        scanner: Row of `SCANNERS`.
        tissue_map: uint8 [h, w], pixels of `MAP_UM_PER_PX`: 0 is glass, 1 + i is tissue i of `TISSUES`.
    """

    path: Path
    mpp: float
    scanner: int
    width_px0: int
    height_px0: int
    tissue_map: NDArray[np.uint8]

    def tissue_at(self, x_px0: float, y_px0: float) -> str:
        """Name of the tissue that lies at a point, or `GLASS`."""
        row, column = (int(place * self.mpp / MAP_UM_PER_PX) for place in (y_px0, x_px0))
        code = self.tissue_map[row, column]
        return TISSUES[code - 1] if code else GLASS


def make_slides(directory: Path, *, seed: int = 0, count: int = 8) -> list[SyntheticSlide]:
    """Write `count` slides into `directory`: scales take turns (0.2525, 0.499 um/px), scanners every second slide.

    Each holds one section of about 2 x 1.6 mm with all of `TISSUES`.

    Raises:
        SlideError: `count` is not positive.
    """
    if count < 1:
        raise SlideError("no slide to make", value=count, expected="a count of 1 or more")
    directory.mkdir(parents=True, exist_ok=True)
    return [_make_slide(directory / f"synthetic-{number:03d}.svs", seed, number) for number in range(count)]


def make_labelled_tiles(
    directory: Path, *, seed: int = 0, per_class: int = 100, side_px: int = 112, mpp: float = 0.5
) -> None:
    """Write a folder of PNG tiles for each of `TISSUES`: `directory/<tissue>/<number>.png`, uint8 [side, side, 3].

    No tile is cut from a slide, whatever the seeds. The scanners take turns, and each tile has stains, a hue and a
    brightness of its own, so that colour alone says little about the tissue.

    Raises:
        DatasetError: a size, a count or a scale that is not positive.
    """
    if per_class < 1 or side_px < 1 or mpp <= 0.0:
        raise DatasetError(
            "no tile to make",
            value=f"per_class={per_class}, side_px={side_px}, mpp={mpp}",
            expected="all of them above zero",
        )
    drawn_px = max(1, round(side_px * mpp / _DRAWN_UM_PER_PX))
    for tissue in TISSUES:
        folder = directory / tissue
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            rng = np.random.default_rng(key(seed, "synthetic-tile", tissue, number))
            maps = draw_tissue(tissue, (drawn_px, drawn_px), _DRAWN_UM_PER_PX, rng)
            maps = finish_section(maps, _DRAWN_UM_PER_PX, rng)
            rgb = scan(maps, _restained(SCANNERS[number % len(SCANNERS)], rng))
            image = Image.fromarray(rgb).resize((side_px, side_px), Image.Resampling.BICUBIC)
            noisy = np.array(image)
            _add_sensor_noise(noisy, rng)
            Image.fromarray(noisy).save(folder / f"{number:04d}.png")


def scan(maps: StainMaps, scanner: Scanner) -> NDArray[np.uint8]:
    """What a scanner sees of stained tissue, by the law of Beer and Lambert: uint8 [h, w, 3]."""
    amounts = np.linspace(0.0, 1.0, 256)[:, None]
    haematoxylin = np.exp2(-amounts * np.log2(10.0) * scanner.haematoxylin)[:, None, :]
    eosin = np.exp2(-amounts * np.log2(10.0) * scanner.eosin)[None, :, :]
    table = np.clip(haematoxylin * eosin * scanner.white, 0.0, 255.0).round().astype(np.uint8).reshape(-1, 3)
    places = (maps.haematoxylin.astype(np.uint16) << 8) | maps.eosin
    rgb: NDArray[np.uint8] = table[places]
    return rgb


def _restained(scanner: Scanner, rng: np.random.Generator) -> Scanner:
    """The scanner after another day in the laboratory: strengths, hues and lamp have moved."""
    lamp = rng.uniform(0.70, 1.03)
    return Scanner(
        haematoxylin=_shifted(scanner.haematoxylin, np.exp(rng.uniform(*np.log([0.35, 1.8]))), 0.38, rng),
        eosin=_shifted(scanner.eosin, np.exp(rng.uniform(*np.log([0.35, 1.8]))), 0.38, rng),
        white=_shifted(scanner.white, lamp, 0.07, rng),
    )


def _shifted(colour: Colour, gain: float, hue: float, rng: np.random.Generator) -> Colour:
    """`colour` times `gain`, each channel moved by up to `hue` of itself; never as bright as a saturated sensor."""
    red, green, blue = np.minimum(np.array(colour) * gain * rng.uniform(1.0 - hue, 1.0 + hue, 3), 252.0).tolist()
    return red, green, blue


def _add_sensor_noise(rgb: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Add noise in place; rows share a few blocks of it, which no crop of a tile's size can tell."""
    rows = min(_TILE_PX, len(rgb))
    block = rng.normal(0.0, _SENSOR_NOISE, (rows, *rgb.shape[1:])).round().astype(np.int16)
    for top in range(0, len(rgb), rows):
        band = rgb[top : top + rows]
        noisy = band + np.roll(block, top // rows * 37, axis=1)[: len(band)]
        band[:] = np.clip(noisy, 0, 255, out=noisy)


def _make_slide(path: Path, seed: int, number: int) -> SyntheticSlide:
    rng = np.random.default_rng(key(seed, "synthetic-slide", number))
    mpp = _SLIDE_MPPS[number % 2]
    scanner = number // 2 % len(SCANNERS)
    enlarged = round(_DRAWN_UM_PER_PX / mpp)
    drawn_um_per_px = mpp * enlarged
    width, height = (round(side / drawn_um_per_px) // 32 * 32 for side in _SLIDE_UM)
    tissue_map = _lay_out(width * drawn_um_per_px, height * drawn_um_per_px, rng)
    maps = finish_section(_draw_section(tissue_map, (height, width), drawn_um_per_px, rng), drawn_um_per_px, rng)
    level_0 = Image.fromarray(scan(maps, SCANNERS[scanner]))
    if enlarged > 1:
        level_0 = level_0.resize((width * enlarged, height * enlarged), Image.Resampling.BICUBIC)
    pixels = np.array(level_0)
    _add_sensor_noise(pixels, rng)
    _write_svs(path, pixels, mpp)
    return SyntheticSlide(path, mpp, scanner, pixels.shape[1], pixels.shape[0], tissue_map)


def _lay_out(width_um: float, height_um: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Which tissue lies where: a section with a wavy edge, cut into patches that take the tissues in turn."""
    shape = (int(np.ceil(height_um / MAP_UM_PER_PX)), int(np.ceil(width_um / MAP_UM_PER_PX)))
    y, x = np.meshgrid(*((np.arange(side) + 0.5) / side for side in shape), indexing="ij")
    rows, columns = _PATCH_GRID
    wave_y, wave_x = (0.02 * smooth_noise(shape, 20.0, rng) for _ in range(2))
    row, column = np.divmod(np.arange(rows * columns), columns)
    centres_y, centres_x = ((cell + 0.5 + rng.uniform(-0.3, 0.3, rows * columns)) for cell in (row, column))
    kinds = np.concatenate([rng.permutation(len(TISSUES)) for _ in range(-(-rows * columns // len(TISSUES)))])
    down, across = rows * (y + wave_y)[..., None] - centres_y, columns * (x + wave_x)[..., None] - centres_x
    tissue = 1 + kinds[(down**2 + across**2).argmin(-1)]
    edge = ((x - 0.5) / 0.47) ** 4 + ((y - 0.5) / 0.46) ** 4 + 0.12 * smooth_noise(shape, 30.0, rng)
    return np.where(edge < 1.0, tissue, 0).astype(np.uint8)


def _draw_section(
    tissue_map: NDArray[np.uint8], shape_px: tuple[int, int], um_per_px: float, rng: np.random.Generator
) -> StainMaps:
    """Draw every connected patch of the map on bare glass, each with staining and directions of its own."""
    section = [Image.new("L", shape_px[::-1]) for _ in range(2)]
    scale = MAP_UM_PER_PX / um_per_px
    for code, tissue in enumerate(TISSUES, start=1):
        patches, _ = ndimage.label(tissue_map == code)
        for number, (rows, columns) in enumerate(ndimage.find_objects(patches), start=1):
            top, left = int(rows.start * scale), int(columns.start * scale)
            bottom, right = min(int(rows.stop * scale), shape_px[0]), min(int(columns.stop * scale), shape_px[1])
            maps = draw_tissue(tissue, (bottom - top, right - left), um_per_px, rng)
            inside = Image.fromarray(
                ndimage.gaussian_filter(np.where(patches == number, np.uint8(255), np.uint8(0)), 1.0)
            )
            box = (left / scale, top / scale, right / scale, bottom / scale)
            smooth = inside.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
            stencil = Image.fromarray(np.asarray(smooth) > 127)
            for stain, drawn in zip(section, (maps.haematoxylin, maps.eosin), strict=True):
                stain.paste(Image.fromarray(drawn), (left, top), stencil)
    return StainMaps(np.asarray(section[0]), np.asarray(section[1]))


def _write_svs(path: Path, level_0: NDArray[np.uint8], mpp: float) -> None:
    """Write the pyramid as Aperio's scanners do: one tiled JPEG page a level, the scale in the first description."""
    height, width = level_0.shape[:2]
    image = Image.fromarray(level_0)
    with tifffile.TiffWriter(path) as writer:
        for downsample in _LEVEL_DOWNSAMPLES:
            level = level_0 if downsample == 1 else np.asarray(image.reduce(downsample))
            size = f"Aperio Image Library v12.0.0\r\n{width}x{height}"
            scale = f"AppMag = {20 * round(0.5 / mpp)}|MPP = {mpp:.4f}"
            writer.write(
                level,
                tile=(_TILE_PX, _TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY, "subsampling": "422"},
                description=f"{size} ({_TILE_PX}x{_TILE_PX}) JPEG/RGB Q={_JPEG_QUALITY}|{scale}",
                subfiletype=0 if downsample == 1 else 1,
                metadata=None,
                software=False,
            )
