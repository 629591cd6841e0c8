"""The objectives: tensors in, one scalar out; every one computes in fp32 or finer."""

from histoscale.objectives.dino import dino_loss
from histoscale.objectives.ibot import ibot_loss
from histoscale.objectives.kde import kde_loss
from histoscale.objectives.sinkhorn import sinkhorn

__all__ = ["dino_loss", "ibot_loss", "kde_loss", "sinkhorn"]
