"""Forks: what a checkpoint may be the parent of, what is recorded of it, and what is refused before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.conftest import S3Server
from torch import Tensor

from histoscale.checkpoint.fragments import CENTER_PREFIX, EMA, MASTER, MOMENTS, Fragment
from histoscale.checkpoint.manifest import encode, marker_key
from histoscale.checkpoint.parent import PARENT_KEY, Parent, open_parent, read_parent
from histoscale.checkpoint.reader import commit_at, latest_commit
from histoscale.checkpoint.run_record import recorded_origins
from histoscale.checkpoint.writer import Snapshot, write_checkpoint
from histoscale.cluster.fork import ForkSource, find_parent, fork_source, origin_of, require_same_parent
from histoscale.cluster.pretrain import PretrainRequest, check_request
from histoscale.cluster.run_folder import read_run, start_run
from histoscale.config.decode import decode_recipe, fingerprint, load_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError, ClusterError, RecipeError, RunError
from histoscale.slides.index import make_index, write_index
from histoscale.slides.records import SlideLocation, SlideRecord
from histoscale.storage import ObjectInfo, Store, open_store
from histoscale.train.fork import POSITIONS, load_parent, misfits, shapes_of

KINDS = (MASTER, EMA, *MOMENTS)
Values = dict[str, Any]


pytestmark = pytest.mark.usefixtures("process_group")


def recipe_of(**sections: Values) -> Recipe:
    values: Values = {
        "precision": "fp32",
        "data": {"region_px": 98},
        "batch": {"tiles": 4, "replicas": 2},
        "model": {"arch": "vit_test14", "drop_path": 0.0},
        "heads": {"dino_prototypes": 12, "ibot_prototypes": 10, "hidden_dim": 8},
        "crops": {"global_px": 42, "local_px": 28, "local_count": 1},
        "schedule": {"images": 16},
    }
    for name, section in sections.items():
        values[name] = (values.get(name) or {}) | section
    return decode_recipe(values)


def tensors_of(shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    return {name: {kind: torch.randn(shape, generator=draws) for kind in KINDS} for name, shape in shapes.items()}


def commit_run(
    store: Store, recipe: Recipe, step: int = 3, centers: dict[str, tuple[int, ...]] | None = None
) -> dict[str, dict[str, Tensor]]:
    """A run with a commit of random state; gives the state."""
    if read_run(store) is None:
        start_run(store, recipe, "/index", "snapshot", ["weights: /w.pth"])
    shapes = shapes_of(recipe) | (centers or {})
    tensors = tensors_of(shapes, seed=step)
    fragments = {name: Fragment(0, kinds[EMA].numel(), shapes[name], _flat(kinds)) for name, kinds in tensors.items()}
    snapshot = Snapshot(step, 4 * step, fingerprint(recipe), fragments, shapes, [], {"workers": "1"})
    write_checkpoint(store, snapshot, keep_last=2)
    return tensors


def _flat(kinds: dict[str, Tensor]) -> dict[str, Tensor]:
    return {kind: tensor.flatten() for kind, tensor in kinds.items()}


def empty_targets(shapes: dict[str, tuple[int, ...]]) -> dict[str, Fragment]:
    return {
        name: Fragment(
            0,
            torch.Size(shape).numel(),
            shape,
            {kind: torch.zeros(torch.Size(shape).numel()) for kind in _kinds_of(name)},
        )
        for name, shape in shapes.items()
    }


def _kinds_of(name: str) -> tuple[str, ...]:
    return (EMA,) if name.startswith(CENTER_PREFIX) else KINDS


@pytest.fixture
def parent_run(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "parent")
    commit_run(store, recipe_of())
    return store


@pytest.fixture
def new_run(tmp_path: Path) -> Store:
    return open_store(tmp_path / "new")


def test_a_fork_records_its_parent_and_where_all_of_it_stems_from(parent_run: Store, new_run: Store) -> None:
    commit = latest_commit(parent_run)
    assert commit is not None
    recipe = recipe_of(schedule={"images": 400}, optim={"lr": 1e-5})
    parent, lines = origin_of(ForkSource(parent_run.uri, None), recipe, new_run)
    assert parent == Parent(parent_run.uri, 3, commit.fingerprint, commit.manifest_crc32, updates=3)
    assert lines == (parent.line(), "weights: /w.pth")
    assert parent.line().startswith(f"forked from {parent_run.uri} at step 3, {commit.fingerprint}@3:")

    start_run(new_run, recipe, "/index", "snapshot", lines, parent)
    assert read_parent(new_run) == parent
    assert recorded_origins(new_run) == list(lines)
    assert open_parent(parent)[1] == commit

    commit_run(new_run, recipe, step=5)
    grandchild, chain = origin_of(ForkSource(new_run.uri, 5), recipe, open_store(f"{new_run.uri}-2"))
    assert grandchild is not None
    assert grandchild.updates == 8, "the moments have those of the parent behind them"
    assert chain == (grandchild.line(), *lines)


def test_the_parent_may_be_in_a_bucket(s3_env: S3Server, new_run: Store) -> None:
    theirs = open_store(f"s3://{s3_env.make_bucket()}/team/run")
    state = commit_run(theirs, recipe_of())
    parent = find_parent(fork_source(f"{theirs.uri}@3"), recipe_of(), new_run)
    targets = empty_targets(shapes_of(recipe_of()))
    load_parent(parent, targets, shapes_of(recipe_of()), recipe_of())
    assert torch.equal(targets[POSITIONS].tensors[EMA], state[POSITIONS][EMA].flatten())


def test_a_source_is_a_place_with_or_without_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fork_source("/runs/a") == ForkSource("/runs/a", None)
    assert fork_source("/runs/a@120") == ForkSource("/runs/a", 120)
    assert fork_source("s3://b/me@home") == ForkSource("s3://b/me@home", None)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ClusterError, match="--fork-from is a relative path"):
        fork_source("runs/a@120")


def test_a_run_goes_on_with_the_parent_that_it_recorded(parent_run: Store, new_run: Store) -> None:
    recipe = recipe_of()
    parent, lines = origin_of(ForkSource(parent_run.uri, None), recipe, new_run)
    assert parent is not None
    start_run(new_run, recipe, "/index", "snapshot", lines, parent)
    for source in (None, ForkSource(parent_run.uri, None), ForkSource(f"{parent_run.uri}/", 3)):
        assert origin_of(source, recipe, new_run) == (parent, (parent.line(),))
    for source in (ForkSource(parent_run.uri, 4), ForkSource("/elsewhere", None)):
        with pytest.raises(RunError, match=rf"was not forked from there.*expected {parent_run.uri}@3"):
            origin_of(source, recipe, new_run)
    with pytest.raises(RunError, match="it began from new weights"):
        require_same_parent(parent_run, ForkSource("/elsewhere", None))


def test_the_parent_is_needed_until_the_first_commit_and_no_longer(parent_run: Store, new_run: Store) -> None:
    recipe = recipe_of()
    parent, lines = origin_of(ForkSource(parent_run.uri, None), recipe, new_run)
    start_run(new_run, recipe, "/index", "snapshot", lines, parent)
    parent_run.delete(marker_key(3))
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 3 \(got 'no checkpoint'"):
        origin_of(None, recipe, new_run)
    commit_run(new_run, recipe, step=1)
    assert origin_of(None, recipe, new_run)[0] == parent


def test_another_checkpoint_at_the_same_step_is_no_parent(parent_run: Store, new_run: Store) -> None:
    parent = find_parent(ForkSource(parent_run.uri, None), recipe_of(), new_run)
    another = replace(commit_at(parent_run, 3), manifest_crc32=1)
    parent_run.put(marker_key(3), encode(another))
    with pytest.raises(CheckpointError, match="is not the one that this run was forked from"):
        open_parent(parent)


def test_a_run_started_anew_forgets_the_parent_of_a_start_that_was_cut_short(parent_run: Store, new_run: Store) -> None:
    parent = find_parent(ForkSource(parent_run.uri, None), recipe_of(), new_run)
    start_run(new_run, recipe_of(), "/index", "snapshot", (), parent)
    new_run.delete("recipe.yaml")
    assert read_run(new_run) is None
    start_run(new_run, recipe_of(), "/index", "snapshot")
    assert read_parent(new_run) is None


@pytest.mark.parametrize("content", ["{", '{"format": 2}', "[]", '{"format": 1, "uri": "x"}'])
def test_a_damaged_record_is_named(new_run: Store, content: str) -> None:
    new_run.put(PARENT_KEY, content.encode())
    with pytest.raises(RunError, match=r"parent\.json of run .* cannot be read"):
        read_parent(new_run)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"arch": "vit_ti14"}}, r"model\.arch: 'vit_ti14' != 'vit_test14'"),
        ({"model": {"qk_norm": True}}, r"\d+ parameters differ \(got 'model\.qk_norm: True != False'"),
        (
            {"heads": {"dino_prototypes": 13, "hidden_dim": 9}},
            r"heads\.dino_prototypes: 13 != 12; heads\.hidden_dim: 9 != 8",
        ),
        ({"heads": {"shared": True}}, r"heads\.shared: True != False"),
        ({"model": {"weights": "/w.pth"}}, r"model\.weights names others .*model\.weights=null"),
        (
            {
                "distill": {"teacher": "/w.pth", "mode": "features", "arch": "vit_test14", "licence": "CC0"},
                "crops": {"local_count": 0, "global_px": 42},
            },
            r"distill\.mode: 'features' != None",
        ),
    ],
)
def test_another_network_is_refused_by_its_fields(
    parent_run: Store, new_run: Store, sections: Values, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histoscale.train.teacher_source._find_weights", lambda distill: _teacher())
    with pytest.raises(RecipeError, match=message):
        find_parent(ForkSource(parent_run.uri, None), recipe_of(**sections), new_run)
    assert list(new_run.list()) == []


def _teacher() -> Any:
    from histoscale.train.teacher_source import TeacherWeights

    return TeacherWeights("/w.pth", "vit_test14", qk_norm=False, sha256="1")


def test_a_network_that_another_version_built_is_refused_by_its_parameters(parent_run: Store, new_run: Store) -> None:
    commit_run(parent_run, recipe_of(), step=4, centers={"backbone.extra": (2,)})
    with pytest.raises(RecipeError, match=r"backbone\.extra absent != \(2,\)"):
        find_parent(ForkSource(parent_run.uri, None), recipe_of(), new_run)


def test_a_missing_parent_is_named(parent_run: Store, new_run: Store, tmp_path: Path) -> None:
    recipe = recipe_of()
    with pytest.raises(RunError, match="is not a run folder"):
        find_parent(ForkSource(str(tmp_path / "nowhere"), None), recipe, new_run)
    with pytest.raises(RunError, match="cannot be forked into its own folder"):
        find_parent(ForkSource(new_run.uri, None), recipe, new_run)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 \(got 'checkpoints of steps 3'"):
        find_parent(ForkSource(parent_run.uri, 7), recipe, new_run)
    commit = commit_at(parent_run, 3)
    parent_run.delete(commit.folder + "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        find_parent(ForkSource(parent_run.uri, 3), recipe, new_run)
    young = open_store(tmp_path / "young")
    start_run(young, recipe, "/index", "snapshot")
    with pytest.raises(CheckpointError, match="young has no checkpoint yet"):
        find_parent(ForkSource(young.uri, None), recipe, new_run)


def test_a_position_embedding_of_another_length_is_resampled_and_its_moments_are_zero(new_run: Store) -> None:
    theirs = open_store(f"{new_run.uri}-parent")
    state = commit_run(theirs, recipe_of())
    recipe = recipe_of(crops={"global_px": 56})
    shapes = shapes_of(recipe)
    assert misfits(shapes_of(recipe_of()), shapes) == []
    targets = empty_targets(shapes)
    whole = targets[POSITIONS]
    part = slice(50, 300)  # as a rank owns it
    targets[POSITIONS] = Fragment(50, 250, whole.shape, {kind: t[part] for kind, t in whole.tensors.items()})
    load_parent(find_parent(ForkSource(theirs.uri, None), recipe, new_run), targets, shapes, recipe)
    for kind in (MASTER, EMA):
        head, patches = state[POSITIONS][kind].split([shapes[POSITIONS][1] - 16, 9], dim=1)
        plane = patches.transpose(1, 2).reshape(1, -1, 3, 3)
        plane = F.interpolate(plane, size=(4, 4), mode="bicubic", antialias=True)
        expected = torch.cat([head, plane.flatten(2).transpose(1, 2)], dim=1).flatten()
        assert torch.equal(targets[POSITIONS].tensors[kind], expected[part])
        assert not whole.tensors[kind][:50].any()
    assert not any(targets[POSITIONS].tensors[kind].any() for kind in MOMENTS)
    for name in shapes.keys() - {POSITIONS}:
        for kind in KINDS:
            assert torch.equal(targets[name].tensors[kind], state[name][kind].flatten()), (name, kind)


def test_the_high_resolution_phase_is_a_fork_of_the_run_that_it_goes_on_from() -> None:
    recipes = Path(__file__).parents[2] / "jobs" / "recipes"
    large = load_recipe(recipes / "highres_post.yaml", ["model.weights=null"])
    run = load_recipe(recipes / "virchow2.yaml")
    assert (run.crops.global_px, large.crops.global_px) == (224, 392)
    assert misfits(shapes_of(run), shapes_of(large)) == []


def test_a_job_is_checked_against_its_parent_before_it_starts(parent_run: Store, new_run: Store) -> None:
    record = SlideRecord("0" * 32, "aperio", 4096, 4096, 0.5, "vendor", 9, (1.0, 4.0), np.ones((256, 256), bool), 16.0)
    index = open_store(f"{new_run.uri}-index")
    objects = (ObjectInfo("slide.svs", 9, "x"),)
    write_index(index, make_index([record], []), {record.slide_id: SlideLocation("/slides", objects, None)})
    source = ForkSource(parent_run.uri, None)
    recipe = recipe_of(data={"mix": [{"mpp": 0.5, "share": 1}]})
    checked = check_request(PretrainRequest(recipe, index.uri, new_run.uri, "job", source))
    assert checked.parent is not None
    assert checked.origins == (checked.parent.line(), "weights: /w.pth")
    assert list(new_run.list()) == []
    other = recipe_of(data={"mix": [{"mpp": 0.5, "share": 1}]}, heads={"hidden_dim": 9})
    with pytest.raises(RecipeError, match=r"heads\.hidden_dim: 9 != 8"):
        check_request(PretrainRequest(other, index.uri, new_run.uri, "job", source))
    start_run(new_run, recipe, index.uri, checked.catalogue.snapshot_id, checked.origins, checked.parent)
    assert check_request(PretrainRequest(recipe, index.uri, new_run.uri, "job")).parent == checked.parent
    with pytest.raises(RunError, match="was not forked from there"):
        check_request(PretrainRequest(recipe, index.uri, new_run.uri, "job", ForkSource(parent_run.uri, 9)))


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_centres_go_along_where_both_runs_have_them(new_run: Store, ours: bool, theirs: bool) -> None:
    centers: dict[str, tuple[int, ...]] = {f"{CENTER_PREFIX}dino": (12,), f"{CENTER_PREFIX}ibot": (10,)}
    parent_store = open_store(f"{new_run.uri}-parent")
    state = commit_run(parent_store, recipe_of(), centers=centers if theirs else {})
    shapes = shapes_of(recipe_of()) | (centers if ours else {})
    targets = empty_targets(shapes)
    load_parent(find_parent(ForkSource(parent_store.uri, None), recipe_of(), new_run), targets, shapes, recipe_of())
    if ours:
        for name in centers:
            expected = state[name][EMA] if theirs else torch.zeros(centers[name])
            assert torch.equal(targets[name].tensors[EMA], expected)
    assert torch.equal(targets["mask_token"].tensors[MASTER], state["mask_token"][MASTER].flatten())


def test_a_student_of_heads_and_a_run_of_its_own_are_forks_of_each_other(parent_run: Store, new_run: Store) -> None:
    student = recipe_of(distill={"teacher": parent_run.uri})
    assert find_parent(ForkSource(parent_run.uri, None), student, new_run).step == 3
    commit_run(new_run, student, step=2)
    assert find_parent(ForkSource(new_run.uri, None), recipe_of(), open_store(f"{new_run.uri}-2")).step == 2
