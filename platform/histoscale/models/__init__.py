"""The networks: a vision transformer under timm's names, and the student of the self-supervised objectives."""

from histoscale.models.ssl import SSLNet, build_ssl_net
from histoscale.models.vit import VisionTransformer

__all__ = ["SSLNet", "VisionTransformer", "build_ssl_net"]
