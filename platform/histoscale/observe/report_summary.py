"""The answers at the top of a run's report, each one sentence: does it learn, what has it seen, is it better."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from histoscale.checkpoint.manifest import Commit
from histoscale.config.recipe import Recipe
from histoscale.evaluate.figures import PRETRAINED, UNTRAINED, Figure, Gain
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.report import JUDGE, EvaluationReport
from histoscale.observe.report_sections import probe_title
from histoscale.observe.timeline import Event, Kind
from histoscale.observe.wording import percent, percents, points

NO_EVALUATION = (
    "no checkpoint was evaluated; set evaluation.datasets, or run jobs/evaluate.py --run RUN --dataset DIR, "
    "and the loss alone cannot tell"
)


def summary(
    recipe: Recipe,
    commit: Commit | None,
    events: Sequence[Event],
    evaluated: Sequence[EvaluationReport],
    best: Mapping[str, Any] | None,
) -> str:
    """Three answers as HTML.

    Args:
        recipe: Of the run.
        commit: Its newest one.
        events: Its timeline.
        evaluated: The newest report on each dataset.
        best: What `evaluations/best.json` holds.
    """
    judged = _judged(evaluated, best)
    answers = (
        ("Is it learning?", _learning(judged, events)),
        ("What has it seen?", _seen(recipe, commit)),
        ("Is it better than what there was?", _better(judged, best)),
    )
    return "".join(f'<p class="said"><b>{ask}</b> {escape(answer)}</p>' for ask, answer in answers)


def _judged(evaluated: Sequence[EvaluationReport], best: Mapping[str, Any] | None) -> EvaluationReport | None:
    """The report on the dataset that names the best step; without such a name, the first."""
    named = [report for report in evaluated if best and report.dataset_hash == best.get("dataset_hash")]
    return next(iter([*named, *evaluated]), None)


def _learning(judged: EvaluationReport | None, events: Sequence[Event]) -> str:
    rung = [event for event in events if event.kind is Kind.ALARM]
    often = "An alarm rang" if len(rung) == 1 else f"{len(rung)} alarms rang, the last"
    but = f" {often} at step {rung[-1].step:,}: {rung[-1].reason}." if rung else ""
    if judged is None:
        return f"Not known yet because {NO_EVALUATION}.{but}"
    figure, gain = _figure(judged), _gain(judged, UNTRAINED)
    if figure is None or gain is None:
        return f"Not known yet because {judged.dataset} was evaluated without the untrained network beside it.{but}"
    low, high = gain.interval
    verdict = "Yes" if low > 0.0 else "No, it is worse" if high < 0.0 else "Not established, the interval holds 0"
    return (
        f"{verdict}: at step {judged.step:,} {probe_title(figure.probe)} tells {percent(figure.mean)} of "
        f"{judged.dataset} (95 %: {percents(figure.interval)}), {points(gain.difference)} points against "
        f"the same network untrained (95 %: {percents(gain.interval)}).{but}"
    )


def _seen(recipe: Recipe, commit: Commit | None) -> str:
    if commit is None:
        return "Nothing that counts yet, because no checkpoint is committed."
    seen, asked = commit.images_seen, recipe.steps * recipe.batch.tiles
    out = f"{len(commit.quarantine)} slides were left out as unreadable" if commit.quarantine else "no slide failed"
    return (
        f"{seen:,} tiles of {asked:,} ({percent(seen / asked)}) in {commit.step:,} steps, a count from the ledger "
        f"and so exact; {out}."
    )


def _better(judged: EvaluationReport | None, best: Mapping[str, Any] | None) -> str:
    against = "Against another model: python jobs/evaluate.py --run RUN --dataset DIR --beside MODEL."
    if judged is None:
        return f"Not known yet because {NO_EVALUATION}. {against}"
    others = [name for name in dict.fromkeys(gain.baseline for gain in judged.gains) if name != UNTRAINED]
    gains = [gain for name in others if (gain := _gain(judged, name)) is not None]
    if not gains:
        return f"Not known yet because {judged.dataset} was evaluated without anything beside it. {against}"
    told = "; ".join(
        f"than {gain.baseline}, {_verdict(gain)}: {points(gain.difference)} points (95 %: {percents(gain.interval)})"
        for gain in gains
    )
    return f"On {judged.dataset}, step {judged.step:,}, {told}. {best_line(best)} {against}"


def _verdict(gain: Gain) -> str:
    low, high = gain.interval
    return "better" if low > 0.0 else "worse" if high < 0.0 else "not told apart"


def best_line(best: Mapping[str, Any] | None) -> str:
    """Which step is the best one so far, and by what."""
    if best is None:
        return "No step is named the best one yet."
    if "score" not in best:
        return f"Somebody has named step {best['step']:,} the best one."
    return (
        f"The best step so far is {best['step']:,}, with a {probe_title(JUDGE)} balanced accuracy of "
        f"{percent(best['score'])} on {best['dataset']}."
    )


def _figure(report: EvaluationReport) -> Figure | None:
    """Balanced accuracy by the probe that judges, or by the first there is."""
    found = [figure for figure in report.figures if (figure.features, figure.metric) == (PRETRAINED, BALANCED_ACCURACY)]
    return next((figure for figure in found if figure.probe == JUDGE), found[0] if found else None)


def _gain(report: EvaluationReport, baseline: str) -> Gain | None:
    figure = _figure(report)
    wanted = (baseline, figure.embedding, figure.probe, figure.metric) if figure else None
    for gain in report.gains:
        if (gain.baseline, gain.embedding, gain.probe, gain.metric) == wanted:
            return gain
    return None
