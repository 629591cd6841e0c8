"""Clusters of tiles become a column of the next index, and the plan balances over it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.unit.embeddings_on_disk import indexed, write_files

from histoscale.embeddings.clusters import cluster_slides
from histoscale.errors import EmbeddingError, SlideIndexError
from histoscale.sampling.plan import Plan
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.archive import describe_slides, list_slides, read_tables
from histoscale.slides.catalogue import open_catalogue
from histoscale.slides.identity import index_key
from histoscale.slides.index import make_index, read_index, read_locations, write_index
from histoscale.slides.snapshot import protected
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store


def quiet(what: str, done: int, total: int) -> None:
    pass


def two_kinds(names: list[str]) -> dict[str, np.ndarray]:
    """Tiles of two directions: of the first slide mostly the one, of all others mostly the other."""
    draw = np.random.default_rng(0)
    kinds = np.array([[1.0, 0, 0, 0], [0, 0, 1.0, 0]])
    features = {}
    for number, name in enumerate(names):
        which = (np.arange(20) < (16 if number == 0 else 2)).astype(int)
        features[name] = kinds[which] * draw.uniform(1, 5, (20, 1)) + 0.05 * draw.standard_normal((20, 4))
    return features


def test_slides_are_named_after_what_most_of_their_tiles_are(tmp_path: Path) -> None:
    names = [f"{number:032x}" for number in range(5)]
    write_files(tmp_path, two_kinds(names))
    found = cluster_slides(open_store(tmp_path), 2, 60, 0, quiet)
    first, *others = found.names()
    assert set(others) == {"c0", "c1"} - {first}
    assert found.counts.sum(axis=1).tolist() == [20] * 5
    assert sorted(found.counts[0].tolist()) == [4, 16]
    assert found.sampled == 60
    written = (tmp_path / "clusters" / "2" / "clusters.csv").read_text().splitlines()
    assert written == ["slide,cluster", *(f"{name},{value}" for name, value in zip(names, found.names(), strict=True))]
    again = cluster_slides(open_store(tmp_path), 2, 60, 0, quiet)
    np.testing.assert_array_equal(again.counts, found.counts)


def test_a_run_balances_over_the_clusters_of_the_next_index(tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", open_store(tmp_path / "index")
    make_slides(slides, count=4)
    before = indexed(slides, tmp_path / "index")
    names = [before.slide_id(row) for row in range(4)]
    write_files(tmp_path / "files", two_kinds(names))
    found = cluster_slides(open_store(tmp_path / "files"), 2, 100, 0, quiet)
    csv = str(tmp_path / "files" / "clusters" / "2" / "clusters.csv")
    key = index_key(protected(out))
    (tmp_path / "site.csv").write_text("slide,site\n" + "".join(f"synthetic-00{n}.svs,{n % 2}\n" for n in range(4)))
    source = list_slides(str(slides))
    archive = describe_slides(source, key, read_tables(source, None, [str(tmp_path / "site.csv"), csv], key), None)
    assert archive.strata.columns == ("site", "cluster")
    # What build_index commits once no slide is new.
    about, records = archive.about(), read_index(out).records
    anew = [replace(record, strata=about.strata(record.slide_id)) for record in records]
    write_index(out, make_index(anew, [], archive.strata.columns), read_locations(out))
    catalogue = open_catalogue(str(tmp_path / "index"), cache=tmp_path / "cache")
    assert [record.strata[1] for record in read_index(out).records] == found.names()
    spec = PlanSpec(
        seed=0,
        tiles=400,
        tiles_per_step=4,
        replicas=1,
        chapter_steps=1,
        tiles_per_visit=1,
        region_px=56,
        mix=((0.5, 1.0),),
        max_upsample=1.1,
        min_tissue=0.4,
        balance=("cluster",),
        temperature=1e9,
    )
    plan = Plan(spec, catalogue.rows, catalogue.columns, catalogue.values, catalogue.mask, {})
    rows = np.concatenate([plan.chapter(0, step, step).rows.reshape(-1) for step in range(100)])
    assert np.mean(rows == 0) == pytest.approx(0.5, abs=0.05)  # one of four slides, and one of two clusters


def test_a_table_names_slides_by_id_only_where_there_are_ids(tmp_path: Path) -> None:
    make_slides(tmp_path / "slides", count=1)
    (tmp_path / "t.csv").write_text(f"slide,site\n{'0' * 32},a\n")
    source = list_slides(str(tmp_path / "slides"))
    for key in (None, bytes(32)):
        with pytest.raises(SlideIndexError, match="line 2: no such slide in SLIDES"):
            read_tables(source, None, [str(tmp_path / "t.csv")], key)


@pytest.mark.parametrize(
    ("slides", "count", "message"),
    [
        (3, 1, "no such number of clusters"),
        (3, 1001, "no such number of clusters"),
        (1, 2, "too few slides to tell apart"),
        (2, 60, "too few tiles for so many clusters"),
    ],
)
def test_clusters_that_cannot_be_are_refused(tmp_path: Path, slides: int, count: int, message: str) -> None:
    write_files(tmp_path, two_kinds([f"{number:032x}" for number in range(slides)]))
    with pytest.raises(EmbeddingError, match=message):
        cluster_slides(open_store(tmp_path), count, 1000, 0, quiet)
