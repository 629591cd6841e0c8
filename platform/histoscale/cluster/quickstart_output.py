"""What a person sees of a quickstart: the lines of its jobs without Ray's own, and the report at the end."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.probes import PROBES
from histoscale.evaluate.report import EvaluationReport
from histoscale.evaluate.table import percent

_INDENT = "      "
# Ray's CLI, its loggers and its C++ core; what they report as an error stays visible, the core's chatter apart.
_RAY_LINE = re.compile(
    r"\d{4}-\d\d-\d\d [\d:,]+\s+(?P<level>DEBUG|INFO|SUCC|WARN|WARNING|ERR) \S+\.py:\d+ -- "
    r"|Running entrypoint for job "
    r"|\[\d{4}-\d\d-\d\d [^]]* [IWE] [^]]*\] \S+\.cc:\d+: "
    r"|(\x1b\[\d+m)?\(raylet\)(\x1b\[0m)? WARNING: "
)
_EXIT_STATUS = re.compile(r"failed with exit code (\d+)")


class JobLines:
    """Passes a job's own lines on, indented; keeps the last one, the last diagnosis and the job's exit status.

    Args:
        tell: Takes each line that a person should see.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._ended = False
        self._last = ""
        self._diagnosis = ""
        self.exit_status: int | None = None  # of the job itself: the CLI's own is 1 whatever happened

    @property
    def last_words(self) -> str:
        """The diagnosis that the job ended with, or else its last line."""
        return self._diagnosis or self._last or "no output"

    def take(self, line: str) -> None:
        """Take one line of the `ray job submit` CLI."""
        ray_line = _RAY_LINE.match(line)
        # After its verdict the CLI repeats the end of the log.
        self._ended = self._ended or (ray_line is not None and ray_line["level"] == "ERR")
        if ray_line is not None and (status := _EXIT_STATUS.search(line)):
            self.exit_status = int(status[1])
        if ray_line is not None or self._ended or not line.strip():
            return
        self._last = line.strip()
        if line.startswith("error: "):
            self._diagnosis = line.removeprefix("error: ")
        self._tell(_INDENT + line)


@dataclass(frozen=True)
class StepOutcome:
    """One step of the quickstart: what it was, and how long it took; None where it was skipped."""

    title: str
    seconds: float | None


@dataclass(frozen=True)
class Places:
    """Where a quickstart keeps what it makes; all of them absolute."""

    out: Path

    @property
    def slides(self) -> Path:
        """The procedural slides."""
        return self.out / "slides"

    @property
    def tiles(self) -> Path:
        """The procedural labelled tiles."""
        return self.out / "tiles"

    @property
    def index(self) -> Path:
        """The index of the slides."""
        return self.out / "index"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.out / "run"

    @property
    def model(self) -> Path:
        """The export."""
        return self.out / "model"

    @property
    def report(self) -> Path:
        """The report."""
        return self.out / "report.md"


def render_report(
    places: Places, steps: Sequence[StepOutcome], checkpoint: str, evaluation: EvaluationReport | None
) -> str:
    """The report at the end, as Markdown that reads well in a terminal."""
    ran = [f"| {step.title} | {'skipped' if step.seconds is None else f'{step.seconds:.1f} s'} |" for step in steps]
    total_s = sum(step.seconds or 0.0 for step in steps)
    return "\n".join(
        [
            "# Quickstart",
            "",
            "| step | time |",
            "|---|---|",
            *ran,
            f"| together | {total_s:.1f} s |",
            "",
            *_accuracy(evaluation),
            "",
            f"- checkpoint: {places.run / checkpoint}",
            f"- exported model, with how to load it: {places.model / 'README.md'}",
            f"- the run's own report, with curves: {places.run / 'report.html'}",
            f"- curves on TensorBoard: {Path(sys.executable).parent / 'tensorboard'} --logdir {places.run / 'events'}",
            f"- all figures: {places.run / 'evaluations'}" if evaluation else "- no evaluation",
            "",
            _next_step(evaluation),
            "",
        ]
    )


def _accuracy(evaluation: EvaluationReport | None) -> list[str]:
    if evaluation is None:
        return ["Evaluation skipped: give labelled tiles with --dataset DIR (one folder per class)."]
    rows = [(PRETRAINED, "after pretraining"), (UNTRAINED, "the same network untrained"), (COLOUR, "colour statistics")]
    tiles, classes = sum(evaluation.counts.values()), len(evaluation.counts)
    probes = [probe for probe in PROBES if probe in evaluation.probes]
    gains = [
        f"{100 * gain.difference:+.1f} ({100 * gain.interval[0]:.1f} to {100 * gain.interval[1]:.1f})"
        for probe in probes
        for gain in evaluation.gains
        if (gain.baseline, gain.probe, gain.metric) == (UNTRAINED, probe, BALANCED_ACCURACY)
    ]
    return [
        f"| balanced accuracy, {tiles} tiles in {classes} classes (chance {1.0 / classes:.1%}) | "
        + " | ".join(PROBES[probe].title for probe in probes)
        + " |",
        "|---" * (len(probes) + 1) + "|",
        *(
            f"| {title} | {' | '.join(percent(evaluation.figure(features, probe)) for probe in probes)} |"
            for features, title in rows
        ),
        f"| gain over the untrained network, points (95 %) | {' | '.join(gains)} |",
        "",
        "Mean +- standard deviation over splits. Where the interval of a gain holds 0, so short a run has shown none.",
    ]


def _next_step(evaluation: EvaluationReport | None) -> str:
    if evaluation is None:
        return "Next: the same command with --dataset DIR; it only evaluates, the rest is there."
    return "Next, on your own slides: make quickstart SLIDES=<folder or s3://bucket/prefix> OUT=my-run"
