"""Student and teacher of the run: backbone, mask token and the projection heads, one forward for all crops.

Shape suffixes: b tiles, n local crops of a tile, N patches of a global crop, D width, E bottleneck, K prototypes. Crops
are crop-major: all tiles' first global crop, then all tiles' second.
"""

import torch
from torch import Tensor, nn

from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.models.heads import ProjectionHead
from histoscale.models.vit import VisionTransformer
from histoscale.models.weights import initialise


class SSLNet(nn.Module):
    """Backbone, mask token and heads; student and teacher are two of these.

    Every call reaches every parameter through its outputs together, whatever is masked and however many local crops
    there are: ZeRO 2 and 3 hang on a parameter that one rank leaves out. A loss must therefore hold all of them, be it
    with weight zero.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        arch, heads, model = ARCHS[recipe.model.arch], recipe.heads, recipe.model
        self.backbone = VisionTransformer(arch, recipe.crops.global_px, model.drop_path, model.qk_norm)
        self.mask_token = nn.Parameter(torch.zeros(1, arch.width))
        self.dino_head = ProjectionHead(arch.width, heads.hidden_dim, heads.dino_bottleneck_dim, heads.dino_prototypes)
        self.ibot_head: ProjectionHead | None = None
        if not heads.shared:
            self.ibot_head = ProjectionHead(
                arch.width, heads.hidden_dim, heads.ibot_bottleneck_dim, heads.ibot_prototypes
            )

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        mask: Tensor,
        *,
        hide_masked: bool = True,
    ) -> dict[str, Tensor]:
        """All outputs that the objectives need.

        Args:
            global_crops: [2b, 3, G, G].
            local_crops: [n*b, 3, L, L], or None without local crops.
            mask: bool [2b, N]; True where iBOT compares a patch.
            hide_masked: Replace masked patches by the mask token (the student); the teacher sees the whole image
                and passes False.

        Returns:
            "cls" [2b, D], class tokens of the global crops before the head; "dino" [2b + n*b, E], projected class
            tokens, global first, and "dino_prototypes" [K, E]; "ibot" [masked patches, E2] in row-major order of
            `mask`, and "ibot_prototypes" [K2, E2], which are DINO's where the head is shared.
        """
        crops = [global_crops] if local_crops is None else [global_crops, local_crops]
        hidden = mask if hide_masked else torch.zeros_like(mask)  # the mask token still needs its place in the graph
        tokens, *local_tokens = self.backbone(crops, hidden, self.mask_token)
        cls = tokens[:, 0]
        all_cls = torch.cat([cls, *(each[:, 0] for each in local_tokens)])
        patches = tokens[:, self.backbone.prefix_tokens :][mask]
        if self.ibot_head is None:
            features, prototypes = self.dino_head(torch.cat([all_cls, patches]))
            dino, ibot = features.split([len(all_cls), len(patches)])
            return _outputs(cls, (dino, prototypes), (ibot, prototypes))
        # With nothing masked the head still runs, on one class token whose features nobody uses: each call then has
        # the same sequence of modules, and the head's parameters a gradient of zero.
        ibot, prototypes = self.ibot_head(patches if len(patches) else cls[:1])
        return _outputs(cls, self.dino_head(all_cls), (ibot[: len(patches)], prototypes))


def _outputs(cls: Tensor, dino: tuple[Tensor, Tensor], ibot: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {
        "cls": cls,
        "dino": dino[0],
        "dino_prototypes": dino[1],
        "ibot": ibot[0],
        "ibot_prototypes": ibot[1],
    }


def build_ssl_net(recipe: Recipe) -> SSLNet:
    """New network on the CPU in fp32, all weights drawn: a function of the recipe's seed and sizes."""
    net = empty_ssl_net(recipe)
    initialise(net, recipe.seed, ARCHS[recipe.model.arch].init_std)
    return net


def empty_ssl_net(recipe: Recipe) -> SSLNet:
    """New network on the CPU in fp32 whose weights are still to come."""
    with torch.device("meta"):
        net = SSLNet(recipe)
    return net.to_empty(device="cpu")
