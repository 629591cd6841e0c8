"""Frozen teachers: which are refused and why, what is loaded, what students are, and the objective of features."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import S3Server
from torch import Tensor, nn

from histoscale.augment.crops import Views
from histoscale.checkpoint.fragments import EMA, MASTER, Fragment
from histoscale.checkpoint.manifest import decode_commit, encode
from histoscale.checkpoint.reader import latest_commit, load_teacher_backbone, require_teacher
from histoscale.checkpoint.writer import Snapshot, write_checkpoint
from histoscale.cluster.pretrain import PretrainRequest, _memory, check_request
from histoscale.cluster.run_folder import start_run
from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe, fingerprint
from histoscale.config.recipe import DistillSection, Recipe
from histoscale.errors import CheckpointError, ModelError, RecipeError, StorageError
from histoscale.evaluate.backbone import initial_backbone, trained_backbone
from histoscale.export.marker import MARKER, WEIGHTS
from histoscale.export.run import ExportRequest, export_run
from histoscale.models import VisionTransformer, build_ssl_net
from histoscale.models.feature_net import build_feature_net
from histoscale.models.weights import initialise
from histoscale.objectives.cosine import cosine_distances, resample_grid
from histoscale.slides.index import make_index, write_index
from histoscale.slides.records import SlideLocation, SlideRecord
from histoscale.storage import ObjectInfo, Store, open_store
from histoscale.train.distill import FeaturesTeacher, HeadsTeacher, load_frozen_teacher
from histoscale.train.features import FeatureObjective, Features
from histoscale.train.objective import Inputs
from histoscale.train.students import build_students
from histoscale.train.teacher_source import TeacherRun, TeacherWeights, describe_teacher, find_teacher
from histoscale.train.warm_start import start_from_published

CPU = torch.device("cpu")
LICENCE = "CC0"
Values = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread_and_its_draws() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


pytestmark = pytest.mark.usefixtures("process_group")


def recipe_of(distill: Values | None = None, **sections: Values) -> Recipe:
    """A recipe of two replicas of two tiles; features have no local crops."""
    features = (distill or {}).get("mode") == "features"
    values: Values = {
        "data": {"region_px": 64},
        "batch": {"tiles": 4, "replicas": 2},
        "model": {"arch": "vit_test14", "drop_path": 0.0},
        "heads": {"dino_prototypes": 12, "ibot_prototypes": 10, "hidden_dim": 8},
        "crops": {"global_px": 42, "local_px": 28, "local_count": 0 if features else 1},
        "schedule": {"images": 16},
        "distill": distill,
    }
    for name, section in sections.items():
        values[name] = (values.get(name) or {}) | section
    return decode_recipe(values)


def lively(net: nn.Module, seed: int = 5) -> Any:
    """The net with every parameter far from its initial value."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return net


def commit_net(store: Store, recipe: Recipe, net: nn.Module, step: int, teacher: str | None = None) -> None:
    """A run with one commit, whose average is the net."""
    if not store.exists("recipe.yaml"):
        start_run(store, recipe, "/index", "snapshot")
    weights = {name: parameter.detach().flatten() for name, parameter in net.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    fragments = {
        name: Fragment(0, flat.numel(), shapes[name], {EMA: flat, MASTER: torch.zeros_like(flat)})
        for name, flat in weights.items()
    }
    snapshot = Snapshot(step, 4 * step, fingerprint(recipe), fragments, shapes, [], {"workers": "1"}, teacher=teacher)
    write_checkpoint(store, snapshot, keep_last=2)


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run with heads, committed at step 3."""
    store = open_store(tmp_path / "teacher")
    recipe = recipe_of()
    commit_net(store, recipe, lively(build_ssl_net(recipe)), step=3)
    return store


@pytest.fixture
def export(run: Store, tmp_path: Path) -> Path:
    export_run(run, recipe_of(), ExportRequest(str(tmp_path / "export")))
    return tmp_path / "export"


def published_net() -> VisionTransformer:
    net = VisionTransformer(ARCHS["vit_test14"], 56)
    initialise(net, seed=0)
    lively(net)
    return net.eval()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file of weights of vit_test14 for 56 px."""
    net = published_net()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def heads(run: Store, **sections: Values) -> Recipe:
    return recipe_of({"teacher": run.uri}, **sections)


def features(teacher: Path | str, **distill: Any) -> Recipe:
    return recipe_of({"teacher": str(teacher), "mode": "features"} | distill)


def find(recipe: Recipe) -> TeacherRun | TeacherWeights:
    return find_teacher(recipe, section(recipe))


def section(recipe: Recipe) -> DistillSection:
    assert recipe.distill is not None
    return recipe.distill


def load(recipe: Recipe) -> Any:
    return load_frozen_teacher(recipe, section(recipe), CPU)


def of_file(**distill: Any) -> Values:
    return {"teacher": "s3://b/w.pth", "mode": "features", "arch": "vit_s14", "licence": LICENCE} | distill


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distill": {"teacher": "runs/one"}}, "teacher must be an absolute path or an s3:// URI, got 'runs/one'"),
        ({"distill": of_file(mode="heads")}, "mode heads needs a run folder, as a file of weights has no heads"),
        ({"distill": {"teacher": "/run", "arch": "vit_s14"}}, "arch is for a file of weights"),
        ({"distill": of_file(arch=None)}, "arch must say whose weights these are, one of .*, got None"),
        ({"distill": of_file(arch="vit_x")}, "arch must say whose weights these are, one of .*, got 'vit_x'"),
        ({"distill": of_file(licence=None)}, r"distill\.licence must say what permits .* forbid training on their out"),
        ({"distill": of_file(licence=" ")}, r"distill\.licence must say"),
        ({"distill": of_file(cls_weight=0, patch_weight=0)}, "must not both be 0"),
        ({"distill": {"teacher": "/run"}, "loss": {"centering": "center"}}, r"centering must be sinkhorn"),
        ({"distill": {"teacher": "/run"}}, r"model\.drop_path must be 0 in distillation.*got 0\.4"),
        ({"distill": of_file(), "model": {"drop_path": 0}}, r"crops\.local_count must be 0 .*from features.*got 8"),
    ],
)
def test_recipes_that_cannot_be_distilled_are_refused(values: Values, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        decode_recipe(values)


def test_a_run_as_teacher_is_named_by_recipe_step_and_weights(run: Store) -> None:
    found = find(heads(run))
    commit = latest_commit(run)
    assert isinstance(found, TeacherRun)
    assert commit is not None
    assert found.fingerprint() == f"{fingerprint(recipe_of())}@3:{commit.manifest_crc32:08x}"
    line = describe_teacher(found, section(heads(run)))
    assert line == f"teacher: heads of vit_test14 at step 3 of {run.uri}, {found.fingerprint()}"
    commit_net(run, recipe_of(), lively(build_ssl_net(recipe_of()), seed=6), step=4)
    assert find(heads(run)).fingerprint().startswith(f"{fingerprint(recipe_of())}@4:")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"heads": {"dino_prototypes": 13}}, r"heads\.dino_prototypes 13'; expected heads\.dino_prototypes 12"),
        ({"heads": {"ibot_prototypes": 9}}, r"heads\.ibot_prototypes 9'; expected heads\.ibot_prototypes 10"),
        ({"heads": {"shared": True}}, r"heads\.shared True, heads\.ibot_prototypes None'; expected"),
        ({"crops": {"global_px": 56}}, r"crops\.global_px 56'; expected crops\.global_px 42"),
        (
            {"model": {"arch": "vit_ti16"}, "crops": {"global_px": 48, "local_px": 32}},
            r"crops\.global_px 48, the patch of model\.arch in px 16'; expected crops\.global_px 42, the patch .* 14",
        ),
    ],
)
def test_a_student_that_cannot_predict_the_prototypes_is_refused(
    run: Store, sections: dict[str, Values], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        find(heads(run, **sections))
    with pytest.raises(RecipeError, match=message):
        load(heads(run)).pupil(heads(run, **sections))


def test_a_teacher_whose_recipe_is_damaged_is_refused(run: Store) -> None:
    run.put("recipe.yaml", run.get("recipe.yaml").replace(b"vit_test14", b"vit_test\xff4"))
    with pytest.raises(RecipeError, match=rf"{run.uri}/recipe\.yaml is not valid YAML.*Restore the file"):
        find(heads(run))


def test_a_student_may_have_another_bottleneck_and_width(run: Store) -> None:
    other = heads(run, model={"arch": "vit_micro14"}, heads={"dino_bottleneck_dim": 6, "hidden_dim": 20})
    net, _ = load(other).pupil(other)
    assert net.dino_head.prototypes.weight.shape == (12, 6)


def test_teachers_that_are_no_finished_run_are_refused(run: Store, export: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a run folder.*distill\.mode=features"):
        find(heads(open_store(export)))
    empty = open_store(tmp_path / "empty")
    start_run(empty, recipe_of(), "/index", "snapshot")
    with pytest.raises(CheckpointError, match="empty has no checkpoint yet"):
        find(heads(empty))
    headless, recipe = open_store(tmp_path / "headless"), features(export)
    commit_net(headless, recipe, build_feature_net(recipe, 32), step=1)
    with pytest.raises(ModelError, match="has no heads: it was distilled from features itself"):
        find(heads(headless))
    mixed = open_store(tmp_path / "mixed")
    commit_net(mixed, recipe_of(), build_ssl_net(recipe_of()), step=1)
    start_run(mixed, recipe_of(optim={"lr": 1e-3}), "/index", "snapshot")
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        find(heads(mixed))


def test_the_teacher_of_heads_is_the_average_of_its_run(run: Store) -> None:
    teacher = load(heads(run))
    assert isinstance(teacher, HeadsTeacher)
    expected = lively(build_ssl_net(recipe_of())).eval()
    images, mask = torch.randn(2, 3, 42, 42), torch.ones(2, 9, dtype=torch.bool)
    out = teacher(images, mask)
    with torch.no_grad():
        wanted = expected(images, None, mask, hide_masked=False)
    for name in wanted:
        torch.testing.assert_close(out[name], wanted[name])
    assert out["ibot"].shape[0] == 18
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    in_bf16 = load(heads(run).model_copy(update={"precision": "bf16"}))
    assert in_bf16(images.bfloat16(), mask)["dino"].dtype == torch.bfloat16


def test_weights_of_another_network_are_refused(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHS, "vit_test14", replace(ARCHS["vit_test14"], registers=0))
    with pytest.raises(ModelError, match=r"another network than its recipe says, at backbone\.pos_embed"):
        load(heads(run))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_export_is_a_teacher_of_features(tmp_path: Path, qk_norm: bool) -> None:
    source, recipe = open_store(tmp_path / "run"), recipe_of(model={"qk_norm": qk_norm})
    commit_net(source, recipe, lively(build_ssl_net(recipe)), step=1)
    export_run(source, recipe, ExportRequest(str(tmp_path / "export")))
    student = features(tmp_path / "export")
    found = find(student)
    assert found == TeacherWeights(str(tmp_path / "export" / WEIGHTS), "vit_test14", qk_norm, sha256_of(tmp_path))
    teacher = load(student)
    assert isinstance(teacher, FeaturesTeacher)
    assert teacher.fingerprint == found.fingerprint() == f"sha256:{sha256_of(tmp_path)}"
    backbone, _ = trained_backbone(source, recipe)
    images = torch.randn(2, 3, 42, 42)
    made = teacher(images)
    with torch.no_grad():
        tokens = backbone(images)
    torch.testing.assert_close(made.cls, tokens[:, 0])
    torch.testing.assert_close(made.patches, tokens[:, 2:])


def sha256_of(folder: Path) -> str:
    return str(json.loads((folder / "export" / MARKER).read_text())["sha256"][WEIGHTS])


def test_published_weights_are_named_by_their_hash_and_their_licence_is_told(published: Path) -> None:
    recipe = features(published, arch="vit_test14", licence=LICENCE)
    found = find(recipe)
    teacher = load(recipe)
    assert found.fingerprint() == teacher.fingerprint
    line = describe_teacher(found, section(recipe))
    assert line == f"teacher: features of vit_test14 from {published}, {teacher.fingerprint}, licence: CC0"
    images = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).cls, published_net()(images)[:, 0])


def test_published_weights_in_a_bucket_have_the_same_name(published: Path, s3_env: S3Server) -> None:
    bucket = open_store(f"s3://{s3_env.make_bucket()}/weights")
    bucket.upload(published, "w.safetensors")
    keywords = {"arch": "vit_test14", "licence": LICENCE}
    remote, local = features(f"{bucket.uri}/w.safetensors", **keywords), features(published, **keywords)
    assert load(remote).fingerprint == find(remote).fingerprint() == find(local).fingerprint()


def test_weights_that_do_not_fit_name_the_field_of_the_teacher(published: Path) -> None:
    with pytest.raises(ModelError, match=r"[Ss]et distill\.arch to vit_test14"):
        load(features(published, arch="vit_s14", licence=LICENCE))


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file of the teacher's weights"):
        find(features(tmp_path / "w.pth", arch="vit_s14", licence=LICENCE))


def test_an_image_side_that_does_not_hold_the_teachers_patches_is_refused(published: Path) -> None:
    recipe = features(published, arch="vit_ti16", licence=LICENCE)
    message = r"does not fit the teacher \(got 42; .* 16 px of a patch of vit_ti16\)\. Set it .* of 112, which fits"
    with pytest.raises(RecipeError, match=message):
        find(recipe)


def test_an_export_whose_weights_were_exchanged_is_refused(export: Path) -> None:
    net = lively(VisionTransformer(ARCHS["vit_test14"], 42), seed=9)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, export / WEIGHTS)
    with pytest.raises(ModelError, match="are not those of its export"):
        load(features(export))


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (None, "is no export of ours"),
        ("no JSON", "is no export of ours"),
        ("5", "is no export of ours"),
        ('{"architecture": "resnet50"}', "is no export of ours"),
        ('{"format": 1}', r"another version of histoscale \(got 'format 1'"),
        ('{"format": 2, "sha256": {}}', r"another version of histoscale \(got 'format 2'"),
    ],
)
def test_folders_that_are_no_export_are_refused(export: Path, marker: str | None, message: str) -> None:
    if marker is None:
        (export / MARKER).unlink()
    else:
        (export / MARKER).write_text(marker)
    with pytest.raises(ModelError, match=message):
        find(features(export))


def test_an_export_of_a_later_format_is_refused(export: Path) -> None:
    marker = json.loads((export / MARKER).read_text())
    (export / MARKER).write_text(json.dumps(marker | {"format": 3}))
    with pytest.raises(ModelError, match="another version of histoscale"):
        find(features(export))


def test_a_commit_keeps_its_teacher_and_older_ones_have_none(run: Store) -> None:
    commit = latest_commit(run)
    assert commit is not None
    taught = replace(commit, teacher="sha256:1")
    assert decode_commit(encode(taught), "key") == taught
    older = {name: value for name, value in json.loads(encode(commit)).items() if name not in ("teacher", "crc32")}
    assert decode_commit(json.dumps(older).encode(), "key") == commit
    require_teacher(taught, "sha256:1")
    for ours, kept in (("sha256:2", taught), (None, taught), ("sha256:1", commit)):
        with pytest.raises(CheckpointError, match="is a student of another teacher"):
            require_teacher(kept, ours)


def test_cosine_loss_is_that_of_loops() -> None:
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    total = 0.0
    for ours, theirs in zip(student.view(6, 5), teacher.view(6, 5), strict=True):
        total += 1.0 - float(ours @ theirs) / math.sqrt(float(ours @ ours) * float(theirs @ theirs))
    assert cosine_distances(student, teacher).mean().item() == pytest.approx(total / 6, rel=1e-12)
    assert cosine_distances(student, 3.0 * student).mean().item() == pytest.approx(0.0, abs=1e-12)
    assert cosine_distances(student.bfloat16(), teacher.bfloat16()).mean().dtype == torch.float32


@pytest.mark.parametrize("rows", [3, 8])
def test_features_move_with_the_grid(rows: int) -> None:
    def ramp(side: int) -> Tensor:
        centres = (torch.arange(side) + 0.5) / side
        return torch.stack([centres[:, None].expand(side, side), centres.expand(side, side)], dim=-1).view(1, -1, 2)

    moved, wanted = resample_grid(ramp(6), rows), ramp(rows)
    inner = [row * rows + column for row in range(1, rows - 1) for column in range(1, rows - 1)]
    assert moved.shape == wanted.shape
    assert (moved - wanted)[0, inner].abs().max() < 0.03  # at the border there is nothing to interpolate with
    assert not torch.allclose(moved, wanted.flip(-1), atol=0.1)
    same = torch.randn(2, 9, 4)
    assert resample_grid(same, 3) is same
    assert resample_grid(torch.randn(1, 36, 2).bfloat16(), rows).dtype == torch.float32


def test_the_objective_of_features_compares_both_crops_in_the_students_grid(export: Path) -> None:
    recipe = features(export, cls_weight=0.25, patch_weight=4)
    teacher = Features(torch.randn(4, 7), torch.randn(4, 36, 7))
    objective = FeatureObjective(recipe, section(recipe), lambda crops: teacher)
    assert (objective.names, objective.weights) == (("cls", "patch"), (0.25, 4.0))
    mask = objective.mask(np.arange(2))
    assert mask.shape == (4, 9)
    assert mask.all()
    inputs = Inputs(0, Views(torch.randn(4, 3, 42, 42), None), torch.from_numpy(mask))
    assert objective.targets([inputs, inputs], 0.07) == [teacher, teacher]
    net = build_feature_net(recipe, 7)
    made = objective.losses(net, inputs, teacher)
    out = net(inputs.views.global_crops)
    cosines = nn.functional.cosine_similarity(out["patch_features"], resample_grid(teacher.patches, 3), dim=-1)
    distances = cosine_distances(out["cls_features"], teacher.cls)
    assert made.terms.tolist() == pytest.approx([distances.mean().item(), 1 - cosines.mean().item()], rel=1e-5)
    assert made.tiles_b.tolist() == pytest.approx(((distances[:2] + distances[2:]) / 2).tolist(), rel=1e-5)
    assert torch.equal(made.cls_bD, out["cls"][:2])
    assert objective.watch([teacher]) == {}


def test_every_parameter_of_a_student_of_features_gets_a_gradient() -> None:
    recipe = recipe_of(model={"qk_norm": True})
    net = lively(build_feature_net(recipe, 7)).train()
    out = net(torch.randn(4, 3, 42, 42))
    assert {name: tuple(tensor.shape) for name, tensor in out.items()} == {
        "cls": (4, 32),
        "cls_features": (4, 7),
        "patch_features": (4, 9, 7),
    }
    teacher = Features(torch.randn(4, 7), torch.randn(4, 9, 7))
    pairs = ((out["cls_features"], teacher.cls), (out["patch_features"], teacher.patches))
    torch.stack([cosine_distances(*pair).mean() for pair in pairs]).sum().backward()
    names = [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert names == []
    assert not [name for name, _ in net.named_parameters() if "mask_token" in name or "head" in name]


def test_a_student_of_features_is_evaluated_and_exported_as_any_other(export: Path, tmp_path: Path) -> None:
    recipe, store = features(export), open_store(tmp_path / "student")
    net = build_feature_net(recipe, 32)
    initial = initial_backbone(recipe).state_dict()
    assert all(torch.equal(initial[name], tensor) for name, tensor in net.backbone.state_dict().items())
    lively(net)
    commit_net(store, recipe, net, step=2, teacher="sha256:1")
    commit = latest_commit(store)
    assert commit is not None
    assert load_teacher_backbone(store, commit).keys() == net.backbone.state_dict().keys()
    backbone, _ = trained_backbone(store, recipe)
    images = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), net.eval().backbone(images))
    export_run(store, recipe, ExportRequest(str(tmp_path / "again")))
    assert load(features(tmp_path / "again"))(images).cls.shape == (1, 32)


def test_a_student_of_features_starts_from_published_weights_where_the_recipe_names_them(
    published: Path, tmp_path: Path
) -> None:
    warm = recipe_of(model={"weights": str(published)}, crops={"global_px": 56})
    started, fresh = build_feature_net(warm, 7), build_feature_net(recipe_of(crops={"global_px": 56}), 7)
    start_from_published(started, warm, open_store(tmp_path / "student"))
    state = published_net().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in started.backbone.state_dict().items())
    assert torch.equal(started.cls_projector.weight, fresh.cls_projector.weight)
    assert not torch.equal(started.backbone.cls_token, fresh.backbone.cls_token)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"batch": {"replicas": 1}}, r"batch\.replicas: 2 != 1"),
        ({"augment": {"hue": 0.2}}, r"augment\.hue: 0\.1 != 0\.2"),
        ({"data": {"max_upsample": 1.2}}, r"data\.max_upsample"),
        ({"crops": {"local_count": 2}}, r"crops\.local_count: 1 != 2"),
        ({"schedule": {"images": 20}}, r"schedule\.images: 16 != 20"),
        ({"loss": {"teacher_temperature": [0.05, 0.05]}}, r"loss\.teacher_temperature"),
        ({"loss": {"sinkhorn_iterations": 2}}, r"loss\.sinkhorn_iterations: 3 != 2"),
        ({"distill": {"teacher": "/other"}}, r"distill\.teacher: .* != '/other'"),
    ],
)
def test_students_that_see_something_else_are_refused(
    run: Store, tmp_path: Path, sections: dict[str, Values], message: str
) -> None:
    recipe = heads(run)
    values = recipe.model_dump()
    for name, section_values in sections.items():
        values[name] |= section_values
    with pytest.raises(RecipeError, match=f"must agree in what it sees .*{message}"):
        build_students([recipe, Recipe.model_validate(values)], CPU, [open_store(tmp_path / n) for n in "ab"])


def test_students_without_a_common_teacher_are_refused(run: Store, tmp_path: Path) -> None:
    stores = [open_store(tmp_path / name) for name in "ab"]
    with pytest.raises(RecipeError, match=r"share a frozen teacher.*distill=null.*Add the section"):
        build_students([recipe_of(), heads(run)], CPU, stores)
    with pytest.raises(RecipeError, match=r"must agree .*distill"):
        build_students([heads(run), recipe_of()], CPU, stores)
    for folders in ([stores[0], stores[0]], stores[:1], [*stores, open_store(tmp_path / "c")]):
        with pytest.raises(RecipeError, match=r"run folder of its own .*expected 2 .*Give as many folders as recipes"):
            build_students([heads(run), heads(run)], CPU, folders)
    with pytest.raises(RecipeError, match=r"has no student .*a recipe and a run folder for each"):
        build_students([], CPU, [])


def test_what_cannot_be_reached_is_refused(s3_env: S3Server) -> None:
    with pytest.raises(StorageError):
        find(heads(open_store("s3://no-such-bucket-of-ours/run")))


def an_index(folder: Path) -> Store:
    """An index of one slide that is all tissue."""
    record = SlideRecord("0" * 32, "aperio", 4096, 4096, 0.5, "vendor", 9, (1.0, 4.0), np.ones((256, 256), bool), 16.0)
    store = open_store(folder / "index")
    objects = (ObjectInfo("slide.svs", 9, "x"),)
    write_index(store, make_index([record], []), {record.slide_id: SlideLocation("/slides", objects, None)})
    return store


def test_a_job_is_refused_before_it_starts_where_its_teacher_is_not_there(run: Store, tmp_path: Path) -> None:
    index, out = an_index(tmp_path), tmp_path / "student"
    recipe = heads(run, data={"mix": [{"mpp": 0.5, "share": 1}]})
    checked = check_request(PretrainRequest(recipe, index.uri, str(out), "job"))
    assert checked.origins[0] == describe_teacher(find(recipe), section(recipe))
    astray = recipe.model_copy(update={"distill": DistillSection(teacher=str(tmp_path / "nowhere"))})
    with pytest.raises(ModelError, match="is not a run folder"):
        check_request(PretrainRequest(astray, index.uri, str(out), "job"))
    alone = recipe.model_copy(update={"distill": None})
    assert check_request(PretrainRequest(alone, index.uri, str(out), "job")).origins == ()
    assert not out.exists()


def test_a_job_says_which_published_weights_it_starts_from_or_why_it_cannot(tmp_path: Path) -> None:
    index, file = an_index(tmp_path), tmp_path / "weights.safetensors"
    model = {"arch": "vit_test14", "weights": str(file)}
    recipe = Recipe.model_validate({"model": model, "data": {"mix": [{"mpp": 0.5, "share": 1}]}})
    request = PretrainRequest(recipe, index.uri, str(tmp_path / "run"), "job")
    with pytest.raises(StorageError):
        check_request(request)
    save_file(dict(VisionTransformer(ARCHS["vit_test14"], 224).state_dict()), file)
    checked = check_request(request)
    (line,) = checked.origins
    assert line.startswith(f"weights: {file} in timm's layout, sha256:")
    assert torch.equal(initial_backbone(recipe).pos_embed, load_file(file)["pos_embed"])

    start_run(checked.store, recipe, index.uri, checked.catalogue.snapshot_id, checked.origins)
    file.unlink()
    with pytest.raises(StorageError):
        check_request(request)
    commit_net(checked.store, recipe, nn.Linear(1, 1), step=1)
    assert check_request(request).origins == (line,)


def test_the_forecast_of_a_job_counts_its_teacher(run: Store, published: Path) -> None:
    of_heads = heads(run, model={"arch": "vit_micro14"}, heads={"hidden_dim": 20})
    of_features = features(published, arch="vit_test14", licence=LICENCE)
    networks = (build_ssl_net(recipe_of()), VisionTransformer(ARCHS["vit_test14"], 42))
    for recipe, network in zip((of_heads, of_features), networks, strict=True):
        assert _memory(recipe, "cpu", find(recipe)).items["teacher"] == 4 * sum(
            each.numel() for each in network.parameters()
        )


def test_a_resumed_student_of_a_file_is_checked_without_reading_it(published: Path, tmp_path: Path) -> None:
    index, out = an_index(tmp_path), str(tmp_path / "student")
    distill = {"teacher": str(published), "mode": "features", "arch": "vit_test14", "licence": LICENCE}
    recipe = recipe_of(distill, data={"mix": [{"mpp": 0.5, "share": 1}]})
    request = PretrainRequest(recipe, index.uri, out, "job")
    checked = check_request(request)
    start_run(checked.store, recipe, index.uri, checked.catalogue.snapshot_id, checked.origins)
    commit_net(checked.store, recipe, nn.Linear(1, 1), step=1)
    published.write_bytes(b"of another kind")
    assert check_request(request).origins == checked.origins
    published.unlink()
    with pytest.raises(ModelError, match="there is no file of the teacher's weights"):
        check_request(request)
