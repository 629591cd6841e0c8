"""Labelled datasets as they are downloaded: each layout that is known, and what all of them give."""

from histoscale.evaluate.datasets.hest import ExpressionTiles, open_hest
from histoscale.evaluate.datasets.registry import AUTO, LAYOUTS, open_dataset
from histoscale.evaluate.datasets.tiles import FileTiles, LabelledTiles, Tile, TileSource, decode_tile

__all__ = [
    "AUTO",
    "LAYOUTS",
    "ExpressionTiles",
    "FileTiles",
    "LabelledTiles",
    "Tile",
    "TileSource",
    "decode_tile",
    "open_dataset",
    "open_hest",
]
