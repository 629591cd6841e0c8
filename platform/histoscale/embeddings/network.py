"""The network that embeds: the teacher of a run at one step, or an export; and what it makes of a batch of tiles."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from histoscale.checkpoint.reader import commit_at, require_commit, require_recipe
from histoscale.config.archs import ARCHS
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import EmbeddingError
from histoscale.evaluate.backbone import trained_backbone
from histoscale.evaluate.embed import embed_pixels
from histoscale.export.exported import load_export, read_export
from histoscale.models import VisionTransformer
from histoscale.storage import Store, open_store

CLS_MEAN = "cls_mean"
BF16, FP32 = "bf16", "fp32"


@dataclass(frozen=True)
class NetworkRef:
    """Weights that can be found again.

    Attributes:
        name: For people and folders, such as `vit_s14-step-1000`.
        arch: Its shape.
        qk_norm: Whether it normalises queries and keys.
        image_px: Side of the images that its position embedding is made for.
        fingerprint: Names the weights.
        uri: The run folder, or that of the export.
        recipe: Of the run; None of an export.
        step: Of the run's commit.
    """

    name: str
    arch: str
    qk_norm: bool
    image_px: int
    fingerprint: str
    uri: str
    recipe: Recipe | None = None
    step: int = 0

    def load(self) -> VisionTransformer:
        """The backbone in evaluation mode, fp32 on the CPU.

        Raises:
            CheckpointError: The commit is gone or damaged.
            EmbeddingError: The export is another one by now.
            ModelError: It is damaged.
            StorageError: The weights cannot be reached.
        """
        store = open_store(self.uri)
        if self.recipe is not None:
            return trained_backbone(store, self.recipe, self.step)[0]
        backbone, export = load_export(store)
        if f"sha256:{export.sha256}" != self.fingerprint:
            raise EmbeddingError(
                "the export is another one by now",
                value=f"sha256:{export.sha256}",
                expected=self.fingerprint,
                remedy="run the command again",
            )
        return backbone

    def require_tile(self, tile_px: int) -> None:
        """Refuse tiles that are no whole number of patches: tiles are never resized, for that would change their scale.

        Raises:
            EmbeddingError: They are not.
        """
        patch_px = ARCHS[self.arch].patch_px
        if tile_px < patch_px or tile_px % patch_px:
            raise EmbeddingError(
                f"tiles do not fit {self.arch}",
                value=f"{tile_px} px",
                expected=f"a multiple of the {patch_px} px of its patch; it was trained at {self.image_px} px",
                remedy="leave --tile-px out, or give such a multiple",
            )


def find_ref(store: Store, recipe: Recipe | None, step: int | None) -> NetworkRef:
    """The teacher of a run, where there is a recipe, or the network of an export.

    Raises:
        EmbeddingError: A step of an export.
        HistoscaleError: There is none, or none of this step.
    """
    if recipe is not None:
        return ref_of_run(store, recipe, step)
    if step is not None:
        raise EmbeddingError(
            "an export has no steps", value=f"--step {step}", expected="--run", remedy="leave --step out"
        )
    return ref_of_export(store)


def ref_of_run(store: Store, recipe: Recipe, step: int | None = None) -> NetworkRef:
    """The teacher of a run at its newest commit, or at that of a step.

    Raises:
        CheckpointError: There is no such commit, or it is of another recipe.
    """
    commit = require_commit(store) if step is None else commit_at(store, step)
    require_recipe(commit, fingerprint(recipe))
    model = recipe.model
    return NetworkRef(
        name=f"{model.arch}-step-{commit.step}",
        arch=model.arch,
        qk_norm=model.qk_norm,
        image_px=recipe.crops.global_px,
        fingerprint=f"{commit.fingerprint}@{commit.step}:{commit.manifest_crc32:08x}",
        uri=store.uri,
        recipe=recipe,
        step=commit.step,
    )


def ref_of_export(store: Store) -> NetworkRef:
    """The network of an export.

    Raises:
        ModelError: It is none of ours.
    """
    export = read_export(store)
    marker = export.marker
    name = f"{marker.arch}-{export.sha256[:8]}"
    return NetworkRef(name, marker.arch, marker.qk_norm, marker.image_px, f"sha256:{export.sha256}", store.uri)


class TileEmbedder:
    """Embeds batches of tiles, in fp32 or under bf16 autocast.

    Args:
        backbone: In evaluation mode; moved to `device`.
        device: Where it runs.
        embedding: One of `spec.KINDS`.
        precision: `bf16` or `fp32`.
        dtype: What the embeddings are rounded to.
    """

    def __init__(
        self, backbone: VisionTransformer, device: torch.device, embedding: str, precision: str, dtype: str
    ) -> None:
        self._backbone = backbone.to(device)
        self._width = backbone.norm.normalized_shape[0] * (2 if embedding == CLS_MEAN else 1)
        self._device = device
        self._is_bf16 = precision == BF16
        self._dtype = np.dtype(dtype)

    @torch.inference_mode()
    def __call__(self, tiles_BHW3: NDArray[np.uint8]) -> NDArray[Any]:
        """Embeddings [B, D] or [B, 2D] of uint8 tiles [B, H, W, 3]."""
        if not len(tiles_BHW3):
            return np.zeros((0, self._width), self._dtype)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16):
            both_B2D = embed_pixels(self._backbone, _tensor(tiles_BHW3).to(self._device, non_blocking=True))
        return both_B2D[:, : self._width].float().cpu().numpy().astype(self._dtype)


def _tensor(tiles: NDArray[np.uint8]) -> torch.Tensor:
    # What comes out of Ray's store is read-only, of which torch warns.
    return torch.from_numpy(tiles if tiles.flags.writeable else tiles.copy())
