"""Alarms over the metrics of a run: pure, one value after the other."""

from dataclasses import dataclass

COLLAPSED_COSINE = 0.98
PATIENCE_STEPS = 20


@dataclass
class CollapseAlarm:
    """Rings once when the class tokens of different tiles have become one.

    New networks map all tiles to nearly one token, so the alarm is armed when the tokens have once been apart, or when
    the learning rate is past its warm-up.

    Attributes:
        warmup_images: Of the recipe.
    """

    warmup_images: int
    _armed: bool = False
    _steps: int = 0

    def update(self, images_seen: int, mean_cosine: float) -> str | None:
        """A sentence for the log at the step at which the alarm rings, None otherwise.

        Args:
            images_seen: After the step.
            mean_cosine: Between class tokens of different tiles.
        """
        high = mean_cosine > COLLAPSED_COSINE
        self._armed |= not high or images_seen > self.warmup_images
        self._steps = self._steps + 1 if high and self._armed else 0
        if self._steps != PATIENCE_STEPS:
            return None
        return (
            f"the model collapses: the class tokens of different tiles have had a mean cosine above {COLLAPSED_COSINE} "
            f"for {PATIENCE_STEPS} steps (now {mean_cosine:.4f}); start another run with a higher loss.kde_weight, a "
            "lower optim.lr or a lower loss.teacher_temperature"
        )
