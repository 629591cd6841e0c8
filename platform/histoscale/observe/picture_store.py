"""The pictures of checkpoints in the run folder, on TensorBoard, and out of both where a slide is withdrawn."""

import io
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from histoscale.errors import RunError
from histoscale.observe.drawing import captioned
from histoscale.observe.metrics import EVENTS_PREFIX
from histoscale.observe.tile_pictures import Picture
from histoscale.storage import Store
from histoscale.storage.json_object import read_json

FOLDER = "pictures"
STEPS_FOLDER = "steps"
EVENTS = f"{EVENTS_PREFIX}/pictures"
FORMAT_VERSION = 1
_QUALITY = 85
_ABOUT = re.compile(rf"{FOLDER}/step-(\d{{10,}})/pictures\.json")


@dataclass(frozen=True)
class Shown:
    """A picture in the run folder; see `Picture`.

    Attributes:
        file: Its key.
    """

    name: str
    title: str
    caption: str
    file: str
    slides: tuple[str, ...]


@dataclass(frozen=True)
class PictureSet:
    """All pictures of one checkpoint.

    Attributes:
        step: Of the checkpoint.
        pictures: In the order to look at them.
        left_out: What is not there, and why.
        events: Keys of the files that hold the same for TensorBoard.
    """

    step: int
    pictures: tuple[Shown, ...]
    left_out: tuple[str, ...]
    events: tuple[str, ...]

    @property
    def key(self) -> str:
        """Of what says what each picture is."""
        return f"{_folder(self.step)}/pictures.json"

    def find(self, name: str) -> Shown | None:
        """The picture of a name, if it is there."""
        return next((shown for shown in self.pictures if shown.name == name), None)


def write_pictures(store: Store, step: int, pictures: Sequence[Picture], left_out: Sequence[str]) -> PictureSet:
    """Put the pictures of a checkpoint into the run folder and on TensorBoard.

    What tells of them comes last, so that a set which can be read is whole.

    Raises:
        StorageError: The run folder cannot be written.
    """
    shown = []
    for picture in pictures:
        data = io.BytesIO()
        picture.image.save(data, "WEBP", quality=_QUALITY)
        file = f"{_folder(step)}/{picture.name}.webp"
        store.put(file, data.getvalue())
        shown.append(Shown(picture.name, picture.title, picture.caption, file, picture.slides))
    found = PictureSet(step, tuple(shown), tuple(left_out), tuple(_write_events(store, step, pictures)))
    _tell(store, found)
    return found


def read_sets(store: Store) -> list[PictureSet]:
    """The pictures of all checkpoints, by step.

    Raises:
        RunError: What is recorded of them is damaged.
    """
    keys = [info.key for info in store.list(FOLDER) if _ABOUT.fullmatch(info.key)]
    return [_read(store, key) for key in keys]


def drawn_step(store: Store) -> int:
    """The newest step of a run that has pictures, or 0."""
    return max((int(found[1]) for info in store.list(FOLDER) if (found := _ABOUT.fullmatch(info.key))), default=0)


def step_page_key(step: int) -> str:
    """Key of the page on the tiles of a step."""
    return f"{STEPS_FOLDER}/step-{step}.html"


def remove_withdrawn(store: Store, withdrawn: Iterable[str]) -> int:
    """Delete every picture and every page of a step that shows one of these slides; gives how many there were.

    TensorBoard's files hold all pictures of a checkpoint, and go as a whole.

    Raises:
        HistoscaleError: The run folder cannot be read or written.
    """
    out, removed = set(withdrawn), 0
    if not out:
        return 0
    for found in read_sets(store):
        shows = [shown for shown in found.pictures if out & set(shown.slides)]
        if not shows:
            continue
        for key in (*(shown.file for shown in shows), *found.events):
            store.delete(key)
        kept = tuple(shown for shown in found.pictures if shown not in shows)
        why = f"{len(shows)} pictures that showed a slide which was withdrawn later"
        _tell(store, PictureSet(found.step, kept, (*found.left_out, why), ()))
        removed += len(shows)
    for info in list(store.list(STEPS_FOLDER)):
        text = store.get(info.key).decode(errors="replace")
        if any(slide_id in text for slide_id in out):
            store.delete(info.key)
            removed += 1
    return removed


def _write_events(store: Store, step: int, pictures: Sequence[Picture]) -> list[str]:
    keys = []
    with tempfile.TemporaryDirectory(prefix="histoscale-") as folder:
        with SummaryWriter(folder) as writer:
            for picture in pictures:
                image = captioned(picture.image, picture.title, picture.caption)
                writer.add_image(f"pictures/{picture.name}", np.asarray(image), step, dataformats="HWC")
        for path in Path(folder).iterdir():
            keys.append(f"{EVENTS}/{path.name}")
            store.upload(path, keys[-1])
    return keys


def _folder(step: int) -> str:
    return f"{FOLDER}/step-{step:010d}"


def _tell(store: Store, found: PictureSet) -> None:
    store.put(found.key, json.dumps({"format": FORMAT_VERSION, **asdict(found)}, indent=1).encode())


def _read(store: Store, key: str) -> PictureSet:
    return read_json(
        store,
        key,
        _decode,
        kind=RunError,
        what=f"{key} of run {store.uri} is damaged",
        expected=f"what says what each picture is, format {FORMAT_VERSION}",
        remedy="delete its folder: the pictures of the next checkpoint do without it",
    )


def _decode(values: Any) -> PictureSet:  # noqa: ANN401 - what a damaged file holds may be anything
    if values["format"] != FORMAT_VERSION:
        raise ValueError("another version")
    shown = tuple(Shown(**entry | {"slides": tuple(entry["slides"])}) for entry in values["pictures"])
    return PictureSet(int(values["step"]), shown, tuple(values["left_out"]), tuple(values["events"]))
