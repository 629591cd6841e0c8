"""Students of a frozen teacher against plain loops, at any world size and ZeRO stage, alone and in a group."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import workers
from plain_reference import (
    copy_of,
    dino,
    half_cosine,
    ibot,
    kde,
    learning_rate,
    logits_of,
    rate_factor,
    relative_distance,
    textbook_sinkhorn,
    tiles_of,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from workers import TILES_PER_STEP, flat, launch, tiny_recipe, train, turns

from histoscale.augment import augment
from histoscale.checkpoint.reader import latest_commit, load_teacher
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.errors import HistoscaleError
from histoscale.models import VisionTransformer, build_ssl_net
from histoscale.models.feature_net import build_feature_net
from histoscale.models.weights import initialise
from histoscale.storage import open_store

STEPS = 3
TOLERANCE = 1e-5
FINE_ARCH = replace(workers.LIVELY_ARCH, patch_px=7, width=48, heads=3)  # of the teacher of features, and of a student
OTHER_ARCH = replace(workers.LIVELY_ARCH, depth=1, width=48, heads=3)

pytestmark = pytest.mark.timeout(600)

Terms = dict[str, Tensor]


def student_recipe(distill: dict[str, Any], arch: str = "vit_test14", **cluster: int) -> Recipe:
    recipe = tiny_recipe(**cluster).model_dump()
    recipe["seed"] = 8
    recipe["model"] |= {"arch": arch, "drop_path": 0.0}
    recipe["heads"] |= {"hidden_dim": 40, "dino_bottleneck_dim": 12, "ibot_bottleneck_dim": 20}
    recipe["distill"] = distill
    if distill.get("mode") == "features":
        recipe["crops"]["local_count"] = 0
    return Recipe.model_validate(recipe)


def heads_recipe(folder: Path, **keywords: Any) -> Recipe:
    return student_recipe({"teacher": str(folder / "teacher")}, **keywords)


def features_recipe(folder: Path, **keywords: Any) -> Recipe:
    distill = {"mode": "features", "arch": "vit_fine", "licence": "ours", "cls_weight": 0.5, "patch_weight": 2.0}
    return student_recipe(distill | {"teacher": str(folder / "teacher.safetensors")}, **keywords)


def feature_teacher() -> VisionTransformer:
    net = VisionTransformer(FINE_ARCH, 42)
    initialise(net, seed=1)
    return net.eval()


def two(rank: int, folder: Path) -> None:
    """A teacher's run, and students of both modes under each ZeRO stage; what one of them left after two steps."""
    from histoscale.cluster.run_folder import start_run

    ARCHS["vit_fine"] = FINE_ARCH
    train(rank, tiny_recipe(zero_stage=1), folder / "teacher", 2)
    if rank == 0:
        start_run(open_store(folder / "teacher"), tiny_recipe(), "/index", "snapshot")
        save_file(copy_of(feature_teacher()), folder / "teacher.safetensors")
    dist.barrier()
    for stage in (1, 2, 3):
        run = folder / f"heads-2-{stage}"
        train(rank, heads_recipe(folder, zero_stage=stage), run, 2)
        if rank == 0 and stage == 3:
            shutil.copytree(run, folder / "halfway")
        train(rank, heads_recipe(folder, zero_stage=stage), run, STEPS)
    train(rank, features_recipe(folder, zero_stage=3), folder / "features-2-3", STEPS)


def one(rank: int, folder: Path) -> None:
    """The same in one process, the run that two left, groups of students, and a teacher that has moved on."""
    ARCHS["vit_fine"], ARCHS["vit_other"] = FINE_ARCH, OTHER_ARCH
    train(rank, heads_recipe(folder, zero_stage=2), folder / "heads-1-2", STEPS)
    train(rank, heads_recipe(folder, zero_stage=1), folder / "halfway", STEPS)
    train(rank, features_recipe(folder, zero_stage=2), folder / "features-1-2", STEPS)
    bf16 = features_recipe(folder, zero_stage=2).model_copy(update={"precision": "bf16"})
    train(rank, bf16, folder / "features-bf16", STEPS)
    train(rank, features_recipe(folder, arch="vit_fine", zero_stage=2), folder / "features-fine", STEPS)
    train(rank, heads_recipe(folder, arch="vit_other", zero_stage=2), folder / "heads-other", STEPS)
    report = group_of_heads(folder) | group_of_features(folder) | lagging_group(folder)
    train(rank, tiny_recipe(zero_stage=1), folder / "teacher", 3)
    report["moved on"] = error_of(lambda: train(rank, heads_recipe(folder), folder / "heads-1-2", STEPS + 1))
    (folder / "report.json").write_text(json.dumps(report))


def group_of_heads(folder: Path) -> dict[str, Any]:
    """Two students of the run, beside each other; metrics, how often the teacher looked, and whether it changed."""
    from histoscale.train.distill import HeadsTeacher
    from histoscale.train.students import build_students

    calls: list[int] = []
    look = HeadsTeacher.__call__

    def counted(self: HeadsTeacher, global_crops: Tensor, mask: Tensor) -> dict[str, Tensor]:
        calls.append(len(mask))
        return look(self, global_crops, mask)

    recipes = [heads_recipe(folder, arch=arch, zero_stage=2) for arch in ("vit_test14", "vit_other")]
    stores = [open_store(folder / f"group-heads-{number}") for number in range(2)]
    HeadsTeacher.__call__ = counted  # type: ignore[method-assign]
    group = build_students(recipes, torch.device("cpu"), stores)
    start = group.resume()
    teacher: nn.Module = group.trainers[0].objective._teacher.network  # type: ignore[attr-defined]
    before = copy.deepcopy(teacher.state_dict())
    metrics = [group.step(step, turns(recipes[0], 0, step)) for step in range(STEPS)]
    group.save(STEPS)
    HeadsTeacher.__call__ = look  # type: ignore[method-assign]
    return {
        "heads": [[flat(each) for each in step] for step in metrics],
        "calls": calls,
        "from": start,
        "unchanged": all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items()),
        "again": error_of(lambda: group.step(STEPS - 1, turns(recipes[0], 0, STEPS - 1))),
    }


def group_of_features(folder: Path) -> dict[str, Any]:
    """Two students of the file, with grids of their own."""
    from histoscale.train.students import build_students

    recipes = [features_recipe(folder, arch=arch, zero_stage=2) for arch in ("vit_test14", "vit_fine")]
    stores = [open_store(folder / f"group-features-{number}") for number in range(2)]
    group = build_students(recipes, torch.device("cpu"), stores)
    metrics = [group.step(step, turns(recipes[0], 0, step)) for step in range(STEPS)]
    return {"features": [[flat(each) for each in step] for step in metrics]}


def lagging_group(folder: Path) -> dict[str, Any]:
    """A group that ended between the commits of its students: the one behind catches up."""
    from histoscale.train.students import build_students

    recipes = [heads_recipe(folder, arch=arch, zero_stage=2) for arch in ("vit_test14", "vit_other")]
    stores = [open_store(folder / "group-heads-0"), open_store(folder / "lagging")]
    train(0, recipes[1], folder / "lagging", STEPS - 1)
    group = build_students(recipes, torch.device("cpu"), stores)
    start = group.resume()
    taken = [group.step(step, turns(recipes[0], 0, step)) for step in range(start, STEPS + 1)]
    group.save(STEPS + 1)
    return {"lagging": [[each and each.loss for each in step] for step in taken], "lagging from": start}


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except HistoscaleError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    launch(two, 2, folder)
    shutil.copytree(folder / "teacher", folder / "teacher-before")
    launch(one, 1, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def archs() -> Any:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "vit_test14", workers.LIVELY_ARCH)
        patch.setitem(ARCHS, "vit_fine", FINE_ARCH)
        patch.setitem(ARCHS, "vit_other", OTHER_ARCH)
        yield


def run_oracle(
    recipe: Recipe, student: nn.Module, terms_of: Callable[[int, int], list[Terms]], weights: dict[str, float]
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Plain AdamW and a plain average over a few steps; `terms_of` gives each replica's terms, its graph alive."""
    average = copy_of(student)
    groups = [{"params": [parameter], "name": name} for name, parameter in student.named_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas)
    curve = []
    for step in range(STEPS):
        images = (step + 1) * TILES_PER_STEP
        replicas = terms_of(step, images)
        means = {name: sum(each[name] for each in replicas) / len(replicas) for name in weights}
        loss = sum(weights[name] * means[name] for name in weights)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), recipe.optim.clip_norm)
        curve.append({name: float(value.detach()) for name, value in means.items()} | {"grad_norm": float(norm)})
        for group in optimizer.param_groups:
            decay = half_cosine(*recipe.optim.weight_decay, images, recipe)
            group["weight_decay"] = decay if group["params"][0].ndim >= 2 else 0.0
            group["lr"] = learning_rate(recipe, images) * rate_factor(recipe, group["name"], images)
        optimizer.step()
        optimizer.zero_grad()
        momentum = half_cosine(*recipe.optim.ema_momentum, images, recipe)
        for name, weight in copy_of(student).items():
            average[name] = momentum * average[name] + (1.0 - momentum) * weight
    return curve, average


@pytest.fixture(scope="module")
def heads_oracle(runs: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    recipe, teacher = heads_recipe(runs), build_ssl_net(tiny_recipe()).eval()
    store = open_store(runs / "teacher-before")
    teacher.load_state_dict(load_teacher(store, latest_commit(store)))
    student = build_ssl_net(recipe)

    def terms_of(step: int, images: int) -> list[Terms]:
        start, end = recipe.loss.teacher_temperature
        temperature = start + (end - start) * min(images / recipe.loss.teacher_temperature_warmup_images, 1.0)
        replicas = [tiles_of(recipe, step, replica) for replica in range(recipe.batch.replicas)]
        views = [augment(torch.from_numpy(each.tiles), each.sample_ids, recipe) for each in replicas]
        everything = torch.ones(2 * recipe.batch.per_replica, 9, dtype=torch.bool)
        with torch.no_grad():
            seen = [logits_of(teacher, view.global_crops, None, everything, False) for view in views]
        parts = {
            name: textbook_sinkhorn(recipe, torch.cat([each[name] for each in seen]), temperature).chunk(len(views))
            for name in ("dino", "ibot")
        }
        made = []
        for number, view in enumerate(views):
            out = logits_of(student, view.global_crops, view.local_crops, everything, False)
            made.append(
                {
                    "dino": dino(recipe, out["dino"], parts["dino"][number]),
                    "ibot": ibot(recipe, out["ibot"], parts["ibot"][number], everything),
                    "kde": sum(kde(recipe, crop) for crop in out["cls"].chunk(2)),
                }
            )
        return made

    loss = recipe.loss
    weights = {"dino": loss.dino_weight, "ibot": loss.ibot_weight, "kde": loss.kde_weight}
    return run_oracle(recipe, student, terms_of, weights)


@pytest.fixture(scope="module")
def features_oracle(runs: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    recipe, teacher = features_recipe(runs), feature_teacher()
    student = build_feature_net(recipe, FINE_ARCH.width)
    prefix = 2  # class token and register

    def terms_of(step: int, images: int) -> list[Terms]:
        made = []
        for replica in range(recipe.batch.replicas):
            tiles = tiles_of(recipe, step, replica)
            crops = augment(torch.from_numpy(tiles.tiles), tiles.sample_ids, recipe).global_crops
            cls, patches = [], []
            for crop in crops:
                with torch.no_grad():
                    seen = teacher(crop[None])[0]
                plane = seen[prefix:].reshape(6, 6, -1).permute(2, 0, 1)[None]
                wanted = F.interpolate(plane, size=(3, 3), mode="bicubic", antialias=True)[0]
                tokens = student.backbone(crop[None])[0]
                cls.append(1 - cosine(student.cls_projector(tokens[0]), seen[0]))
                for row in range(3):
                    for column in range(3):
                        ours = student.patch_projector(tokens[prefix + 3 * row + column])
                        patches.append(1 - cosine(ours, wanted[:, row, column]))
            made.append({"cls": torch.stack(cls).mean(), "patch": torch.stack(patches).mean()})
        return made

    return run_oracle(recipe, student, terms_of, {"cls": 0.5, "patch": 2.0})


def cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours @ theirs) / (ours.square().sum().sqrt() * theirs.square().sum().sqrt())


def metrics_of(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    parts = sorted(run.glob(f"metrics-*-rank-{rank}.json"))
    return [step for part in parts for step in json.loads(part.read_text())]


def average_of(run: Path) -> dict[str, Tensor]:
    store = open_store(run)
    commit = latest_commit(store)
    assert commit is not None
    return load_teacher(store, commit)


@pytest.mark.parametrize(
    ("mode", "case"),
    [("heads", "2-1"), ("heads", "2-2"), ("heads", "2-3"), ("heads", "1-2"), ("features", "2-3"), ("features", "1-2")],
)
def test_students_equal_plain_loops_at_any_world_size(
    runs: Path, mode: str, case: str, request: pytest.FixtureRequest
) -> None:
    curve, average = request.getfixturevalue(f"{mode}_oracle")
    metrics = metrics_of(runs / f"{mode}-{case}")
    for name in curve[0]:
        assert [step[name] for step in metrics] == pytest.approx([step[name] for step in curve], rel=TOLERANCE), name
    assert relative_distance(average_of(runs / f"{mode}-{case}"), average) < TOLERANCE


@pytest.mark.parametrize("mode", ["heads", "features"])
def test_the_average_of_the_student_is_committed_and_has_moved(
    runs: Path, mode: str, request: pytest.FixtureRequest
) -> None:
    recipe = heads_recipe(runs) if mode == "heads" else features_recipe(runs)
    net = build_ssl_net(recipe) if mode == "heads" else build_feature_net(recipe, FINE_ARCH.width)
    curve, average = request.getfixturevalue(f"{mode}_oracle")
    assert relative_distance(copy_of(net), average) > 5e-3
    assert all(curve[-1][name] < curve[0][name] for name in curve[0])


def test_a_run_goes_on_with_its_teacher_at_another_world_size(runs: Path) -> None:
    whole = metrics_of(runs / "heads-1-2")
    assert [step["step"] for step in metrics_of(runs / "halfway")] == list(range(STEPS))
    for name in ("loss", "grad_norm"):
        expected = [step[name] for step in whole]
        assert [step[name] for step in metrics_of(runs / "halfway")] == pytest.approx(expected, rel=TOLERANCE)


def test_commits_name_their_teacher_and_another_one_is_refused(runs: Path) -> None:
    before = latest_commit(open_store(runs / "teacher-before"))
    commit = latest_commit(open_store(runs / "heads-1-2"))
    assert commit is not None
    assert before is not None
    assert commit.teacher == f"{before.fingerprint}@2:{before.manifest_crc32:08x}"
    error = json.loads((runs / "report.json").read_text())["moved on"]
    assert error.startswith("CheckpointError: the checkpoint of step 3 is a student of another teacher")
    assert "@3:" in error
    assert "distil from a finished one" in error


def test_a_group_equals_its_students_alone_and_the_teacher_looks_once(runs: Path) -> None:
    report = json.loads((runs / "report.json").read_text())
    assert report["from"] == 0
    assert report["unchanged"]
    assert report["calls"] == [6] * (STEPS * 4)
    assert report["again"].startswith(
        "TrainingError: every student has taken this step (got 2; expected step 3). Begin"
    )
    for mode, alone in (("heads", ("heads-1-2", "heads-other")), ("features", ("features-1-2", "features-fine"))):
        for number, name in enumerate(alone):
            expected = metrics_of(runs / name)
            for step, metrics in enumerate(report[mode]):
                assert metrics[number] == pytest.approx(expected[step], rel=1e-6), (mode, name, step)
    assert report["heads"][1][0]["dino"] != pytest.approx(report["heads"][1][1]["dino"], rel=1e-4)


def test_a_student_that_is_ahead_waits_for_the_others(runs: Path) -> None:
    report = json.loads((runs / "report.json").read_text())
    assert report["lagging from"] == STEPS - 1
    (ahead, behind), (next_ahead, next_behind) = report["lagging"]
    assert ahead is None
    assert behind == pytest.approx(metrics_of(runs / "heads-other")[STEPS - 1]["loss"], rel=1e-6)
    assert next_ahead is not None
    assert next_behind is not None
    for name in ("group-heads-0", "lagging"):
        commit = latest_commit(open_store(runs / name))
        assert commit is not None
        assert commit.step == STEPS + 1


def test_students_tell_of_their_health_what_makes_sense(runs: Path) -> None:
    heads, features = metrics_of(runs / "heads-1-2")[0], metrics_of(runs / "features-1-2")[0]
    of_all = {"health/effective_rank", "optim/update_norm", "optim/ema_distance", "loss_by_mpp/0.5"}
    assert of_all <= heads.keys() & features.keys()
    assert {"health/target_entropy", "health/prototype_use"} <= heads.keys()
    assert not {"health/target_entropy", "health/prototype_use"} & features.keys()
    for step in metrics_of(runs / "features-1-2"):
        scales = [step[f"loss_by_mpp/{mpp}"] for mpp in ("0.25", "0.5", "1", "2")]
        assert sum(scales) / 4 == pytest.approx(step["cls"], rel=1e-5), "twelve tiles, three of each scale"


def test_bf16_follows_fp32(runs: Path) -> None:
    fp32, bf16 = metrics_of(runs / "features-1-2"), metrics_of(runs / "features-bf16")
    for name in ("cls", "patch"):
        assert [step[name] for step in bf16] == pytest.approx([step[name] for step in fp32], rel=0.05)
        assert [step[name] for step in bf16] != [step[name] for step in fp32]
