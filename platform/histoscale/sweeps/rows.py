"""What became of a trial: one row for each, as CSV, as Parquet, and back."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from histoscale.errors import SweepError
from histoscale.sweeps.trial import Trial

_SCORE, _CHANCE, _SETTING = "score:", "chance:", "set:"
_FIELDS: dict[str, pa.DataType] = {
    "name": pa.string(),
    "role": pa.string(),
    "arch": pa.string(),
    "seed": pa.int64(),
    "images": pa.int64(),
    "slides": pa.int64(),
    "parameters": pa.int64(),
    "flops": pa.float64(),
    "own_flops": pa.float64(),
    "lr": pa.float64(),
    "lr_factor": pa.float64(),
    "held_out": pa.bool_(),
    "reason": pa.string(),
    "loss": pa.float64(),
    "latency_ms": pa.float64(),
    "wall_s": pa.float64(),
}


@dataclass(frozen=True)
class TrialRow:
    """One trial that has ended, well or not.

    Attributes:
        name: Of the trial.
        role: See `Trial`.
        arch: Of its model.
        seed: Of the spec.
        images: Seen since new weights.
        slides: Drawn from; None is all.
        parameters: Of the backbone.
        flops: Since new weights.
        own_flops: Of the trial itself, without its trunk.
        lr: Learning rate.
        lr_factor: Multiple of the rule's.
        held_out: Predicted, not fitted.
        reason: Why it failed, or could not be judged; "" where all went well.
        scores: Task -> balanced accuracy.
        chance: Task -> that of guessing.
        settings: Field of the grid -> value, as text.
        loss: At its end.
        latency_ms: Of one tile through the backbone.
        wall_s: That it took.
    """

    name: str
    role: str
    arch: str
    seed: int
    images: int
    slides: int | None
    parameters: int
    flops: float
    own_flops: float
    lr: float
    lr_factor: float
    held_out: bool
    reason: str
    scores: Mapping[str, float]
    chance: Mapping[str, float]
    settings: Mapping[str, str]
    loss: float | None = None
    latency_ms: float | None = None
    wall_s: float | None = None

    def error(self, task: str) -> float:
        """1 - balanced accuracy; NaN where there is no score."""
        return 1.0 - self.scores.get(task, math.nan)


def row_of(
    trial: Trial,
    *,
    scores: Mapping[str, float] | None = None,
    chance: Mapping[str, float] | None = None,
    loss: float | None = None,
    latency_ms: float | None = None,
    wall_s: float | None = None,
    reason: str = "",
) -> TrialRow:
    """The row of a trial.

    Args:
        trial: Which.
        scores: As all that follows, see `TrialRow`.
        chance: See there.
        loss: See there.
        latency_ms: See there.
        wall_s: See there.
        reason: See there.
    """
    return TrialRow(
        name=trial.name,
        role=trial.role,
        arch=trial.recipe.model.arch,
        seed=trial.seed,
        images=trial.images,
        slides=trial.slides,
        parameters=trial.cost.parameters,
        flops=trial.cost.flops_since_start,
        own_flops=trial.cost.flops,
        lr=trial.recipe.optim.lr,
        lr_factor=trial.lr_factor,
        held_out=trial.held_out,
        reason=reason,
        scores=dict(scores or {}),
        chance=dict(chance or {}),
        settings={field: json.dumps(value) for field, value in trial.settings.items()},
        loss=loss,
        latency_ms=latency_ms,
        wall_s=wall_s,
    )


def to_table(rows: Sequence[TrialRow]) -> pa.Table:
    """A column for each plain field, and for each task and each field of the grid."""
    columns = {name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in _FIELDS.items()}
    for prefix, attribute, kind in (
        (_SCORE, "scores", pa.float64()),
        (_CHANCE, "chance", pa.float64()),
        (_SETTING, "settings", pa.string()),
    ):
        for name in dict.fromkeys(name for row in rows for name in getattr(row, attribute)):
            columns[prefix + name] = pa.array([getattr(row, attribute).get(name) for row in rows], kind)
    return pa.table(columns)


def to_parquet(rows: Sequence[TrialRow]) -> bytes:
    """The table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(to_table(rows), sink)
    return sink.getvalue()


def from_parquet(data: bytes) -> tuple[TrialRow, ...]:
    """The rows of `to_parquet`."""
    return tuple(_row(values) for values in pq.read_table(io.BytesIO(data)).to_pylist())


def to_json(row: TrialRow) -> bytes:
    """One row as JSON."""
    return json.dumps(asdict(row), indent=1).encode()


def from_json(data: bytes) -> TrialRow:
    """The row of `to_json`.

    Raises:
        SweepError: It is damaged, or of another version.
    """
    try:
        return TrialRow(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise SweepError(
            "the result of a trial is damaged or of another version of histoscale",
            value=str(error),
            expected="what the sweep wrote",
            remedy="remove the file below results/, and run the sweep again, which measures that trial anew",
        ) from error


def to_csv(rows: Sequence[TrialRow]) -> str:
    """The table as CSV, for spreadsheets; empty cells are not known."""
    table = to_table(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, table.column_names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.to_pylist())
    return text.getvalue()


def _row(values: Mapping[str, Any]) -> TrialRow:
    def below(prefix: str) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): value
            for name, value in values.items()
            if name.startswith(prefix) and value is not None
        }

    plain = {name: values[name] for name in _FIELDS}
    return TrialRow(**plain, scores=below(_SCORE), chance=below(_CHANCE), settings=below(_SETTING))
