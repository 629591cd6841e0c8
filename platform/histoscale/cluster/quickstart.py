"""The whole path with one command: slides, index, pretraining, evaluation, export, each step a submitted job."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from histoscale.checkpoint.reader import latest_commit
from histoscale.cluster.job import MIN_LOCAL_CPUS
from histoscale.cluster.local import HeadSize, LocalHead
from histoscale.cluster.quickstart_output import JobLines, Places, StepOutcome, render_report
from histoscale.config.decode import load_recipe
from histoscale.errors import ClusterError, RunError
from histoscale.evaluate.report import latest_report
from histoscale.slides.synthetic import make_labelled_tiles, make_slides
from histoscale.storage import open_store

RECIPE = "jobs/recipes/quickstart.yaml"
STEPS = 5
_SETTINGS = "quickstart.json"
_SLIDES = 8
_TILES_PER_CLASS = 100
_TILE_MPP = 0.5
_OBJECT_STORE_BYTES = 1 << 30


@dataclass(frozen=True)
class QuickstartRequest:
    """One call of the quickstart.

    Attributes:
        repository: Holds `jobs/`; sent along with every job.
        out: Folder for everything that it makes, absolute.
        slides_uri: The user's slides, or None for procedural ones.
        dataset_uri: Labelled tiles of the user's, or None.
        seed: Of the slides, the tiles and the run.
        overrides: Of the recipe, as `field=value`.
    """

    repository: Path
    out: Path
    slides_uri: str | None
    dataset_uri: str | None
    seed: int
    overrides: tuple[str, ...] = ()


def run_quickstart(request: QuickstartRequest, tell: Callable[[str], None]) -> str:
    """Run every step, or what is left of them, and answer the report.

    Raises:
        RunError: The output folder belongs to something else, or was made with other slides or another seed.
        ClusterError: The head does not start, or a step fails.
    """
    _claim(request)
    return _Quickstart(request, tell).run()


class _Quickstart:
    """The steps in order, numbered and timed."""

    def __init__(self, request: QuickstartRequest, tell: Callable[[str], None]) -> None:
        self._request = request
        self._tell = tell
        self._places = Places(request.out)
        self._started_s = time.monotonic()
        self._outcomes: list[StepOutcome] = []

    def run(self) -> str:
        request, places = self._request, self._places
        slides, dataset = self._inputs()
        cpus = max(MIN_LOCAL_CPUS, os.cpu_count() or 1)
        self._tell(f"starting a Ray head for this command, {cpus} logical CPUs")
        with LocalHead(HeadSize(cpus, _OBJECT_STORE_BYTES)) as head:
            self._tell(f"the head answers on {head.address}, to this command only")
            self._submit(head, "index", ["jobs/index.py", slides, "--out", str(places.index)])
            pretrain = ["jobs/pretrain.py", "--recipe", RECIPE]
            for override in (f"seed={request.seed}", *request.overrides):
                pretrain += ["--set", override]
            self._submit(head, "pretrain", [*pretrain, "--index", str(places.index), "--out", str(places.run)])
            if dataset is None:
                self._skip("evaluate", "no labelled tiles; give some with --dataset DIR, one folder per class")
            else:
                self._submit(head, "evaluate", ["jobs/evaluate.py", "--run", str(places.run), "--dataset", dataset])
            export = ["jobs/export.py", "--run", str(places.run), "--format", "timm", "--out", str(places.model)]
            self._submit(head, "export", export)
        return self._report(dataset)

    def _inputs(self) -> tuple[str, str | None]:
        """Where the slides and the labelled tiles are; made here unless the user has some."""
        request, places = self._request, self._places
        if request.slides_uri is not None:
            self._skip("slides", "your own")
            return request.slides_uri, request.dataset_uri
        with self._step("slides"):
            if _read_settings(request.out).get("slides_made"):
                self._tell(f"      {_SLIDES} procedural slides are there")
            else:
                self._tell(f"      drawing {_SLIDES} procedural slides and labelled tiles")
                make_slides(places.slides, seed=request.seed, count=_SLIDES)
                side_px = load_recipe(request.repository / RECIPE).crops.global_px
                make_labelled_tiles(
                    places.tiles, seed=request.seed, per_class=_TILES_PER_CLASS, side_px=side_px, mpp=_TILE_MPP
                )
                _write_settings(request, slides_made=True)
        return str(places.slides), request.dataset_uri or str(places.tiles)

    def _submit(self, head: LocalHead, name: str, script: Sequence[str]) -> None:
        lines = JobLines(self._tell)
        with self._step(name):
            status = head.submit(["python", *script], self._request.repository, lines.take)
            if status != 0:
                status = lines.exit_status or status
                raise ClusterError(
                    f"step {len(self._outcomes) + 1} of {STEPS}, {name}, failed with exit status {status}",
                    value=lines.last_words,
                    remedy="solve it and run the same command again; what is finished is kept",
                )

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self._tell(f"{self._number()} {name} (after {_clock(time.monotonic() - self._started_s)})")
        started_s = time.monotonic()
        yield
        self._outcomes.append(StepOutcome(name, time.monotonic() - started_s))

    def _skip(self, name: str, reason: str) -> None:
        self._tell(f"{self._number()} {name}: {reason}")
        self._outcomes.append(StepOutcome(name, None))

    def _number(self) -> str:
        return f"[{len(self._outcomes) + 1}/{STEPS}]"

    def _report(self, dataset: str | None) -> str:
        run_store = open_store(self._places.run)
        commit = latest_commit(run_store)
        evaluation = None if dataset is None else latest_report(run_store, Path(dataset).name)
        report = render_report(self._places, self._outcomes, commit.folder if commit else "checkpoints", evaluation)
        self._places.report.write_text(report)
        return report


def _claim(request: QuickstartRequest) -> None:
    """Make the output folder this quickstart's, unless it is something else's."""
    wanted = _settings(request)
    if (request.out / _SETTINGS).exists():
        found = {name: _read_settings(request.out).get(name) for name in wanted}
        if found != wanted:
            raise RunError(
                "the quickstart in this folder was made from other slides or with another seed",
                value=str(request.out),
                expected="the same --slides and --seed as then, which resumes it",
                remedy="give another folder with --out",
            )
        return
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise RunError(
            "the output folder holds something else",
            value=str(request.out),
            expected="an empty folder, or that of an earlier quickstart",
            remedy="give another folder with --out",
        )
    request.out.mkdir(parents=True, exist_ok=True)
    # Neither git nor the upload of the working directory should take what lies here.
    (request.out / ".gitignore").write_text("*\n")
    _write_settings(request, slides_made=False)


def _settings(request: QuickstartRequest) -> dict[str, str | int]:
    # The slides' place may name a patient, so only its hash is written down.
    slides = "procedural" if request.slides_uri is None else hashlib.sha256(request.slides_uri.encode()).hexdigest()
    return {"slides": slides, "seed": request.seed}


def _read_settings(out: Path) -> dict[str, object]:
    try:
        values = json.loads((out / _SETTINGS).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write_settings(request: QuickstartRequest, *, slides_made: bool) -> None:
    (request.out / _SETTINGS).write_text(json.dumps(_settings(request) | {"slides_made": slides_made}) + "\n")


def _clock(seconds: float) -> str:
    minutes, seconds_left = divmod(round(seconds), 60)
    return f"{minutes}:{seconds_left:02d}"
