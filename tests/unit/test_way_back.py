"""The command that takes a run back to before its trouble."""

import shlex

from histoscale.cluster.fork import fork_source
from histoscale.cluster.way_back import way_back
from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe

RECIPE = Recipe.model_validate({"seed": 7, "batch": {"tiles": 64, "replicas": 8}, "schedule": {"images": 64_000}})


def test_it_forks_from_the_newest_checkpoint_of_before_under_another_seed_for_what_is_left() -> None:
    said = way_back(RECIPE, "s3://bucket/run", "/index", [100, 200, 300], since=299)
    command = shlex.split(said.split(": ", 1)[1].split(" (")[0])
    assert command[:2] == ["python", "jobs/pretrain.py"]
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert options["--index"] == "/index"
    source = fork_source(options["--fork-from"])
    assert (source.uri, source.step) == ("s3://bucket/run", 200)
    overrides = [value for name, value in zip(command[2::2], command[3::2], strict=True) if name == "--set"]
    forked = decode_recipe(RECIPE.model_dump(mode="json"), overrides)
    assert forked.seed != RECIPE.seed
    assert forked.steps == RECIPE.steps - 200


def test_a_checkpoint_at_the_first_step_of_the_trouble_holds_none_of_it() -> None:
    assert "/run@300" in way_back(RECIPE, "/run", "/index", [300, 301], since=300)


def test_it_says_where_no_checkpoint_of_before_is_left() -> None:
    assert "keep_every_steps" in way_back(RECIPE, "/run", "/index", [300], since=299)
