"""Student of a teacher that gives features and no prototypes: backbone and two projectors to the teacher's width.

Shape suffixes: B images, N patches, D width, W the teacher's width.
"""

import torch
from torch import Tensor, nn

from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.models.vit import VisionTransformer
from histoscale.models.weights import initialise


class FeatureNet(nn.Module):
    """Backbone and projectors; only the backbone is of use after the training.

    The backbone has the names, and for a seed the initial weights, that it has in `SSLNet`.

    Args:
        recipe: Its model, and the side of its global crops.
        teacher_width: W.
    """

    def __init__(self, recipe: Recipe, teacher_width: int) -> None:
        super().__init__()
        arch, model = ARCHS[recipe.model.arch], recipe.model
        self.backbone = VisionTransformer(arch, recipe.crops.global_px, model.drop_path, model.qk_norm)
        self.cls_projector = nn.Linear(arch.width, teacher_width)
        self.patch_projector = nn.Linear(arch.width, teacher_width)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of normalised images [B, 3, h, w].

        Returns:
            "cls" [B, D], class tokens; "cls_features" [B, W] and "patch_features" [B, N, W], in the teacher's space.
        """
        tokens = self.backbone(images)
        cls, patches = tokens[:, 0], tokens[:, self.backbone.prefix_tokens :]
        return {
            "cls": cls,
            "cls_features": self.cls_projector(cls),
            "patch_features": self.patch_projector(patches),
        }


def build_feature_net(recipe: Recipe, teacher_width: int) -> FeatureNet:
    """New network on the CPU in fp32, all weights drawn: its backbone's are those of `build_ssl_net`."""
    with torch.device("meta"):
        net = FeatureNet(recipe, teacher_width)
    net.to_empty(device="cpu")
    initialise(net, recipe.seed, ARCHS[recipe.model.arch].init_std)
    return net
