"""Damaged small files of a run end in a diagnosis, or say something of the same form: never in another error."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.unit.test_fuzz_index import mutated

from histoscale.checkpoint.ledger import StepRecord, encode_ledger, ledger_key, read_history, read_replacements
from histoscale.checkpoint.run_record import (
    INDEX_KEY,
    ORIGINS_KEY,
    RECIPE_KEY,
    recorded_index,
    recorded_origins,
)
from histoscale.cluster.run_folder import read_run, recorded_snapshot, start_run
from histoscale.config.decode import decode_recipe, dump_recipe, recorded_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError, HistoscaleError, RecipeError, RunError
from histoscale.storage import Store, open_store
from histoscale.storage.json_object import count_of, decode_json, read_json, text_of
from histoscale.stream.faults import Fault

CASES = 1200
STEPS = 4
LEDGER = ledger_key(0, STEPS)
RECIPE = decode_recipe({"precision": "fp32", "batch": {"tiles": 64, "replicas": 4}})
ORIGINS = ["teacher: a run", "weights: a file"]


@pytest.fixture
def run(tmp_path: Path) -> Store:
    store = open_store(tmp_path)
    start_run(store, RECIPE, "/index", "abc", ORIGINS)
    faults = (Fault(17, 0, "b" * 32, "blur", False), Fault(17, 1, "a" * 32, "background", False))
    records = [StepRecord(step, ((step * 16, 16),), faults if step == 1 else ()) for step in range(STEPS)]
    store.put(LEDGER, encode_ledger(records))
    return store


def ledger(store: Store) -> object:
    return list(read_history(store, STEPS)), list(read_replacements(store, STEPS))


READERS: dict[str, tuple[Callable[[Store], object], type[HistoscaleError]]] = {
    RECIPE_KEY: (read_run, RecipeError),
    INDEX_KEY: (recorded_index, RunError),
    ORIGINS_KEY: (recorded_origins, RunError),
    LEDGER: (ledger, CheckpointError),
}


def form_of(value: object) -> object:
    """The types of what was read: those of the elements for a list, and for a tuple those of each place."""
    if isinstance(value, list):
        return list, frozenset(form_of(each) for each in value)
    return (tuple, tuple(form_of(each) for each in value)) if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize("key", READERS)
def test_damaged_files_are_refused_or_have_the_same_form(run: Store, key: str) -> None:
    read, kind = READERS[key]
    original, expected = run.get(key), read(run)
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(CASES if key != RECIPE_KEY else CASES // 8):
        refusal: HistoscaleError | None = None
        run.put(key, mutated(original, rng))
        try:
            found = read(run)
        except HistoscaleError as error:
            refusal = error
            refused += 1
        else:
            assert found == expected or form_of(found) == form_of(expected)
        assert refusal is None or (isinstance(refusal, kind) and refusal.remedy)
    assert refused > 10
    run.put(key, original)
    assert read(run) == expected


@pytest.mark.parametrize("key", READERS)
def test_files_that_were_cut_short_are_refused(run: Store, key: str) -> None:
    read, kind = READERS[key]
    original = run.get(key)
    at = range(0, len(original) - 1, 7) if key != RECIPE_KEY else range(0, original.index(b"\ncluster:"), 97)
    for stop in at:
        run.put(key, original[:stop])
        with pytest.raises(kind):
            read(run)


def test_a_recipe_that_was_cut_between_two_sections_is_no_recipe_of_defaults() -> None:
    data = dump_recipe(Recipe()).encode()
    assert recorded_recipe(data, "recipe.yaml") == Recipe()
    with pytest.raises(RecipeError, match=r"recipe.yaml is incomplete \(got 'no cluster'; .*\)\. Restore the file as"):
        recorded_recipe(data[: data.index(b"cluster:")], "recipe.yaml")
    with pytest.raises(RecipeError, match=r"is not valid YAML.*Restore the file as"):
        recorded_recipe(b"seed: \xff", "recipe.yaml")


def test_the_diagnosis_names_file_and_damage(run: Store) -> None:
    assert recorded_snapshot(run) == "abc"
    run.put(INDEX_KEY, b"{}")
    with pytest.raises(
        RunError, match=r"index.json of run /.* is damaged \(got 'JSON of another form'; expected .*index"
    ):
        recorded_snapshot(run)
    run.put(ORIGINS_KEY, b'{"a": 1}')
    with pytest.raises(RunError, match="a list of lines"):
        recorded_origins(run)
    lines = run.get(LEDGER).splitlines(keepends=True)
    run.put(LEDGER, b"".join([*lines[:2], lines[2].replace(b"[32, 16]", b"[32, 1\xff]"), lines[3]]))
    with pytest.raises(
        CheckpointError, match=r"line 3 of ledger/.* is damaged \(got 'no JSON in .* bytes'.*Restore it"
    ):
        list(read_history(run, STEPS))


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 0, "samples": [[0, 16]], "replaced": [[16, 0, "a", "blur"]]}',
        b'{"step": 0, "samples": [[0, 16]], "replaced": [[3, 33, "a", "blur"]]}',
        b'{"step": 0, "samples": [[0, 16]], "replaced": [[3, 0, 5, "blur"]]}',
        b'{"step": 0, "samples": [[0, 99999999999999999999]]}',
        b'{"step": 0, "samples": [[-1, 16]]}',
        b'{"step": true, "samples": [[0, 16]]}',
        b'{"step": 0, "samples": [[0.0, 16]]}',
        b'{"step": 0, "samples": [[0]]}',
        b'{"step": 0, "samples": [[0, 16]], "seplaced": [[3, 0, "a", "blur"]]}',
        b'{"step": 0}',
        b"[]",
        b"",
    ],
)
def test_lines_that_no_run_writes_are_damaged(run: Store, line: bytes) -> None:
    run.put(LEDGER, b"\n".join([line, *run.get(LEDGER).splitlines()[1:]]))
    with pytest.raises(CheckpointError, match=r"line 1 of ledger/step-00000000-00000004\.jsonl is damaged"):
        ledger(run)


def test_nothing_of_the_text_is_in_the_diagnosis(run: Store) -> None:
    words = {"kind": RunError, "what": "x is damaged", "expected": "y", "remedy": "restore it"}
    for data in (b'{"S24', b'["S24"]', b"[" * 100_000):
        with pytest.raises(RunError, match="x is damaged") as caught:
            decode_json(data, lambda values: count_of(values["S24"]), **words)
        assert "S24" not in str(caught.value)
    assert decode_json(b'{"S24": 1}', lambda values: count_of(values["S24"]), **words) == 1
    run.put("one", b'"S24"')
    assert read_json(run, "one", text_of, **words) == "S24"
