"""TensorBoard's HParams of a sweep: what was varied, and what came of it, trial by trial."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from histoscale.storage import Store
from histoscale.sweeps.rows import TrialRow

EVENTS = "events"


def write_hparams(store: Store, rows: Sequence[TrialRow]) -> None:
    """Replace SWEEP/events by one run for each trial that has a score.

    Args:
        store: The folder of the sweep.
        rows: Of all trials.

    Raises:
        StorageError: They cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="histoscale-hparams-") as scratch:
        for row in rows:
            if row.scores:
                with SummaryWriter(scratch) as writer:
                    writer.add_hparams(varied(row), measured(row), run_name=row.name)
        for info in store.list(EVENTS):
            store.delete(info.key)
        for path in sorted(Path(scratch).rglob("*/events*")):
            store.upload(path, f"{EVENTS}/{path.relative_to(scratch).as_posix()}")


def varied(row: TrialRow) -> dict[str, str | int | float]:
    """What tells a trial from others."""
    fixed: dict[str, str | int | float] = {
        "role": row.role,
        "model.arch": row.arch,
        "images": row.images,
        "seed": row.seed,
        "optim.lr": row.lr,
    }
    settings = {field: json.loads(value) for field, value in row.settings.items()}
    plain = {
        field: value if isinstance(value, str | int | float) else json.dumps(value) for field, value in settings.items()
    }
    return fixed | ({} if row.slides is None else {"slides": row.slides}) | plain


def measured(row: TrialRow) -> dict[str, float]:
    """What came of it."""
    found = {f"score/{task}": value for task, value in row.scores.items()}
    extra = {"loss": row.loss, "latency_ms": row.latency_ms, "parameters": float(row.parameters), "flops": row.flops}
    return found | {name: value for name, value in extra.items() if value is not None}
