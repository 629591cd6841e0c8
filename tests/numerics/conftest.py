"""Makes the helpers of this folder importable, also in the processes that tests start; runs that tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

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
