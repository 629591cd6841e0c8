"""Commands, options and files that the documentation names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "jobs").rglob("*.*"))]
ADDED = re.compile(r'add(?:_argument)?\(\s*"(--[a-z0-9-]+)"([^\n]*)')


def options_of(job: str) -> dict[str, bool]:
    """Options of a job script, and whether each must be given."""
    found = ADDED.findall((ROOT / job).read_text())
    return {"--help": False} | {name: "required=True" in rest for name, rest in found}


def commands_of(page: Path) -> list[tuple[str, str, bool]]:
    """The job and the words behind it of every command, and whether the command is a whole one."""
    text = page.read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        for job, words in re.findall(r"python (jobs/\w+\.py)((?:(?! -- )[^`])*)", line):
            is_block = line.startswith(("    ", "#     ")) and "..." not in words
            found.append((job, words, is_block))
    return found


def test_there_are_commands_to_look_at() -> None:
    assert sum(len(commands_of(page)) for page in PAGES) > 50
    assert options_of("jobs/sweep.py")["--index"]
    assert not options_of("jobs/sweep.py")["--teacher"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_commands_have_the_options_of_their_jobs(page: Path) -> None:
    for job, words, is_whole in commands_of(page):
        options, given = options_of(job), set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", words))
        assert given <= options.keys(), f"{job}{words}"
        missing = {name for name, is_required in options.items() if is_required} - given
        assert not is_whole or not missing, f"{job}{words}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_documented_files_are_there(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"(?<![\w/.])(?:tests|docs|jobs|platform)/[\w/.-]*\w", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
