"""The sections of a recipe on how a run goes: what is kept, what is borne, and what it runs on."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from histoscale.config.section import Count, NonNegative, Positive, Probability, Section


class CheckpointSection(Section):
    """When the run is committed, which commits are kept, and what is borne."""

    every_steps: Count = 1000
    keep_last: Count = 3
    keep_every_steps: Count | None = None  # commits of its multiples stay for ever
    max_failed: Count = 3  # checkpoints in a row that could not be written


class EvaluationSection(Section):
    """What committed checkpoints are measured on, and drawn, beside the run; may change when a run resumes."""

    datasets: tuple[str, ...] = ()  # as jobs/evaluate.py takes them; the first one judges which checkpoint is the best
    every_commits: Count = 1
    cpus: Count = 1
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    tries: Count = 2  # of one evaluation, whose node may be taken away
    pictures: bool = True  # of tiles, patches, attention, neighbours and mixture, with or without datasets

    @model_validator(mode="after")
    def _places(self) -> Self:
        for uri in self.datasets:
            if "://" not in uri and not uri.startswith("/"):
                raise ValueError(f"datasets must be absolute paths or s3:// URIs, got {uri!r}")
        return self


class StreamSection(Section):
    """What the stream bears before it stops the run: the lower of the two bounds, a share being one slide at least."""

    max_bad_slides: Annotated[int, Field(ge=0)] = 1000
    max_bad_share: Probability = 0.05


class TrackingSection(Section):
    """Who else is told of the run; may change when a run resumes."""

    mlflow: str | None = None  # URI of a tracking server, which is told of each commit
    experiment: str = "histoscale"  # of MLflow, in which the run stands

    @model_validator(mode="after")
    def _is_a_server(self) -> Self:
        parts = urlsplit(self.mlflow or "http://server")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"mlflow must be the http(s):// URI of a tracking server, got {self.mlflow!r}")
        if parts.username or parts.password:
            raise ValueError(
                "mlflow must name no user and no password, as recipes are recorded: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD where the job runs"
            )
        return self


class ClusterSection(Section):
    """How the run is mapped to hardware; may change when a run resumes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Count | tuple[Count, Count] = 1  # a number, or the bounds between which the run grows and shrinks
    zero_stage: Literal[1, 2, 3] = 2
    cpus_per_worker: Count = 1
    activation_checkpointing: bool = False  # blocks are computed twice: less memory, a third slower
    compile: bool = False  # torch.compile of the blocks: minutes at the start, and a C++ compiler on the machine
    readers: Count | tuple[Count, Count] = 2  # a number, or the bounds between which Ray Data scales
    slide_cache_gb: Positive = 50.0  # of a node, for copies of slides that all its readers share
    tile_cache_gb: NonNegative = 0.0  # of a node, for compressed tiles that all its readers share
    max_failures: Annotated[int, Field(ge=0)] = 5  # crashes; restarts for nodes that are taken away count apart
    max_preemptions: Annotated[int, Field(ge=0)] = 1000
    resize_horizon_s: Positive = 3600.0  # a larger size must repay its restart within this time
    silence_s: Annotated[float, Field(ge=15.0)] = 60.0  # a worker that gives no sign of life for so long is ended
    start_timeout_s: Positive = 600.0

    @property
    def worker_bounds(self) -> tuple[int, int]:
        """Least and largest number of workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def reader_bounds(self) -> tuple[int, int]:
        """Least and largest number of readers."""
        return (self.readers, self.readers) if isinstance(self.readers, int) else self.readers

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile works with zero_stage 1 and 2, got 3, which gathers weights between the layers")
        return self

    @model_validator(mode="after")
    def _bounds_ordered(self) -> Self:
        for name, (low, high) in (("readers", self.reader_bounds), ("workers", self.worker_bounds)):
            if low > high:
                raise ValueError(f"{name} must be a number or (least, most), got ({low}, {high})")
        return self
