"""What changes during a run: learning rate, weight decay, EMA momentum, teacher temperature.

Every schedule is a pure function of images seen, so it does not know steps, epochs or the world size. The shapes are
DINOv2's (Oquab et al., arXiv 2304.07193): linear warm-ups and half cosines. A constant rate with a cooldown is the
other shape of the rate: one minus a square root, which Haegele et al. (arXiv 2405.18392) found to do best.
"""

import math
from dataclasses import dataclass

from histoscale.config.recipe import Recipe


@dataclass(frozen=True)
class StepSettings:
    """The scheduled values of one optimiser step."""

    lr: float
    weight_decay: float
    ema_momentum: float
    teacher_temperature: float
    last_layer_frozen: bool


def schedules_at(recipe: Recipe, images_seen: int) -> StepSettings:
    """The values of the step that ends with `images_seen` images, its own included (so no step has a rate of zero)."""
    run = images_seen / recipe.schedule.images
    optim, loss = recipe.optim, recipe.loss
    return StepSettings(
        lr=_learning_rate(recipe, images_seen),
        weight_decay=_cosine(*optim.weight_decay, run),
        ema_momentum=_cosine(*optim.ema_momentum, run),
        teacher_temperature=_linear(
            *loss.teacher_temperature, _share(images_seen, loss.teacher_temperature_warmup_images)
        ),
        last_layer_frozen=images_seen <= optim.freeze_last_layer_images,
    )


def _learning_rate(recipe: Recipe, images_seen: int) -> float:
    optim = recipe.optim
    if images_seen < optim.warmup_images:
        return _linear(0.0, optim.lr, images_seen / optim.warmup_images)
    decay = optim.decay
    if decay != "cosine":
        left = recipe.schedule.images - images_seen
        cooled = 1.0 - left / decay.cooldown_images if left < decay.cooldown_images else 0.0
        return _linear(optim.lr, optim.min_lr, math.sqrt(min(cooled, 1.0)))
    after_warmup = _share(images_seen - optim.warmup_images, recipe.schedule.images - optim.warmup_images)
    return _cosine(optim.lr, optim.min_lr, after_warmup)


def _share(part: int, whole: int) -> float:
    """How much of `whole` is done; all of it where there is nothing to do."""
    return part / whole if whole > 0 else 1.0


def _linear(start: float, end: float, share: float) -> float:
    return start + (end - start) * min(max(share, 0.0), 1.0)


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` to `end`, flat at both."""
    return _linear(start, end, 0.5 * (1.0 - math.cos(math.pi * min(max(share, 0.0), 1.0))))
