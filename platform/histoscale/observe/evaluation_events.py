"""What evaluations found, on TensorBoard: one small file of events for each, beside those of the steps."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from histoscale.observe.metrics import EVENTS_PREFIX
from histoscale.storage import Store

FOLDER = f"{EVENTS_PREFIX}/evaluation"


def write_evaluation(store: Store, step: int, values: Mapping[str, float]) -> None:
    """Add the figures of the checkpoint of `step`; files of the same folder are one curve to TensorBoard.

    Args:
        store: The run folder.
        step: Steps of the checkpoint.
        values: Tag -> figure.

    Raises:
        StorageError: The run folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="histoscale-") as folder:
        with SummaryWriter(folder) as writer:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
        for path in Path(folder).iterdir():
            store.upload(path, f"{FOLDER}/{path.name}")
