"""What a layout is: how it is recognised, read and checked, and how one that is incomplete is refused."""

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets.tiles import LabelledTiles
from histoscale.storage import Store, join, open_store

Columns = dict[str, list[str]]  # by name, one value per row

_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True)
class Published:
    """How many tiles a dataset has by its publication; what could not be confirmed is left out.

    Attributes:
        total: All tiles.
        parts: Tiles of each part.
        classes: Tiles of each class.
    """

    total: int | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """The objects of a place that may be a dataset.

    Attributes:
        store: The place.
        keys: Its objects, sorted; without hidden ones. They may hold patient data and belong in no message.
    """

    store: Store
    keys: tuple[str, ...] = field(repr=False)

    @cached_property
    def known(self) -> frozenset[str]:
        """The keys, to look them up."""
        return frozenset(self.keys)

    def inside(self, folder: str | None) -> "Listing":
        """The listing of a folder of the place, where there is one, else the same: a download may lie in its folder."""
        prefix = f"{folder}/"
        keys = tuple(key.removeprefix(prefix) for key in self.keys if key.startswith(prefix))
        return Listing(open_store(join(self.store.uri, folder), private=True), keys) if folder and keys else self

    def matches(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """The keys that a pattern matches as a whole, in order."""
        return (match for key in self.keys if (match := pattern.fullmatch(key)))


@dataclass(frozen=True)
class Layout:
    """One way in which labelled tiles lie in a place.

    Attributes:
        name: What `open_dataset` calls it.
        expected: The layout in words, for refusals.
        mark: A key that it alone has, matched as a whole.
        read: Labelled tiles of a listing under a choice; the layout is given to it as well.
        published: What is published of its size, by choice; the one choice "" where there is nothing to choose.
        default: The choice where none is made; None where one must be made.
        folder: Name of the folder that the download unpacks to, which may be left out.
    """

    name: str
    expected: str
    mark: re.Pattern[str]
    read: "Callable[[Layout, Listing, str], LabelledTiles]"
    published: Mapping[str, Published] = field(default_factory=lambda: {"": Published()})
    default: str | None = ""
    folder: str | None = None

    def open(self, listing: Listing, choice: str | None) -> LabelledTiles:
        """The labelled tiles of a place that has this layout.

        Raises:
            DatasetError: No such choice, or what lies there is incomplete or of another layout.
        """
        chosen = self.default if choice is None else choice
        if chosen is None or chosen not in self.published:
            choices = [f"{self.name}:{name}" for name in self.published if name]
            raise DatasetError(
                f"the layout {self.name} has no such choice" if chosen else f"the layout {self.name} needs a choice",
                value=f"{self.name}:{chosen}" if chosen else None,
                expected=" or ".join(choices) or self.name,
                remedy="correct the layout",
            )
        tiles = self.read(self, listing.inside(self.folder), chosen)
        check_published(tiles, self.published[chosen], self)
        return tiles

    def refuse(self, what: str, value: object = None) -> DatasetError:
        """The error for a place that does not hold the whole dataset in this layout."""
        return DatasetError(
            f"{self.name}: {what}", value=value, expected=self.expected, remedy="unpack the whole download there"
        )


def list_place(uri: str) -> Listing:
    """The objects of a place.

    Raises:
        StorageError: It cannot be listed.
    """
    store = open_store(uri, private=True)
    keys = (info.key for info in store.list())
    return Listing(store, tuple(key for key in keys if not any(part.startswith(".") for part in key.split("/"))))


def check_published(tiles: LabelledTiles, published: Published, layout: Layout) -> None:
    """Refuse a dataset whose size is not the published one.

    Raises:
        DatasetError: Every part and class that has more or fewer tiles.
    """
    parts = Counter(() if tiles.parts is None else tiles.parts.tolist())
    found = [(name, parts[name], count) for name, count in published.parts.items()]
    counts = tiles.counts()
    found += [(name, counts.get(name, 0), count) for name, count in published.classes.items()]
    if published.total is not None:
        found.append(("in all", len(tiles), published.total))
    wrong = [f"{name}: {here} tiles of {count}" for name, here, count in found if here != count]
    if wrong:
        raise layout.refuse("the number of tiles is not the published one", ", ".join(wrong))


def refuse_missing(layout: Layout, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Refuse a place that lacks files or folders that the layout always has; their names hold no patient.

    Raises:
        DatasetError: All that is missing.
    """
    here = set(found)
    missing = [name for name in wanted if name not in here]
    if missing:
        raise layout.refuse("the dataset is incomplete", "no " + ", no ".join(missing))


def refuse_absent_tiles(layout: Layout, keys: Iterable[str], listing: Listing) -> None:
    """Refuse a table that names tiles which are not there.

    Raises:
        DatasetError: With their number.
    """
    absent = sum(key not in listing.known for key in keys)
    if absent:
        raise layout.refuse(f"{absent} tiles that its table names are not there")


def read_csv(layout: Layout, listing: Listing, key: str, columns: Iterable[str], delimiter: str = ",") -> Columns:
    """Columns of a CSV with a header, gzipped where its name ends in `.gz`.

    Args:
        layout: The layout that has it.
        listing: The place.
        key: The CSV; its name holds no patient.
        columns: Those that are wanted; others may be there.
        delimiter: Between the fields.

    Raises:
        DatasetError: The CSV is damaged, or lacks columns or fields.
        StorageError: It cannot be read.
    """
    data = listing.store.get(key)
    try:
        text = (gzip.decompress(data) if key.endswith(".gz") else data).decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        wanted = list(columns)
        absent = [name for name in wanted if name not in (rows.fieldnames or ())]
        if absent:
            raise layout.refuse(f"{key} lacks columns", ", ".join(absent))
        found: Columns = {name: [] for name in wanted}
        for row in rows:
            for name in wanted:
                found[name].append(_field(layout, key, rows.line_num, row[name]))
    except (*_GZIP_ERRORS, UnicodeDecodeError, csv.Error):
        raise layout.refuse(f"{key} is no whole CSV") from None
    return found


def codes(layout: Layout, key: str, column: str, values: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """What the codes of a column stand for.

    Raises:
        DatasetError: A code that is not known.
    """
    listed = list(values)
    unknown = sum(value not in known for value in listed)
    if unknown:  # which are not shown: a column of another table may name patients
        raise layout.refuse(f"{key} has a {column} other than {' or '.join(known)}", f"in {unknown} rows")
    return [known[value] for value in listed]


def names_array(values: Iterable[str]) -> np.ndarray[tuple[int], np.dtype[np.str_]]:
    """Names as str [N]."""
    return np.array(list(values), dtype=np.str_)


def _field(layout: Layout, key: str, line: int, value: str | None) -> str:
    if value is None:
        raise layout.refuse(f"{key} is cut short", f"line {line}")
    return value
