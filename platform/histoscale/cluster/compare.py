"""From run folders to one page that compares them; a run that cannot be read is told and left out."""

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from histoscale.checkpoint.reader import latest_commit
from histoscale.cluster.run_folder import require_run
from histoscale.errors import HistoscaleError, RunError
from histoscale.observe.comparison import read_record
from histoscale.observe.comparison_page import comparison_page
from histoscale.storage import open_store

LEAST, MOST = 2, 8


def compare_runs(uris: Sequence[str], out: str, tell: Callable[[str], None]) -> None:
    """Write a page that compares runs.

    Args:
        uris: The run folders; the first is what the others are held against.
        out: URI of the page.
        tell: Takes a line for people.

    Raises:
        RunError: There are too many runs, one comes twice, or fewer than two can be read.
        StorageError: The page cannot be written.
    """
    if len(set(uris)) != len(uris) or len(uris) > MOST:
        raise RunError(
            "these runs cannot be compared", value=", ".join(uris), expected=f"{LEAST} to {MOST} different run folders"
        )
    records, left_out = [], []
    for uri in uris:
        store = open_store(uri)
        try:
            records.append(read_record(store, require_run(store), latest_commit(store)))
        except HistoscaleError as error:
            left_out.append(f"{uri}: {error}")
            tell(f"warning: left out: {left_out[-1]}")
    if len(records) < LEAST:
        raise RunError(
            "there is nothing to compare",
            value=f"{len(records)} runs that can be read",
            expected=f"{LEAST} at least",
            remedy="mend what the lines above say, or give other run folders",
        )
    folder, name = _place(out)
    open_store(folder).put(name, comparison_page(records, left_out).encode())
    tell(f"comparison: {out}")


def _place(out: str) -> tuple[str, str]:
    """Folder and name of a file."""
    name = PurePosixPath(out).name
    return out[: -len(name)].rstrip("/") or "/", name
