"""What the tests of embeddings share: slides indexed without a cluster, a network as an export, folders of files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from histoscale.bench.embed import publish_weights
from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.embeddings.files import SlideTiles, write_embedding
from histoscale.embeddings.folder import begin
from histoscale.embeddings.network import NetworkRef, ref_of_export
from histoscale.embeddings.spec import EmbeddingSpec
from histoscale.embeddings.tiling import Tiling
from histoscale.evaluate.backbone import initial_backbone
from histoscale.slides.archive import describe_slides, list_slides, read_tables
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.slides.examine import examine
from histoscale.slides.identity import index_key
from histoscale.slides.index import make_index, write_index
from histoscale.slides.opening import open_located
from histoscale.slides.snapshot import protected
from histoscale.slides.table_cache import TableCache
from histoscale.storage import open_store
from histoscale.storage.ranges import open_ranges

SNAPSHOT = "0123456789abcdef"


def indexed(slides: Path, index: Path, mpp: Mapping[str, float] | None = None) -> Catalogue:
    """The catalogue of a new index of a folder of slides; `mpp` by name for those that do not say it."""
    if mpp:
        lines = "".join(f"{name},{value}\n" for name, value in mpp.items())
        (slides / "slides.csv").write_text("slide,mpp\n" + lines)
    source, out = list_slides(str(slides)), open_store(index)
    archive = describe_slides(source, index_key(protected(out)), read_tables(source, None, ()), None)
    records = []
    for name in archive.slides:
        location = archive.location(name)
        opening = open_located(location, open_ranges(location.root_uri), TableCache(2**20), index / "copies", 2**30)
        with opening as opened:
            size_bytes = sum(info.size_bytes for info in location.objects)
            records.append(examine(name, opened.slide, size_bytes=size_bytes, layout=opened.layout))
    write_index(out, make_index(records, []), {name: archive.location(name) for name in archive.slides})
    return open_catalogue(str(index), cache=index / "cache")


def small_recipe(arch: str = "vit_test14", global_px: int = 56) -> Recipe:
    """A recipe of a small network."""
    return decode_recipe(
        {
            "data": {"region_px": 2 * global_px},
            "batch": {"tiles": 4, "replicas": 2},
            "model": {"arch": arch},
            "crops": {"global_px": global_px, "local_px": 28},
            "schedule": {"images": 8},
        }
    )


def exported_network(folder: Path, recipe: Recipe | None = None) -> NetworkRef:
    """The network of a new export of the weights that a recipe begins with."""
    recipe = recipe or small_recipe()
    publish_weights(folder, initial_backbone(recipe), recipe)
    return ref_of_export(open_store(folder))


def a_spec(**changes: Any) -> EmbeddingSpec:
    """How the files of `write_files` are made."""
    facts = {"model": "sha256:0", "arch": "vit_test14", "embedding": "cls", "dtype": "float32", "precision": "fp32"}
    return EmbeddingSpec(**{"tiling": Tiling.of(0.5, 224, None, 0.65), **facts, **changes})


def write_files(folder: Path, features: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """A folder of embeddings with these features, by slide id, each tile beside the one before it."""
    store, spec = open_store(folder), a_spec()
    begin(store, spec, SNAPSHOT)
    for name, rows in features.items():
        x = 224 * np.arange(len(rows))
        coords = np.stack([x % 2240, x // 2240 * 224], axis=1)
        tiles = SlideTiles(name, coords, 224, 0.5, (2240, 224 * (len(rows) // 10 + 1)))
        write_embedding(store, spec, SNAPSHOT, tiles, rows.astype(np.float32), 0)
