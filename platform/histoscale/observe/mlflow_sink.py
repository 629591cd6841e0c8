"""What a run tells an MLflow server: its recipe, the metrics of committed steps and its evaluations, each once.

MLflow keeps every value that it is sent and takes none back, while steps that are not committed may be taken again with
other values. So only committed steps are sent, and what was sent is recorded in the run folder. Times are those of the
committed steps alone, counted from the start of the run: a batch that is sent again, as its answer was lost, holds the
same points, which a server with a database keeps once.
"""

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from histoscale.checkpoint.reader import latest_commit
from histoscale.checkpoint.run_record import find_index
from histoscale.config.decode import fingerprint, flat_fields
from histoscale.config.recipe import Recipe
from histoscale.config.running import TrackingSection
from histoscale.errors import DatasetError, RunError
from histoscale.evaluate.report import FOLDER, decode
from histoscale.observe.code_record import code_line, read_provenance
from histoscale.observe.goodput import STEP_S
from histoscale.observe.metrics import read_metrics
from histoscale.observe.timeline import read_events
from histoscale.storage import Store
from histoscale.storage.json_object import count_of, read_json, text_of

STATE_KEY = "mlflow.json"
PACKAGE = "mlflow"
_METRICS_AT_ONCE, _PARAMS_AT_ONCE, _VALUE_CHARS = 1000, 100, 500  # what servers of any version take
_REQUEST_S = "10"


@dataclass(frozen=True)
class Sent:
    """What a server has been told of a run.

    Attributes:
        uri: Of the server.
        experiment: Name of the experiment.
        run_id: What the server calls the run.
        steps: Committed steps whose metrics were sent.
        evaluations: Keys of the evaluations that were sent.
    """

    uri: str
    experiment: str
    run_id: str
    steps: int = 0
    evaluations: tuple[str, ...] = ()


def require_client(tracking: TrackingSection) -> None:
    """Refuse a recipe that names a server where the client is not installed.

    Raises:
        RunError: It is not.
    """
    if tracking.mlflow is not None and importlib.util.find_spec(PACKAGE) is None:
        raise RunError(
            "tracking.mlflow needs MLflow's client, which is not installed here",
            value=tracking.mlflow,
            expected="the package mlflow-skinny",
            remedy="install it where the job runs: `pip install 'histoscale[mlflow]'`; or leave tracking.mlflow out",
        )


def client_errors() -> tuple[type[Exception], ...]:
    """What MLflow's client raises where a server is away or refuses something; loads the client, in 1 to 4 s.

    From here on the client gives up on a server after some seconds, and tells nobody else of its use.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _REQUEST_S)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the next look is one
    from mlflow.exceptions import MlflowException

    return MlflowException, OSError  # the latter is what connections raise


def open_client(uri: str) -> Any:  # noqa: ANN401 - mlflow is optional
    """MLflow's client, with the credentials of MLflow's own variables, such as MLFLOW_TRACKING_TOKEN."""
    client_errors()
    from mlflow import MlflowClient

    return MlflowClient(uri)


class MlflowSink:
    """The run of one server that follows a run folder; every call may raise whatever MLflow's client does.

    Args:
        store: The run folder.
        tracking: Of the recipe, with a server.
        client: An `MlflowClient`.
    """

    def __init__(self, store: Store, tracking: TrackingSection, client: Any) -> None:  # noqa: ANN401
        self._store = store
        self._tracking = tracking
        self._client = client
        self._sent: Sent | None = None

    def send(self, recipe: Recipe) -> None:
        """Send what was committed and evaluated since the last time; nothing before the first commit."""
        commit = latest_commit(self._store)
        if commit is None:
            return
        sent = self._opened(recipe) if not self._sent else self._sent
        if sent.steps == 0:
            self._log_params(sent, recipe)
        start_ms = self._start_ms()
        if commit.step > sent.steps:
            for step, values in _by_batch(read_metrics(self._store, commit.step), sent.steps, start_ms):
                self._log(sent, values)
                sent = self._note(replace(sent, steps=step))
        keys = [info.key for info in self._store.list(FOLDER) if info.key.endswith(".json") and "-step-" in info.key]
        for key in keys:
            if key not in sent.evaluations:
                self._log(sent, self._figures(key, start_ms))
                sent = self._note(replace(sent, evaluations=(*sent.evaluations, key)))

    def end(self, status: str) -> None:
        """Tell how the run has ended, as MLflow calls it: FINISHED, KILLED or FAILED."""
        if self._sent is not None:
            self._client.set_terminated(self._sent.run_id, status)

    def _figures(self, key: str, start_ms: int) -> list[tuple[str, float, int, int]]:
        """Points of an evaluation; none where it is of another version, as evaluating again would overwrite it."""
        try:
            report = decode(self._store.get(key))
        except DatasetError:
            return []
        return [
            (name, value, start_ms, report.step) for name, value in report.scalars().items() if math.isfinite(value)
        ]

    def _opened(self, recipe: Recipe) -> Sent:
        """The run on the server: the one that the run folder names, where the server still has it, else a new one."""
        from mlflow.entities import RunTag

        sent = read_sent(self._store)
        known = sent is not None and (sent.uri, sent.experiment) == (self._tracking.mlflow, self._tracking.experiment)
        if sent is None or not known or not self._has(sent.run_id):
            sent = self._created()
            self._store.put(STATE_KEY, _encoded(sent))
        else:
            self._client.update_run(sent.run_id, status="RUNNING")
        index = find_index(self._store)
        tags = {
            "histoscale.run": self._store.uri,
            "histoscale.recipe": fingerprint(recipe),
            "histoscale.code": "; ".join(map(code_line, read_provenance(self._store))),
            "histoscale.index_snapshot": index[1] if index else "",
        }
        self._client.log_batch(sent.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        self._sent = sent
        return sent

    def _created(self) -> Sent:
        name = self._tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_name = self._store.uri.rpartition("/")[2]
        run = self._client.create_run(experiment_id, start_time=self._start_ms(), run_name=run_name)
        return Sent(str(self._tracking.mlflow), name, run.info.run_id)

    def _has(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _log_params(self, sent: Sent, recipe: Recipe) -> None:
        from mlflow.entities import Param

        params = [
            Param(name, (value if isinstance(value, str) else json.dumps(value))[:_VALUE_CHARS] or "''")
            for name, value in flat_fields(recipe).items()
        ]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(sent.run_id, params=params[start : start + _PARAMS_AT_ONCE])

    def _log(self, sent: Sent, values: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(values), _METRICS_AT_ONCE):
            part = values[start : start + _METRICS_AT_ONCE]
            self._client.log_batch(sent.run_id, metrics=[Metric(*value) for value in part])

    def _note(self, sent: Sent) -> Sent:
        self._sent = sent
        self._store.put(STATE_KEY, _encoded(sent))
        return sent

    def _start_ms(self) -> int:
        events = read_events(self._store)
        return round(events[0].time_s * 1000) if events else 0


def read_sent(store: Store) -> Sent | None:
    """What the run folder records; None where nothing was sent.

    Raises:
        RunError: The record is damaged.
    """
    if not store.exists(STATE_KEY):
        return None
    return read_json(
        store,
        STATE_KEY,
        lambda values: Sent(
            text_of(values["uri"]),
            text_of(values["experiment"]),
            text_of(values["run_id"]),
            count_of(values["steps"]),
            tuple(map(text_of, values["evaluations"])),
        ),
        kind=RunError,
        what=f"{STATE_KEY} of run {store.uri} is damaged",
        expected="what MLflow was told of the run",
        remedy=f"delete {STATE_KEY}: MLflow is then told all of the run anew, as another run",
    )


def _encoded(sent: Sent) -> bytes:
    return json.dumps(asdict(sent), indent=1).encode()


def _by_batch(
    lines: Iterator[Mapping[str, float]], first: int, start_ms: int
) -> Iterator[tuple[int, list[tuple[str, float, int, int]]]]:
    """From `first` on, as many whole steps as one request holds: how many steps are done with them, and the points.

    A point is (name, value, milliseconds since 1970, step); what is not finite is left out.
    """
    elapsed_s, points, done = 0.0, list[tuple[str, float, int, int]](), first
    for line in lines:
        elapsed_s += line.get(STEP_S, 0.0)
        step, at_ms = int(line["step"]), start_ms + round(1000 * elapsed_s)
        if step < first:
            continue
        new = [(name, value, at_ms, step) for name, value in line.items() if name != "step" and math.isfinite(value)]
        if points and len(points) + len(new) > _METRICS_AT_ONCE:
            yield done, points
            points = []
        points, done = points + new, step + 1
    if points:
        yield done, points
