"""Embeddings of slides: grid, files as TRIDENT reads them, resuming, refusals, and a loop of OpenSlide as oracle."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import torch
from PIL import Image
from tests.unit.embeddings_on_disk import SNAPSHOT, a_spec, exported_network, indexed, small_recipe, write_files
from tests.unit.test_export import committed_run, tiny_recipe

from histoscale.cluster.embedding import workforce_of
from histoscale.embeddings.files import (
    SlideTiles,
    count_tiles,
    key_of,
    read_embedding,
    write_embedding,
)
from histoscale.embeddings.folder import LEFT_OUT, MANIFEST, LeftOut, begin, read_folder, unchanged, write_left_out
from histoscale.embeddings.network import TileEmbedder, find_ref
from histoscale.embeddings.progress import EmbeddingProgress
from histoscale.embeddings.reading import NO_TILE, TOO_COARSE, Source, TileReader, kept_tiles, tiles_of
from histoscale.embeddings.selection import Selection
from histoscale.embeddings.tiling import Tiling, reading_order
from histoscale.errors import CheckpointError, ClusterError, EmbeddingError, HistoscaleError
from histoscale.evaluate.backbone import initial_backbone, trained_backbone
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SLIDE = "ab" * 16


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Catalogue]:
    """Two synthetic slides, of 0.2525 and 0.499 um/px, and their catalogue."""
    folder = tmp_path_factory.mktemp("archive")
    make_slides(folder / "slides", count=2)
    return folder, indexed(folder / "slides", folder / "index")


def brute_force(
    mask: np.ndarray[Any, Any], mask_px0: float, tiling: Tiling, size: tuple[int, int], mpp: float
) -> set[Any]:
    """The wanted tiles by a loop over places, with the share of tissue from a fine raster."""
    side = tiling.tile_px * tiling.mpp / mpp
    pitch, whole = math.ceil(tiling.stride_px * tiling.mpp / mpp - 1e-6), math.ceil(side - 1e-6)
    found = set()
    counts = [max(0, (length - whole) // pitch + 1) for length in size]
    left, top = ((size[n] - (counts[n] - 1) * pitch - whole) // 2 for n in (0, 1))
    steps = (np.arange(60) + 0.5) / 60 * side
    for row in range(counts[1]):
        for column in range(counts[0]):
            x, y = left + column * pitch, top + row * pitch
            at_y, at_x = ((y + steps) / mask_px0).astype(int), ((x + steps) / mask_px0).astype(int)
            if mask[np.ix_(at_y, at_x)].mean() >= tiling.min_tissue:
                found.add((x, y))
    return found


@pytest.mark.parametrize("stride_px", [64, 40])
def test_tiles_are_those_of_a_loop_over_the_grid(stride_px: int) -> None:
    mask = np.zeros((40, 60), np.bool_)
    mask[7:30, 11:47] = True
    tiling = Tiling.of(0.5, 64, stride_px, 0.6)
    coords, pitch = tiling.coords(mask, (1920, 1280), 0.25, 8.0)
    assert set(map(tuple, coords.tolist())) == brute_force(mask, 32.0, tiling, (1920, 1280), 0.25)
    assert pitch == 2 * stride_px
    assert coords.tolist() == sorted(coords.tolist(), key=lambda place: (place[1], place[0]))
    assert tiling.folder == f"20x_64px_{64 - stride_px}px_overlap"


def test_a_slide_smaller_than_a_tile_has_none() -> None:
    coords, _ = Tiling.of(0.5, 224, 112, 0.5).coords(np.ones((5, 5), np.bool_), (160, 160), 0.5, 16.0)
    assert coords.shape == (0, 2)
    assert reading_order(coords, 112).shape == (0,)


def test_tiles_are_read_in_square_blocks_each_once() -> None:
    y, x = np.divmod(np.arange(32 * 32), 32)
    coords = np.stack([100 * x, 100 * y], axis=1)
    order = reading_order(coords, 100)
    assert sorted(order.tolist()) == list(range(32 * 32))
    first = coords[order[:64]] // 100
    assert set(map(tuple, first.tolist())) == {(column, row) for column in range(8) for row in range(8)}


def test_the_rows_of_a_file_are_in_order_however_they_were_read() -> None:
    y, x = np.divmod(np.arange(300), 20)
    tiles = SlideTiles(SLIDE, np.stack([x, y], axis=1) * 10, 10, 0.5, (200, 150))
    order = reading_order(tiles.coords, 10)
    batches = [order[at : at + 128] for at in range(0, 300, 128)]
    kept = [np.flatnonzero(batch % 7 != 3) for batch in batches]
    left, places = kept_tiles(tiles, order, kept, 128)
    read = np.concatenate([tiles.coords[batch[which]] for batch, which in zip(batches, kept, strict=True)])
    rows = np.empty_like(read)
    rows[places] = read
    np.testing.assert_array_equal(rows, left.coords)
    np.testing.assert_array_equal(left.coords, tiles.coords[np.arange(300) % 7 != 3])


def test_trident_reads_the_file(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((23, 8))
    write_files(tmp_path, {SLIDE: features})
    with h5py.File(tmp_path / f"{SLIDE}.h5", "r") as file:  # as TRIDENT's read_coords and its slide encoders do
        attributes, coords = dict(file["coords"].attrs), file["coords"][:]
        read = torch.from_numpy(file["features"][:]).float()
        assert dict(file["features"].attrs) == {"name": SLIDE}
        ours = dict(file.attrs)
    np.testing.assert_array_equal(read.numpy(), features.astype(np.float32))
    assert coords.dtype == np.int64
    assert coords.shape == (23, 2)
    assert {name: attributes[name] for name in ("patch_size", "patch_size_level0", "overlap", "name")} == {
        "patch_size": 224,
        "patch_size_level0": 224,
        "overlap": 0,
        "name": SLIDE,
    }
    assert (attributes["level0_magnification"], attributes["target_magnification"]) == (20, 20)
    assert (attributes["level0_width"], attributes["level0_height"]) == (2240, 672)
    assert ours["fingerprint"] == a_spec().fingerprint
    assert (ours["snapshot_id"], ours["mpp"], ours["min_tissue"]) == (SNAPSHOT, 0.5, 0.65)
    assert count_tiles(open_store(tmp_path), SLIDE) == 23
    some = read_embedding(open_store(tmp_path), SLIDE, np.array([3, 5]))
    np.testing.assert_array_equal(some.features, features[[3, 5]].astype(np.float32))


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    features = {SLIDE: np.random.default_rng(1).standard_normal((300, 8))}
    write_files(tmp_path / "a", features)
    write_files(tmp_path / "b", features)
    assert (tmp_path / "a" / f"{SLIDE}.h5").read_bytes() == (tmp_path / "b" / f"{SLIDE}.h5").read_bytes()


def test_numbers_that_are_not_finite_and_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingError, match=r"are not finite \(got '1 of 3 tiles'"):
        write_files(tmp_path, {SLIDE: np.array([[1.0], [np.nan], [2.0]])})
    assert not (tmp_path / key_of(SLIDE)).exists()
    (tmp_path / key_of(SLIDE)).write_bytes(b"no HDF5")
    with pytest.raises(EmbeddingError, match="cannot be read"):
        read_embedding(open_store(tmp_path), SLIDE)
    with h5py.File(tmp_path / key_of(SLIDE), "w") as file:
        file["features"], file["coords"] = np.zeros((3, 2)), np.zeros((2, 2))
    with pytest.raises(EmbeddingError, match="cannot be read"):
        read_embedding(open_store(tmp_path), SLIDE)


def test_a_folder_is_gone_on_with_only_as_it_was_begun(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(EmbeddingError, match="holds no embeddings"):
        read_folder(store)
    write_files(tmp_path, {SLIDE: np.zeros((2, 3))})
    folder, done = begin(store, a_spec(), "fedcba9876543210")
    assert done == {SLIDE}
    assert folder.snapshots == (SNAPSHOT, "fedcba9876543210")
    assert read_folder(store) == folder
    with pytest.raises(
        EmbeddingError, match=r"holds other embeddings \(got 'embedding cls_mean'; expected embedding cls\)"
    ):
        begin(store, a_spec(embedding="cls_mean"), SNAPSHOT)
    (tmp_path / MANIFEST).write_text('{"format": "else"}')
    with pytest.raises(EmbeddingError, match="damaged or of another version"):
        read_folder(store)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(EmbeddingError, match="files of somebody else"):
        begin(store, a_spec(), SNAPSHOT)


def test_what_was_left_out_is_a_line_each(tmp_path: Path) -> None:
    write_left_out(open_store(tmp_path), [LeftOut("b", "cut", is_bad=True), LeftOut("a", NO_TILE, is_bad=False)])
    lines = [json.loads(line) for line in (tmp_path / LEFT_OUT).read_text().splitlines()]
    assert lines == [
        {"slide_id": "a", "reason": NO_TILE, "bad": False},
        {"slide_id": "b", "reason": "cut", "bad": True},
    ]


def test_files_hold_while_the_record_of_their_slide_does(archive: tuple[Path, Catalogue]) -> None:
    _, catalogue = archive
    first, second = catalogue.slide_id(0), catalogue.slide_id(1)
    before = np.array(catalogue.rows)
    assert unchanged([first, second], catalogue.rows, [before]) == {first, second}
    before["size_bytes"][1] += 1
    assert unchanged([first, second], catalogue.rows, [before]) == {first}
    assert unchanged([first, second], catalogue.rows, [before[:0]]) == {first, second}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mpp": 0.0}, "tiles have no scale"),
        ({"tile_px": 0}, "tiles have no size"),
        ({"stride_px": 300}, "the stride does not cover the tissue"),
        ({"min_tissue": 1.5}, "no tile has such a share of tissue"),
    ],
)
def test_tilings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        replace(Tiling(0.5, 224, 224, 0.65), **changes)


@pytest.mark.parametrize(("changes", "what"), [({"embedding": "both"}, "embedding"), ({"dtype": "int8"}, "dtype")])
def test_unknown_kinds_are_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(EmbeddingError, match=f"there is no such {what}"):
        a_spec(**changes)


def test_a_selection_says_what_is_not_there(archive: tuple[Path, Catalogue]) -> None:
    _, catalogue = archive
    first, second = catalogue.slide_id(0), catalogue.slide_id(1)
    assert Selection.parse(None, [], None).rows(catalogue, ()) == [0, 1]
    assert Selection.parse(f"{second}, {first}", [], 1).rows(catalogue, ()) == [0]
    assert Selection.parse(None, [], None).rows(catalogue, {first}) == [1]
    for slides, where, limit, message in (
        ("nobody", [], None, "1 of 1 slides are not in the index"),
        (None, ["site"], None, "--where is no condition"),
        (None, ["site=a"], None, "the index has no such column"),
        (None, [], 0, "--limit leaves no slide"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            Selection.parse(slides, where, limit).rows(catalogue, ())
    with pytest.raises(EmbeddingError, match="no slide of the index is wanted"):
        Selection().rows(catalogue, {first, second})


def test_a_condition_is_a_column_and_one_of_its_values() -> None:
    strata = np.zeros((3, 8), np.uint32)
    strata[:, 1] = [0, 1, 0]
    rows = np.zeros(3, [("strata", "<u4", (8,))])
    rows["strata"] = strata
    values = (("a",), ("x", "y"))
    kind: Any = type("OfThree", (SimpleNamespace,), {"__len__": lambda _: 3})
    catalogue = kind(rows=rows, columns=("site", "stain"), values=values, has=lambda _: False)
    assert Selection.parse(None, ["stain=x"], None).rows(catalogue, ()) == [0, 2]
    assert Selection.parse(None, ["stain=y", "site=a"], None).rows(catalogue, ()) == [1]
    with pytest.raises(EmbeddingError, match=r"no slide has this stain \(got 'z'; expected one of 'x', 'y'\)"):
        Selection.parse(None, ["stain=z"], None).rows(catalogue, ())
    with pytest.raises(EmbeddingError, match=r"no such column \(got 'age'; expected one of site, stain\)"):
        Selection.parse(None, ["age=z"], None).rows(catalogue, ())


@pytest.mark.usefixtures("process_group")
def test_the_network_of_a_run_is_its_teacher_at_the_step(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    store = committed_run(tmp_path, recipe)
    network = find_ref(store, recipe, None)
    assert network == find_ref(store, recipe, 2)
    assert (network.name, network.image_px) == ("vit_test14-step-2", recipe.crops.global_px)
    wanted = trained_backbone(store, recipe)[0].state_dict()
    for name, tensor in network.load().state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3"):
        find_ref(store, recipe, 3)
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        find_ref(store, tiny_recipe(seed=1), None)


def test_tiles_and_steps_that_the_network_cannot_take_are_refused(tmp_path: Path) -> None:
    network = exported_network(tmp_path / "export")
    with pytest.raises(
        EmbeddingError, match=r"tiles do not fit vit_test14 \(got '60 px'; expected a multiple of the 14 px"
    ):
        network.require_tile(60)
    network.require_tile(70)
    with pytest.raises(EmbeddingError, match="an export has no steps"):
        find_ref(open_store(tmp_path / "export"), None, 3)
    other = replace(network, fingerprint="sha256:1")
    with pytest.raises(EmbeddingError, match="the export is another one by now"):
        other.load()


def test_slides_that_have_no_tile_say_why(archive: tuple[Path, Catalogue]) -> None:
    _, catalogue = archive
    assert tiles_of(catalogue, 0, Tiling.of(0.1, 56, None, 0.5)) == TOO_COARSE
    assert tiles_of(catalogue, 0, Tiling.of(0.5, 14_000, None, 0.5)) == NO_TILE


def openslide_tile(path: Path, x: int, y: int, side_px0: float, side_px: int) -> np.ndarray[Any, Any]:
    """A tile as a careful user of OpenSlide and Pillow reads it, from level 0, with room for the filter around it."""
    margin = 16
    with openslide.OpenSlide(path) as slide:
        whole = math.ceil(side_px0) + 2 * margin
        image = slide.read_region((x - margin, y - margin), 0, (whole, whole)).convert("RGB")
    box = (margin, margin, margin + side_px0, margin + side_px0)
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BICUBIC, box=box))


@pytest.mark.parametrize("embedding", ["cls", "cls_mean"])
def test_embeddings_equal_those_of_a_loop_over_openslide(
    archive: tuple[Path, Catalogue], tmp_path: Path, embedding: str
) -> None:
    folder, catalogue = archive
    recipe = small_recipe()
    network = exported_network(tmp_path / "export", recipe)
    tiling = Tiling.of(0.5, 56, None, 0.65)
    spec = a_spec(tiling=tiling, embedding=embedding)
    source = Source(str(folder / "index"), catalogue.snapshot_id, spec, tmp_path / "copies", 2**30)
    reader, embed = TileReader(source), TileEmbedder(network.load(), torch.device("cpu"), embedding, "fp32", "float32")
    plain = initial_backbone(recipe)
    paths = {path.stat().st_size: path for path in (folder / "slides").iterdir()}
    reader.prepare()
    for row in range(2):
        tiles = tiles_of(catalogue, row, tiling)
        assert isinstance(tiles, SlideTiles)
        assert len(tiles.coords) > 100
        path, side_px0 = paths[int(catalogue.rows[row]["size_bytes"])], 56 * 0.5 / tiles.mpp
        chosen = tiles.coords[:: len(tiles.coords) // 12]
        ours = embed(reader.read(row, chosen).tiles)
        for place, found in zip(chosen.tolist(), ours, strict=True):
            pixels = torch.from_numpy(openslide_tile(path, *place, side_px0, 56).astype(np.float32) / 255.0)
            image = (pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
            with torch.inference_mode():
                tokens = plain(image.permute(2, 0, 1)[None])[0]
            wanted = tokens[0] if embedding == "cls" else torch.cat([tokens[0], tokens[2:].mean(0)])  # one register
            np.testing.assert_allclose(found, wanted.numpy(), atol=0.02)
            assert np.corrcoef(found, wanted.numpy())[0, 1] > 0.999


def test_an_empty_batch_has_the_width_of_the_others(tmp_path: Path) -> None:
    network = exported_network(tmp_path / "export")
    embed = TileEmbedder(network.load(), torch.device("cpu"), "cls_mean", "fp32", "float16")
    assert embed(np.zeros((0, 56, 56, 3), np.uint8)).shape == (0, 64)
    two = embed(np.zeros((2, 56, 56, 3), np.uint8))
    assert two.shape == (2, 64)
    assert two.dtype == np.float16


def test_a_slide_that_changed_is_refused_as_a_whole_and_a_damaged_place_alone(
    archive: tuple[Path, Catalogue], tmp_path: Path
) -> None:
    make_slides(tmp_path / "slides", count=1)
    catalogue = indexed(tmp_path / "slides", tmp_path / "index")
    spec = a_spec(tiling=Tiling.of(0.5, 56, None, 0.65))
    tiles = tiles_of(catalogue, 0, spec.tiling)
    assert isinstance(tiles, SlideTiles)
    (path,) = (tmp_path / "slides").glob("*.svs")
    path.write_bytes(path.read_bytes()[:-100])
    source = Source(str(tmp_path / "index"), catalogue.snapshot_id, spec, tmp_path / "copies", 2**30)
    batch = TileReader(source).read(0, tiles.coords[:3])
    assert batch.whole_slide is not None
    assert "changed" in batch.whole_slide
    assert path.name not in batch.whole_slide
    assert len(batch.kept) == 0


@pytest.mark.parametrize(
    ("cpus", "gpus", "asked", "expected"),
    [
        (8, 0, ("auto", None, None), (1, 3, "cpu")),
        (64, 0, ("auto", None, None), (8, 28, "cpu")),
        (16, 1, ("auto", None, None), (15, 1, "cuda")),
        (16, 2, ("cpu", 3, 4), (3, 4, "cpu")),
    ],
)
def test_the_workforce_fits_the_cluster(cpus: int, gpus: int, asked: Any, expected: Any) -> None:
    force = workforce_of(cpus, gpus, *asked)
    assert (force.readers, force.embedders, force.device) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("cuda", None, None), "too small for these processes"),
        (("cpu", 8, 1), "too small for these processes"),
        (("cpu", 0, 1), "--readers leaves nobody to work"),
        (("cpu", 1, -1), "--embedders leaves nobody to work"),
    ],
)
def test_a_workforce_that_cannot_be_is_refused(asked: Any, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        workforce_of(8, 0, *asked)


def test_progress_tells_rates_and_the_time_left() -> None:
    progress = EmbeddingProgress(total=10, before=2, done=3, left_out=1, tiles=300, seconds=20.0)
    assert progress.line() == (
        "6 of 10 slides, 300 tiles, 2 slides done before, 1 left out, 15.0 tiles/s, 0.15 slides/s, 20.0 s left"
    )
    assert not progress.is_over
    assert EmbeddingProgress(1, 1, 0, 0, 0, 0.0).line() == "1 of 1 slides, 0 tiles, 1 slides done before"


def test_an_index_that_is_not_there_is_a_diagnosis(tmp_path: Path) -> None:
    with pytest.raises(HistoscaleError, match="no slide index"):
        open_catalogue(str(tmp_path))


def test_writing_overwrites_whole_files(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    tiles = SlideTiles(SLIDE, np.zeros((1, 2), np.int64), 10, 0.5, (10, 10))
    for value in (1.0, 2.0):
        write_embedding(store, a_spec(), SNAPSHOT, tiles, np.full((1, 4), value, np.float32), 3)
    assert read_embedding(store, SLIDE).features.tolist() == [[2.0] * 4]
    assert [info.key for info in store.list()] == [key_of(SLIDE)]
