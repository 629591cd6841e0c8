"""A suite: tasks of a paper, how each is judged, what the paper reports, and which of them a folder of datasets has."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from histoscale.config.decode import invalid, read_yaml
from histoscale.config.section import Count, Section
from histoscale.errors import DatasetError, StorageError
from histoscale.evaluate.datasets import LAYOUTS, open_dataset
from histoscale.evaluate.datasets.hest import check_hest
from histoscale.evaluate.datasets.layout import Layout
from histoscale.evaluate.probes import PROBES
from histoscale.storage import is_remote, join

HEST, FOREST = "hest", "random_forest"

Embedding = Literal["cls_mean", "cls"]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Text = Annotated[str, StringConstraints(min_length=1)]
Score = Annotated[float, Field(ge=-1.0, le=1.0)]
Figures = Mapping[Embedding, Mapping[Text, Score]]  # embedding -> model -> what the paper reports


class Subtask(Section):
    """One of several datasets over which a task's figure is the mean.

    Attributes:
        name: As the paper calls it.
        folder: Its folder in the task's.
        published: What the paper reports of it.
    """

    name: Name
    folder: Name
    published: Figures


class Task(Section):
    """One task of a suite.

    Attributes:
        name: Unique in the suite.
        title: As people call it.
        layout: How its dataset lies, see `open_dataset`, or "hest"; nothing for a private dataset.
        folder: Where it lies in the folder of datasets; nothing for a private dataset.
        private: Nobody but the paper's authors has the dataset.
        metric: What the figures are.
        protocol: How embeddings are judged: the name of a probe, or "random_forest" for expression.
        tiles: Tiles of the dataset as the paper counts them, where it does.
        table: Where in the paper the figures stand.
        published: What the paper reports; nothing in a suite of one's own.
        subtasks: Of a mean, what it is over.
        note: What else a reader of the figures must know.
    """

    name: Name
    title: Text
    layout: Text | None = None
    folder: Name | None = None
    private: bool = False
    metric: Literal["weighted_f1", "pearson"]
    protocol: Text
    tiles: Count | None = None
    table: Text = "none"
    published: Figures = Field(default_factory=dict)
    subtasks: tuple[Subtask, ...] = ()
    note: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.private != (self.layout is None) or self.private != (self.folder is None):
            raise ValueError("a private task has neither layout nor folder, every other has both")
        is_hest = self.layout == HEST
        if is_hest != bool(self.subtasks) or is_hest != (self.metric == "pearson"):
            raise ValueError("subtasks and the metric pearson are those of the layout hest")
        if (self.protocol == FOREST) != (self.metric == "pearson") or self.protocol not in (FOREST, *PROBES):
            raise ValueError(
                f"protocol {self.protocol!r} does not give {self.metric}: {FOREST} gives pearson, and weighted_f1 "
                f"comes from one of {', '.join(PROBES)}"
            )
        base = (self.layout or HEST).partition(":")[0]
        known = (*LAYOUTS, HEST)
        if base not in known:
            near = get_close_matches(base, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"layout {self.layout!r} is not known (nearest: {near})")
        return self


class Suite(Section):
    """The tasks of a paper, or of one's own.

    Attributes:
        name: Of the suite.
        source: The paper, or who put it together.
        tasks: Its tasks.
    """

    name: Name
    source: Text
    tasks: tuple[Task, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks of the same name: {', '.join(twice)}")
        return self


@dataclass(frozen=True)
class Resolution:
    """What of a task can be run.

    Attributes:
        task: The task.
        uri: Its dataset; of `subtasks`, the folder that holds theirs. None where it cannot be run.
        subtasks: Those that can be run.
        reason: Why the task, or a part of it, cannot be run; "" where all can.
    """

    task: Task
    uri: str | None
    subtasks: tuple[Subtask, ...] = ()
    reason: str = ""


def load_suite(path: str | Path) -> Suite:
    """Suite of a YAML file.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, or holds anything invalid; all problems at once.
    """
    try:
        return Suite.model_validate(read_yaml(path, "suite"))
    except ValidationError as error:
        raise invalid(error, Suite, str(path)) from error


def resolve(suite: Suite, uri: str, layouts: Mapping[str, Layout] = LAYOUTS) -> tuple[Resolution, ...]:
    """Which tasks of a suite can be run with the datasets of a folder.

    Every dataset is listed and checked as `open_dataset` does; of HEST, all but tiles and counts.

    Args:
        suite: The suite.
        uri: The folder that holds the datasets, each in the folder that its task names.
        layouts: Those that are known.
    """
    return tuple(_resolve(task, uri, layouts) for task in suite.tasks)


def _resolve(task: Task, uri: str, layouts: Mapping[str, Layout]) -> Resolution:
    if task.layout is None or task.folder is None:
        return Resolution(task, None, reason="the dataset is private")
    place = join(uri, task.folder)
    if not is_remote(uri) and not Path(place.removeprefix("file://")).is_dir():
        return Resolution(task, None, reason=f"there is no folder {task.folder}")
    if task.layout != HEST:
        try:
            open_dataset(place, task.layout, layouts)
        except (DatasetError, StorageError) as error:
            return Resolution(task, None, reason=str(error))
        return Resolution(task, place)
    usable, reasons = [], []
    for subtask in task.subtasks:
        try:
            check_hest(place, subtask.folder)
        except (DatasetError, StorageError) as error:
            reasons.append(f"{subtask.name}: {error}")
        else:
            usable.append(subtask)
    return Resolution(task, place if usable else None, tuple(usable), " ".join(reasons))
