"""What code and which packages a run was trained with: the source itself, named by its hash, and versions beside it.

A job that was submitted has no git with it, so the source of the package and of the job scripts is what is recorded;
where the code lies in a git checkout, its commit and its uncommitted difference are, too.
"""

import hashlib
import io
import json
import platform
import subprocess
import zipfile
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from histoscale.observe.code_record import PROVENANCE_FOLDER
from histoscale.storage import Store

_PACKAGE = Path(__file__).resolve().parents[1]
_SUFFIXES = frozenset({".py", ".yaml"})
_GIT_S = 20.0
_EPOCH = (1980, 1, 1, 0, 0, 0)  # so that the same source gives the same archive


def record_provenance(store: Store, package: Path = _PACKAGE) -> str:
    """Write what this process runs into a run folder, once for each different content; gives the key of the record.

    Args:
        store: The run folder.
        package: Root of the source.

    Raises:
        StorageError: It cannot be written.
    """
    archive, source_sha256 = source_archive(package)
    record: dict[str, object] = {
        "source_sha256": source_sha256,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
    }
    git = git_state(package)
    if git is not None:
        commit, difference = git
        record["git"] = {"commit": commit, "difference": difference}
    text = json.dumps(record, indent=1, sort_keys=True).encode()
    key = f"{PROVENANCE_FOLDER}/{hashlib.sha256(text).hexdigest()[:16]}.json"
    if not store.exists(key):
        store.put(f"{PROVENANCE_FOLDER}/source-{source_sha256[:16]}.zip", archive)
        store.put(key, text)
    return key


def source_archive(package: Path) -> tuple[bytes, str]:
    """The source below a folder as a zip archive, and the SHA-256 of what is in it: of names and contents alone."""
    digest, buffer = hashlib.sha256(), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(package.rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                name, content = path.relative_to(package.parent).as_posix(), path.read_bytes()
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return buffer.getvalue(), digest.hexdigest()


def git_state(folder: Path) -> tuple[str, str] | None:
    """The commit that a folder is at, and what differs from it there; None where it is in no git checkout."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit.strip(), _git(folder, "diff", "HEAD", "--", ".") or ""


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _versions() -> Mapping[str, str]:
    """Installed packages by name; a damaged one has no name."""
    found = ((each.metadata["Name"], each.version) for each in distributions())
    return {name.lower(): version for name, version in found if name}
