from pathlib import Path
from typing import Any

import pytest

from histoscale.config.decode import (
    decode_recipe,
    differences,
    dump_recipe,
    fingerprint,
    load_recipe,
    parse_yaml,
)
from histoscale.config.recipe import ExtendedContext, RandomResized, Recipe
from histoscale.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_along_are_valid(path: Path) -> None:
    assert load_recipe(path).steps > 0


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = decode_recipe({"seed": 3, "batch": {"tiles": 64, "replicas": 4}})
    assert decode_recipe(parse_yaml(dump_recipe(recipe), "test")) == recipe


def test_ranges_and_balance_read_back_as_themselves() -> None:
    data = {
        "mix": [{"mpp": [0.25, 1.0], "share": 1}, {"mpp": 0.5, "share": 2}],
        "balance": ["site", "stain"],
        "temperature": 2.0,
        "weights": {"stain": {"IHC": 0}},
        "max_tiles_per_slide": 900,
    }
    recipe = decode_recipe({"data": data})
    assert [entry.mpp for entry in recipe.data.mix] == [(0.25, 1.0), 0.5]
    assert recipe.data.weights == {"stain": {"IHC": 0.0}}
    assert decode_recipe(parse_yaml(dump_recipe(recipe), "test")) == recipe


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("{kind: random_resized, local_scale: [0.05, 0.4]}", RandomResized(local_scale=(0.05, 0.4))),
        ("{kind: extended_context, scale_of: area}", ExtendedContext(scale_of="area")),
        ("{kind: extended_context}", ExtendedContext()),
    ],
)
def test_both_kinds_of_window_are_read_from_yaml(text: str, window: ExtendedContext | RandomResized) -> None:
    recipe = decode_recipe(parse_yaml(f"crops: {{poses: flips, window: {text}}}", "test"))
    assert (recipe.crops.window, recipe.crops.poses) == (window, "flips")
    assert decode_recipe(parse_yaml(dump_recipe(recipe), "test")) == recipe


def test_a_scale_of_the_area_bounds_the_window_by_its_root_and_a_share_of_the_region_always_fits() -> None:
    def crops_in(region_px: int, window: dict[str, Any]) -> Recipe:
        return decode_recipe({"data": {"region_px": region_px}, "crops": {"window": window}})

    # 224 px times sqrt(1 / 0.95), for the aspect, are 229.8 px; by a scale of 1.44 they become 330.9 or 275.8 px.
    extended = {"kind": "extended_context", "scale": [1.0, 1.44]}
    assert crops_in(331, extended).data.region_px == 331
    with pytest.raises(RecipeError, match=r"global_px of up to 330\.9 px must fit in data.region_px, got 330"):
        crops_in(330, extended)
    assert crops_in(276, extended | {"scale_of": "area"}).data.region_px == 276
    with pytest.raises(RecipeError, match=r"global_px of up to 275\.8 px must fit in data.region_px, got 275"):
        crops_in(275, extended | {"scale_of": "area"})
    assert crops_in(64, {"kind": "random_resized"}).data.region_px == 64


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 1  # type: ignore[misc]


def test_every_problem_of_a_file_is_reported_at_once_with_the_nearest_name() -> None:
    values = {"modle": {}, "model": {"arhc": "x"}, "data": {"mix": [{"mp": 1, "mpp": 0.5, "share": 0}]}, "seed": "x"}
    with pytest.raises(RecipeError) as caught:
        decode_recipe(values, source="my.yaml")
    text = str(caught.value)
    assert text.startswith("my.yaml has 5 problems: ")
    assert "modle is not a field (nearest: model)" in text
    assert "model.arhc is not a field (nearest: model.arch)" in text
    assert "data.mix.0.mp is not a field (nearest: data.mix.0.mpp)" in text
    assert "data.mix.0.share = 0: input should be greater than 0" in text
    assert "seed = 'x'" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": {"tiles": 10, "replicas": 4}}, "replicas must divide tiles"),
        ({"batch": {"tiles": 4, "replicas": 4}}, "two tiles or more"),
        ({"batch": {"chapter_steps": 3, "tiles_per_visit": 2}}, "tiles_per_visit must divide chapter_steps"),
        ({"model": {"arch": "vit_xxl"}}, "arch must be one of"),
        ({"crops": {"window": {"kind": "extended_context", "scale": [1.2, 0.9]}}}, r"scale must be \(low, high\)"),
        ({"crops": {"window": {"kind": "extended_context", "aspect": [2, 1]}}}, r"aspect must be \(low, high\)"),
        ({"crops": {"window": {"kind": "random_resized", "global_scale": [1, 0.3]}}}, "global_scale must be"),
        ({"crops": {"window": {"kind": "random_resized", "local_scale": [0.3, 0.1]}}}, "local_scale must be"),
        ({"crops": {"window": {"kind": "random_resized", "scale": [0.9, 1.1]}}}, "scale is not a field"),
        ({"crops": {"window": {"kind": "centre"}}}, "'extended_context', 'random_resized'"),
        ({"model": {"weights": "dinov2.pth"}}, "weights must be an absolute path or an s3:// URI"),
        ({"crops": {"window": 3}}, "'extended_context', 'random_resized'"),
        ({"crops": {"window": {"kind": "random_resized", "local_scal": [0, 1]}}}, "nearest: .*local_scale"),
        ({"crops": {"poses": "turns"}}, "crops.poses = 'turns'"),
        ({"augment": {"hed_p": 1.5}}, "augment.hed_p = 1.5"),
        ({"augment": {"hed_strength": -0.1}}, "augment.hed_strength = -0.1"),
        ({"crops": {"global_px": 100}}, "multiple of the patch"),
        ({"data": {"region_px": 224}}, "crops.global_px of up to .* must fit in data.region_px"),
        ({"crops": {"local_px": 392}}, "crops.local_px of up to .* must fit in data.region_px"),
        ({"data": {"mix": [{"mpp": 1, "share": 1}, {"mpp": 1, "share": 2}]}}, "each mpp may stand once"),
        ({"data": {"mix": []}}, "at least 1 item"),
        ({"data": {"mix": [{"mpp": [1, 0.5], "share": 1}]}}, r"mix\.0: a range of mpp must be \[finest, coarsest\]"),
        ({"data": {"mix": [{"mpp": [0.5, 0.5], "share": 1}]}}, r"a range of mpp must be \[finest, coarsest\]"),
        ({"data": {"mix": [{"mpp": [0.5, 30], "share": 1}]}}, r"mix\.0\.mpp\.range\.1 = 30: input should be less than"),
        ({"data": {"mix": [{"mpp": [0.5], "share": 1}]}}, r"mix\.0\.mpp\.range\.1 = .*field required"),
        ({"data": {"mix": [{"mpp": "x", "share": 1}]}}, r"mix\.0\.mpp\.scale = 'x'"),
        ({"data": {"mix": [{"mpp": [0.5, 1], "share": 1}] * 2}}, "each mpp may stand once"),
        ({"data": {"temperature": 0}}, "data.temperature = 0: input should be greater than 0"),
        ({"data": {"weights": {"site": {"A": -1}}}}, "data.weights.site.A = -1"),
        ({"data": {"max_tiles_per_slide": 0}}, "data.max_tiles_per_slide = 0"),
        ({"loss": {"mask_ratio": [0.5, 0.1]}}, "mask_ratio must be"),
        ({"schedule": {"images": 5}}, "must hold one step"),
        ({"batch": {"tiles": 64, "replicas": 4}, "cluster": {"workers": 5}}, "must not exceed batch.replicas"),
        ({"optim": {"lr": float("nan")}}, "finite"),
        ({"optim": {"betas": [1.0, 0.9]}}, "less than 1"),
        ({"cluster": {"zero_stage": 4}}, "cluster.zero_stage = 4"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        decode_recipe(values)


def test_overrides_are_typed_like_the_file() -> None:
    window = "crops.window.scale=[0.8, 1.0]"
    recipe = decode_recipe({}, ["model.arch=vit_s14", "loss.kde_weight=0", window])
    assert (recipe.model.arch, recipe.loss.kde_weight) == ("vit_s14", 0.0)
    assert recipe.crops.window == ExtendedContext(scale=(0.8, 1.0))


@pytest.mark.parametrize("override", ["model.arch", "=3", "model..arch=1", "seed.x=1", "seed={", "seed=2024-13-45"])
def test_overrides_that_cannot_be_read_are_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="override"):
        decode_recipe({"seed": 1}, [override])


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_yaml("a: [", "x")
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_yaml("seed: 2024-13-45", "x")
    with pytest.raises(RecipeError, match=r"seed = datetime\.date"):
        decode_recipe(parse_yaml("seed: 2024-01-02", "x"))
    with pytest.raises(RecipeError, match="is not a recipe"):
        parse_yaml("- 1", "x")


def test_the_fingerprint_names_the_experiment_and_not_the_hardware() -> None:
    base = decode_recipe({})
    assert fingerprint(base) == fingerprint(decode_recipe({}, ["cluster.workers=7", "cluster.zero_stage=3"]))
    changed = decode_recipe({}, ["optim.lr=0.001", "cluster.workers=7"])
    assert fingerprint(base) != fingerprint(changed)
    assert differences(changed, base) == ["optim.lr: 0.001 != 0.00035"]
