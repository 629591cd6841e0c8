"""What a run records of the code that trains it."""

import io
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from histoscale.cluster import provenance
from histoscale.cluster.provenance import git_state, record_provenance, source_archive
from histoscale.storage import open_store


def write(folder: Path, text: str) -> Path:
    (folder / "part").mkdir(parents=True, exist_ok=True)
    (folder / "part" / "a.py").write_text(text)
    (folder / "notes.txt").write_text("no source")
    return folder


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_the_source_is_kept_whole_and_named_by_its_content(tmp_path: Path) -> None:
    package = write(tmp_path / "histoscale", "x = 1\n")
    archive, digest = source_archive(package)
    with zipfile.ZipFile(io.BytesIO(archive)) as kept:
        assert kept.namelist() == ["histoscale/part/a.py"]
        assert kept.read("histoscale/part/a.py") == b"x = 1\n"
    assert source_archive(package) == (archive, digest)
    assert source_archive(write(package, "x = 2\n"))[1] != digest


def test_a_run_records_each_different_code_once(tmp_path: Path) -> None:
    store, package = open_store(tmp_path / "run"), write(tmp_path / "histoscale", "x = 1\n")
    first = record_provenance(store, package)
    assert record_provenance(store, package) == first
    second = record_provenance(store, write(package, "x = 2\n"))
    assert first != second
    assert len(list((tmp_path / "run" / "provenance").glob("source-*.zip"))) == 2
    record = json.loads(store.get(first))
    assert record["packages"]["torch"]
    assert record["python"].startswith("3.")
    assert "git" not in record


def test_a_checkout_tells_its_commit_and_what_differs(tmp_path: Path) -> None:
    package = write(tmp_path / "histoscale", "x = 1\n")
    git(package, "init", "-q")
    git(package, "add", ".")
    git(package, "commit", "-qm", "one")
    state = git_state(package)
    assert state is not None
    assert (len(state[0]), state[1]) == (40, "")
    write(package, "x = 2\n")
    state = git_state(package)
    assert state is not None
    assert "-x = 1\n+x = 2" in state[1]
    store = open_store(tmp_path / "run")
    assert json.loads(store.get(record_provenance(store, package)))["git"]["commit"] == state[0]


def test_a_machine_without_git_records_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state(write(tmp_path / "histoscale", "x = 1\n")) is None


def test_the_package_itself_is_what_is_recorded_by_default(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record_provenance(store)
    (archive,) = (tmp_path / "provenance").glob("source-*.zip")
    with zipfile.ZipFile(archive) as kept:
        assert "histoscale/train/step.py" in kept.namelist()
    assert provenance._PACKAGE.name == "histoscale"


def test_a_dirty_tree_is_recorded_with_its_difference_and_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "s3cr3t-of-aws", "MLFLOW_TRACKING_PASSWORD": "s3cr3t-of-mlflow"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    package = write(tmp_path / "histoscale", "x = 1\n")
    (package / ".env").write_text("TOKEN=s3cr3t-in-a-file\n")
    git(package, "init", "-q")
    git(package, "add", "part", "notes.txt")
    git(package, "commit", "-qm", "one")
    git(package, "remote", "add", "origin", "https://user:s3cr3t-of-git@example.invalid/a.git")
    write(package, "x = 2\n")
    (package / "new.py").write_text("y = 3\n")
    git(package, "add", "new.py")
    store = open_store(tmp_path / "run")
    record = json.loads(store.get(record_provenance(store, package)))
    assert "-x = 1\n+x = 2" in record["git"]["difference"]
    assert "+y = 3" in record["git"]["difference"]
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as kept:
                assert kept.namelist() == ["histoscale/new.py", "histoscale/part/a.py"]
                written = b"".join(map(kept.read, kept.namelist()))
        else:
            written = path.read_bytes() if path.is_file() else b""
        assert b"s3cr3t" not in written
