"""The quickstart over three seeds: its minutes, and whether the embedding got better because the model learned."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from histoscale.bench.figure import Figure
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED
from histoscale.evaluate.report import EvaluationReport, latest_report
from histoscale.storage import open_store

SEEDS = (0, 1, 2)


def quickstart() -> Iterator[Figure]:
    """`quickstart.minutes` and the balanced accuracies of kNN and linear probe, each over three seeds."""
    minutes, reports = [], []
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as folder:
        for seed in SEEDS:
            out = Path(folder) / f"seed-{seed}"
            start_s = time.monotonic()
            command = [sys.executable, "jobs/quickstart.py", "--out", str(out), "--seed", str(seed)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            minutes.append((time.monotonic() - start_s) / 60.0)
            report = latest_report(open_store(out / "run"), "tiles")
            if report is not None:
                reports.append(report)
    yield Figure("quickstart.minutes", max(minutes), "min", details={"by_seed": minutes})
    for probe in ("knn", "linear"):
        yield accuracy(reports, probe)


def accuracy(reports: list[EvaluationReport], probe: str) -> Figure:
    """Mean over the seeds after pretraining; the baseline is the same network untrained."""
    means = {
        features: [report.figure(features, probe).mean for report in reports]
        for features in (PRETRAINED, UNTRAINED, COLOUR)
    }
    return Figure(
        f"quickstart.{probe}_accuracy",
        statistics.fmean(means[PRETRAINED]),
        "share",
        statistics.fmean(means[UNTRAINED]),
        {features: values for features, values in means.items()},
    )
