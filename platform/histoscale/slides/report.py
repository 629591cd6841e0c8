"""The index as a page for people: what is in it, what is not and why, and a look at some of the slides. No names."""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import islice

import numpy as np
from PIL import Image

from histoscale.slides.records import SLIDES_SCHEMA, unpack_mask
from histoscale.slides.report_charts import histogram, page, share_table, table
from histoscale.slides.snapshot import REPORT, SLIDES, Snapshot, read_snapshot
from histoscale.slides.tables import read_rows
from histoscale.storage import Store, join

MAGNIFICATIONS_MPP = (0.25, 0.5, 1.0, 2.0)
MAX_UPSAMPLE = 1.1
MAX_PICTURES = 64
MAX_ROWS = 40
"""Values of a stratum that a table shows; the rest is summed up."""

_COUNTED = ["mpp", "mpp_origin", "mpp_conflict", "vendor", "strata", "patient", "size_bytes", "tissue_px", "mask_px0"]
_SHOWN = ["slide_id", "picture", "mask", "mask_rows", "mask_columns", "mpp", "strata"]
_OUTLINE = (20, 160, 60)
_QUALITY = 80


@dataclass
class Counts:
    """What the page shows of all slides.

    Attributes:
        by_value: For each strata column: value -> slides.
        by_vendor: Vendor -> slides.
        by_origin: Where the scale comes from -> slides.
        scales: um/px of all slides, rounded to 0.001 -> slides.
        served: Value of the first strata column -> slides that serve each of `MAGNIFICATIONS_MPP`.
        conflicts: (um/px that is used, um/px that another origin gives), rounded -> slides.
        patients: Patients that are known.
        size_bytes: Bytes of all slides.
    """

    by_value: list[Counter[str]]
    by_vendor: Counter[str] = field(default_factory=Counter)
    by_origin: Counter[str] = field(default_factory=Counter)
    scales: Counter[float] = field(default_factory=Counter)
    served: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0] * len(MAGNIFICATIONS_MPP)))
    conflicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    patients: set[str] = field(default_factory=set)
    size_bytes: int = 0


@dataclass(frozen=True)
class Picture:
    """A slide on the contact sheet: its picture with the outline of its tissue, as JPEG, and what stands below."""

    jpeg: bytes = field(repr=False)
    caption: str


def write_report(store: Store) -> str:
    """Write `report.html` of the current snapshot; gives its URI.

    Raises:
        SlideIndexError: No index, or a damaged one.
        StorageError: It cannot be read or written.
    """
    snapshot = read_snapshot(store)
    html = render(snapshot, count(store, snapshot), pictures(store, snapshot))
    store.put(REPORT, html.encode())
    return join(store.uri, REPORT)


def count(store: Store, snapshot: Snapshot) -> Counts:
    """Count over all slides of a snapshot; masks stay where they are."""
    counts = Counts([Counter() for _ in snapshot.columns])
    for part in snapshot.parts(SLIDES):
        for row in read_rows(store, part, SLIDES_SCHEMA, _COUNTED):
            for counter, value in zip(counts.by_value, row["strata"], strict=True):
                counter[value] += 1
            counts.by_vendor[row["vendor"]] += 1
            counts.by_origin[row["mpp_origin"]] += 1
            counts.scales[round(row["mpp"], 3)] += 1
            served = counts.served[row["strata"][0] if row["strata"] else "all slides"]
            for place, mpp in enumerate(MAGNIFICATIONS_MPP):
                served[place] += row["mpp"] <= mpp * MAX_UPSAMPLE
            if row["mpp_conflict"] is not None:
                counts.conflicts[f"{row['mpp']:.3f}", f"{row['mpp_conflict']:.3f}"] += 1
            if row["patient"] is not None:
                counts.patients.add(row["patient"])
            counts.size_bytes += row["size_bytes"]
    return counts


def pictures(store: Store, snapshot: Snapshot) -> list[Picture]:
    """The kept pictures, with the outline of what is taken for tissue.

    The slides that have one were chosen by their ids, the smallest first, and so lie in the first part.
    """
    found: list[Picture] = []
    for part in islice(snapshot.parts(SLIDES), 1):
        for row in read_rows(store, part, SLIDES_SCHEMA, _SHOWN):
            if row["picture"] is not None:
                caption = " · ".join([f"{row['mpp']:.3g} µm/px", *(value for value in row["strata"] if value)])
                found.append(Picture(_outlined(row), caption))
            if len(found) == MAX_PICTURES:
                return found
    return found


def render(snapshot: Snapshot, counts: Counts, contact_sheet: Sequence[Picture]) -> str:
    """The page, self-contained."""
    facts = [
        ("slides", f"{snapshot.slides:,}"),
        ("refused", f"{snapshot.refused:,}"),
        ("unreachable", f"{snapshot.unreachable:,}"),
        ("tissue", f"{snapshot.tissue_mm2:,.0f} mm²"),
        ("size", f"{counts.size_bytes / 1e9:,.1f} GB"),
        ("patients known", f"{len(counts.patients):,}"),
        ("probable duplicates", f"{snapshot.duplicates:,}"),
        ("scale in doubt", f"{snapshot.conflicts:,}"),
    ]
    first = snapshot.columns[0] if snapshot.columns else ""
    sections = [
        ("Scale of the slides", histogram(counts.scales, "µm/px at level 0")),
        (
            f"Magnifications that each {escape(first) or 'slide'} serves",
            share_table(first, _served(counts), [f"{mpp:g} µm/px" for mpp in MAGNIFICATIONS_MPP])
            + f"<p>A slide serves what is at most {MAX_UPSAMPLE - 1:.0%} finer than its own pixels.</p>",
        ),
    ]
    for name, counter in zip(snapshot.columns, counts.by_value, strict=True):
        sections.append((f"Slides by {escape(name)}", table((name, "slides"), _largest(counter))))
    sections.append(("Slides by vendor", table(("vendor", "slides"), counts.by_vendor.most_common())))
    sections.append(("Where the scale comes from", table(("origin", "slides"), counts.by_origin.most_common())))
    if counts.conflicts:
        rows = [(used, other, slides) for (used, other), slides in counts.conflicts.most_common(MAX_ROWS)]
        sections.append(("Scales in doubt", table(("µm/px used", "µm/px by another origin", "slides"), rows)))
    if snapshot.refused:
        sections.append(("Refused slides", table(("reason", "slides"), _largest(snapshot.reasons))))
    if contact_sheet:
        sections.append(("A sample, with the outline of its tissue", _sheet(contact_sheet)))
    return page("Slide index", f"snapshot {snapshot.snapshot_id}, {snapshot.created}", facts, sections)


def _served(counts: Counts) -> list[tuple[str, int, list[int]]]:
    """(Value, its slides, those that serve each magnification), the most frequent values first."""
    slides = counts.by_value[0] if counts.by_value else Counter({"all slides": sum(counts.scales.values())})
    rows = [(value, number, counts.served[value]) for value, number in slides.most_common()]
    shown, rest = rows[:MAX_ROWS], rows[MAX_ROWS:]
    if rest:
        totals = [sum(served[place] for _, _, served in rest) for place in range(len(MAGNIFICATIONS_MPP))]
        shown.append((f"{len(rest)} others", sum(number for _, number, _ in rest), totals))
    return shown


def _largest(counter: Mapping[str, int]) -> list[tuple[str, int]]:
    rows = Counter(counter).most_common()
    rest = rows[MAX_ROWS:]
    return rows[:MAX_ROWS] + ([(f"{len(rest)} others", sum(number for _, number in rest))] if rest else [])


def _sheet(contact_sheet: Sequence[Picture]) -> str:
    cells = "".join(
        f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in contact_sheet
    )
    return f'<div class="sheet">{cells}</div>'


def _outlined(row: Mapping[str, object]) -> bytes:
    """The picture of a slide with the outline of its mask, JPEG."""
    picture = Image.open(io.BytesIO(_as_bytes(row["picture"]))).convert("RGB")
    mask = unpack_mask(_as_bytes(row["mask"]), int(str(row["mask_rows"])), int(str(row["mask_columns"])))
    small = np.asarray(Image.fromarray(mask).convert("L").resize(picture.size, Image.Resampling.BOX)) >= 128
    padded = np.pad(small, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels = np.array(picture)
    pixels[small & ~inner] = _OUTLINE
    data = io.BytesIO()
    # Colour at full resolution: the outline is one pixel wide.
    Image.fromarray(pixels).save(data, "JPEG", quality=_QUALITY, subsampling=0)
    return data.getvalue()


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""
