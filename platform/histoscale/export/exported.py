"""An export of ours, read again: which network its weights are of."""

import json
from dataclasses import dataclass
from typing import Any

from histoscale.config.archs import ARCHS
from histoscale.errors import ModelError
from histoscale.export.timm_layout import CONFIG, FORMAT_VERSION, OURS, WEIGHTS, timm_arguments
from histoscale.storage import Store, join


@dataclass(frozen=True)
class Exported:
    """A backbone that an export holds.

    Attributes:
        weights: URI of its weights.
        arch: Name of its shape.
        qk_norm: Whether it normalises queries and keys.
        image_px: Side of the images that it sees.
        sha256: Of the weights, as its configuration says.
    """

    weights: str
    arch: str
    qk_norm: bool
    image_px: int
    sha256: str


def read_export(store: Store) -> Exported:
    """What the configuration of an export says.

    Raises:
        ModelError: The folder is no export of ours, or one of another version.
        StorageError: It cannot be reached.
    """
    config = _config(store)
    try:
        version, sha256 = config[OURS]["format"], str(config[OURS]["sha256"][WEIGHTS])
        arguments: dict[str, Any] = config["model_args"]
        image_px, qk_norm = int(arguments["img_size"]), bool(arguments.get("qk_norm", False))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_export(store) from error
    fitting = [name for name, arch in ARCHS.items() if timm_arguments(arch, image_px, qk_norm) == arguments]
    if version != FORMAT_VERSION or not fitting:
        raise ModelError(
            f"the export at {store.uri} is of another version of histoscale",
            value=f"format {version}, a model of width {arguments.get('embed_dim')}",
            expected=f"format {FORMAT_VERSION} and one of {', '.join(ARCHS)}",
            remedy="export the run again with this version",
        )
    return Exported(join(store.uri, WEIGHTS), fitting[0], qk_norm, image_px, sha256)


def _config(store: Store) -> dict[str, Any]:
    if not store.exists(CONFIG):
        raise _no_export(store)
    try:
        config = json.loads(store.get(CONFIG))
    except ValueError as error:
        raise _no_export(store) from error
    if not isinstance(config, dict):
        raise _no_export(store)
    return config


def _no_export(store: Store) -> ModelError:
    return ModelError(
        f"{store.uri} is no export of ours",
        expected=f"a {CONFIG} that jobs/export.py wrote, beside {WEIGHTS}",
        remedy="give the --out of jobs/export.py, or a .safetensors or .pth file of published weights",
    )
