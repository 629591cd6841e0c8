"""Several students of one frozen teacher: it looks at each micro-batch once, and all of them learn from that.

group = build_students(recipes, device, stores)
for step in range(group.resume(), recipes[0].steps):
    metrics = group.step(step, micro_batches)
group.save(recipes[0].steps)
"""

from collections.abc import Sequence

import torch

from histoscale.checkpoint.manifest import Commit
from histoscale.config.decode import differences
from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError, TrainingError
from histoscale.storage.store import Store
from histoscale.train.distill import load_frozen_teacher
from histoscale.train.step import MicroBatch, StepMetrics
from histoscale.train.trainer import Trainer, build_student

# All that decides what the teacher sees, what it makes of that, and when.
_SHARED = (
    "seed",
    "precision",
    "data",
    "batch",
    "crops",
    "augment",
    "distill",
    "schedule",
    "loss.teacher_temperature",
    "loss.teacher_temperature_warmup_images",
    "loss.sinkhorn_iterations",
)


def build_students(recipes: Sequence[Recipe], device: torch.device, stores: Sequence[Store]) -> "StudentGroup":
    """One student for each recipe, in a run folder of its own, and their teacher (collective); see `build_trainer`.

    Raises:
        RecipeError: There is no recipe, they differ in something that the teacher sees, or a student cannot learn from
            it.
        HistoscaleError: The teacher cannot be used.
    """
    if not recipes:
        raise RecipeError(
            "a group has no student",
            value="no recipe",
            expected="one recipe or more",
            remedy="give a recipe and a run folder for each student",
        )
    first = recipes[0]
    if first.distill is None:
        raise RecipeError(
            "students share a frozen teacher, and the first recipe names none",
            value="distill=null",
            expected="recipes with a section `distill`",
            remedy="add the section to each, or train runs without a teacher one by one",
        )
    for recipe in recipes:
        _require_shared(first, recipe)
    if not len({store.uri for store in stores}) == len(stores) == len(recipes):
        raise RecipeError(
            "each student needs a run folder of its own",
            value=", ".join(store.uri for store in stores),
            expected=f"{len(recipes)} different folders",
            remedy="give as many folders as recipes, none of them twice",
        )
    teacher = load_frozen_teacher(first, first.distill, device)
    pairs = zip(recipes, stores, strict=True)
    return StudentGroup([build_student(recipe, teacher, device, store) for recipe, store in pairs])


class StudentGroup:
    """The students' runs on this rank. Every method is collective: all ranks call it alike.

    Attributes:
        trainers: One for each student.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = trainers

    def resume(self) -> int:
        """Load each student's newest commit; returns the first step that some student has to take.

        A group that ended between the commits of its students has some that are ahead: they wait for the others.

        Raises:
            CheckpointError: No commit of a student is whole, or it belongs to another recipe or another teacher.
        """
        return min(trainer.resume() for trainer in self.trainers)

    def step(
        self, step: int, micro_batches: Sequence[MicroBatch | None], stop_requested: bool = False
    ) -> list[StepMetrics | None]:
        """Take one optimiser step with every student but those that have taken it already, for which None stands.

        Raises:
            TrainingError: A student's loss or gradient is not finite, or the step is no student's next one.
        """
        due = [trainer for trainer in self.trainers if trainer.next_step <= step]
        if not due:
            raise TrainingError(
                "every student has taken this step",
                value=step,
                expected=f"step {min(trainer.next_step for trainer in self.trainers)}",
                remedy="begin at the step that `resume` returns, and take each once",
            )
        prepared = due[0].prepare(step, micro_batches)
        return [
            trainer.update(step, micro_batches, prepared, stop_requested) if trainer in due else None
            for trainer in self.trainers
        ]

    def begin_save(self, step: int) -> None:
        """Let every student that has taken so many steps and no more be committed beside the next steps.

        Raises:
            StorageError: See `Trainer.settle`.
        """
        for trainer in self.trainers:
            if trainer.next_step == step:
                trainer.begin_save(step)

    def settle(self, *, wait: bool) -> list[Commit | None]:
        """Move on with the students' checkpoints in flight; see `Trainer.settle`.

        Raises:
            StorageError: That of a student failed, as the last of too many in a row.
        """
        return [trainer.settle(wait=wait) for trainer in self.trainers]

    def save(self, step: int) -> None:
        """Commit every student that has taken so many steps and no more.

        Raises:
            StorageError: Something could not be written; that student's commit does not exist.
        """
        for trainer in self.trainers:
            if trainer.next_step == step:
                trainer.save(step)


def _require_shared(ours: Recipe, theirs: Recipe) -> None:
    """Refuse students whose teacher would have to look twice."""
    fields = [
        line for line in differences(ours, theirs) if any(line.startswith((f"{name}:", f"{name}.")) for name in _SHARED)
    ]
    if fields:
        raise RecipeError(
            "students of one teacher must agree in what it sees",
            value="; ".join(fields),
            expected="the same values",
            remedy="give them the same values, or train them one by one",
        )
