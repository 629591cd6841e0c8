"""Collects the outcome of every slide: from the current snapshot, from unfinished runs, and from examinations."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from histoscale.errors import SlideIndexError
from histoscale.slides.archive import Archive
from histoscale.slides.examine import EXAMINATION_VERSION
from histoscale.slides.external_sort import SlideSorter
from histoscale.slides.pending import pending_parts, read_pending
from histoscale.slides.records import EXAMINED_SCHEMA, REFUSALS_SCHEMA, SLIDES_SCHEMA
from histoscale.slides.snapshot import REFUSALS, SLIDES, read_snapshot
from histoscale.slides.tables import read_batches, read_rows
from histoscale.storage import Store


class Gathering:
    """The outcomes of an archive's slides so far; each slide is taken once.

    Args:
        archive: The slides.
        sorter: Takes the examined ones.

    Attributes:
        left: Ids of the slides without an outcome.
        refusals: Rows of `REFUSALS_SCHEMA`, by slide id.
        pending: Keys of what unfinished runs have left and of what this one adds; the commit makes them superfluous.
    """

    def __init__(self, archive: Archive, sorter: SlideSorter) -> None:
        self._fingerprints = {name: archive.fingerprint(name) for name in archive.slides}
        self._sorter = sorter
        self.left = dict.fromkeys(archive.slides)
        self.refusals: dict[str, dict[str, Any]] = {}
        self.pending: list[str] = []

    @property
    def accepted(self) -> int:
        """Number of slides that are taken."""
        return self._sorter.rows

    def fingerprint(self, name: str) -> bytes:
        """Of a slide as it is now."""
        return self._fingerprints[name]

    def take_earlier(self, store: Store) -> None:
        """Take what earlier runs found of slides that have not changed since; what is damaged is left out."""
        for part in pending_parts(store):
            self.pending.append(part.key)
            self._take_whole(read_pending(store, part))
        try:
            snapshot = read_snapshot(store)
        except SlideIndexError:
            return  # none yet, of another version, or torn: this run replaces it
        for part in snapshot.parts(SLIDES):
            self._take_whole(read_batches(store, part, SLIDES_SCHEMA, EXAMINED_SCHEMA.names))
        for part in snapshot.parts(REFUSALS):
            try:
                self._refuse(list(read_rows(store, part, REFUSALS_SCHEMA)))
            except SlideIndexError:
                continue  # its slides are examined again

    def take(self, batch: pa.RecordBatch) -> None:
        """Take rows that have the columns of `EXAMINED_SCHEMA`, and for refusals `reason` and `version`."""
        accepted = [True] * batch.num_rows
        if "reason" in batch.schema.names:
            accepted = batch["reason"].is_null().to_pylist()
            refused = batch.filter(batch["reason"].is_valid()).select(REFUSALS_SCHEMA.names)
            self._refuse(refused.to_pylist())
        names, fingerprints = batch["slide_id"].to_pylist(), batch["fingerprint"].to_pylist()
        wanted = [
            taken and self._decide(name, fingerprint)
            for taken, name, fingerprint in zip(accepted, names, fingerprints, strict=True)
        ]
        columns = [batch[name] for name in EXAMINED_SCHEMA.names]
        self._sorter.add(pa.RecordBatch.from_arrays(columns, schema=EXAMINED_SCHEMA).filter(pa.array(wanted)))

    def _take_whole(self, batches: Iterator[pa.RecordBatch]) -> None:
        try:
            for batch in batches:
                self.take(batch)
        except SlideIndexError:
            return  # what is left of a damaged part is examined again

    def _refuse(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            if row["version"] == EXAMINATION_VERSION and self._decide(row["slide_id"], row["fingerprint"]):
                self.refusals[row["slide_id"]] = row

    def _decide(self, name: str, fingerprint: bytes | None) -> bool:
        """Whether an outcome of a slide is that of the slide as it is now, and the first; it then counts."""
        if name not in self.left or self._fingerprints[name] != fingerprint:
            return False
        del self.left[name]
        return True


def forget_pending(store: Store, keys: Sequence[str]) -> None:
    """Remove what unfinished runs have left, once it is in a snapshot."""
    for key in keys:
        store.delete(key)
