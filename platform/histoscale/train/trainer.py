"""A run on one rank: resume, step, save. The loop, the data and the cluster are the caller's.

trainer = build_trainer(recipe, device, store)
for step in range(trainer.resume(), recipe.steps):
    metrics = trainer.step(step, micro_batches)
    committed = trainer.settle(wait=False)
    if (step + 1) % recipe.checkpoint.every_steps == 0:
        committed = trainer.begin_save(step + 1) or committed
trainer.save(recipe.steps)
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from histoscale.checkpoint.capture import CapturedBatch, capture_failure
from histoscale.checkpoint.collective import on_every_rank, on_first_rank
from histoscale.checkpoint.fragments import (
    CENTER_PREFIX,
    EMA,
    MASTER,
    MOMENTS,
    Fragment,
    local_fragments,
    master_fragments,
    materialise_moments,
    parameter_shapes,
    refresh_parameters,
)
from histoscale.checkpoint.ledger import StepRecord, runs_of
from histoscale.checkpoint.manifest import Commit, CorruptCheckpoint
from histoscale.checkpoint.parent import read_parent
from histoscale.checkpoint.reader import commit_before, latest_commit, load_into, require_recipe, require_teacher
from histoscale.checkpoint.retention import Retention, discard_after
from histoscale.checkpoint.writer import CheckpointWriter, Fence, Snapshot, unfenced
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import NonFiniteError, StorageError, TrainingError
from histoscale.models.ssl import build_ssl_net, empty_ssl_net
from histoscale.sampling.tile_groups import SlideStrata, TileGroups
from histoscale.storage.store import Store
from histoscale.train.distill import FrozenTeacher, load_frozen_teacher
from histoscale.train.engine import StudentEngine
from histoscale.train.fork import load_parent
from histoscale.train.objective import Objective, PrototypeObjective
from histoscale.train.step import MicroBatch, Prepared, StepMetrics, TrainStep, all_reduce
from histoscale.train.teacher import Average, EMATeacher
from histoscale.train.warm_start import start_from_published

_log = logging.getLogger(__name__)


def build_trainer(
    recipe: Recipe,
    device: torch.device,
    store: Store,
    fence: Fence = unfenced,
    strata: SlideStrata | None = None,
) -> "Trainer":
    """Student, teacher and optimiser with their initial state (collective).

    `torch.distributed` must be initialised, and with CUDA the current device set. `store` is the run folder,
    `fence` is asked before its commits are touched, and the losses of `strata` are told apart.

    Raises:
        HistoscaleError: The recipe distils from a teacher, or starts from published weights, that cannot be used;
            raised on every rank.
    """
    if recipe.distill is not None:
        return build_student(recipe, load_frozen_teacher(recipe, recipe.distill, device), device, store, fence, strata)
    network = build_ssl_net(recipe).to(device)
    start_from_published(network, recipe, store)
    student = StudentEngine(network, recipe, device)
    masters = master_fragments(student.deepspeed)
    teacher = EMATeacher(empty_ssl_net(recipe), masters, device, student.dtype)
    objective = PrototypeObjective(recipe, teacher, all_reduce, hide_masked=True)
    return Trainer(recipe, student, teacher, objective, store, fence=fence, strata=strata)


def build_student(
    recipe: Recipe,
    teacher: FrozenTeacher,
    device: torch.device,
    store: Store,
    fence: Fence = unfenced,
    strata: SlideStrata | None = None,
) -> "Trainer":
    """Student of a frozen teacher, with its initial state (collective); see `build_trainer`.

    Raises:
        HistoscaleError: The recipe's student cannot learn from this teacher, or starts from published weights that
            cannot be used; raised on every rank.
    """
    network, objective = teacher.pupil(recipe)
    start_from_published(network.to(device), recipe, store)
    student = StudentEngine(network, recipe, device)
    average = Average(master_fragments(student.deepspeed))
    return Trainer(recipe, student, average, objective, store, teacher.fingerprint, fence, strata)


class Trainer:
    """The state of a run on this rank. Every method is collective: all ranks call it alike.

    Attributes:
        student: What is trained.
        teacher: The average that follows it: what is committed, and without a frozen teacher what it learns from.
        objective: What its steps minimise.
        groups: Of tiles, whose losses are told apart.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: StudentEngine,
        teacher: Average,
        objective: Objective[Any],
        store: Store,
        frozen_teacher: str | None = None,
        fence: Fence = unfenced,
        strata: SlideStrata | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.objective = objective
        self._recipe = recipe
        self._store = store
        self._frozen_teacher = frozen_teacher
        self._fence = fence
        self.groups = TileGroups.from_recipe(recipe, strata or SlideStrata())
        self._train_step = TrainStep(recipe, student, objective, teacher, self.groups)
        centers = {CENTER_PREFIX + name: tuple(center.shape) for name, center in objective.centers.items()}
        self._shapes = parameter_shapes(student.deepspeed) | centers
        self._next_step = 0
        self._whole = True  # not while a checkpoint is read, nor once that has failed
        self._parent = on_first_rank(lambda: read_parent(store))
        self._earlier_updates = self._parent.updates if self._parent else 0
        self._last_commit: Commit | None = None
        self._records: list[StepRecord] = []
        retention = Retention(recipe.checkpoint.keep_last, recipe.checkpoint.keep_every_steps)
        self._writer = CheckpointWriter(store, retention, recipe.checkpoint.max_failed, fence)

    @property
    def next_step(self) -> int:
        """The step to go on with."""
        return self._next_step

    def resume(self) -> int:
        """Load the newest commit that is not corrupt, or else the parent of a fork; returns the step to go on with.

        What claims to be later than the commit is discarded.

        Raises:
            CheckpointError: No commit is whole, or it belongs to another recipe or another frozen teacher; or the
                parent's checkpoint is gone.
            RunError: Another job has the run by now.
        """
        commit = on_first_rank(lambda: latest_commit(self._store))
        while commit is not None and (problem := self._problem_with(commit)) is not None:
            commit = on_first_rank(partial(commit_before, self._store, commit, problem))
        step = commit.step if commit else 0
        on_first_rank(self._fence)
        on_first_rank(lambda: discard_after(self._store, step))
        if commit is None and self._parent is not None:
            materialise_moments(self.student.deepspeed, self._earlier_updates)
            with self._reading():
                load_parent(self._parent, self._state() | self._centers(()), self._shapes, self._recipe)
                self._publish()
        self._last_commit = commit
        return self._next_step

    def restore(self, state: Commit) -> None:
        """Take over the state of a commit or of a capture, whatever world size wrote it (collective).

        Raises:
            CorruptCheckpoint: A file is missing or corrupt; raised on every rank.
            CheckpointError: It is of another network or of a student of another frozen teacher.
        """
        require_teacher(state, self._frozen_teacher)
        materialise_moments(self.student.deepspeed, self._earlier_updates + state.step)
        targets = self._state() | self._centers(())
        with self._reading():
            on_every_rank(lambda: load_into(self._store, state, targets, self._shapes))
            self._publish()
        self._next_step = state.step

    def step(self, step: int, micro_batches: Sequence[MicroBatch | None], stop_requested: bool = False) -> StepMetrics:
        """Take one optimiser step; see `TrainStep`.

        Raises:
            TrainingError: A loss or gradient is not finite, the step is not the next one, or the state was read in
                part only.
        """
        return self.update(step, micro_batches, self.prepare(step, micro_batches), stop_requested)

    def prepare(self, step: int, micro_batches: Sequence[MicroBatch | None]) -> Prepared:
        """The first half of a step, which students of one teacher can share; see `TrainStep.prepare`.

        Raises:
            TrainingError: The step is not the next one, or the state was read in part only.
        """
        self._require_next(step)
        return self._train_step.prepare(step, micro_batches)

    def update(
        self, step: int, micro_batches: Sequence[MicroBatch | None], prepared: Prepared, stop_requested: bool = False
    ) -> StepMetrics:
        """The second half of a step, from what was prepared of its micro-batches; see `TrainStep.update`.

        Raises:
            NonFiniteError: A loss or gradient is not finite; it names the capture of the step in the run folder.
            TrainingError: See `prepare`.
        """
        self._require_next(step)
        used = [batch for batch in micro_batches if batch is not None]
        try:
            metrics = self._train_step.update(step, prepared, stop_requested)
        except NonFiniteError as failure:
            raise self._captured(failure.with_traceback(None), used) from None
        runs = runs_of(int(sample_id) for batch in used for sample_id in batch.sample_ids)
        self._records.append(StepRecord(step, tuple(runs), tuple(fault for batch in used for fault in batch.faults)))
        self._next_step = step + 1
        return metrics

    def begin_save(self, step: int, first: Callable[[], None] | None = None) -> Commit | None:
        """Copy the state after `step` steps to host memory and let it be committed beside the next steps.

        Waits for the checkpoint in flight, if there is one; answers its commit.

        Args:
            step: The trainer's.
            first: See `CheckpointWriter.begin`.

        Raises:
            TrainingError: So many steps have not been taken, or the state was read in part only.
            StorageError: See `settle`, and RunError too.
        """
        self._require_at(step)
        committed = self.settle(wait=True)
        if self._last_commit is None or self._last_commit.step != step:
            self._writer.begin(self._snapshot(step), first)
        return committed

    def settle(self, *, wait: bool) -> Commit | None:
        """Move on with the checkpoint in flight; answers its commit once, as soon as it is there.

        A checkpoint that could not be written is told of in the log: the next one takes its place, and holds the
        ledger of its steps too.

        Args:
            wait: Until it is committed or has failed, instead of looking how far it is.

        Raises:
            StorageError: It failed, as the last of `checkpoint.max_failed` in a row; the same on every rank.
            RunError: Another job has the run by now; the same on every rank.
        """
        commit = self._writer.settle(wait=wait)
        if commit is not None:
            self._note(commit)
        return commit

    def save(self, step: int, first: Callable[[], None] | None = None) -> Commit:
        """Commit the state after `step` steps and wait; the commit that exists is returned when it is of this step.

        Args:
            step: The trainer's.
            first: See `CheckpointWriter.begin`.

        Raises:
            TrainingError: See `begin_save`.
            StorageError: Something could not be written; nothing is committed.
            RunError: See `settle`.
        """
        self.begin_save(step, first)
        if self._last_commit is not None and self._last_commit.step == step:
            return self._last_commit
        commit = self._writer.finish()
        self._note(commit)
        return commit

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Where this fails, the state is that of no step."""
        self._whole = False
        yield
        self._whole = True

    def _require_whole(self) -> None:
        if not self._whole:
            raise TrainingError(
                "the state of this run was read in part only, so nothing is made of it",
                expected="a checkpoint that was read to its end",
                remedy="start the run again, which takes the newest checkpoint that is whole",
            )

    def _require_next(self, step: int) -> None:
        self._require_whole()
        if step != self._next_step:
            raise TrainingError(
                "a step is out of order",
                value=step,
                expected=f"step {self._next_step}",
                remedy="begin at the step that `resume` returns, and take each once",
            )

    def _require_at(self, step: int) -> None:
        self._require_whole()
        if step != self._next_step or step == 0:
            raise TrainingError(
                "a checkpoint is asked for at another step than the trainer's",
                value=step,
                expected=f"step {self._next_step}, after at least one step",
                remedy="save when as many steps have been taken",
            )

    def _note(self, commit: Commit) -> None:
        """Take note of a commit: what its ledger holds belongs to the next one no more."""
        self._last_commit = commit
        self._records = [record for record in self._records if record.step >= commit.step]

    def _captured(self, failure: NonFiniteError, used: Sequence[MicroBatch]) -> NonFiniteError:
        """The failure, with the place of a capture of the step (collective)."""
        if self._earlier_updates + self._next_step == 0:
            materialise_moments(self.student.deepspeed, 0)
        try:
            self.settle(wait=True)  # steps that went well before this one
        except StorageError as error:
            _log.warning("%s", error)
        batches = [CapturedBatch.of(each.replica, each.sample_ids, each.tiles, each.faults) for each in used]
        return capture_failure(self._store, self._snapshot(self._next_step), batches, failure)

    def _publish(self) -> None:
        """Let student and teacher compute with the state that was read (collective)."""
        refresh_parameters(self.student.deepspeed)
        self.teacher.publish()

    def _problem_with(self, commit: Commit) -> CorruptCheckpoint | None:
        """Restore a commit (collective); answers why that cannot be, the same on every rank."""
        require_recipe(commit, fingerprint(self._recipe))
        try:
            self.restore(commit)
        except CorruptCheckpoint as problem:
            return problem
        return None

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

    def _centers(self, empty_kinds: Sequence[str]) -> dict[str, Fragment]:
        """The centres of the teacher's logits, whole, under the kind of the average.

        Args:
            empty_kinds: Further kinds, of zeros: a shard has all kinds of everything.
        """
        return {
            CENTER_PREFIX + name: Fragment(
                0,
                center.numel(),
                tuple(center.shape),
                {EMA: center} | {kind: torch.zeros_like(center) for kind in empty_kinds},
            )
            for name, center in self.objective.centers.items()
        }

    def _snapshot(self, step: int) -> Snapshot:
        return Snapshot(
            step=step,
            images_seen=step * self._recipe.batch.tiles,
            fingerprint=fingerprint(self._recipe),
            fragments=self._state() | (self._centers((MASTER, *MOMENTS)) if dist.get_rank() == 0 else {}),
            shapes=self._shapes,
            records=self._records,
            quarantine=self._last_commit.quarantine if self._last_commit else (),
            teacher=self._frozen_teacher,
            written_by={
                "workers": str(dist.get_world_size()),
                "zero_stage": str(self._recipe.cluster.zero_stage),
                **{name: version(name) for name in ("histoscale", "torch", "deepspeed")},
            },
        )
