"""Student and teacher of the run: backbone, mask token and the two projection heads, one forward for all crops.

Shape suffixes: b tiles, n local crops of a tile, N patches of a global crop, D width, K prototypes. Crops are
crop-major: all tiles' first global crop, then all tiles' second.
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

    Every call reaches every parameter through "dino", "ibot" and "cls" together, whatever is masked and however many
    local crops there are: ZeRO 2 and 3 hang on a parameter that one rank leaves out. A loss must therefore hold
    "dino" and, when it is there, "ibot", be it with weight zero.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        arch, heads = ARCHS[recipe.model.arch], recipe.heads
        self.backbone = VisionTransformer(arch, recipe.crops.global_px, recipe.model.drop_path)
        self.mask_token = nn.Parameter(torch.zeros(1, arch.width))
        self.dino_head = ProjectionHead(arch.width, heads.hidden_dim, heads.dino_bottleneck_dim, heads.dino_prototypes)
        self.ibot_head = ProjectionHead(arch.width, heads.hidden_dim, heads.ibot_bottleneck_dim, heads.ibot_prototypes)

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        hide_masked: bool = True,
    ) -> dict[str, Tensor]:
        """All outputs that the objectives need.

        Args:
            global_crops: [2b, 3, G, G].
            local_crops: [n*b, 3, L, L], or None without local crops.
            mask: bool [2b, N], or None; True where iBOT compares a patch.
            hide_masked: Replace masked patches by the mask token (the student); the teacher sees the whole image
                and passes False.

        Returns:
            "cls" [2b, D], class tokens of the global crops before the head; "dino" [2b + n*b, K], logits of all
            class tokens, global first; "ibot" [masked patches, K2], logits in row-major order of `mask`, absent
            without a mask.
        """
        nothing = global_crops.new_zeros(1, 1, dtype=torch.bool)  # the mask token still needs its place in the graph
        hidden = nothing if mask is None else mask
        tokens = self.backbone(global_crops, *((hidden, self.mask_token) if hide_masked else ()))
        cls = tokens[:, 0]
        all_cls = [cls] if local_crops is None else [cls, self.backbone(local_crops)[:, 0]]
        dino = self.dino_head(torch.cat(all_cls))
        patches = tokens[:, self.backbone.prefix_tokens :]
        chosen = cls[:0] if mask is None else patches[mask]
        # With nothing masked the head still runs, on one class token whose logits count for nothing: each call then
        # has the same sequence of modules, and the head's parameters a gradient of zero.
        idle = chosen.shape[0] == 0
        ibot = self.ibot_head(cls[:1] if idle else chosen)
        if idle:
            dino = dino + 0.0 * ibot.sum()
            ibot = ibot[:0]
        outputs = {"cls": cls, "dino": dino}
        return outputs if mask is None else outputs | {"ibot": ibot}


def build_ssl_net(recipe: Recipe) -> SSLNet:
    """New network on the CPU in fp32; its weights are a function of the recipe's seed and sizes alone."""
    with torch.device("meta"):
        net = SSLNet(recipe)
    net.to_empty(device="cpu")
    initialise(net, recipe.seed, ARCHS[recipe.model.arch].init_std)
    return net
