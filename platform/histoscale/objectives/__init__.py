"""The objectives: tensors in, one scalar out; every one computes in fp32 or finer."""

from histoscale.objectives.assignment import Assignment, centered, logit_sums, sinkhorn
from histoscale.objectives.cross_entropy import cross_entropy
from histoscale.objectives.dino import dino_losses
from histoscale.objectives.ibot import ibot_loss
from histoscale.objectives.kde import kde_loss, mean_cosine
from histoscale.objectives.koleo import koleo_loss

__all__ = [
    "Assignment",
    "centered",
    "cross_entropy",
    "dino_losses",
    "ibot_loss",
    "kde_loss",
    "koleo_loss",
    "logit_sums",
    "mean_cosine",
    "sinkhorn",
]
