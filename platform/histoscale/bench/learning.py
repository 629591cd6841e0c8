"""Whether a small model learns from real tissue: pretrained on slides without labels, probed on labelled tiles.

Slides and labelled tiles come from other patients and laboratories. Each tile is told by probes that were fitted on
others, from features of the pretrained network, of the same network before its first step, and from plain colour
statistics. Intervals are those of a bootstrap over the tiles, of differences tile by tile.
"""

import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from histoscale.bench.figure import Figure
from histoscale.bench.step import Tiles
from histoscale.config.decode import load_recipe
from histoscale.config.recipe import DataSection, Recipe
from histoscale.errors import DatasetError
from histoscale.evaluate.backbone import initial_backbone, trained_backbone
from histoscale.evaluate.baselines import colour_statistics
from histoscale.evaluate.datasets import Tile, decode_tile
from histoscale.evaluate.embed import Embedder
from histoscale.evaluate.features import BATCH_TILES, Extractor, FloatArray
from histoscale.evaluate.figures import BASELINES, COLOUR, PRETRAINED, UNTRAINED
from histoscale.evaluate.linear import logistic_scores
from histoscale.evaluate.probes import knn_scores
from histoscale.evaluate.splits import Labels
from histoscale.models import VisionTransformer
from histoscale.seeding import key, permute_many, subkeys, uniforms
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.slide import Slide
from histoscale.slides.tile_check import TileCheck, tile_fault
from histoscale.slides.tissue import MASK_UM_PER_PX, Mask, tissue_mask
from histoscale.storage import open_store
from histoscale.train.trainer import build_trainer

DATA = Path("..", "shared", "data")
RECIPE = Path("jobs", "recipes", "quickstart.yaml")
OVERRIDES = (
    "precision=fp32",
    "schedule.images=9600",
    "batch.replicas=1",
    "cluster.workers=1",
    "data.mix=[{mpp: 1.0, share: 0.4}, {mpp: 2.0, share: 0.4}, {mpp: 4.0, share: 0.2}]",
    "crops.window={kind: random_resized, global_scale: [0.25, 1.0], local_scale: [0.05, 0.25]}",
    "augment.brightness=0.2",
    "augment.contrast=0.2",
    "augment.saturation=0.1",
    "augment.hue=0.03",
    "augment.grayscale_p=0.0",
)
"""What differs from the quickstart: one process; the scales that the labelled tiles have at the network's size, and
windows of many sizes, since these scales are far apart; weak changes of colour, for real stains differ by tissue."""

SLIDES = (
    ("sections/B4_BT10737_D2_HE.jpg", 0.69),
    ("sections/C2_5714_HE_BT_C2.jpg", 0.69),
    ("slides/CMU-1-Small-Region.svs", 0.499),
    ("slides/TCGA-CR-7395-01A-01-TS1.svs", 1.0),
)
"""Files and um/px of level 0: of the third it is known, of the sections told by the pitch of their spots, and of the
last by the size of its lymphocytes."""

PROBES = {"knn": knn_scores, "linear": logistic_scores}
FOLDS = 5
_ATTEMPTS = 20  # places that are tried for each region
_FOLDINGS = 3
_RESAMPLES = 4000
_PERCENTILES = (2.5, 97.5)

Outcomes = NDArray[np.float64]
"""[N]: the share of the times in which the class of a tile was told, or a difference of two of these."""
Told = Mapping[str, Mapping[str, Outcomes]]
"""Kind of features -> probe -> outcomes."""


@dataclass(frozen=True)
class Labelled:
    """Labelled tiles; labels count the classes from 0."""

    name: str
    tiles: Sequence[Tile]
    labels: Labels


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        seeds: One run each: of its weights, crops, order of the tiles, and of the folds of its evaluation.
        slides: As `SLIDES`.
        regions: Size of the pool that the runs draw from.
        overrides: To the recipe, beside `OVERRIDES`.
    """

    seeds: Sequence[int] = (0, 1, 2)
    slides: Sequence[tuple[str, float]] = SLIDES
    regions: int = 2400
    overrides: Sequence[str] = ()


def learning(data: Path = DATA, plan: Plan = Plan()) -> Iterator[Figure]:
    """`learning.oral_knn`, `learning.oral_linear`, `learning.crc_knn` and `learning.crc_linear`.

    Raises:
        DatasetError: The slides or the labelled tiles are not there.
    """
    datasets = [oral_tiles(data), crc_tiles(data)]
    recipes = [load_recipe(RECIPE, [*OVERRIDES, *plan.overrides, f"seed={seed}"]) for seed in plan.seeds]
    pool = region_pool(data, plan.slides, recipes[0], plan.regions)
    told: dict[str, list[Told]] = {each.name: [] for each in datasets}
    with _one_process() as folder:
        for recipe in recipes:
            trained = pretrain(recipe, pool, folder / f"seed-{recipe.seed}")
            for dataset in datasets:
                told[dataset.name].append(evaluate(recipe, trained, dataset))
    for dataset in datasets:
        for probe in PROBES:
            yield figure(dataset, probe, told[dataset.name])


def figure(dataset: Labelled, probe: str, told: Sequence[Told]) -> Figure:
    """What the runs of all seeds tell of one dataset by one probe.

    The details hold the balanced accuracies of each seed and, for each baseline, by how much the pretrained network is
    above it: for each seed, and for the mean over the seeds, "mean" and "interval".
    """
    labels = dataset.labels
    accuracies = {
        features: [balanced_accuracy(run[features][probe], labels) for run in told]
        for features in (PRETRAINED, *BASELINES)
    }
    gains = {}
    for baseline in BASELINES:
        differences = [run[PRETRAINED][probe] - run[baseline][probe] for run in told]
        gains[f"over {baseline}"] = {
            "by_seed": [_gain(difference, labels) for difference in differences],
            "pooled": _gain(np.mean(differences, axis=0), labels),
        }
    return Figure(
        f"learning.{dataset.name}_{probe}",
        statistics.fmean(accuracies[PRETRAINED]),
        "share",
        statistics.fmean(accuracies[UNTRAINED]),
        {"tiles": len(labels), "chance": 1.0 / len(np.unique(labels)), **accuracies, **gains},
    )


def balanced_accuracy(told: Outcomes, labels: Labels) -> float:
    """Mean over the classes; of a difference, the difference of two of these."""
    return statistics.fmean(float(told[labels == label].mean()) for label in np.unique(labels))


def bootstrap_interval(difference: Outcomes, labels: Labels, seed: int = 0) -> tuple[float, float]:
    """Between which values 95 % of the balanced accuracies lie when each class's tiles are drawn again and again."""
    classes = np.unique(labels)
    means = np.zeros(_RESAMPLES)
    for label in classes:
        values = difference[labels == label]
        draws = uniforms(key(seed, "bootstrap", int(label)), np.arange(_RESAMPLES, dtype=np.int64), len(values))
        means += values[(draws * len(values)).astype(np.int64)].mean(axis=1) / len(classes)
    low, high = np.percentile(means, _PERCENTILES)
    return float(low), float(high)


def _gain(difference: Outcomes, labels: Labels) -> dict[str, object]:
    return {
        "mean": balanced_accuracy(difference, labels),
        "interval": list(bootstrap_interval(difference, labels)),
    }


@contextlib.contextmanager
def _one_process() -> Iterator[Path]:
    """A process group of this process alone, for all runs (DeepSpeed keeps the first that it sees); their folder."""
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as folder:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            yield Path(folder)
        finally:
            dist.destroy_process_group()


def pretrain(recipe: Recipe, pool: NDArray[np.uint8], run: Path) -> VisionTransformer:
    """What a run commits that is trained by this process on a pool of regions [N, R, R, 3], in an empty folder."""
    store = open_store(run)
    trainer = build_trainer(recipe, torch.device("cpu"), store)
    for step in range(recipe.steps):
        trainer.step(step, micro_batches(recipe, pool, step))
    trainer.save(recipe.steps)
    return trained_backbone(store, recipe)[0]


def micro_batches(recipe: Recipe, pool: NDArray[np.uint8], step: int) -> list[Tiles]:
    """All replicas of a step; each region of the pool comes once before any comes again, in an order of the seed's."""
    batch = recipe.batch
    sample_ids = np.arange(step * batch.tiles, (step + 1) * batch.tiles, dtype=np.int64)
    turns, places = np.divmod(sample_ids, len(pool))
    keys = subkeys(key(recipe.seed, "pool"), turns)
    rows = permute_many(keys, places, np.full(len(places), len(pool)))
    parts = zip(np.split(rows, batch.replicas), np.split(sample_ids, batch.replicas), strict=True)
    return [Tiles(pool[some], ids, replica) for replica, (some, ids) in enumerate(parts)]


def region_pool(data: Path, files: Sequence[tuple[str, float]], recipe: Recipe, count: int) -> NDArray[np.uint8]:
    """Regions of slides at the scales and shares of the recipe, fit for training as those of a run: uint8 [N, R, R, 3].

    Each scale is drawn from the slides that are fine enough for it, from each as often as it has tissue. Regions may
    overlap: there are more of them than places side by side.

    Args:
        data: Folder of the slides.
        files: As `SLIDES`.
        recipe: Its `data` section.
        count: Regions that are wanted; where a slide has too few places that are fit, there are fewer.
    """
    mix = recipe.data.mix
    regions: list[NDArray[np.uint8]] = []
    shares = sum(entry.share for entry in mix)
    with contextlib.ExitStack() as stack:
        slides = [stack.enter_context(_opened(data / name, mpp)) for name, mpp in files]
        masks = [tissue_mask(slide.thumbnail(MASK_UM_PER_PX), MASK_UM_PER_PX) for slide in slides]
        for scale, entry in enumerate(mix):
            finest, coarsest = entry.mpp if isinstance(entry.mpp, tuple) else (entry.mpp, entry.mpp)
            fine = [n for n, slide in enumerate(slides) if slide.info.mpp <= finest * recipe.data.max_upsample]
            tissue = sum(int(masks[n].sum()) for n in fine)
            for n in fine:
                wanted = round(count * entry.share / shares * int(masks[n].sum()) / tissue)
                draws = uniforms(key(0, "region", scale, n), np.arange(_ATTEMPTS * wanted, dtype=np.int64), 3)
                mpps = finest * (coarsest / finest) ** draws[:, 2]
                regions += islice(_regions(slides[n], masks[n], recipe.data, draws[:, :2], mpps), wanted)
    return np.stack(regions)


def _regions(
    slide: Slide, mask: Mask, data: DataSection, places: NDArray[np.float64], mpps: NDArray[np.float64]
) -> Iterator[NDArray[np.uint8]]:
    """Regions at those of the places (shares of the mask's height and width, [N, 2]) that a run would train on."""
    check = TileCheck(data.min_tile_tissue, data.min_sharpness)
    px0 = MASK_UM_PER_PX / slide.info.mpp
    for place, mpp in zip(places, mpps.tolist(), strict=True):
        side = data.region_px * mpp / MASK_UM_PER_PX
        top, left = place * np.maximum(np.array(mask.shape) - side, 0.0)
        if mask[round(top) : round(top + side), round(left) : round(left + side)].mean() < data.min_tissue:
            continue
        region = slide.read(left * px0, top * px0, data.region_px, mpp)
        if tile_fault(region, mpp, check) is None:
            yield region


@contextlib.contextmanager
def _opened(file: Path, mpp: float) -> Iterator[Slide]:
    """A slide; a section, one large JPEG picture, is first stored in tiles as scanners do."""
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as folder:
        if file.suffix == ".jpg":
            tiled = Path(folder) / "section.tiff"
            pixels = simplejpeg.decode_jpeg(file.read_bytes())
            tifffile.imwrite(
                tiled, pixels, tile=(256, 256), photometric="rgb", compression="jpeg", compressionargs={"level": 95}
            )
            file = tiled
        with contextlib.closing(open_slide(file, mpp=mpp)) as slide:
            yield slide


def oral_tiles(data: Path) -> Labelled:
    """1,224 tiles of oral mucosa, healthy and with carcinoma, at two magnifications; whose they are is not known."""
    files = sorted((data / "tiles" / "oral_oscc_cc0").glob("*/*.jpg"))
    return _labelled("oral", {file.stem: (file.parent.name, file) for file in files})


def crc_tiles(data: Path) -> Labelled:
    """100 tiles of eight tissues of the colon from two selections of one set; what is in both counts once."""
    named: dict[str, tuple[str, Path]] = {}
    for file in sorted((data / "tiles").glob("crc_val_he_7k_*/*")):
        name = file.stem.split("___")[-1].split("_")[0]
        named.setdefault(name, (name.split("-")[0], file))
    return _labelled("crc", named)


def _labelled(name: str, files: Mapping[str, tuple[str, Path]]) -> Labelled:
    tiles = [tile for _, file in files.values() if (tile := decode_tile(file.read_bytes())) is not None]
    if not tiles or len(tiles) < len(files):
        raise DatasetError(
            f"the {name} tiles are missing or damaged",
            value=f"{len(tiles)} of {len(files)} images",
            expected="those that docs/benchmarks/README.md names",
            remedy="run it from the root of the repository, with the shared data beside that",
        )
    labels = np.unique([label for label, _ in files.values()], return_inverse=True)[1]
    return Labelled(name, tiles, labels.astype(np.int64))


def evaluate(recipe: Recipe, trained: VisionTransformer, dataset: Labelled) -> Told:
    """What each kind of features tells by each probe."""
    side_px, device = recipe.crops.global_px, torch.device("cpu")
    extractors: dict[str, Extractor] = {
        PRETRAINED: Embedder(trained, side_px, device),
        UNTRAINED: Embedder(initial_backbone(recipe), side_px, device),
        COLOUR: colour_statistics,
    }
    starts = range(0, len(dataset.tiles), BATCH_TILES)
    return {
        name: outcomes(
            np.concatenate([extractor(dataset.tiles[start : start + BATCH_TILES]) for start in starts]),
            dataset.labels,
            recipe.seed,
        )
        for name, extractor in extractors.items()
    }


def outcomes(features: FloatArray, labels: Labels, seed: int) -> dict[str, Outcomes]:
    """What each probe tells of each tile when fitted on the folds without it, over several divisions into folds."""
    told = {probe: np.zeros(len(labels)) for probe in PROBES}
    for folding in range(_FOLDINGS):
        fold = folds(labels, key(seed, "folds", folding))
        for number in range(FOLDS):
            test = fold == number
            for probe, scores in PROBES.items():
                predicted = scores(features[~test], labels[~test], features[test]).argmax(axis=1)
                told[probe][test] += (predicted == labels[test]) / _FOLDINGS
    return told


def folds(labels: Labels, draw_key: int) -> NDArray[np.int64]:
    """The fold of each tile, which has its share of every class: [N]."""
    order = uniforms(draw_key, np.arange(len(labels), dtype=np.int64), 1)[:, 0]
    fold = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        fold[rows[np.argsort(order[rows])]] = np.arange(len(rows)) % FOLDS
    return fold
