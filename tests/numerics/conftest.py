"""Makes the helpers of this folder importable, also in the processes that tests start; runs that tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import archive
import grid
import workers
from plain_reference import PlainRun, run_plain

from histoscale.config.archs import ARCHS


@pytest.fixture(scope="session")
def plain() -> PlainRun:
    """The run of the tiny recipe as one plain process does it."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "vit_test14", workers.LIVELY_ARCH)
        return run_plain(workers.tiny_recipe(), workers.STEPS)


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two workers left: see `workers.two_workers`."""
    folder = tmp_path_factory.mktemp("two-workers")
    workers.launch(workers.two_workers, 2, folder)
    return folder


@pytest.fixture(scope="session")
def grid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an index, for the runs of the grid beside it."""
    folder = tmp_path_factory.mktemp("grid")
    # Fields of colour, so that tiles differ: class tokens that are nearly one make all gradients large.
    slides = [archive.noise(seed, 0, 200, square_px=80) + archive.noise(seed, 0, 55) for seed in range(5)]
    archive.write_archive(folder, slides)
    return folder


@pytest.fixture(scope="session")
def plain_grid(grid_folder: Path) -> PlainRun:
    """The run of the grid's recipe as one plain process does it."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "vit_test14", workers.LIVELY_ARCH)
        return grid.run_plain_grid(grid_folder)


@pytest.fixture(scope="session")
def grid_inputs(grid_folder: Path) -> dict[str, dict[str, str]]:
    """What every run of the grid's recipe must learn from."""
    return grid.expected_inputs(grid_folder)


@pytest.fixture(scope="session")
def grid_groups(grid_folder: Path) -> Path:
    """The same folder, with what `grid.GROUPS` left there."""
    for size, legs in grid.GROUPS:
        workers.launch(grid.train_legs, size, grid_folder, legs)
    return grid_folder
