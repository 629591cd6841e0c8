"""What the student and the teacher see: crops, colours and masks, each a function of the seed and the sample id."""

from histoscale.augment.crops import Views, augment
from histoscale.augment.masks import block_masks

__all__ = ["Views", "augment", "block_masks"]
