"""The frozen teacher that a recipe names: found, and held against the student's recipe, before its weights are read."""

import math
from dataclasses import dataclass
from typing import TypeAlias

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.reader import require_commit, require_recipe
from histoscale.checkpoint.run_record import RECIPE_KEY, find_recipe
from histoscale.config.archs import ARCHS
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import DistillSection, ModelSection, Recipe
from histoscale.errors import ModelError, RecipeError
from histoscale.export.exported import read_export
from histoscale.models.published import fetched, located
from histoscale.storage import open_store


@dataclass(frozen=True)
class TeacherRun:
    """A run of ours whose average, backbone and heads, is the teacher."""

    uri: str
    recipe: Recipe
    commit: Commit

    def fingerprint(self) -> str:
        """Names recipe, step and weights."""
        return f"{self.commit.fingerprint}@{self.commit.step}:{self.commit.manifest_crc32:08x}"


@dataclass(frozen=True)
class TeacherWeights:
    """A file of weights whose features are the teacher.

    Attributes:
        arch: Name of its shape.
        sha256: Of the file, where an export says it.
        licence: Of the weights, where an export says it.
    """

    uri: str
    arch: str
    qk_norm: bool
    sha256: str | None
    licence: str | None = None

    def fingerprint(self) -> str:
        """Names the weights by their SHA-256; the file is read for it where no export says it."""
        if self.sha256 is not None:
            return f"sha256:{self.sha256}"
        with fetched(self.uri) as (_, sha256):
            return f"sha256:{sha256}"


Teacher: TypeAlias = TeacherRun | TeacherWeights


def find_teacher(recipe: Recipe, distill: DistillSection) -> Teacher:
    """The teacher of a recipe, reachable and fit for its student.

    Raises:
        HistoscaleError: It cannot be reached, is something else, or does not fit.
    """
    if distill.mode == "heads":
        run = _find_run(distill.teacher)
        require_same_targets(recipe, run.recipe)
        return run
    weights = _find_weights(distill)
    patch_px = ARCHS[weights.arch].patch_px
    if recipe.crops.global_px % patch_px:
        both_px = math.lcm(patch_px, ARCHS[recipe.model.arch].patch_px)
        raise RecipeError(
            "crops.global_px does not fit the teacher",
            value=recipe.crops.global_px,
            expected=f"a multiple of the {patch_px} px of a patch of {weights.arch}",
            remedy=f"set it to a multiple of {both_px}, which fits the student, too, or take a teacher with its patch",
        )
    return weights


def describe_teacher(source: Teacher, distill: DistillSection) -> str:
    """A line for people: whose outputs the run learns from."""
    if isinstance(source, TeacherRun):
        what = f"heads of {source.recipe.model.arch} at step {source.commit.step} of {source.uri}"
    else:
        what = f"features of {source.arch} from {source.uri}"
    stated = distill.licence or (source.licence if isinstance(source, TeacherWeights) else None)
    licence = f", licence: {stated}" if stated else ""
    return f"teacher: {what}, {source.fingerprint()}{licence}"


def taught_by(recipe: Recipe, source: Teacher) -> Recipe:
    """A student's recipe with its teacher's network in place of its own."""
    if isinstance(source, TeacherRun):
        return recipe.model_copy(update={"model": source.recipe.model, "heads": source.recipe.heads})
    return recipe.model_copy(update={"model": ModelSection(arch=source.arch, drop_path=0.0, qk_norm=source.qk_norm)})


def require_same_targets(student: Recipe, teacher: Recipe) -> None:
    """Refuse a student that cannot predict a teacher's prototypes, patch by patch.

    Raises:
        RecipeError: Prototypes or the grids of patches differ; names every field that does.
    """
    ours, theirs = _targets_of(student), _targets_of(teacher)
    differing = [name for name in theirs if ours.get(name) != theirs[name]]
    if differing:
        raise RecipeError(
            "the student cannot predict what the heads of its teacher say",
            value=", ".join(f"{name} {ours.get(name)}" for name in differing),
            expected=", ".join(f"{name} {theirs[name]}" for name in differing),
            remedy="give the student these values, or distil from an export of the teacher with distill.mode=features",
        )


def _targets_of(recipe: Recipe) -> dict[str, object]:
    """What must be equal: name of the field -> value."""
    heads = recipe.heads
    values: dict[str, object] = {
        "heads.shared": heads.shared,
        "heads.dino_prototypes": heads.dino_prototypes,
        "crops.global_px": recipe.crops.global_px,
        "the patch of model.arch in px": ARCHS[recipe.model.arch].patch_px,
    }
    return values if heads.shared else values | {"heads.ibot_prototypes": heads.ibot_prototypes}


def _find_run(uri: str) -> TeacherRun:
    store = open_store(uri)
    recipe = find_recipe(store)
    if recipe is None:
        raise ModelError(
            f"the teacher at {store.uri} is not a run folder",
            expected=f"the --out of jobs/pretrain.py, with a {RECIPE_KEY} in it",
            remedy="correct distill.teacher; an export or published weights need distill.mode=features",
        )
    if recipe.distill is not None and recipe.distill.mode == "features":
        raise ModelError(
            f"the teacher at {store.uri} has no heads: it was distilled from features itself",
            value="distill.mode=features",
            expected="a run of pretraining, or one that was distilled from heads",
            remedy="export it with jobs/export.py, and set distill.teacher to the export and distill.mode=features",
        )
    commit = require_commit(store)
    require_recipe(commit, fingerprint(recipe))
    return TeacherRun(store.uri, recipe, commit)


def _find_weights(distill: DistillSection) -> TeacherWeights:
    if distill.arch is None:
        export = read_export(open_store(distill.teacher))
        marker = export.marker
        return TeacherWeights(export.weights, marker.arch, marker.qk_norm, export.sha256, marker.licence)
    store, name = located(distill.teacher)
    if not store.exists(name):
        raise ModelError(
            "there is no file of the teacher's weights",
            value=distill.teacher,
            expected="a .safetensors or .pth file of published weights",
            remedy="correct distill.teacher",
        )
    return TeacherWeights(distill.teacher, distill.arch, qk_norm=False, sha256=None)
