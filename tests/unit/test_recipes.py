"""The recipes that come along: what they claim in their heads and in docs/recipes.md is what they hold.

Costs are computed here from the shapes of the models, by the rules that docs/recipes.md states, and memory is forecast.
"""

import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import BaseModel

from histoscale.config.archs import ARCHS, Arch
from histoscale.config.decode import decode_recipe, load_recipe
from histoscale.config.recipe import ExtendedContext, RandomResized, Recipe
from histoscale.train.memory import forecast

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))}
LARGE = [name for name in RECIPES if name != "quickstart"]
DOCS = ROOT / "docs" / "recipes.md"
COLUMNS = ("virchow2", "virchow2g", "virchow2g_mini")
TAGS = {"known", "reported", "weak", "DINOv2", "DINO", "Midnight", "OpenMidnight", "nanopath", "computed", "ours"}
PARTS = ("Paper", "Hardware", "Memory", "Cost", "Expect", "Sources")
TEACHERS = {"virchow2g_mini": "virchow2g"}
H100_FLOPS, A100_FLOPS = 989e12, 312e12  # dense bf16, as NVIDIA's data sheets have it


def header(name: str) -> dict[str, str]:
    """The opening comment: label -> text, on one line each."""
    lines = []
    for line in RECIPES[name].read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    text = " ".join(lines)
    labels = list(re.finditer(rf"(?:^| )({'|'.join(PARTS)}): ", text))
    ends = [each.start() for each in labels[1:]] + [len(text)]
    return {each[1]: text[each.end() : end] for each, end in zip(labels, ends, strict=True)}


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Every model that an annotation names, inside unions and tuples, too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_of(part)]


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Path of each leaf field -> its own default, or "required"; all members of a union count."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        nested = models_of(field.annotation)
        for part in nested:
            found = leaves(part, f"{prefix}{name}.") | found
        if not nested:
            found[prefix + name] = "required" if field.is_required() else field.default
    return found


def value_at(node: Any, names: list[str]) -> Any:
    """What a recipe holds at a path; LookupError where it has no such section."""
    if not names:
        return node
    if isinstance(node, tuple):
        return tuple(value_at(entry, names) for entry in node)
    if not isinstance(node, BaseModel) or names[0] not in type(node).model_fields:
        raise LookupError(names[0])
    return value_at(getattr(node, names[0]), names[1:])


def shown(value: Any) -> str:
    """A value as the table has it."""
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, tuple):
        return ", ".join(shown(entry) for entry in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def row_of(path: str, own_default: Any) -> list[str]:
    """The cells of one field: its default, and "=" or another value for each column."""
    names = path.split(".")

    def cell(recipe: Recipe) -> str | None:
        try:
            return shown(value_at(recipe, names))
        except LookupError:
            return None

    default = cell(Recipe()) or shown(own_default)
    recipes = [cell(load_recipe(RECIPES[name])) for name in COLUMNS]
    return [default, *("=" if value in (None, default) else str(value) for value in recipes)]


def block_multiplications(arch: Arch) -> int:
    """Of one token through the matrices of one block."""
    return 4 * arch.width**2 + (3 if arch.ffn == "swiglu" else 2) * arch.width * arch.ffn_hidden


def forward_flop(arch: Arch, side_px: int) -> int:
    """Of one image through a backbone."""
    patches = (side_px // arch.patch_px) ** 2
    tokens = patches + 1 + arch.registers
    blocks = arch.depth * (2 * tokens * block_multiplications(arch) + 4 * tokens**2 * arch.width)
    return blocks + 2 * patches * 3 * arch.patch_px**2 * arch.width


def head_sizes(recipe: Recipe, arch: Arch) -> tuple[int, int]:
    """Multiplications of one token through the DINO and the iBOT head, prototypes included."""
    heads = recipe.heads

    def head(bottleneck: int, prototypes: int) -> int:
        return heads.hidden_dim * (arch.width + heads.hidden_dim + bottleneck) + bottleneck * prototypes

    dino = head(heads.dino_bottleneck_dim, heads.dino_prototypes)
    return dino, dino if heads.shared else head(heads.ibot_bottleneck_dim, heads.ibot_prototypes)


def tile_flop(recipe: Recipe, teacher: Recipe) -> float:
    """Of one tile in a step: the teacher's forward pass, and three times the student's."""
    crops, arch, teacher_arch = recipe.crops, ARCHS[recipe.model.arch], ARCHS[teacher.model.arch]
    patches = (crops.global_px // arch.patch_px) ** 2
    compared = patches * (2.0 if recipe.distill else sum(recipe.loss.mask_ratio) / 2.0)
    (dino, ibot), (teacher_dino, teacher_ibot) = head_sizes(recipe, arch), head_sizes(teacher, teacher_arch)
    student = 2 * forward_flop(arch, crops.global_px) + crops.local_count * forward_flop(arch, crops.local_px)
    heads = 2 * ((2 + crops.local_count) * dino + compared * ibot)
    looked = 2 * forward_flop(teacher_arch, crops.global_px) + 2 * (2 * teacher_dino + compared * teacher_ibot)
    return 3 * ((1 - recipe.model.drop_path) * student + heads) + looked


def parameters(recipe: Recipe) -> int:
    """Matrices and prototypes of backbone and heads; what is left out is a thousandth."""
    arch, heads = ARCHS[recipe.model.arch], head_sizes(recipe, ARCHS[recipe.model.arch])
    return arch.depth * block_multiplications(arch) + (heads[0] if recipe.heads.shared else sum(heads))


def loaded(name: str) -> tuple[Recipe, Recipe]:
    """A recipe, and that of its teacher."""
    return load_recipe(RECIPES[name]), load_recipe(RECIPES[TEACHERS.get(name, name)])


def number(text: str, pattern: str) -> float:
    """The one number that a pattern finds, thousands separated by commas or not."""
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern} in {text}"
    return float(found[0].replace(",", ""))


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_decodes_and_says_what_it_is_for(name: str) -> None:
    recipe, parts = load_recipe(RECIPES[name]), header(name)
    assert recipe.steps > 0
    assert tuple(parts) == PARTS
    assert all(len(text) > 10 for text in parts.values())
    assert max(map(len, RECIPES[name].read_text().splitlines())) <= 140


@pytest.mark.parametrize("name", LARGE)
def test_each_value_names_its_source(name: str) -> None:
    body = [line for line in RECIPES[name].read_text().splitlines() if line and not line.startswith("#")]
    for line in body:
        code, _, comment = line.partition(" # ")
        holds_a_value = not code.rstrip().endswith(":")
        assert not holds_a_value or re.match(r"\[(\w+)\]", comment), f"{line} has no source"
        assert set(re.findall(r"\[([A-Za-z]\w*)\]", comment)) <= TAGS, line


@pytest.mark.parametrize("name", LARGE)
def test_replicas_let_the_workers_change(name: str) -> None:
    recipe, hardware = load_recipe(RECIPES[name]), header(name)["Hardware"]
    batch, cluster = recipe.batch, recipe.cluster
    most = number(hardware, r"(\d+) replicas bear up to \d+ workers") // 4
    assert most == number(hardware, r"bear up to (\d+) workers") == batch.replicas // 4
    assert cluster.workers <= most
    assert batch.replicas % cluster.workers == 0, "some worker would idle"
    assert batch.per_replica >= 8
    block_bytes = batch.chapter_steps * batch.per_replica * recipe.data.region_px**2 * 3
    assert 10e6 < block_bytes < 31e6


@pytest.mark.parametrize("name", LARGE)
def test_durations_end_before_the_run_does(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    images, optim = recipe.schedule.images, recipe.optim
    assert optim.freeze_last_layer_images < optim.warmup_images < 0.2 * images
    assert recipe.loss.teacher_temperature_warmup_images < 0.5 * images


@pytest.mark.parametrize("name", LARGE)
def test_the_rate_is_stated_at_the_recipes_own_batch(name: str) -> None:
    (line,) = [line for line in RECIPES[name].read_text().splitlines() if line.strip().startswith("lr:")]
    recipe = load_recipe(RECIPES[name])
    root = re.search(r"(\d+e-\d) x sqrt\((\d+) / 1024\)", line)
    linear = re.search(r"(\d+e-\d) x (\d+) / 256", line)
    found = root or linear
    assert found, line
    base, tiles = float(found[1]), int(found[2])
    assert tiles == recipe.batch.tiles
    assert recipe.optim.lr == pytest.approx(base * (math.sqrt(tiles / 1024) if root else tiles / 256), rel=1e-5)


@pytest.mark.parametrize("name", LARGE)
def test_durations_in_steps_are_those_in_images(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    for images, kind, count in re.findall(
        r"images: (\d+) # \[\w+\] ([\d,]+) (steps|% of the run)", RECIPES[name].read_text()
    ):
        unit = recipe.batch.tiles if count == "steps" else recipe.schedule.images / 100
        assert int(images) == pytest.approx(float(kind.replace(",", "")) * unit)


@pytest.mark.parametrize("name", LARGE)
def test_cost_and_memory_are_what_the_shapes_give(name: str) -> None:
    recipe, teacher = loaded(name)
    parts, flop = header(name), tile_flop(recipe, teacher)
    assert number(parts["Cost"], r"([\d.]+) TFLOP a tile") == pytest.approx(flop / 1e12, rel=2e-3)
    hours = flop * recipe.schedule.images / (H100_FLOPS * 3600)
    for low, high in re.findall(r"([\d,]+) to ([\d,]+) H100-hours", parts["Cost"]):
        assert float(low.replace(",", "")) == pytest.approx(hours / 0.39, rel=0.02)
        assert float(high.replace(",", "")) == pytest.approx(hours / 0.21, rel=0.02)
    for low, high, gpus in re.findall(r"(\d+) to (\d+) days on (\d+) H100", parts["Cost"]):
        assert [int(low), int(high)] == [round(hours / share / 24 / int(gpus)) for share in (0.39, 0.21)]
    memory = parts["Memory"]
    workers, stage = recipe.cluster.workers, recipe.cluster.zero_stage
    looks = recipe.model_copy(update={"model": teacher.model, "heads": teacher.heads})
    told = forecast(recipe, workers, stage, torch.bfloat16, teacher=looks)
    assert number(memory, r"computed: ([\d.]+) GB a GPU") == pytest.approx(told.total_bytes / 1e9, abs=0.051)
    assert number(memory, r"at (\d+) workers?") == workers


def test_the_two_shares_of_the_peak_come_from_published_runs() -> None:
    dinov2 = decode_recipe({"model": {"arch": "vit_giant14"}})  # ViT-g of 625,000 steps of 3,072 in 22,000 A100-hours
    spent = tile_flop(dinov2, dinov2) * 625_000 * 3072
    assert spent / (22_000 * 3600 * A100_FLOPS) == pytest.approx(0.39, abs=0.005)
    openmidnight, _ = loaded("vit_g14_warm_8gpu")
    spent = tile_flop(openmidnight, openmidnight) * openmidnight.schedule.images
    assert spent / (8 * 83.3 * 3600 * H100_FLOPS) == pytest.approx(0.21, abs=0.005)


def test_virchow2_is_the_papers() -> None:
    recipe = load_recipe(RECIPES["virchow2"])
    mix = {entry.mpp: entry.share for entry in recipe.data.mix}
    assert mix == {0.25: 0.2, 0.5: 0.4, 1.0: 0.2, 2.0: 0.2}
    assert (recipe.batch.tiles, recipe.data.region_px, recipe.data.min_tissue) == (4096, 392, 0.65)
    assert recipe.model.arch == "vit_h14_reg4"
    crops = recipe.crops
    assert (crops.global_px, crops.local_px, crops.local_count) == (224, 98, 8)
    assert crops.window == ExtendedContext(scale=(0.9, 1.1), aspect=(0.95, 1.05))
    loss = recipe.loss
    assert (loss.kde_weight, loss.kde_kappa, loss.koleo_weight) == (0.05, 5.0, 0.0)
    assert recipe.heads.dino_prototypes == recipe.heads.ibot_prototypes == 131072
    assert recipe.augment.solarize_p == 0.2
    assert recipe.augment.hed_p == 0.0
    assert recipe.schedule.images == 2_000_000_000


def test_virchow2g_differs_in_size_batch_and_solarisation_and_mini_is_its_pupil() -> None:
    small, large, mini = (load_recipe(RECIPES[name]) for name in COLUMNS)
    assert large.model.arch == "vit_gigantic14_reg8"
    assert ARCHS[large.model.arch].registers == 8
    assert (large.batch.tiles, large.augment.solarize_p, large.model.qk_norm) == (3072, 0.0, True)
    for section in ("data", "heads", "crops", "loss", "schedule", "stream"):
        assert getattr(small, section) == getattr(large, section) == getattr(mini, section), section
    assert mini.distill is not None
    assert (mini.distill.mode, mini.model.arch, mini.model.drop_path) == ("heads", "vit_s14", 0.0)
    arch = ARCHS["vit_s14"]
    assert (arch.width, arch.registers, arch.layer_scale, arch.ffn) == (384, 0, None, "mlp")


def test_the_ablation_has_patches_of_16_and_its_rows_can_be_set() -> None:
    recipe = load_recipe(RECIPES["vit_b16_ablation"])
    assert (recipe.model.arch, recipe.crops.local_px, recipe.schedule.images) == ("vit_b16", 96, 115_000_000)
    options = re.findall(r"^# {5}\S.*? {2,}(\S.*)$", RECIPES["vit_b16_ablation"].read_text(), re.MULTILINE)
    assert len(options) == 3
    overrides = [option for line in options for option in ([line.strip("'")] if line.startswith("'") else line.split())]
    baseline = load_recipe(RECIPES["vit_b16_ablation"], overrides)
    assert baseline.crops.window == RandomResized()
    assert (baseline.loss.kde_weight, baseline.loss.koleo_weight, baseline.augment.solarize_p) == (0.0, 0.1, 0.0)


def test_warm_starts_name_their_weights_and_regions_grow_with_the_crops() -> None:
    warm, post = load_recipe(RECIPES["vit_g14_warm_8gpu"]), load_recipe(RECIPES["highres_post"])
    assert warm.model.arch == "vit_giant14_reg4"
    assert warm.model.weights is not None
    assert post.model.weights is not None
    assert warm.cluster.workers == 8
    assert (post.crops.global_px, post.crops.local_px) == (392, 168)
    assert post.data.region_px / post.crops.global_px == 392 / 224
    assert load_recipe(RECIPES["vit_s14_one_gpu"]).cluster.workers == 1


def test_quickstart_trains_its_prototypes_and_patches_from_the_first_step() -> None:
    recipe = load_recipe(RECIPES["quickstart"])
    assert (recipe.optim.freeze_last_layer_images, recipe.optim.patch_embed_lr) == (0, 1.0)


def table() -> dict[str, list[str]]:
    """The rows of the table of fields: name -> the other cells; a name that stands twice fails."""
    rows: dict[str, list[str]] = {}
    for line in DOCS.read_text().splitlines():
        if (cells := re.match(r"\| `([a-z_.0-9]+)` \|(.*)\|$", line)) and line.count("|") == 7:
            assert cells[1] not in rows, f"{cells[1]} stands twice"
            rows[cells[1]] = [cell.strip() for cell in cells[2].split(" | ")]
    return rows


def test_the_table_has_each_field_once_with_its_values_and_source() -> None:
    fields, rows = leaves(Recipe), table()
    assert sorted(rows) == sorted(fields)
    assert {"crops.window.global_scale", "crops.window.scale", "distill.teacher", "data.mix.mpp"} <= set(rows)
    for path, own_default in fields.items():
        *values, source = rows[path]
        assert values == row_of(path, own_default), path
        assert re.match(r"(\[\w+\] ?)+\S*", source), f"{path} has no source"
        assert set(re.findall(r"\[([A-Za-z]\w*)\]", source)) <= TAGS, path


def test_the_page_names_each_recipe_and_the_readme_links_it() -> None:
    text = DOCS.read_text()
    for name in RECIPES:
        assert f"`{name}.yaml`" in text
    assert all(f"[{tag}]" in text for tag in TAGS)
    assert "docs/recipes.md" in (ROOT / "README.md").read_text()


def test_recipes_are_plain_yaml() -> None:
    for path in RECIPES.values():
        assert isinstance(yaml.safe_load(path.read_text()), dict)
