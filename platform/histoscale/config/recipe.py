"""The recipe of a run: frozen, closed models; every field changes something.

Durations are counted in images seen, never in epochs or in steps of some world size. Values marked [DINOv2] are
those of facebookresearch/dinov2's ViT-L configuration, those marked [Virchow2] are reported for arXiv 2408.00738.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from histoscale.config.archs import ARCHS

Share = Annotated[float, Field(gt=0.0, le=1e6)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """One closed section of a recipe: unknown fields are refused, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


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
    weights: dict[str, dict[str, NonNegative]] = {}  # column -> value -> factor; 0 leaves its slides out
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

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.arch not in ARCHS:
            raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {self.arch!r}")
        return self


class HeadSection(Section):
    """The two projection heads: three layers, a bottleneck and prototypes."""

    dino_prototypes: Count = 131072  # [Virchow2]
    ibot_prototypes: Count = 131072
    hidden_dim: Count = 2048  # [DINOv2]
    dino_bottleneck_dim: Count = 384  # [DINOv2]
    ibot_bottleneck_dim: Count = 256  # [DINOv2]


class CropSection(Section):
    """Extended-context translation: crops cut from a larger region, hardly resized."""

    global_px: Count = 224
    local_px: Count = 98
    local_count: Annotated[int, Field(ge=0)] = 8
    scale: tuple[Positive, Positive] = (0.9, 1.1)  # [Virchow2], read as a factor of the side
    aspect: tuple[Positive, Positive] = (0.95, 1.05)  # [Virchow2]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("scale", "aspect"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (low, high), got ({low}, {high})")
        return self


class AugmentSection(Section):
    """Colour and blur; the strengths are torchvision's, the blur shares DINOv2's effective ones."""

    brightness: NonNegative = 0.4  # [DINOv2]
    contrast: NonNegative = 0.4  # [DINOv2]
    saturation: NonNegative = 0.2  # [DINOv2]
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1  # [DINOv2]
    jitter_p: Probability = 0.8  # [DINOv2]
    grayscale_p: Probability = 0.2  # [DINOv2]
    solarize_p: Probability = 0.2  # [DINOv2], of the second global crop
    blur_p: tuple[Probability, Probability, Probability] = (
        0.0,
        0.9,
        0.5,
    )  # [DINOv2], global 1, global 2, local


class LossSection(Section):
    """DINO + iBOT + the kernel density estimator that replaces KoLeo."""

    dino_weight: NonNegative = 1.0  # [DINOv2]
    ibot_weight: NonNegative = 1.0  # [DINOv2]
    kde_weight: NonNegative = 0.05  # as re-implementations of Virchow2 have it
    kde_kappa: Positive = 5.0  # likewise
    student_temperature: Positive = 0.1  # [DINOv2]
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)  # [DINOv2]
    teacher_temperature_warmup_images: Annotated[int, Field(ge=0)] = 115_000_000  # [DINOv2] 37,500 steps of 3,072
    sinkhorn_iterations: Count = 3  # [DINOv2]
    mask_ratio: tuple[Probability, Probability] = (0.1, 0.5)  # [DINOv2]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.mask_ratio
        if low > high or high <= 0.0:
            raise ValueError(f"mask_ratio must be (low, high) with 0 < high, got ({low}, {high})")
        return self


class OptimSection(Section):
    """AdamW, its schedules and the EMA teacher."""

    lr: Positive = 3.5e-4
    min_lr: NonNegative = 1e-6  # [DINOv2]
    warmup_images: Annotated[int, Field(ge=0)] = 307_200_000  # [DINOv2] 100,000 steps of 3,072
    weight_decay: tuple[NonNegative, NonNegative] = (0.04, 0.2)  # [DINOv2]
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # [DINOv2]
    clip_norm: Positive = 3.0  # [DINOv2], of the global norm
    ema_momentum: tuple[Probability, Probability] = (0.994, 1.0)  # [DINOv2]


class ScheduleSection(Section):
    """How long the run is."""

    images: Count = 2_000_000_000  # [Virchow2]


class CheckpointSection(Section):
    """When the run is committed, and how many commits are kept."""

    every_steps: Count = 1000
    keep_last: Count = 3


class StreamSection(Section):
    """What the stream bears before it stops the run: the lower of the two bounds, a share being one slide at least."""

    max_bad_slides: Annotated[int, Field(ge=0)] = 1000
    max_bad_share: Probability = 0.05


class ClusterSection(Section):
    """How the run is mapped to hardware: the one section that may change when a run resumes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Count = 1
    zero_stage: Literal[1, 2, 3] = 2
    cpus_per_worker: Count = 1
    readers: Count | tuple[Count, Count] = 2  # a number, or the bounds between which Ray Data scales
    slide_cache_gb: Positive = 50.0  # of a node, for copies of slides that all its readers share
    tile_cache_gb: NonNegative = 0.0  # of a node, for compressed tiles that all its readers share
    max_failures: Annotated[int, Field(ge=0)] = 5
    start_timeout_s: Positive = 600.0

    @property
    def reader_bounds(self) -> tuple[int, int]:
        """Least and largest number of readers."""
        return (self.readers, self.readers) if isinstance(self.readers, int) else self.readers

    @model_validator(mode="after")
    def _readers_ordered(self) -> Self:
        low, high = self.reader_bounds
        if low > high:
            raise ValueError(f"readers must be a number or (least, most), got ({low}, {high})")
        return self


class Recipe(Section):
    """Everything that defines a run, and (in `cluster`) what it runs on."""

    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    model: ModelSection = ModelSection()
    heads: HeadSection = HeadSection()
    crops: CropSection = CropSection()
    augment: AugmentSection = AugmentSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stream: StreamSection = StreamSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.schedule.images // self.batch.tiles

    @model_validator(mode="after")
    def _fits(self) -> Self:
        patch_px = ARCHS[self.model.arch].patch_px
        for name in ("global_px", "local_px"):
            side_px = getattr(self.crops, name)
            if side_px % patch_px:
                raise ValueError(f"crops.{name} must be a multiple of the patch of {patch_px} px, got {side_px}")
            low, high = self.crops.aspect
            widest_px = side_px * self.crops.scale[1] * math.sqrt(max(high, 1.0 / low))
            if widest_px > self.data.region_px:
                raise ValueError(
                    f"crops.{name} of up to {widest_px:.1f} px must fit in data.region_px, got {self.data.region_px}"
                )
        if self.steps < 1:
            raise ValueError(
                f"schedule.images must hold one step of {self.batch.tiles} tiles, got {self.schedule.images}"
            )
        if self.cluster.workers > self.batch.replicas:
            raise ValueError(
                f"cluster.workers must not exceed batch.replicas ({self.batch.replicas}), got {self.cluster.workers}"
            )
        return self
