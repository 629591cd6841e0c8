"""A run on one rank: resume, step, save. The loop, the data and the cluster are the caller's.

trainer = build_trainer(recipe, device, store)
for step in range(trainer.resume(), recipe.steps):
    metrics = trainer.step(step, micro_batches)
trainer.save(recipe.steps)
"""

from collections.abc import Sequence
from importlib.metadata import version

import torch
import torch.distributed as dist

from histoscale.checkpoint.collective import on_first_rank
from histoscale.checkpoint.fragments import (
    Fragment,
    local_fragments,
    master_fragments,
    materialise_moments,
    parameter_shapes,
    refresh_parameters,
)
from histoscale.checkpoint.ledger import StepRecord, runs_of
from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.reader import discard_after, latest_commit, load_into, require_recipe
from histoscale.checkpoint.writer import Snapshot, write_checkpoint
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import TrainingError
from histoscale.models.ssl import build_ssl_net
from histoscale.storage.store import Store
from histoscale.train.engine import StudentEngine
from histoscale.train.step import MicroBatch, StepMetrics, TrainStep
from histoscale.train.teacher import EMATeacher


def build_trainer(recipe: Recipe, device: torch.device, store: Store) -> "Trainer":
    """Student, teacher and optimiser with their initial state (collective).

    `torch.distributed` must be initialised, and with CUDA the current device set. `store` is the run folder.
    """
    student = StudentEngine(build_ssl_net(recipe), recipe, device)
    masters = master_fragments(student.deepspeed)
    teacher = EMATeacher(build_ssl_net(recipe), masters, device, student.dtype)
    return Trainer(recipe, student, teacher, store)


class Trainer:
    """The state of a run on this rank. Every method is collective: all ranks call it alike."""

    def __init__(self, recipe: Recipe, student: StudentEngine, teacher: EMATeacher, store: Store) -> None:
        self.student = student
        self.teacher = teacher
        self._recipe = recipe
        self._store = store
        self._train_step = TrainStep(recipe, student, teacher)
        self._shapes = parameter_shapes(student.deepspeed)
        self._next_step = 0
        self._last_commit: Commit | None = None
        self._records: list[StepRecord] = []

    def resume(self) -> int:
        """Load the newest commit, if there is one; returns the step to go on with.

        Raises:
            CheckpointError: No commit is whole, or it belongs to another recipe.
        """
        commit = on_first_rank(self._newest_commit)
        if commit is not None:
            materialise_moments(self.student.deepspeed, commit.step)
            load_into(self._store, commit, self._state(), self._shapes)
            refresh_parameters(self.student.deepspeed)
            self.teacher.publish()
            self._next_step = commit.step
        self._last_commit = commit
        return self._next_step

    def step(self, step: int, micro_batches: Sequence[MicroBatch | None], stop_requested: bool = False) -> StepMetrics:
        """Take one optimiser step; see `TrainStep.run`.

        Raises:
            TrainingError: A loss or gradient is not finite, or the step is not the next one.
        """
        if step != self._next_step:
            raise TrainingError("a step is out of order", value=step, expected=f"step {self._next_step}")
        metrics = self._train_step.run(step, micro_batches, stop_requested)
        used = [batch for batch in micro_batches if batch is not None]
        runs = runs_of(int(sample_id) for batch in used for sample_id in batch.sample_ids)
        self._records.append(StepRecord(step, tuple(runs), tuple(fault for batch in used for fault in batch.faults)))
        self._next_step = step + 1
        return metrics

    def save(self, step: int) -> Commit:
        """Commit the state after `step` steps; the commit that exists is returned when it is of this step.

        Raises:
            TrainingError: So many steps have not been taken.
            StorageError: Something could not be written; nothing is committed.
        """
        if step != self._next_step or step == 0:
            raise TrainingError(
                "a checkpoint is asked for at another step than the trainer's",
                value=step,
                expected=f"step {self._next_step}, after at least one step",
            )
        if self._last_commit is None or self._last_commit.step != step:
            self._last_commit = write_checkpoint(self._store, self._snapshot(step), self._recipe.checkpoint.keep_last)
            self._records.clear()
        return self._last_commit

    def _newest_commit(self) -> Commit | None:
        commit = latest_commit(self._store)
        if commit is not None:
            require_recipe(commit, fingerprint(self._recipe))
        discard_after(self._store, commit)
        return commit

    def _state(self) -> dict[str, Fragment]:
        """This rank's weights, moments and average, as views."""
        return {
            name: Fragment(
                part.offset,
                part.numel,
                part.shape,
                part.tensors | self.teacher.fragments[name].tensors,
            )
            for name, part in local_fragments(self.student.deepspeed).items()
        }

    def _snapshot(self, step: int) -> Snapshot:
        return Snapshot(
            step=step,
            images_seen=step * self._recipe.batch.tiles,
            fingerprint=fingerprint(self._recipe),
            fragments=self._state(),
            shapes=self._shapes,
            records=self._records,
            quarantine=self._last_commit.quarantine if self._last_commit else (),
            written_by={
                "workers": str(dist.get_world_size()),
                "zero_stage": str(self._recipe.cluster.zero_stage),
                **{name: version(name) for name in ("histoscale", "torch", "deepspeed")},
            },
        )
