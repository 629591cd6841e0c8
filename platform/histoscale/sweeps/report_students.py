"""The report of a distillation sweep as one HTML page."""

from collections.abc import Sequence
from html import escape

from histoscale.slides.report_charts import page
from histoscale.sweeps.charts import Series, chart
from histoscale.sweeps.report import bounds, failed_and_all, table
from histoscale.sweeps.retention import KEPT, DistillationFindings, Student
from histoscale.sweeps.rows import TrialRow


def distillation_page(findings: DistillationFindings, rows: Sequence[TrialRow], name: str, created: str) -> str:
    """SWEEP/report.html.

    Args:
        findings: What the rows say.
        rows: Of all trials.
        name: Of the sweep, for people.
        created: When, for people.
    """
    front = [student for student in findings.students if student.on_front]
    sections = [
        ("The answer", f"<p>{escape(findings.sentence)}</p>"),
        ("How small?", _front_chart(findings, "parameters of the backbone")),
        ("How fast?", _latency_chart(findings)),
        ("Students", _students(findings)),
        ("With the teacher and without", _gains(findings)),
        *failed_and_all(rows),
    ]
    facts = [
        ("kinds of student", f"{len(findings.students)}"),
        ("on the front", f"{len(front)}"),
        ("most that was kept", f"{max(student.mean_kept for student in findings.students):.0%}"),
        ("trials failed", f"{sum(bool(row.reason) for row in rows)}"),
    ]
    return page(f"Distillation sweep {name}", f"histoscale, {created}", facts, sections)


def _front_chart(findings: DistillationFindings, title: str) -> str:
    points = [(float(student.parameters), student) for student in findings.students]
    note = (
        "<p>Filled points are on the Pareto front: no other student is at least as good in all of size, latency and "
        "what it keeps. That is its balanced accuracy above chance over its teacher's, mean over the tasks; the "
        f"teacher, {escape(findings.teacher.name)} with {findings.teacher.parameters:,} parameters, keeps 1. Beyond "
        f"{KEPT:.0%} a student counts as good as its teacher.</p>"
    )
    return chart(_series(points), title, "share kept") + note


def _latency_chart(findings: DistillationFindings) -> str:
    points = [(student.latency_ms, student) for student in findings.students if student.latency_ms is not None]
    if not points:
        return "<p>Latency was not measured.</p>"
    return chart(_series(points), "ms for one tile", "share kept")


def _series(points: Sequence[tuple[float, Student]]) -> list[Series]:
    groups = (("on the Pareto front", True), ("beaten by another student", False))
    return [
        Series(
            name,
            points=[(x, each.mean_kept, each.title) for x, each in points if each.on_front is front],
            bars=[(x, *each.kept_interval) for x, each in points if each.on_front is front and each.kept_interval],
            hollow=not front,
        )
        for name, front in groups
    ]


def _students(findings: DistillationFindings) -> str:
    tasks = list(findings.teacher.scores)
    body = [
        [
            student.title,
            f"{student.parameters:,}",
            "" if student.latency_ms is None else f"{student.latency_ms:.3g}",
            *(f"{student.scores[task]:.3f} ({student.kept[task]:.0%})" for task in tasks),
            f"{student.mean_kept:.1%}",
            "one seed: not known" if student.kept_interval is None else bounds(student.kept_interval, ".1%"),
            "yes" if student.on_front else "",
        ]
        for student in findings.students
    ]
    teacher = findings.teacher
    latency = "" if teacher.latency_ms is None else f"{teacher.latency_ms:.3g}"
    scores = [f"{teacher.scores[task]:.3f} (100%)" for task in tasks]
    body.append([f"teacher: {teacher.name}", f"{teacher.parameters:,}", latency, *scores, "100.0%", "", ""])
    return table(["student", "parameters", "ms a tile", *tasks, "kept", "95 % over seeds", "on the front"], body)


def _gains(findings: DistillationFindings) -> str:
    if not findings.gains:
        return "<p>No student was also trained from scratch: nothing shows what the teacher was worth.</p>"
    body = [
        [
            gain.student,
            gain.task,
            f"{100 * gain.difference:+.1f}",
            "one seed: not known"
            if gain.difference_interval is None
            else f"{100 * gain.difference_interval[0]:+.1f} to {100 * gain.difference_interval[1]:+.1f}",
            str(gain.seeds),
        ]
        for gain in findings.gains
    ]
    return table(["student", "task", "points of balanced accuracy", "95 %", "seeds"], body)
