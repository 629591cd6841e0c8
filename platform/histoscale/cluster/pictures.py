"""The pictures of a run's newest checkpoint, made where there is a CPU or a GPU; what cannot be drawn is left out."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from histoscale.checkpoint.manifest import Commit
from histoscale.cluster.run_tiles import RunTiles
from histoscale.cluster.step_report import write_step_page
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.errors import HistoscaleError
from histoscale.evaluate.backbone import trained_backbone
from histoscale.evaluate.datasets import LabelledTiles, Tile, open_dataset
from histoscale.evaluate.embed import Embedder
from histoscale.models import VisionTransformer
from histoscale.observe.chart_pictures import asked_for, mixture_picture, points_picture, seen_until
from histoscale.observe.metrics import read_metrics
from histoscale.observe.picture_store import PictureSet, drawn_step, remove_withdrawn, write_pictures
from histoscale.observe.spikes import largest_spikes
from histoscale.observe.tile_pictures import (
    Looks,
    Picture,
    attention_picture,
    central,
    crops_picture,
    darkness,
    look_at,
    neighbours_picture,
    patches_picture,
    spread_over,
    tiles_picture,
)
from histoscale.sampling.gallery import asking_tiles, place_of
from histoscale.sampling.plan import TilePlan
from histoscale.storage import Store
from histoscale.stream.seen_tiles import SeenTile
from histoscale.units import describe_mpp

GALLERY_TILES, QUERIES = 256, 8
_OF_A_STEP = 8  # tiles of each magnification
_CROPPED = 3  # tiles
_OF_A_DATASET = 512  # tiles
_PAGES = 3  # of spikes
_BATCH = 32


def draw_run(store: Store, recipe: Recipe, device: torch.device) -> PictureSet:
    """Draw the newest checkpoint of a run, and write the pages of the largest spikes since the pictures before.

    Raises:
        CheckpointError: The run has no usable checkpoint.
        StorageError: The run folder cannot be read or written.
    """
    backbone, commit = trained_backbone(store, recipe)
    since = drawn_step(store)
    studio = _Studio(store, recipe, commit, backbone, device)
    pictures = studio.pictures()
    studio.try_to("slides that were withdrawn", studio.remove_withdrawn)
    studio.try_to("pages of spikes", lambda: studio.pages(since))
    return write_pictures(store, commit.step, pictures, studio.left_out)


class _Studio:
    """Draws one checkpoint.

    Attributes:
        left_out: Lines on what is not drawn, and why.
    """

    def __init__(
        self, store: Store, recipe: Recipe, commit: Commit, backbone: VisionTransformer, device: torch.device
    ) -> None:
        self._store, self._recipe, self._commit = store, recipe, commit
        self._backbone, self._device = backbone.to(device), device
        self._embed = Embedder(backbone, recipe.crops.global_px, device)
        self.left_out: list[str] = []

    def pictures(self) -> list[Picture]:
        """All that can be drawn, in the order to look at them."""
        found: list[Picture] = []
        kinds: list[tuple[str, Callable[[], list[Picture]]]] = [
            ("tiles of a step", self._of_step),
            ("tiles to compare checkpoints by", self._of_gallery),
            ("the mixture", self._of_mixture),
        ]
        kinds += [("a dataset", partial(self._of_dataset, uri)) for uri in self._recipe.evaluation.datasets]
        for what, draw in kinds:
            self.try_to(what, partial(_extend, found, draw))
        return found

    def try_to(self, what: str, do: Callable[[], None]) -> None:
        """Do something; that it cannot be done is noted, and is no failure of the rest."""
        try:
            do()
        except HistoscaleError as error:
            self.left_out.append(f"{what}: {error}")

    def remove_withdrawn(self) -> None:
        """Let nothing in the run folder show a slide that was withdrawn since."""
        removed = remove_withdrawn(self._store, self._tiles.withdrawn)
        if removed:
            self.left_out.append(f"{removed} older pictures were deleted: they showed a slide that was withdrawn")

    def pages(self, since: int) -> None:
        """The pages of the largest spikes from step `since` on."""
        metrics = list(read_metrics(self._store, self._commit.step))
        for spike in largest_spikes(metrics, _PAGES, since):
            write_step_page(self._store, self._recipe, self._commit, spike.step, self._tiles)

    @cached_property
    def _tiles(self) -> RunTiles:
        return RunTiles(self._store, self._recipe, self._commit)

    def _of_step(self) -> list[Picture]:
        tiles, step = self._tiles, self._commit.step - 1
        planned = tiles.within_reach(tiles.of_step(step))
        wanted: list[TilePlan] = []
        for place in range(len(tiles.mix)):
            own = [tile for tile in planned if place_of(tile.mpp, tiles.mix) == place]
            wanted += [own[at] for at in spread_over(len(own), _OF_A_STEP)]
        seen, lines = tiles.read(wanted)
        self.left_out += lines
        if not seen:
            return []
        cropped = [seen[at] for at in spread_over(len(seen), _CROPPED)]
        return [tiles_picture(step, seen, tiles.mix), crops_picture(step, cropped, self._recipe)]

    def _of_gallery(self) -> list[Picture]:
        seen, lines = self._tiles.gallery(GALLERY_TILES)
        self.left_out += lines
        queries = asking_tiles([tile.plan for tile in seen], self._tiles.mix, QUERIES)
        if not queries:
            return []
        embeddings = self._embedded([central(tile.pixels, self._recipe.crops.global_px) for tile in seen])
        asked = [seen[place] for place in queries]
        looks = self._look(asked)
        return [
            neighbours_picture(seen, embeddings, queries),
            patches_picture(asked, looks),
            attention_picture(asked, looks),
            points_picture(
                "embeddings",
                "How the network orders the tiles",
                f"Each point is one of {len(seen)} tiles, the same at every checkpoint. Tissue should order them; "
                "where colours of scanners or sites lie apart, the network sees where a slide was made.",
                embeddings,
                np.array([darkness(tile.pixels) for tile in seen]),
                self._names(seen),
            ),
        ]

    def _look(self, tiles: Sequence[SeenTile]) -> Looks:
        return look_at(self._backbone, ARCHS[self._recipe.model.arch].patch_px, tiles, self._device)

    def _names(self, tiles: Sequence[SeenTile]) -> dict[str, list[str]]:
        """What the colours of the gallery's points mean, and the name of each point."""
        mix, catalogue = self._tiles.mix, self._tiles.catalogue
        names = {"magnification": [describe_mpp(mix[place_of(tile.plan.mpp, mix)]) for tile in tiles]}
        for column in self._recipe.data.balance:
            at = catalogue.columns.index(column)
            codes = [int(catalogue.rows["strata"][tile.plan.row, at]) for tile in tiles]
            names[column] = [catalogue.values[at][code] for code in codes]
        return names

    def _of_mixture(self) -> list[Picture]:
        plan, mix = self._tiles.plan, self._tiles.mix
        seen, counted = seen_until(plan, self._commit.step, mix)
        return [mixture_picture(asked_for(plan.report(), mix), seen, counted, self._commit.step)]

    def _of_dataset(self, uri: str) -> list[Picture]:
        dataset = open_dataset(uri)
        places = spread_over(len(dataset), _OF_A_DATASET)
        read = [(place, dataset.source.read(place)[1]) for place in places]
        tiles = {place: tile for place, tile in read if tile is not None}
        if not tiles:
            return []
        return [
            points_picture(
                f"dataset-{dataset.name}",
                f"How the network orders the tiles of {dataset.name}",
                f"Each point is one of {len(tiles)} labelled tiles. Classes should lie apart, centres should not.",
                self._embedded(list(tiles.values())),
                np.array([darkness(tile) for tile in tiles.values()]),
                _labels(dataset, list(tiles)),
            )
        ]

    def _embedded(self, tiles: Sequence[Tile]) -> NDArray[np.float32]:
        parts = [self._embed(tiles[first : first + _BATCH]) for first in range(0, len(tiles), _BATCH)]
        return np.concatenate(parts)


def _extend(found: list[Picture], draw: Callable[[], list[Picture]]) -> None:
    found += draw()


def _labels(dataset: LabelledTiles, places: Sequence[int]) -> dict[str, list[str]]:
    names = {"class": [dataset.classes[dataset.labels[place]] for place in places]}
    if dataset.centers is not None:
        names["centre"] = [str(dataset.centers[place]) for place in places]
    return names
