"""The recipe of a run: frozen, closed models; every field changes something.

Durations are counted in images seen, never in epochs or in steps of some world size. Values marked [DINOv2] are
those of facebookresearch/dinov2's ViT-L configuration, those marked [Virchow2] are reported for arXiv 2408.00738.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from histoscale.config.archs import ARCHS
from histoscale.config.running import (
    CheckpointSection,
    ClusterSection,
    EvaluationSection,
    StreamSection,
    TrackingSection,
)
from histoscale.config.section import Count, Decay, NonNegative, Positive, Probability, Section, Share

Scale = Annotated[float, Field(ge=0.05, le=20.0)]


class Magnification(Section):
    """One scale of the mix, or a range (finest, coarsest) to draw from, and its share of the tiles.

    Shares need not sum to one.
    """

    mpp: Annotated[
        Annotated[Scale, Tag("scale")] | Annotated[tuple[Scale, Scale], Tag("range")],
        Discriminator(lambda mpp: "range" if isinstance(mpp, list | tuple) else "scale"),
    ]
    share: Share

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if isinstance(self.mpp, tuple) and not self.mpp[0] < self.mpp[1]:
            raise ValueError(f"a range of mpp must be [finest, coarsest], got {list(self.mpp)}")
        return self


class DataSection(Section):
    """Which tiles are drawn from the slides."""

    mix: Annotated[tuple[Magnification, ...], Field(min_length=1)] = (
        Magnification(mpp=0.25, share=0.2),
        Magnification(mpp=0.5, share=0.4),
        Magnification(mpp=1.0, share=0.2),
        Magnification(mpp=2.0, share=0.2),
    )  # [Virchow2] 40x 20 %, 20x 40 %, 10x 20 %, 5x 20 %
    region_px: Annotated[int, Field(ge=16, le=2048)] = 392  # [Virchow2]
    max_upsample: Annotated[float, Field(ge=1.0, le=2.0)] = 1.1
    min_tissue: Probability = 0.65  # [Virchow2] a tile is kept from 65 % tissue on
    min_tile_tissue: Probability = 0.4  # of the tile as it was read; 0 switches the test off
    min_sharpness: NonNegative = 0.45  # of the tile as it was read, 1 being sharp at its scale; 0 switches it off
    balance: tuple[str, ...] = ()  # columns of the index whose values, combined, make the strata
    temperature: Positive = 1.0  # 1: strata as large as in the archive; the larger, the more alike
    weights: dict[str, dict[str, NonNegative]] = Field(
        default_factory=dict
    )  # column -> value -> factor; 0 leaves its slides out
    slides: Count | None = None  # that are drawn from: the first so many by their keyed ids, a random part; None: all
    max_tiles_per_slide: Count | None = None  # of the whole run; what is cut goes to the other strata
    resident_slides: Count = 64  # of a stratum and scale that are in use at once, where slides are read from copies
    resident_visits: Count = 64  # to each of them before others take their place

    @model_validator(mode="after")
    def _scales_differ(self) -> Self:
        scales = [entry.mpp for entry in self.mix]
        if len(set(scales)) != len(scales):
            raise ValueError(f"each mpp may stand once in the mix, got {scales}")
        return self


class BatchSection(Section):
    """The virtual world: `tiles` a step, in `replicas` equal shares, read in chapters."""

    tiles: Count = 4096  # [Virchow2]
    replicas: Count = 512
    chapter_steps: Count = 4
    tiles_per_visit: Count = 4

    @property
    def per_replica(self) -> int:
        """Tiles of one micro-batch."""
        return self.tiles // self.replicas

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.tiles % self.replicas:
            raise ValueError(f"replicas must divide tiles, got {self.tiles} tiles in {self.replicas} replicas")
        if self.per_replica < 2:
            raise ValueError(f"a replica needs two tiles or more (KDE compares them), got {self.per_replica}")
        if self.chapter_steps % self.tiles_per_visit:
            raise ValueError(
                f"tiles_per_visit must divide chapter_steps, got {self.tiles_per_visit} and {self.chapter_steps}"
            )
        return self


class ModelSection(Section):
    """The backbone."""

    arch: str = "vit_h14_reg4"
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.4  # [DINOv2]
    qk_norm: bool = False  # LayerNorm of queries and keys, for large models that diverge
    weights: str | None = None  # a file of published weights, timm's or Meta's, from which the backbone starts

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.arch not in ARCHS:
            raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {self.arch!r}")
        if self.weights is not None and "://" not in self.weights and not self.weights.startswith("/"):
            raise ValueError(f"weights must be an absolute path or an s3:// URI, got {self.weights!r}")
        return self


class HeadSection(Section):
    """The two projection heads: three layers, a bottleneck and prototypes."""

    shared: bool = False  # iBOT projects with DINO's head and prototypes; [DINOv2] has two for its large models
    dino_prototypes: Count = 131072  # [Virchow2]
    ibot_prototypes: Count = 131072
    hidden_dim: Count = 2048  # [DINOv2]
    dino_bottleneck_dim: Count = 384  # [DINOv2]
    ibot_bottleneck_dim: Count = 256  # [DINOv2]


class Window(Section):
    """The part of a region that a crop shows; the ranges of its subclasses are (low, high)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"{name} must be (low, high), got {value}")
        return self


class ExtendedContext(Window):
    """Extended-context translation [Virchow2]: windows of about the crop's own size, hardly resized."""

    kind: Literal["extended_context"] = "extended_context"
    scale: tuple[Positive, Positive] = (0.9, 1.1)  # [Virchow2], of the window over the crop
    scale_of: Literal["side", "area"] = "side"  # the paper does not say which
    aspect: tuple[Positive, Positive] = (0.95, 1.05)  # [Virchow2]


class RandomResized(Window):
    """The classic random-resized crop [DINOv2]: windows of any size, resized to the crop's."""

    kind: Literal["random_resized"] = "random_resized"
    global_scale: tuple[Positive, Positive] = (0.32, 1.0)  # [DINOv2], shares of the region's area
    local_scale: tuple[Positive, Positive] = (0.05, 0.32)  # [DINOv2]
    aspect: tuple[Positive, Positive] = (0.75, 4.0 / 3.0)  # [DINOv2]


def _kind_of_window(window: object) -> str:
    """What a window says that it is; extended context where it does not say."""
    kind = window.get("kind", "extended_context") if isinstance(window, dict) else getattr(window, "kind", "no section")
    return str(kind)


class CropSection(Section):
    """The crops of a tile: two global ones, which teacher and student see, and local ones, which the student sees."""

    global_px: Count = 224
    local_px: Count = 98
    local_count: Annotated[int, Field(ge=0)] = 8  # [DINOv2]
    window: Annotated[
        Annotated[ExtendedContext, Tag("extended_context")] | Annotated[RandomResized, Tag("random_resized")],
        Discriminator(_kind_of_window),
    ] = ExtendedContext()
    poses: Literal["dihedral", "flips", "none"] = "dihedral"  # all eight of the square, or four without quarter turns


class AugmentSection(Section):
    """Colour and blur; the strengths are torchvision's, the blur shares DINOv2's effective ones."""

    brightness: NonNegative = 0.4  # [DINOv2]
    contrast: NonNegative = 0.4  # [DINOv2]
    saturation: NonNegative = 0.2  # [DINOv2]
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1  # [DINOv2]
    jitter_p: Probability = 0.8  # [DINOv2]
    grayscale_p: Probability = 0.2  # [DINOv2]
    solarize_p: Probability = 0.2  # [DINOv2], of the second global crop
    blur_p: tuple[Probability, Probability, Probability] = (0.0, 0.9, 0.5)  # [DINOv2], global 1, global 2, local
    hed_p: Probability = 0.0  # stain jitter; Virchow2 has none
    hed_strength: NonNegative = 0.05  # of each stain's amount, as factor and as offset


class LossSection(Section):
    """DINO + iBOT + the kernel density estimator that replaces KoLeo."""

    dino_weight: NonNegative = 1.0  # [DINOv2]
    ibot_weight: NonNegative = 1.0  # [DINOv2]
    kde_weight: NonNegative = 0.05  # as re-implementations of Virchow2 have it
    kde_kappa: Positive = 5.0  # likewise
    koleo_weight: NonNegative = 0.0  # [DINOv2] 0.1; KDE stands in its place
    spread_group: Annotated[int, Field(ge=2)] | None = None  # tiles that KDE and KoLeo compare; None: the replica's
    student_temperature: Positive = 0.1  # [DINOv2]
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)  # [DINOv2]
    teacher_temperature_warmup_images: Annotated[int, Field(ge=0)] = 115_000_000  # [DINOv2] 37,500 steps of 3,072
    centering: Literal["sinkhorn", "center"] = "sinkhorn"  # [DINOv2] sinkhorn for its large models
    sinkhorn_iterations: Count = 3  # [DINOv2]
    center_momentum: Probability = 0.9  # [DINOv2]
    mask_ratio: tuple[Probability, Probability] = (0.1, 0.5)  # [DINOv2]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.mask_ratio
        if low > high or high <= 0.0:
            raise ValueError(f"mask_ratio must be (low, high) with 0 < high, got ({low}, {high})")
        return self


class Cooldown(Section):
    """A constant rate that falls only over the last `cooldown_images`: runs of other lengths share all before it."""

    cooldown_images: Annotated[int, Field(ge=0)]  # 0: it never falls, as in a run that others are forked from


class OptimSection(Section):
    """AdamW, its schedules and the EMA teacher."""

    lr: Positive = 3.5e-4
    min_lr: NonNegative = 1e-6  # [DINOv2]
    warmup_images: Annotated[int, Field(ge=0)] = 307_200_000  # [DINOv2] 100,000 steps of 3,072
    decay: Annotated[
        Annotated[Literal["cosine"], Tag("cosine")] | Annotated[Cooldown, Tag("cooldown")],
        Discriminator(lambda decay: "cosine" if isinstance(decay, str) else "cooldown"),
    ] = "cosine"  # [DINOv2] of the rate, after the warm-up
    weight_decay: tuple[NonNegative, NonNegative] = (0.04, 0.2)  # [DINOv2]
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # [DINOv2]
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # [DINOv2] of the rate, from block to block down
    patch_embed_lr: NonNegative = 0.2  # [DINOv2] factor of the patch embedding's rate
    freeze_last_layer_images: Annotated[int, Field(ge=0)] = 3_840_000  # [DINOv2] 1,250 steps of 3,072: prototypes stand
    clip_norm: Positive = 3.0  # [DINOv2], of the global norm
    ema_momentum: tuple[Probability, Probability] = (0.994, 1.0)  # [DINOv2]


class DistillSection(Section):
    """A frozen teacher instead of the student's own average."""

    teacher: str  # heads: a run folder; features: an export of ours, or a file of published weights
    mode: Literal["heads", "features"] = "heads"
    arch: str | None = None  # of a file of published weights, which does not say
    licence: str | None = None  # what permits distilling from foreign weights; must be stated for them
    cls_weight: NonNegative = 1.0  # features: of the class tokens' cosine
    patch_weight: NonNegative = 1.0  # features: of the patch tokens' cosine

    @property
    def teacher_is_a_file(self) -> bool:
        """Whether the teacher is a file of weights, which need not be ours, rather than a folder that we wrote."""
        return self.teacher.endswith((".safetensors", ".pth"))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "://" not in self.teacher and not self.teacher.startswith("/"):
            raise ValueError(f"teacher must be an absolute path or an s3:// URI, got {self.teacher!r}")
        if self.mode == "heads" and self.teacher_is_a_file:
            raise ValueError(f"mode heads needs a run folder, as a file of weights has no heads, got {self.teacher!r}")
        if not self.teacher_is_a_file:
            if self.arch is not None:
                raise ValueError(f"arch is for a file of weights, a folder of ours says its own, got {self.arch!r}")
        elif self.arch not in ARCHS:
            raise ValueError(f"arch must say whose weights these are, one of {', '.join(ARCHS)}, got {self.arch!r}")
        elif not (self.licence or "").strip():
            raise ValueError(
                "distill.licence must say what permits distilling from these weights: some published models forbid "
                f"training on their outputs, got {self.licence!r}"
            )
        if self.mode == "features" and not self.cls_weight + self.patch_weight > 0.0:
            raise ValueError("cls_weight and patch_weight must not both be 0: nothing would be learnt")
        return self


class ScheduleSection(Section):
    """How long the run is."""

    images: Count = 2_000_000_000  # [Virchow2]


class Recipe(Section):
    """All that defines a run; in `evaluation`, `tracking` and `cluster`, how it is looked at and what it runs on."""

    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    on_alarm: Literal["warn", "stop"] = "warn"  # when an alarm rings; stop commits first
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    model: ModelSection = ModelSection()
    heads: HeadSection = HeadSection()
    crops: CropSection = CropSection()
    augment: AugmentSection = AugmentSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    distill: DistillSection | None = None
    schedule: ScheduleSection = ScheduleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stream: StreamSection = StreamSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.schedule.images // self.batch.tiles

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._crops_fit()
        self._distillation_fits()
        group = self.loss.spread_group
        if group is not None and self.batch.per_replica % group:
            raise ValueError(f"loss.spread_group must divide the replica's {self.batch.per_replica} tiles, got {group}")
        if self.steps < 1:
            raise ValueError(
                f"schedule.images must hold one step of {self.batch.tiles} tiles, got {self.schedule.images}"
            )
        self._cooldown_fits()
        most = self.cluster.worker_bounds[1]
        if most > self.batch.replicas:
            raise ValueError(
                f"cluster.workers must not exceed batch.replicas, which share a step out, got {most} for "
                f"{self.batch.replicas} (use {self.batch.replicas} workers, or a larger batch.replicas in a new run)"
            )
        return self

    def _cooldown_fits(self) -> None:
        decay, warmup_images = self.optim.decay, self.optim.warmup_images
        if decay != "cosine" and decay.cooldown_images and decay.cooldown_images + warmup_images > self.schedule.images:
            raise ValueError(
                "optim.warmup_images and optim.decay.cooldown_images must fit in schedule.images, got "
                f"{warmup_images} and {decay.cooldown_images} in {self.schedule.images}"
            )

    def _distillation_fits(self) -> None:
        if self.distill is None:
            return
        if self.loss.centering == "center":
            raise ValueError("loss.centering must be sinkhorn in distillation, whose teacher has no centre, got center")
        if self.model.drop_path > 0.0:
            raise ValueError(
                f"model.drop_path must be 0 in distillation, which drops nothing [DINOv2], got {self.model.drop_path}"
            )
        if self.distill.mode == "features" and self.crops.local_count:
            raise ValueError(
                "crops.local_count must be 0 in distillation from features, which compares global crops alone, "
                f"got {self.crops.local_count}"
            )

    def _crops_fit(self) -> None:
        patch_px, window = ARCHS[self.model.arch].patch_px, self.crops.window
        for name in ("global_px", "local_px"):
            side_px = getattr(self.crops, name)
            if side_px % patch_px:
                raise ValueError(f"crops.{name} must be a multiple of the patch of {patch_px} px, got {side_px}")
            if isinstance(window, RandomResized):
                continue
            low, high = window.aspect
            largest = window.scale[1] if window.scale_of == "side" else math.sqrt(window.scale[1])
            widest_px = side_px * largest * math.sqrt(max(high, 1.0 / low))
            if widest_px > self.data.region_px:
                raise ValueError(
                    f"crops.{name} of up to {widest_px:.1f} px must fit in data.region_px, got {self.data.region_px}"
                )
