"""The plan of a run: sample k -> slide, magnification, place; a pure function, O(1) per tile, no table of tiles.

A slot is (step, replica r, position i in the micro-batch); its sample id is k = (step * V + r) * b + i. T steps
in a row are a group. The tiles of one slot over the steps of a group are a visit: T places of one slide at one
magnification. Visits of a magnification are numbered through the whole run; n visits in a row, n being the
number of slides that serve it, are a round and go to every such slide once.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import PlanError
from histoscale.sampling.mixture import Mixture
from histoscale.sampling.places import SlideGeometry, grid
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.supply import survey
from histoscale.seeding import key, permute, uniforms

_CACHED_PLACES = 1 << 23  # 32 MB of cell numbers


@dataclass(frozen=True)
class MicroBatchPlan:
    """The b tiles of one (step, replica).

    Attributes:
        sample_ids: int64 [b].
        slides: int32 [b], rows of `Plan.slide_ids`.
        mpp: float64 [b].
        x_px0: float64 [b], left edge of the region, whole level-0 pixels.
        y_px0: float64 [b], upper edge of the region.
    """

    sample_ids: NDArray[np.int64]
    slides: NDArray[np.int32]
    mpp: NDArray[np.float64]
    x_px0: NDArray[np.float64]
    y_px0: NDArray[np.float64]


@dataclass(frozen=True)
class MagnificationReport:
    """What serves one magnification: `slides` slides with `places` places between them."""

    mpp: float
    share: float
    slides: int
    places: int


class Plan:
    """The plan of a run over a set of slides; the masks are read once, here, and not kept.

    Args:
        spec: What decides the plan beside the slides.
        slides: Geometry and tissue mask of each slide; their order is part of the plan.

    Raises:
        PlanError: No slide serves a magnification of the mix.
    """

    def __init__(self, spec: PlanSpec, slides: Sequence[SlideGeometry]) -> None:
        self.spec = spec
        self.slide_ids = tuple(slide.slide_id for slide in slides)
        self._mixture = Mixture([share for _, share in spec.mix], spec.tiles_per_step)
        self._supplies = survey(spec, slides)
        self._sizes_px0 = np.array([(slide.width_px0, slide.height_px0) for slide in slides], np.int64)
        self._slide_mpp = np.array([slide.mpp for slide in slides], np.float64)
        self._cache: OrderedDict[tuple[int, int], NDArray[np.int32]] = OrderedDict()
        self._cached_places = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict(), "_cached_places": 0}

    def report(self) -> tuple[MagnificationReport, ...]:
        """Which magnification is served by how many slides, in the order of the mix."""
        return tuple(
            MagnificationReport(supply.mpp, share, len(supply.rows), int(supply.counts.sum(dtype=np.int64)))
            for (_, share), supply in zip(self.spec.mix, self._supplies, strict=True)
        )

    def sample_ids(self, step: int, replica: int) -> NDArray[np.int64]:
        """Sample ids of one micro-batch: int64 [b].

        Raises:
            PlanError: There is no such step or replica.
        """
        spec = self.spec
        if step < 0 or not 0 <= replica < spec.replicas:
            raise PlanError(
                "no such micro-batch",
                value=f"step {step}, replica {replica}",
                expected=f"a step of 0 or more and a replica below {spec.replicas}",
            )
        first = (step * spec.replicas + replica) * spec.tiles_per_micro_batch
        return np.arange(first, first + spec.tiles_per_micro_batch, dtype=np.int64)

    def micro_batch(self, step: int, replica: int) -> MicroBatchPlan:
        """The tiles of one replica of one step, whoever computes it.

        Raises:
            PlanError: There is no such step or replica.
        """
        spec = self.spec
        sample_ids = self.sample_ids(step, replica)
        group, turn = divmod(step, spec.tiles_per_visit)
        bounds, before = self._mixture.bounds(group), self._mixture.before(group)
        # A micro-batch takes every V-th position, so that it holds the mix of the whole step.
        column = permute(key(spec.seed, "plan", "replica", group), replica, spec.replicas)
        order_key = key(spec.seed, "plan", "order", group, replica)
        jitters = uniforms(key(spec.seed, "plan", "jitter"), sample_ids, 2) - 0.5
        tiles = []
        for i, jitter in enumerate(jitters):
            position = permute(order_key, i, spec.tiles_per_micro_batch) * spec.replicas + column
            q = bisect_right(bounds, position) - 1
            tiles.append(self._tile(q, before[q] + position - bounds[q], turn, jitter))
        rows, mpp, x_px0, y_px0 = zip(*tiles, strict=True)
        return MicroBatchPlan(sample_ids, np.array(rows, np.int32), np.array(mpp), np.array(x_px0), np.array(y_px0))

    def _tile(self, q: int, visit: int, turn: int, jitter: NDArray[np.float64]) -> tuple[int, float, float, float]:
        """(slide row, mpp, x_px0, y_px0) of tile number `turn` of a visit; `jitter` in regions, x then y."""
        supply, seed = self._supplies[q], self.spec.seed
        mpp_word = repr(supply.mpp)
        round_number, index = divmod(visit, len(supply.rows))
        entry = permute(key(seed, "plan", "slide", mpp_word, round_number), index, len(supply.rows))
        row, places = int(supply.rows[entry]), int(supply.counts[entry])
        epoch, index = divmod(round_number * self.spec.tiles_per_visit + turn, places)
        place = permute(key(seed, "plan", "place", mpp_word, self.slide_ids[row], epoch), index, places)
        side_px0 = self.spec.region_px * supply.mpp / float(self._slide_mpp[row])
        size_px0 = self._sizes_px0[row]
        squares = grid(int(size_px0[0]), int(size_px0[1]), side_px0)
        corner_px0 = squares.corners_px0(self._cells(q, entry)[place : place + 1])[0]
        if epoch > 0:
            # Past the first epoch the grid's places are used up: near them lies tissue not yet seen.
            corner_px0 = np.clip(np.rint(corner_px0 + jitter * side_px0), 0.0, np.floor(size_px0 - side_px0))
        return row, supply.mpp, float(corner_px0[0]), float(corner_px0[1])

    def _cells(self, q: int, entry: int) -> NDArray[np.int32]:
        cells = self._cache.get((q, entry))
        if cells is None:
            cells = self._cache[q, entry] = self._supplies[q].cells(entry)
            self._cached_places += len(cells)
            while self._cached_places > _CACHED_PLACES and len(self._cache) > 1:
                self._cached_places -= len(self._cache.popitem(last=False)[1])
        self._cache.move_to_end((q, entry))
        return cells
