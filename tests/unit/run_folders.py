"""Run folders as runs leave them, written by hand, for tests of reports."""

import json
from dataclasses import replace

from histoscale.checkpoint.manifest import Commit
from histoscale.config.decode import dump_recipe
from histoscale.config.recipe import Recipe
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED, Figure, Gain, Robustness
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.report import EvaluationReport, encode
from histoscale.observe.timeline import Event, Kind, write_event
from histoscale.storage import Store
from histoscale.stream.faults import Quarantined

RECIPE = Recipe.model_validate({"schedule": {"images": 100 * 4096}})
STEPS = 60
ALARM = "training starves: <i>give</i> it readers"


def commit_of(recipe: Recipe, step: int, *slides: Quarantined) -> Commit:
    return Commit(step, step * recipe.batch.tiles, "f" * 16, "checkpoints/x/", {}, 0, None, {}, tuple(slides))


def write_events(store: Store) -> None:
    """A crash at step 29, after an alarm."""
    for event in (
        Event(Kind.START, 1_700_000_000.0, 0, 2),
        Event(Kind.RESUME, 1_700_000_010.0, 0, 2),
        Event(Kind.ALARM, 1_700_000_025.0, 14, 2, ALARM),
        Event(Kind.COMMIT, 1_700_000_030.0, 20, 2, stall_s=1.0),
        Event(Kind.CRASH, 1_700_000_040.0, 29, 2, "<b>SIGKILL</b>"),
        Event(Kind.RESUME, 1_700_000_050.0, 20, 2, restart_s=10.0, steps_redone=9),
        Event(Kind.END, 1_700_000_100.0, STEPS, 2),
    ):
        write_event(store, event)


def write_metrics(store: Store, tiles: int = 4096, loss: float = 9.0) -> None:
    """One line for each step, then one of a step that is not committed, then a torn one."""
    lines = [
        {
            "step": step,
            "time/step_s": 1.0,
            "time/wait_s": 0.0,
            "time/wait_share": 0.02,
            "time/tiles_per_s": float(tiles),
            "loss/total": loss - step / STEPS,
            "optim/lr": 1e-4,
            "progress/images_seen": float((step + 1) * tiles),
        }
        for step in range(STEPS)
    ]
    store.put("metrics.jsonl", "\n".join(map(json.dumps, [*lines, {"step": STEPS}])).encode() + b"\n{")


def evaluation(step: int, accuracy: float, half: float = 0.1, dataset: str = "crc") -> EvaluationReport:
    """A report whose kNN accuracy has an interval of `half` to both sides."""
    figures = [
        Figure(name, "both", "knn", BALANCED_ACCURACY, (value,), (value - half, value + half))
        for name, value in ((PRETRAINED, accuracy), (UNTRAINED, 0.5))
    ]
    gain = Gain(UNTRAINED, "both", "knn", BALANCED_ACCURACY, accuracy - 0.5, (0.05, 0.3), 0.01)
    robust = Robustness(PRETRAINED, "both", 40, 20, 0.75, (0.7, 0.8), 0.5, (0.6,), (0.5, 0.7), 0.25)
    return EvaluationReport(
        dataset,
        "h" * 16,
        "f" * 16,
        step,
        step * 4096,
        {"a": 10, "b": 10},
        "3 splits by patient",
        tuple(figures),
        (gain, replace(gain, baseline=COLOUR)),
        (robust,),
        ("intervals are too narrow",),
    )


def write_evaluations(store: Store, *reports: EvaluationReport) -> None:
    for report in reports:
        store.put(report.key.replace("<crc>", "crc"), encode(report))


def write_provenance(store: Store, commit: str = "c" * 40, **packages: str) -> None:
    record = {
        "source_sha256": commit[0] * 64,
        "python": "3.11.7",
        "platform": "Linux",
        "packages": {"torch": "2.13", "deepspeed": "0.19", "ray": "2.60"} | packages,
        "git": {"commit": commit, "difference": "+x"},
    }
    store.put("provenance/1.json", json.dumps(record).encode())


def write_run(store: Store, recipe: Recipe = RECIPE, accuracy: float = 0.7) -> None:
    """All that a report reads of a run, but for its checkpoints."""
    write_events(store)
    write_metrics(store, recipe.batch.tiles)
    store.put("recipe.yaml", dump_recipe(recipe).encode())
    store.put("index.json", json.dumps({"index": "/data/my index", "snapshot_id": "abc"}).encode())
    store.put("origins.json", json.dumps(["teacher: <x>"]).encode())
    write_provenance(store)
    write_evaluations(store, evaluation(20, accuracy - 0.1), evaluation(STEPS, accuracy))
    best = {"step": STEPS, "score": accuracy, "dataset": "crc", "dataset_hash": "h" * 16, "embedding": "both"}
    store.put("evaluations/best.json", json.dumps(best).encode())
