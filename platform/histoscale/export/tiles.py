"""The tiles over which an export is proven where they are not those of the run: a folder's, or procedural ones."""

import tempfile
from pathlib import Path

from histoscale.errors import ExportError
from histoscale.evaluate.datasets.tiles import decode_tile
from histoscale.export.parity import ParityTiles
from histoscale.slides.synthetic import make_labelled_tiles
from histoscale.storage import Store

TILES = 16
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def tiles_of_folder(store: Store) -> ParityTiles:
    """The first images of a folder, in the order of their names.

    Raises:
        ExportError: There are none, or one is damaged.
        StorageError: The folder cannot be read.
    """
    keys = [info.key for info in store.list() if info.key.lower().endswith(_IMAGES)][:TILES]
    if not keys:
        raise ExportError(
            f"there are no tiles in {store.uri}",
            expected=f"images with the suffix {', '.join(_IMAGES)}",
            remedy="give a folder of tiles with --tiles, or leave it out",
        )
    tiles = []
    for number, key in enumerate(keys, 1):
        tile = decode_tile(store.get(key))
        if tile is None:
            raise ExportError(
                f"a tile of {store.uri} cannot be decoded",
                value=f"number {number} by name",
                expected="an image that Pillow reads",
                remedy="remove it, or give another folder with --tiles",
            )
        tiles.append(tile)
    return ParityTiles(tuple(tiles), "tiles of a folder that was given")


def procedural_tiles(side_px: int, why: str) -> ParityTiles:
    """Drawn tissue, always the same.

    Args:
        side_px: Side of a tile.
        why: Why the run's own slides were not used, for people.
    """
    with tempfile.TemporaryDirectory(prefix="histoscale-export-") as scratch:
        make_labelled_tiles(Path(scratch), per_class=TILES // 4, side_px=side_px)
        tiles = [decode_tile(path.read_bytes()) for path in sorted(Path(scratch).rglob("*.png"))[:TILES]]
    return ParityTiles(tuple(tile for tile in tiles if tile is not None), f"drawn tissue, no real slides: {why}")
