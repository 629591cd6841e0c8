"""Tiles per second from slides on a disk to files of embeddings, against the loop that people write with OpenSlide.

The loop reads, resizes and embeds on one core, one after the other; ours has one reader and one embedder. So the ratio
of CPU time says which does less work, and that of tiles per second what doing both at once gains on two cores.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
import torch
from PIL import Image

from histoscale.bench.figure import Figure
from histoscale.bench.ray_local import CpuMeter, local_ray
from histoscale.cluster.embedding_pipeline import BATCH_TILES, Embedded, EmbeddingPipeline, Workforce
from histoscale.config.decode import decode_recipe, fingerprint
from histoscale.config.recipe import Recipe
from histoscale.embeddings.files import SlideTiles, read_embedding
from histoscale.embeddings.network import FP32, NetworkRef, TileEmbedder, ref_of_export
from histoscale.embeddings.reading import Source, tiles_of
from histoscale.embeddings.spec import EmbeddingSpec
from histoscale.embeddings.tiling import Tiling
from histoscale.errors import DatasetError
from histoscale.evaluate.backbone import initial_backbone
from histoscale.export.marker import Marker, publish
from histoscale.export.run import write_model
from histoscale.models import VisionTransformer
from histoscale.slides.build import build_index
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.storage import open_store

ARCHS = ("vit_micro14", "vit_s14")
_SHARED = Path("../shared")
_TOOL = _SHARED / "tools" / "make_large_slide.py"
_TILING = Tiling.of(0.5, 224, None, 0.65)


@dataclass(frozen=True)
class _Rate:
    tiles: int
    seconds: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return self.tiles / self.seconds

    @property
    def cpu_ms(self) -> float:
        return self.cpu_s / self.tiles * 1000


def embed() -> Iterator[Figure]:
    """`embed.tiles_per_s` and `embed.cpu_ratio` for each of `ARCHS`, on a slide of whole sections at 0.25 um/px."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as name, local_ray(cpus=2):
        folder = Path(name)
        slide = _make_slide(folder / "slides" / "section.svs")
        build_index(str(slide.parent), str(folder / "index"))
        catalogue = open_catalogue(str(folder / "index"))
        for arch in ARCHS:
            network = _export(folder / arch, arch)
            ours = _ours(folder, catalogue, network)
            plain, difference = _loop(folder, catalogue, network, slide)
            details = {
                "arch": arch,
                "tiles": ours.tiles,
                "cpu_ms_per_tile": ours.cpu_ms,
                "loop_cpu_ms_per_tile": plain.cpu_ms,
                "largest_difference_of_a_feature": difference,
            }
            yield Figure("embed.tiles_per_s", ours.per_s, "tiles/s", plain.per_s, details)
            yield Figure("embed.cpu_ratio", plain.cpu_ms / ours.cpu_ms, "ratio", 1.0, details)


def _make_slide(path: Path) -> Path:
    sections = sorted((_SHARED / "data" / "sections").glob("*.jpg"))
    if not sections or not _TOOL.exists():
        raise DatasetError("no sections to make slides of", value=str(_SHARED), expected="whole sections as JPEG")
    path.parent.mkdir(parents=True)
    command = [sys.executable, str(_TOOL), str(path), *map(str, sections), "--grid", "2", "--mpp", "0.25"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return path


def _export(folder: Path, arch: str) -> NetworkRef:
    recipe = decode_recipe({"model": {"arch": arch}})
    publish_weights(folder, initial_backbone(recipe), recipe)
    return ref_of_export(open_store(folder))


def publish_weights(folder: Path, backbone: VisionTransformer, recipe: Recipe) -> None:
    """Write an export of a backbone that no run has trained."""
    marker = Marker(
        layout="timm",
        arch=recipe.model.arch,
        image_px=recipe.crops.global_px,
        qk_norm=recipe.model.qk_norm,
        recipe=fingerprint(recipe),
        snapshot="",
        step=0,
        images_seen=0,
        teacher=None,
        licence=None,
        origins=(),
        sha256={},
    )
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch), backbone, marker)
        publish(open_store(folder), Path(scratch), marker)


def _spec(network: NetworkRef) -> EmbeddingSpec:
    return EmbeddingSpec(_TILING, network.fingerprint, network.arch, "cls_mean", "float32", FP32)


def _ours(folder: Path, catalogue: Catalogue, network: NetworkRef) -> _Rate:
    """From the first batch that is handed out to the file, without the start of the processes."""
    source = Source(catalogue.index_uri, catalogue.snapshot_id, _spec(network), folder / "copies", 2**30)
    pipeline = EmbeddingPipeline(catalogue, source, network, _out(folder, network), Workforce(1, 1, "cpu"))
    meter: CpuMeter | None = None
    for outcome in pipeline.run([0]):
        if outcome is None and meter is None and pipeline.began_s is not None:
            meter = CpuMeter()
        if isinstance(outcome, Embedded) and pipeline.began_s is not None:
            seconds = time.monotonic() - pipeline.began_s
            return _Rate(outcome.tiles, seconds, meter.seconds() if meter else 0.0)
    raise DatasetError("the slide was not embedded", expected="a slide with tissue")


def _loop(folder: Path, catalogue: Catalogue, network: NetworkRef, slide: Path) -> tuple[_Rate, float]:
    """The loop, and how far its features are from ours at most."""
    tiles = tiles_of(catalogue, 0, _TILING)
    if not isinstance(tiles, SlideTiles):
        raise DatasetError("the slide has no tiles", value=tiles)
    run = TileEmbedder(network.load(), torch.device("cpu"), "cls_mean", FP32, "float32")
    side_px0, found = round(_TILING.side_px0(tiles.mpp)), []
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    with openslide.OpenSlide(slide) as handle:
        for first in range(0, len(tiles.coords), BATCH_TILES):
            batch = [
                handle.read_region((x, y), 0, (side_px0, side_px0)).convert("RGB")
                for x, y in tiles.coords[first : first + BATCH_TILES].tolist()
            ]
            size = (_TILING.tile_px, _TILING.tile_px)
            found.append(run(np.stack([np.asarray(tile.resize(size, Image.Resampling.BICUBIC)) for tile in batch])))
    rate = _Rate(len(tiles.coords), time.monotonic() - start_s, time.process_time() - start_cpu_s)
    ours = read_embedding(open_store(_out(folder, network)), tiles.slide_id).features
    return rate, float(np.abs(np.concatenate(found) - ours).max())


def _out(folder: Path, network: NetworkRef) -> str:
    return str(folder / "out" / network.arch)
