"""An export of ours, read again: which network its weights are of, and the network itself."""

from dataclasses import dataclass

from histoscale.config.archs import ARCHS
from histoscale.errors import ModelError
from histoscale.export.marker import FORMAT_VERSION, MARKER, WEIGHTS, Marker, read_marker, version_of
from histoscale.models import VisionTransformer
from histoscale.models.huggingface import MASK_TOKEN
from histoscale.models.published import load_published
from histoscale.storage import Store, join


@dataclass(frozen=True)
class Exported:
    """A backbone that an export holds.

    Attributes:
        weights: URI of its weights.
        marker: What the export says of itself.
    """

    weights: str
    marker: Marker

    @property
    def sha256(self) -> str:
        """Of the weights, as the marker says."""
        return self.marker.sha256[WEIGHTS]


def read_export(store: Store) -> Exported:
    """What the marker of an export says.

    Raises:
        ModelError: The folder is no export of ours, one that was interrupted, or one of another version.
        StorageError: It cannot be reached.
    """
    marker = read_marker(store)
    if marker is not None and marker.arch in ARCHS and WEIGHTS in marker.sha256:
        return Exported(join(store.uri, WEIGHTS), marker)
    found = version_of(store)
    if found is None:
        raise ModelError(
            f"{store.uri} is no export of ours",
            expected=f"a {MARKER} that jobs/export.py wrote when it was done, beside {WEIGHTS}",
            remedy="give the --out of jobs/export.py, and export the run again where that was interrupted or is of "
            "an earlier version; or give a .safetensors or .pth file of published weights",
        )
    raise ModelError(
        f"the export at {store.uri} is of another version of histoscale",
        value=f"format {found}" + (f", a {marker.arch}" if marker else ""),
        expected=f"format {FORMAT_VERSION} and one of {', '.join(ARCHS)}",
        remedy="export the run again with this version",
    )


def load_export(store: Store) -> tuple[VisionTransformer, Exported]:
    """The network of an export, in fp32 on the CPU and in evaluation mode: every tensor used, none missing.

    Raises:
        ModelError: The folder is no export, or a tensor of it is missing, left over, of another shape or changed.
        StorageError: It cannot be reached.
    """
    export = read_export(store)
    marker = export.marker
    arch = ARCHS[marker.arch]
    loaded = load_published(export.weights, arch, marker.image_px, marker.qk_norm)
    leftover = [name for name in loaded.unused if name != MASK_TOKEN]  # theirs has one, zero, that nothing here needs
    wrong = [*leftover, *loaded.fresh] or ([] if loaded.resized_from_grid is None else ["pos_embed"])
    if loaded.sha256 != export.sha256 or wrong:
        raise ModelError(
            f"the weights at {export.weights} are not those of the export",
            value=f"SHA-256 {loaded.sha256}" if not wrong else f"{', '.join(wrong[:3])}: left over, missing or resized",
            expected=f"SHA-256 {export.sha256}",
            remedy="fetch the export again, or export the run again",
        )
    backbone = VisionTransformer(arch, marker.image_px, qk_norm=marker.qk_norm)
    backbone.load_state_dict(loaded.state, strict=True)
    return backbone.eval(), export
