"""Findings of a distillation sweep: how small a student keeps how much, and what the teacher was worth."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from histoscale.errors import SweepError
from histoscale.sweeps.fits import Interval, t_interval
from histoscale.sweeps.rows import TrialRow

KEPT = 0.95
"""What a student must keep for the sentence to call it as good as its teacher."""


@dataclass(frozen=True)
class TeacherScores:
    """The teacher beside its students.

    Attributes:
        name: For people.
        parameters: Of its backbone.
        latency_ms: Of one tile; None where it was not measured.
        scores: Task -> balanced accuracy.
        chance: Task -> that of guessing.
    """

    name: str
    parameters: int
    latency_ms: float | None
    scores: Mapping[str, float]
    chance: Mapping[str, float]


@dataclass(frozen=True)
class Student:
    """One kind of student, over its seeds.

    Attributes:
        arch: Of its backbone.
        images: Seen.
        settings: Of the grid.
        parameters: Of its backbone.
        latency_ms: Of one tile; None where it was not measured.
        scores: Task -> mean balanced accuracy.
        kept: Task -> mean share of the teacher's score above chance.
        mean_kept: Over the tasks.
        kept_interval: 95 % interval of `mean_kept` over seeds, by Student's t; None for one seed.
        seeds: How many.
        on_front: No other student is at least as good in all of size, latency and `mean_kept`, and better in one.
    """

    arch: str
    images: int
    settings: Mapping[str, str]
    parameters: int
    latency_ms: float | None
    scores: Mapping[str, float]
    kept: Mapping[str, float]
    mean_kept: float
    kept_interval: Interval | None
    seeds: int
    on_front: bool = False

    @property
    def title(self) -> str:
        """For people: what it differs in."""
        settings = "".join(f", {field}={value}" for field, value in self.settings.items())
        return f"{self.arch}, {self.images:,} images{settings}"


@dataclass(frozen=True)
class Gain:
    """A student beside the same one from scratch, on equal images.

    Attributes:
        student: Its title.
        task: What both were judged by.
        difference: Mean over seeds of the student's balanced accuracy less that from scratch.
        difference_interval: 95 % interval over seeds, by Student's t; None for one seed.
        seeds: Pairs.
    """

    student: str
    task: str
    difference: float
    difference_interval: Interval | None
    seeds: int


@dataclass(frozen=True)
class DistillationFindings:
    """What a distillation sweep found.

    Attributes:
        sentence: The answer.
        teacher: Beside its students.
        students: Of every kind, smallest first.
        gains: Of each over itself from scratch.
    """

    sentence: str
    teacher: TeacherScores
    students: tuple[Student, ...]
    gains: tuple[Gain, ...]


def analyse_distillation(rows: Sequence[TrialRow], teacher: TeacherScores) -> DistillationFindings:
    """What the rows of a sweep's trials say.

    Args:
        rows: One for each trial that has ended.
        teacher: Judged on the same tasks.

    Raises:
        SweepError: The teacher is no better than guessing, or no student has ended with the teacher's tasks.
    """
    for task, score in teacher.scores.items():
        if not score > teacher.chance[task]:
            raise SweepError(
                f"the teacher is no better than guessing on {task}: nobody can keep what it does not know",
                value=score,
                expected=f"a balanced accuracy above {teacher.chance[task]:.3g}",
                remedy="take another teacher, or another dataset",
            )
    done = [row for row in rows if not row.reason and set(teacher.scores) <= set(row.scores)]
    kinds = _by_kind([row for row in done if row.role == "student"])
    if not kinds:
        raise SweepError(
            "no student has ended with scores on the teacher's tasks",
            value=f"{sum(bool(row.reason) for row in rows)} of {len(rows)} trials failed",
            expected=", ".join(teacher.scores),
            remedy="read the reasons of the failed trials in the table, and run the same command again",
        )
    students = [_student(each, teacher) for each in kinds]
    front = pareto([(row.parameters, row.latency_ms or 0.0, -row.mean_kept) for row in students])
    marked = [Student(**{**vars(student), "on_front": place in front}) for place, student in enumerate(students)]
    marked.sort(key=lambda student: (student.parameters, student.images))
    gains = tuple(gain for each in kinds for gain in _gains(each, done, teacher))
    return DistillationFindings(_sentence(marked, gains, teacher), teacher, tuple(marked), gains)


def pareto(costs: Sequence[tuple[float, ...]]) -> set[int]:
    """Indices of what nothing else beats: no other is at most as dear in all, and cheaper in one."""
    return {
        place
        for place, cost in enumerate(costs)
        if not any(other != cost and all(b <= a for a, b in zip(cost, other, strict=True)) for other in costs)
    }


def _by_kind(rows: Sequence[TrialRow]) -> list[list[TrialRow]]:
    kinds: dict[tuple[object, ...], list[TrialRow]] = {}
    for row in rows:
        kinds.setdefault((row.arch, row.images, *sorted(row.settings.items())), []).append(row)
    return list(kinds.values())


def _student(rows: Sequence[TrialRow], teacher: TeacherScores) -> Student:
    kept = [
        {task: (row.scores[task] - low) / (teacher.scores[task] - low) for task, low in teacher.chance.items()}
        for row in rows
    ]
    means = [statistics.fmean(each.values()) for each in kept]
    latencies = [row.latency_ms for row in rows if row.latency_ms is not None]
    first = rows[0]
    return Student(
        arch=first.arch,
        images=first.images,
        settings=first.settings,
        parameters=first.parameters,
        latency_ms=statistics.median(latencies) if latencies else None,
        scores={task: statistics.fmean(row.scores[task] for row in rows) for task in teacher.scores},
        kept={task: statistics.fmean(each[task] for each in kept) for task in teacher.chance},
        mean_kept=statistics.fmean(means),
        kept_interval=t_interval(means),
        seeds=len(rows),
    )


def _gains(rows: Sequence[TrialRow], done: Sequence[TrialRow], teacher: TeacherScores) -> list[Gain]:
    def place(row: TrialRow) -> tuple[object, ...]:
        settings = sorted(item for item in row.settings.items() if not item[0].startswith("distill."))
        return row.arch, row.images, row.seed, *settings

    alone = {place(row): row for row in done if row.role == "scratch"}
    pairs = [(row, alone[place(row)]) for row in rows if place(row) in alone]
    gains = []
    for task in teacher.scores if pairs else ():
        differences = [ours.scores[task] - theirs.scores[task] for ours, theirs in pairs]
        title = _student(rows, teacher).title
        gains.append(Gain(title, task, statistics.fmean(differences), t_interval(differences), len(pairs)))
    return gains


def _sentence(students: Sequence[Student], gains: Sequence[Gain], teacher: TeacherScores) -> str:
    fit = [student for student in students if student.mean_kept >= KEPT]
    chosen = fit[0] if fit else max(students, key=lambda student: student.mean_kept)
    spread = (
        f"{chosen.kept_interval[0]:.0%} to {chosen.kept_interval[1]:.0%} over {chosen.seeds} seeds"
        if chosen.kept_interval
        else "of one seed, so its spread is not known"
    )
    size = f"{chosen.parameters:,} parameters, 1/{teacher.parameters / chosen.parameters:.3g} of the teacher's"
    kept = f"keeps {chosen.mean_kept:.0%} of what {teacher.name} knows beyond chance ({spread})"
    if not fit:
        answer = f"No student keeps {KEPT:.0%} of its teacher; the best, {chosen.title} ({size}), {kept}."
    else:
        answer = f"The smallest student that keeps {KEPT:.0%} of its teacher is {chosen.title} ({size}): it {kept}."
        if chosen.kept_interval and chosen.kept_interval[0] < KEPT:
            answer += f" Its interval reaches below {KEPT:.0%}: more seeds would tell."
    own = [gain for gain in gains if gain.student == chosen.title]
    for gain in own[:1]:
        bounds = gain.difference_interval
        spread = f" ({100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f})" if bounds else " (one seed)"
        answer += (
            f" Beside the same model from scratch on as many images the teacher was worth "
            f"{100 * gain.difference:+.1f} points of balanced accuracy on {gain.task}{spread}."
        )
    return answer
