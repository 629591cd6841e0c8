"""Procedural H&E-like tissue: where haematoxylin and eosin lie, drawn in microns, before any scanner sees it.

The sizes are those of histology textbooks, rounded: lymphocyte nuclei 6-8 um, spindle nuclei 10-18 um long, glands
50-80 um and adipocytes 40-60 um across, tumour nuclei 9-17 um. The tissues differ in texture alone: staining levels
are drawn from ranges that overlap. They are patterns to test software with, not models of disease.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy.spatial import cKDTree

Floats = NDArray[np.float32]
Points = NDArray[np.float64]

_OUTLINE_POINTS = 14
_PROFILE_STEP_UM = 0.25
_PROFILE_LENGTH = 1 << 14


@dataclass(frozen=True)
class StainMaps:
    """Amount of each stain, uint8 [h, w]: 0 is none, 255 the most that a section takes up."""

    haematoxylin: NDArray[np.uint8]
    eosin: NDArray[np.uint8]


def draw_tissue(tissue: str, shape_px: tuple[int, int], um_per_px: float, rng: np.random.Generator) -> StainMaps:
    """One patch of `tissue` (a name of `TISSUES`), [height, width] pixels of `um_per_px`, reaching over all borders."""
    canvas = _Canvas(shape_px, um_per_px, rng)
    _DRAWERS[tissue](canvas)
    return canvas.maps()


def finish_section(maps: StainMaps, um_per_px: float, rng: np.random.Generator) -> StainMaps:
    """The optics and the knife: soft edges, clumped chromatin, uneven section thickness and uptake of stain."""
    shape = maps.eosin.shape
    thickness = _gain(shape, 0.10, 150.0 / um_per_px, rng)
    chromatin = _gain(shape, 0.22, 1.2 / um_per_px, rng)
    matrix = _gain(shape, 0.12, 3.0 / um_per_px, rng)
    chromatin *= thickness
    matrix *= thickness
    return StainMaps(_soften(maps.haematoxylin, chromatin), _soften(maps.eosin, matrix))


def smooth_noise(shape_px: tuple[int, ...], scale_px: float, rng: np.random.Generator) -> Floats:
    """Noise of about unit variance that varies over `scale_px` pixels: float32 [h, w]."""
    height, width = shape_px
    rows, columns = height / scale_px, width / scale_px
    coarse = rng.standard_normal((int(rows) + 4, int(columns) + 4), dtype=np.float32)
    image = Image.fromarray(coarse)
    box = (1.0, 1.0, 1.0 + columns, 1.0 + rows)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC, box=box), dtype=np.float32)


def _gain(shape_px: tuple[int, ...], strength: float, scale_px: float, rng: np.random.Generator) -> Floats:
    gain = smooth_noise(shape_px, scale_px, rng)
    gain *= np.float32(strength)
    gain += np.float32(1.0)
    return gain


def _soften(stain: NDArray[np.uint8], gain: Floats) -> NDArray[np.uint8]:
    """The stain with soft edges, times `gain` [h, w], which is overwritten."""
    gain *= np.asarray(Image.fromarray(stain).filter(ImageFilter.GaussianBlur(0.7)))
    return np.clip(gain, 0.0, 255.0, out=gain).astype(np.uint8)


class _Canvas:
    """Two grey images to draw on in microns, with what all tissues share: nuclei, fibres, scattered points."""

    def __init__(self, shape_px: tuple[int, int], um_per_px: float, rng: np.random.Generator) -> None:
        self.shape_px = shape_px
        self.um_per_px = um_per_px
        self.rng = rng
        self.size_um = np.array([shape_px[1], shape_px[0]]) * um_per_px
        self.nuclear = rng.uniform(0.45, 0.95)  # how dark this patch's nuclei are
        self.ground = rng.uniform(0.20, 0.60)  # how eosinophilic it is
        self.haematoxylin = Image.new("L", shape_px[::-1], int(rng.uniform(0, 25)))
        self.eosin = Image.new("L", shape_px[::-1])

    def maps(self) -> StainMaps:
        return StainMaps(np.asarray(self.haematoxylin), np.asarray(self.eosin))

    def paint_eosin(self, level: Floats | Points) -> None:
        """Set the whole eosin image from `level` [h, w], where 1 is the darkest."""
        self.eosin = Image.fromarray(np.clip(level * 255.0, 0.0, 255.0).astype(np.uint8))

    def matrix(self, mottle: float) -> Floats:
        """A cloudy ground of this patch's eosin level: float32 [h, w]."""
        clouds = smooth_noise(self.shape_px, 12.0 / self.um_per_px, self.rng)
        return (self.ground * (1.0 + mottle * clouds)).astype(np.float32)

    def scatter(self, spacing_um: float, jitter: float, keep: float = 1.0) -> Points:
        """Points [N, 2] (x, y in um) of a jittered hexagonal lattice that reaches one spacing over the borders."""
        step_y = spacing_um * np.sqrt(0.75)
        start_y, start_x = self.rng.uniform(-2.0, -1.0, 2)
        rows = np.arange(start_y, self.size_um[1] / step_y + 1.0)
        columns = np.arange(start_x - 0.5, self.size_um[0] / spacing_um + 1.0)
        row_grid, column_grid = np.meshgrid(rows, columns, indexing="ij")
        shift = 0.5 * (np.arange(len(rows)) % 2)[:, None]
        points = np.stack([(column_grid + shift) * spacing_um, row_grid * step_y], axis=-1).reshape(-1, 2)
        points += self.rng.normal(0.0, jitter * spacing_um, points.shape)
        kept: Points = points[self.rng.uniform(size=len(points)) < keep]
        return kept

    def shapes(self, image: Image.Image, outlines_um: Points, levels: Points) -> None:
        """Fill each outline [N, K, 2] with its level [N] in 0..1."""
        draw = ImageDraw.Draw(image)
        pixels = (outlines_um / self.um_per_px).reshape(-1, 2 * _OUTLINE_POINTS)
        fills = np.clip(levels * 255.0, 0.0, 255.0).astype(int)
        for polygon, fill in zip(pixels.tolist(), fills.tolist(), strict=True):
            draw.polygon(polygon, fill=fill)

    def nuclei(self, centres: Points, radii: Points, angles: Points, roughness: float) -> None:
        """Nuclei with half axes `radii` [N, 2] um, turned by `angles` [N]; their darkness varies by a fifth."""
        levels = self.nuclear * self.rng.uniform(0.8, 1.2, len(centres))
        self.shapes(self.haematoxylin, outlines(centres, radii, angles, roughness, self.rng), levels)

    def lymphocytes(self, share: float) -> None:
        """A few wandering lymphocytes, as any tissue has: `share` of a full sheet."""
        centres = self.scatter(9.0, 0.35, keep=share)
        radii = self.rng.uniform(2.8, 3.8, (len(centres), 1)) * np.ones((1, 2))
        self.nuclei(centres, radii, np.zeros(len(centres)), 0.05)

    def fibre_axes(self, direction: float, wave_um: float, wavelength_um: float) -> Floats:
        """Distance across wavy fibres that run along `direction` (radians): float32 [h, w] in um."""
        y, x = np.ogrid[: self.shape_px[0], : self.shape_px[1]]
        x_um, y_um = x.astype(np.float32) * self.um_per_px, y.astype(np.float32) * self.um_per_px
        along = x_um * np.float32(np.cos(direction)) + y_um * np.float32(np.sin(direction))
        across = y_um * np.float32(np.cos(direction)) - x_um * np.float32(np.sin(direction))
        bend = smooth_noise(self.shape_px, 60.0 / self.um_per_px, self.rng)
        phase = along * np.float32(2 * np.pi / wavelength_um) + 1.5 * bend
        bent: Floats = across + np.float32(wave_um) * (np.sin(phase) + 1.5 * bend)
        return bent

    def profile(self, across_um: Floats, width_um: float) -> Floats:
        """Random grey bands about `width_um` wide, looked up by the distance across them: values around 0..1."""
        count = int(_PROFILE_LENGTH * _PROFILE_STEP_UM / width_um)
        knots = np.cumsum(self.rng.uniform(0.5, 1.5, count))
        values = self.rng.uniform(0.0, 1.0, count)
        table = np.interp(np.linspace(0.0, knots[-1], _PROFILE_LENGTH), knots, values).astype(np.float32)
        places = (across_um * np.float32(1.0 / _PROFILE_STEP_UM)).astype(np.int32) & (_PROFILE_LENGTH - 1)
        shades: Floats = table[places]
        return shades

    def spindle_nuclei(self, direction: float, spacing_um: float) -> None:
        """Elongated nuclei along `direction`."""
        centres = self.scatter(spacing_um, 0.35, keep=0.8)
        radii = np.stack([self.rng.uniform(5.0, 9.0, len(centres)), self.rng.uniform(1.1, 1.9, len(centres))], axis=-1)
        self.nuclei(centres, radii, direction + self.rng.normal(0.0, 0.2, len(centres)), 0.08)


def outlines(centres: Points, radii: Points, angles: Points, roughness: float, rng: np.random.Generator) -> Points:
    """Closed shapes [N, K, 2] around `centres` [N, 2]: ellipses that `roughness` dents by two harmonics."""
    turn = np.linspace(0.0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)[None, :]
    phases = rng.uniform(0.0, 2 * np.pi, (len(centres), 2, 1))
    dents = 1.0 + roughness * (np.cos(2 * turn + phases[:, 0]) + np.cos(3 * turn + phases[:, 1]))
    major, minor = radii[:, :1] * np.cos(turn) * dents, radii[:, 1:] * np.sin(turn) * dents
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return centres[:, None, :] + np.stack([major * cosine - minor * sine, major * sine + minor * cosine], axis=-1)


def _draw_adipose(canvas: _Canvas) -> None:
    """Large empty cells: a Voronoi foam whose walls are 1-3 um thick, with flat nuclei pressed against them."""
    rng = canvas.rng
    spacing_um = rng.uniform(38.0, 58.0)
    centres = canvas.scatter(spacing_um, 0.13)
    coarse_um = 2.0
    shape = tuple(int(np.ceil(side * canvas.um_per_px / coarse_um)) + 1 for side in canvas.shape_px)
    rows, columns = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    nearest, _ = cKDTree(centres).query(np.stack([columns, rows], axis=-1).reshape(-1, 2) * coarse_um, k=2)
    to_wall = (nearest[:, 1] - nearest[:, 0]).reshape(shape).astype(np.float32)
    box = (0.0, 0.0, *(canvas.size_um / coarse_um))
    fine = Image.fromarray(to_wall).resize(canvas.shape_px[::-1], Image.Resampling.BILINEAR, box=box)
    walls = np.clip(rng.uniform(2.2, 3.6) - np.asarray(fine), 0.0, 1.0)
    canvas.paint_eosin((0.4 + canvas.ground) * walls)
    canvas.haematoxylin = Image.new("L", canvas.shape_px[::-1])
    angles = rng.uniform(0.0, np.pi, len(centres))
    offsets = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * spacing_um * 0.47
    canvas.nuclei(centres + offsets, np.tile([1.5, 4.5], (len(centres), 1)), angles, 0.05)


def _draw_gland(canvas: _Canvas) -> None:
    """Rings of nuclei around pale lumens, packed in loose matrix."""
    rng = canvas.rng
    canvas.paint_eosin(0.7 * canvas.matrix(0.25))
    spacing_um = rng.uniform(52.0, 82.0)
    centres = canvas.scatter(spacing_um, 0.07)
    count = len(centres)
    radii = spacing_um * rng.uniform(0.38, 0.47, (count, 1)) * rng.uniform(0.9, 1.1, (count, 2))
    angles = rng.uniform(0.0, np.pi, count)
    lumen = canvas.ground * rng.uniform(0.1, 0.9)  # empty, or filled with secretion
    shape_seed = int(rng.integers(1 << 62))
    for scale, level in ((1.0, 1.25 * canvas.ground), (rng.uniform(0.35, 0.55), lumen)):
        ring = outlines(centres, radii * scale, angles, 0.05, np.random.default_rng(shape_seed))
        canvas.shapes(canvas.eosin, ring, np.full(count, level))
    ring = outlines(centres, radii * 0.84, angles, 0.05, np.random.default_rng(shape_seed))
    per_ring = int(2 * np.pi * 0.84 * spacing_um * 0.42 / rng.uniform(6.0, 8.0))
    places = np.linspace(0.0, _OUTLINE_POINTS, per_ring, endpoint=False)
    closed = np.concatenate([ring, ring[:, :1]], axis=1)
    before = places.astype(int)
    share = (places - before)[None, :, None]
    nuclei = closed[:, before] * (1.0 - share) + closed[:, before + 1] * share
    outward = nuclei - centres[:, None, :]
    turned = np.arctan2(outward[..., 1], outward[..., 0]).reshape(-1)
    nuclei = nuclei.reshape(-1, 2) + rng.normal(0.0, 0.6, (count * per_ring, 2))
    canvas.nuclei(nuclei, np.tile([4.2, 2.6], (len(nuclei), 1)), turned, 0.06)
    canvas.lymphocytes(rng.uniform(0.0, 0.06))


def _draw_lymphoid(canvas: _Canvas) -> None:
    """A sheet of small round dense nuclei with hardly any cytoplasm."""
    rng = canvas.rng
    canvas.paint_eosin(canvas.matrix(0.25))
    centres = canvas.scatter(rng.uniform(7.6, 11.0), 0.16, keep=rng.uniform(0.75, 1.0))
    radii = rng.uniform(2.7, 3.9, (len(centres), 1)) * rng.uniform(0.92, 1.08, (len(centres), 2))
    canvas.nuclei(centres, radii, rng.uniform(0.0, np.pi, len(centres)), 0.04)


def _draw_muscle(canvas: _Canvas) -> None:
    """Straight parallel fibres 10-20 um thick with pale clefts between them."""
    rng = canvas.rng
    direction = rng.uniform(0.0, np.pi)
    across = canvas.fibre_axes(direction, rng.uniform(0.5, 2.0), 120.0)
    width_um = rng.uniform(10.0, 20.0)
    within = np.abs(np.mod(across / np.float32(width_um), 1.0) - 0.5)
    cleft = np.clip((0.5 - within) * np.float32(width_um / 1.8), 0.1, 1.0)
    shade = 0.85 + 0.3 * canvas.profile(across, width_um) - 0.15 * canvas.profile(across, 1.5)
    canvas.paint_eosin((0.05 + canvas.ground) * cleft * shade)
    canvas.spindle_nuclei(direction, rng.uniform(19.0, 30.0))
    canvas.lymphocytes(rng.uniform(0.0, 0.03))


def _draw_stroma(canvas: _Canvas) -> None:
    """Wavy thin collagen fibres with sparse spindle nuclei."""
    rng = canvas.rng
    direction = rng.uniform(0.0, np.pi)
    across = canvas.fibre_axes(direction, rng.uniform(4.0, 8.0), rng.uniform(45.0, 80.0))
    fibres = canvas.profile(across, rng.uniform(2.0, 3.5))
    broken = smooth_noise(canvas.shape_px, 9.0 / canvas.um_per_px, rng)
    canvas.paint_eosin(canvas.ground * (0.25 + 1.5 * fibres + 0.22 * broken))
    canvas.spindle_nuclei(direction, rng.uniform(17.0, 27.0))
    canvas.lymphocytes(rng.uniform(0.0, 0.10))


def _draw_tumour(canvas: _Canvas) -> None:
    """Crowded cells with large, irregular, pale or dark nuclei of very different size, each with a nucleolus."""
    rng = canvas.rng
    canvas.paint_eosin(1.1 * canvas.matrix(0.3))
    centres = canvas.scatter(rng.uniform(13.0, 18.0), 0.17, keep=rng.uniform(0.8, 1.0))
    count = len(centres)
    sizes = rng.uniform(4.2, 7.0, (count, 1)) * rng.uniform(0.75, 1.2, (count, 2))
    angles = rng.uniform(0.0, np.pi, count)
    canvas.nuclei(centres, sizes, angles, 0.11)
    shade = rng.uniform(0.5, 0.9, count)
    inside = outlines(centres, sizes * 0.7, angles, 0.11, rng)
    canvas.shapes(canvas.haematoxylin, inside, canvas.nuclear * shade)
    dots = centres + rng.normal(0.0, 1.0, centres.shape)
    canvas.nuclei(dots, np.full((count, 2), 1.1), angles, 0.0)
    canvas.lymphocytes(rng.uniform(0.0, 0.05))


_DRAWERS: dict[str, Callable[[_Canvas], None]] = {
    "adipose": _draw_adipose,
    "gland": _draw_gland,
    "lymphoid": _draw_lymphoid,
    "muscle": _draw_muscle,
    "stroma": _draw_stroma,
    "tumour": _draw_tumour,
}
TISSUES = tuple(_DRAWERS)
