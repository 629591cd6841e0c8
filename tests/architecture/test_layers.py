"""The shape of the code: who may import whom, what stands where, and how large it gets."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "histoscale"
LAYERS = [
    {"errors", "units", "seeding"},
    {"config", "storage"},
    {"slides", "sampling"},
    {"models", "objectives", "augment"},
    {"stream", "checkpoint", "train", "evaluate", "export", "observe", "embeddings"},
    {"cluster", "sweeps", "bench"},
]
MAY_IMPORT_RAY = {"stream", "cluster", "sweeps", "slides/build.py", "bench"}
NEVER_TORCH = {"errors", "units", "seeding", "config", "storage", "slides", "sampling"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def layer_of(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports_of(path):
        if name.startswith("histoscale."):
            other = name.split(".")[1]
            assert layer_of(other) <= layer_of(part), f"{part} imports {other}, which lies above it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_edge_imports_ray_and_torch_stays_out_of_the_core(path: Path) -> None:
    part, relative = part_of(path), path.relative_to(PACKAGE).as_posix()
    top = {name.split(".")[0] for name in imports_of(path)}
    if part not in MAY_IMPORT_RAY and relative not in MAY_IMPORT_RAY:
        assert "ray" not in top
    if part in NEVER_TORCH:
        assert not top & {"torch", "deepspeed"}
    if part not in {"train", "checkpoint"}:
        assert "deepspeed" not in top


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    program = "import sys, histoscale; print(sorted({'torch', 'ray', 'deepspeed'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_source_root_never_shadows_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    program = "import platform; print(platform.python_version())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize("path", modules() + sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "every module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_are_short_and_say_how_to_submit_them(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"python jobs/{path.name}" in docstring
