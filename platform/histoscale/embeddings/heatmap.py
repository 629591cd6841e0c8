"""The attention of the tiles of a slide: as a file, and as a picture of where they lie."""

import io
import tempfile
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata

from histoscale.embeddings.files import SlideEmbedding
from histoscale.storage import Store
from histoscale.storage.local import diagnosed_files

_LONG_SIDE_PX = 1024
_GLASS = (255, 255, 255)
_LOW_TO_HIGH = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float64)
"""Colours that are told apart in print and by all eyes: dark blue to yellow."""


def write_attention(
    store: Store, key: str, slide: SlideEmbedding, weights_N: NDArray[np.float32], split: int, *, is_held_out: bool
) -> None:
    """Write `attention` [n] float32, which sums to one, beside `coords` [n, 2].

    Args:
        store: Where.
        key: Under which name.
        slide: The slide.
        weights_N: Of its tiles.
        split: Which split the network was fitted on.
        is_held_out: Whether it had not seen the slide.
    """
    with diagnosed_files("the folder of temporary files", private=True), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("attention", data=weights_N)
            coords = file.create_dataset("coords", data=slide.coords)
            coords.attrs["patch_size_level0"] = slide.side_px0
            file.attrs.update({"slide_id": slide.slide_id, "split": split, "held_out": is_held_out})
        store.upload(path, key)


def write_heatmap(store: Store, key: str, slide: SlideEmbedding, weights_N: NDArray[np.float32]) -> None:
    """Write the picture of `draw_heatmap` as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(draw_heatmap(slide, weights_N)).save(buffer, "PNG")
    store.put(key, buffer.getvalue())


def draw_heatmap(slide: SlideEmbedding, weights_N: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A picture of the slide, its longer side 1,024 px: each tile in the colour of its rank, glass white.

    Where tiles overlap, the highest is seen.

    Returns:
        uint8 [h, w, 3].
    """
    width_px0, height_px0 = slide.size_px0
    scale = _LONG_SIDE_PX / max(width_px0, height_px0)
    picture = np.empty((max(1, round(height_px0 * scale)), max(1, round(width_px0 * scale)), 3), np.uint8)
    picture[:] = _GLASS
    ranks_N = (rankdata(weights_N, method="average") - 1.0) / max(len(weights_N) - 1, 1)
    at_N = ranks_N * (len(_LOW_TO_HIGH) - 1)
    stops = np.arange(len(_LOW_TO_HIGH))
    colours_N3 = np.stack([np.interp(at_N, stops, _LOW_TO_HIGH[:, channel]) for channel in range(3)], axis=1)
    for number in np.argsort(ranks_N, kind="stable"):
        left, top = np.floor(slide.coords[number] * scale).astype(int)
        right, bottom = np.ceil((slide.coords[number] + slide.side_px0) * scale).astype(int)
        picture[top:bottom, left:right] = np.rint(colours_N3[number])
    return picture
