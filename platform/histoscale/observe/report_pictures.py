"""The part of a run's report that shows tissue: spikes with the way to their tiles, and pictures of a checkpoint."""

import base64
import shlex
from collections.abc import Mapping, Sequence
from html import escape

from histoscale.checkpoint.run_record import recorded_index
from histoscale.errors import HistoscaleError
from histoscale.observe.picture_store import (
    FOLDER,
    STEPS_FOLDER,
    PictureSet,
    Shown,
    read_sets,
    remove_withdrawn,
    step_page_key,
)
from histoscale.observe.spikes import WATCHED, Spike, largest_spikes
from histoscale.observe.tile_pictures import NEIGHBOURS
from histoscale.slides.exclusions import read_exclusions
from histoscale.slides.snapshot import read_snapshot
from histoscale.storage import Store, open_store

_MOST_BYTES = 2_000_000  # of pictures within the page; the rest is linked
_MOST_SPIKES = 10

Section = tuple[str, str]


def picture_sections(store: Store, metrics: Sequence[Mapping[str, float]]) -> list[Section]:
    """Headings and HTML of spikes and pictures; what cannot be shown says why.

    First every picture and every page of a step that shows a slide which was withdrawn since is deleted.

    Args:
        store: The run folder.
        metrics: What was measured of the steps, steps ascending.

    Raises:
        StorageError: The run folder cannot be read.
    """
    try:
        if any(True for folder in (FOLDER, STEPS_FOLDER) for _ in store.list(folder)):
            remove_withdrawn(store, _withdrawn(store))
        sets = read_sets(store)
        pictures = _pictures(store, sets) if sets else []
    except HistoscaleError as error:
        pictures = [("Pictures", f"<p>Not shown: {escape(str(error))}</p>")]
    if not metrics:
        return pictures
    return [("Spikes, and the tiles of a step", _spikes(store, largest_spikes(metrics, _MOST_SPIKES))), *pictures]


def _spikes(store: Store, spikes: Sequence[Spike]) -> str:
    command = f"python jobs/report.py {shlex.quote(store.uri)} --step N"
    way = (
        "<p>A curve tells its steps when the pointer rests on it. This command shows the tiles of any of them, with "
        f"their slides and places:</p><pre>{escape(command)}</pre>"
    )
    if not spikes:
        return f"<p>Neither the loss nor the gradient norm has a step that stands out from those around it.</p>{way}"
    pages = {info.key for info in store.list(STEPS_FOLDER)}
    rows = "".join(_spike(spike, pages) for spike in sorted(spikes, key=lambda spike: spike.step))
    heads = "".join(f"<th>{head}</th>" for head in ("step", "curve", "value", "median around", "its tiles"))
    note = (
        "<p>The largest steps that stand far above the 50 before and after them. One is no harm; many on tiles of one "
        "kind (ink, blur, glass, one slide) say what to leave out.</p>"
    )
    return f"<table><tr>{heads}</tr>{rows}</table>{note}{way}"


def _spike(spike: Spike, pages: set[str]) -> str:
    key = step_page_key(spike.step)
    page = f'<a href="{escape(key)}">page</a>' if key in pages else f"<code>--step {spike.step}</code>"
    cells = (f"{spike.step:,}", WATCHED[spike.metric], f"{spike.value:.4g}", f"{spike.typical:.4g}")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td>{page}</td></tr>"


def _withdrawn(store: Store) -> frozenset[str]:
    """Slides that must not be shown; without the index nobody knows them, so that nothing is shown."""
    uri, snapshot_id = recorded_index(store)
    index = open_store(uri)
    read_snapshot(index, snapshot_id)
    return frozenset(slide_id for one in read_exclusions(index) for slide_id in one.slide_ids)


def _pictures(store: Store, sets: Sequence[PictureSet]) -> list[Section]:
    newest = sets[-1]
    page, sections = _Page(store), []
    for shown in newest.pictures:
        first = sets[0].find(shown.name) if len(sets) > 1 and shown.name == NEIGHBOURS else None
        body = (
            page.figure(shown, newest.step)
            if first is None
            else _compared(page, first, sets[0].step, shown, newest.step)
        )
        sections.append((escape(shown.title), f"{body}<p>{escape(shown.caption)}</p>"))
    if newest.left_out:
        lines = "".join(f"<p>{escape(line)}</p>" for line in newest.left_out)
        sections.append((f"Pictures that were left out at step {newest.step:,}", lines))
    return sections


def _compared(page: "_Page", first: Shown, first_step: int, newest: Shown, newest_step: int) -> str:
    columns = page.figure(first, first_step) + page.figure(newest, newest_step)
    return f'<div style="display:grid;grid-template-columns:1fr 1fr;gap:12px">{columns}</div>'


class _Page:
    """Puts pictures into the page for as long as there is room, and links the others."""

    def __init__(self, store: Store) -> None:
        self._store, self._room_bytes = store, _MOST_BYTES

    def figure(self, shown: Shown, step: int) -> str:
        """A picture under the step of its checkpoint."""
        data = base64.b64encode(self._store.get(shown.file)).decode()
        link = escape(shown.file)
        if len(data) > self._room_bytes:
            return f'<p><a href="{link}">{escape(shown.title)}, step {step:,}</a></p>'
        self._room_bytes -= len(data)
        image = f'<img alt="{escape(shown.title)}" style="max-height:none" src="data:image/webp;base64,{data}">'
        return f'<figure><a href="{link}">{image}</a><figcaption>step {step:,}</figcaption></figure>'
