"""The attention of a backbone's last block, computed openly: the fused kernels of the forward pass do not tell it.

Shape suffixes: B images, N patches, T tokens, Q queries, P tokens of all images, D width, H heads, C width of a head.
"""

from torch import Tensor

from histoscale.models.vit import Attention, Spans, VisionTransformer


def attention_weights(attention: Attention, x_BTD: Tensor, queries: int) -> Tensor:
    """How much the first `queries` tokens of each image take from every token of it: [B, H, Q, T], rows sum to one.

    Args:
        attention: The layer.
        x_BTD: What goes into it.
        queries: How many tokens ask.
    """
    images, tokens, _ = x_BTD.shape
    qkv_3BHTC = attention.qkv(x_BTD).view(images, tokens, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    q_BHQC, k_BHTC = attention.q_norm(qkv_3BHTC[0][:, :, :queries]), attention.k_norm(qkv_3BHTC[1])
    scores_BHQT: Tensor = (q_BHQC * q_BHQC.shape[-1] ** -0.5) @ k_BHTC.transpose(-2, -1)
    return scores_BHQT.softmax(dim=-1)


def class_attention(backbone: VisionTransformer, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of some images, and what the class token takes from each patch in the last block.

    Args:
        backbone: In evaluation mode.
        images_B3HW: Normalised images.

    Returns:
        Tokens after the final norm [B, T, D]; attention [B, H, N], whose rest to one goes to class token and registers.
    """
    layer: Attention = backbone.blocks[-1].attn  # type: ignore[assignment]
    inputs: list[Tensor] = []

    def keep(_: Attention, arguments: tuple[Tensor, Spans]) -> None:
        inputs.append(arguments[0])

    hook = layer.register_forward_pre_hook(keep)
    try:
        tokens_BTD = backbone(images_B3HW)
    finally:
        hook.remove()
    weights_BH1T = attention_weights(layer, inputs[0].view(*tokens_BTD.shape[:2], -1), queries=1)
    return tokens_BTD, weights_BH1T[:, :, 0, backbone.prefix_tokens :]
