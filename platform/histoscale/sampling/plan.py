"""The plan of a run: sample k -> slide, magnification, place; a pure function, O(1) per tile, no table of tiles.

A slot is (step, replica r, position i in the micro-batch); its sample id is k = (step * V + r) * b + i. T steps
in a row are a group. The tiles of one slot over the steps of a group are a visit: T places of one slide at one
magnification. Visits of a magnification are numbered through the whole run, and the number alone leads to the
stratum, the patient, the slide, and to how often the slide was visited before.

What cannot be drawn (a slide that is out, or has no place at this magnification) is drawn again as a spare of the
same magnification and stratum, keyed by sample and attempt. So are samples that a reader finds unfit. Spares of slides
that are read from copies come from those in use at the time, as long as these have any.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import PlanError
from histoscale.sampling.inverse import Inverse
from histoscale.sampling.places import Frames, Grid, SlidePlaces, find_places
from histoscale.sampling.report import PlanReport, fingerprint, make_report
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.supply import Strata, find_strata, make_supply
from histoscale.sampling.visits import Visitor, Visits
from histoscale.seeding import key, permute_many, subkey, subkeys, uniforms
from histoscale.units import describe_mpp

MAX_ATTEMPTS = 32
_ATTEMPTS_AT_RESIDENTS = 16

_CACHED_PLACES = 1 << 23  # 32 MB of cell numbers
_CACHED_SLIDES = 1 << 16  # many of them may have no place at all
_NEVER = np.iinfo(np.int64).max
_ANY_CELL = np.zeros(1, np.int32)
_NOWHERE = SlidePlaces(Grid(1, 1, 0, 0, 1, 1.0, 1, 1), np.zeros(0, np.int32))


@dataclass(frozen=True)
class TilePlan:
    """One tile.

    Attributes:
        sample_id: Which sample.
        attempt: The attempt that gave it: the one asked for, or the first after it that can be drawn.
        row: Row of the catalogue.
        mpp: Scale.
        x_px0: Left edge of the region, whole level-0 pixels.
        y_px0: Upper edge of the region.
        visit: Tiles of one visit share it, no others do; negative for a spare.
    """

    sample_id: int
    attempt: int
    row: int
    mpp: float
    x_px0: float
    y_px0: float
    visit: int


@dataclass(frozen=True)
class ChapterPlan:
    """The tiles of one replica over some steps; arrays [steps, b] of what `TilePlan` says.

    Attributes:
        sample_ids: int64.
        rows: int32.
        mpp: float64.
        x_px0: float64.
        y_px0: float64.
        attempts: int16.
        visit: int64.
    """

    sample_ids: NDArray[np.int64]
    rows: NDArray[np.int32]
    mpp: NDArray[np.float64]
    x_px0: NDArray[np.float64]
    y_px0: NDArray[np.float64]
    attempts: NDArray[np.int16]
    visit: NDArray[np.int64]


class Plan:
    """The plan of a run over the slides of a catalogue.

    Making it reads the columns that say which slide serves what; masks are read one by one, when a visit needs them.
    Not for several threads at once.

    Args:
        spec: What decides the plan beside the slides.
        rows: Structured array with the fields of the catalogue; their order is part of the plan.
        columns: Names of the strata columns.
        values: What the codes of each strata column stand for.
        mask_of: Tissue mask of a row, bool [h, w].
        exclusions: Row -> first step at which its slide is out.

    Raises:
        PlanError: No slide serves a magnification of the mix, or the recipe's balance does not fit the catalogue.
    """

    def __init__(
        self,
        spec: PlanSpec,
        rows: NDArray[Any],
        columns: Sequence[str],
        values: Sequence[Sequence[str]],
        mask_of: Callable[[int], NDArray[np.bool_]],
        exclusions: Mapping[int, int] | None = None,
    ) -> None:
        self.spec = spec
        self._rows = np.asarray(rows)  # a view without the cost of a memory map's class
        self._columns, self._values = tuple(columns), tuple(tuple(names) for names in values)
        self._mask_of = mask_of
        self._exclusions = dict(exclusions or {})
        self._strata = find_strata(spec, self._rows, self._columns, self._values)
        self._supply = make_supply(spec, self._rows, self._strata)
        self._visitor = Visitor(spec, self._supply)
        self._coarsest_mpp = [scale.coarsest_mpp for scale in spec.magnifications]
        self._keys = {name: key(spec.seed, "plan", name) for name in ("strip", "jitter", "spare")}
        self._cache: OrderedDict[tuple[int, int], SlidePlaces] = OrderedDict()
        self._cached_places = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict(), "_cached_places": 0}

    @property
    def strata(self) -> Strata:
        """The strata of all slides."""
        return self._strata

    def report(self) -> PlanReport:
        """What the run draws from where, from the tables alone."""
        return make_report(self.spec, self._rows, self._columns, self._values, self._strata, self._supply)

    def strata_of(self, rows_N: NDArray[np.integer]) -> list[str]:
        """Names of the strata that some rows are of, as the report has them."""
        return [self._strata.names[stratum] for stratum in self._strata.of_row[rows_N].tolist()]

    def fingerprint(self, snapshot_id: str) -> str:
        """16 hex digits that name the plan over a snapshot of the index: the same digits, the same tiles."""
        return fingerprint(self.spec, snapshot_id, self._exclusions)

    def tile(self, sample_id: int, attempt: int = 0) -> TilePlan:
        """The tile of a sample at an attempt, or at the first later one that can be drawn.

        Raises:
            PlanError: There is no such sample, or none of `MAX_ATTEMPTS` attempts at it can be drawn.
        """
        if sample_id < 0 or attempt < 0:
            raise PlanError("no such sample", value=f"sample {sample_id}, attempt {attempt}", expected="0 or more")
        micro_batch, i = divmod(sample_id, self.spec.tiles_per_micro_batch)
        step, replica = divmod(micro_batch, self.spec.replicas)
        visits = self._visitor.visits(replica, [step // self.spec.tiles_per_visit], slice(i, i + 1))
        if attempt:
            return self._spare(sample_id, attempt, visits, 0)
        one = np.zeros((1, 1), np.int64)
        drawn = self._draw(one + sample_id, one + step, visits, one)
        return TilePlan(
            sample_id,
            int(drawn.attempts[0, 0]),
            int(drawn.rows[0, 0]),
            float(drawn.mpp[0, 0]),
            float(drawn.x_px0[0, 0]),
            float(drawn.y_px0[0, 0]),
            int(drawn.visit[0, 0]),
        )

    def chapter(self, replica: int, first_step: int, last_step: int) -> ChapterPlan:
        """The tiles of one replica from `first_step` to `last_step`, included, whoever reads them.

        Raises:
            PlanError: There are no such steps or no such replica, or a sample has no attempt that can be drawn.
        """
        spec = self.spec
        if not 0 <= first_step <= last_step or not 0 <= replica < spec.replicas:
            raise PlanError(
                "no such chapter",
                value=f"steps {first_step} to {last_step}, replica {replica}",
                expected=f"steps of 0 or more and a replica below {spec.replicas}",
            )
        b = spec.tiles_per_micro_batch
        steps_S1, slots_B = np.arange(first_step, last_step + 1)[:, None], np.arange(b)
        groups_S1 = steps_S1 // spec.tiles_per_visit
        first_group, last_group = first_step // spec.tiles_per_visit, last_step // spec.tiles_per_visit
        visits = self._visitor.visits(replica, range(first_group, last_group + 1))
        sample_ids_SB = (steps_S1 * spec.replicas + replica) * b + slots_B
        return self._draw(sample_ids_SB, steps_S1 + 0 * slots_B, visits, (groups_S1 - first_group) * b + slots_B)

    def samples_of(self, row: int, stop: int) -> NDArray[np.int64]:
        """The samples of steps 0 to `stop - 1` that the plan takes from a slide, ascending: int64 [N].

        What the content of tiles decided is not in the plan: see `spares_of` for samples that gave way to a spare.
        Which slides of the same stratum have no place at all must be known, so their masks are read.
        """
        inverse = Inverse(self.spec, self._supply)
        found = [np.zeros(0, np.int64)]
        for q, pool in inverse.pools_of(row):
            displaced = [self._displaced(inverse, other, q, stop) for other in inverse.rows_of(pool).tolist()]
            found.append(self.spares_of(row, np.concatenate(displaced)))
            if len(self._places(row, q).cells):
                samples = inverse.samples_of(row, q, stop)
                out_from = self._exclusions.get(row, _NEVER)
                found.append(samples[samples // self.spec.tiles_per_step < out_from])
        return np.unique(np.concatenate(found))

    def spares_of(self, row: int, sample_ids: NDArray[np.int64], attempt: int = 1) -> NDArray[np.int64]:
        """Those of some samples whose tile at an attempt, or at the first later one, comes from a slide.

        Args:
            row: The slide.
            sample_ids: Samples that gave way to a spare.
            attempt: 1 or more.
        """
        inverse, asked = Inverse(self.spec, self._supply), sample_ids
        # Spares of slides that are read from copies depend on which of them are in use: no short cut.
        if not any(self._strata.copied[self._supply.stratum[pool]] for _, pool in inverse.pools_of(row)):
            asked = sample_ids[inverse.may_be_spares(row, sample_ids, attempt, MAX_ATTEMPTS)]
        return np.array([k for k in asked.tolist() if self.tile(k, attempt).row == row], np.int64)

    def _displaced(self, inverse: Inverse, row: int, q: int, stop: int) -> NDArray[np.int64]:
        """The samples of visits to a slide that has no place at a magnification, or is out by then."""
        empty = not len(self._places(row, q).cells)
        if not empty and row not in self._exclusions:
            return np.zeros(0, np.int64)
        samples = inverse.samples_of(row, q, stop)
        return samples if empty else samples[samples // self.spec.tiles_per_step >= self._exclusions[row]]

    def _draw(
        self,
        sample_ids_SB: NDArray[np.int64],
        steps_SB: NDArray[np.int64],
        visits: Visits,
        visit_SB: NDArray[np.int64],
    ) -> ChapterPlan:
        """The tiles of some visits; `visit_SB` says which of them each tile belongs to."""
        sample_ids_N, steps_N, visit_N = (array.reshape(-1) for array in (sample_ids_SB, steps_SB, visit_SB))
        rows_N = visits.row[visit_N]
        out_N = self._out_from(rows_N) <= steps_N
        needed = set(visit_N[~out_N].tolist())
        places = [
            self._places(row, q) if visit in needed else _NOWHERE
            for visit, (row, q) in enumerate(zip(visits.row.tolist(), visits.q.tolist(), strict=True))
        ]
        x_N, y_N = self._corners_px0(places, sample_ids_N, steps_N, visits, visit_N)
        mpp_N, number_N = visits.mpp[visit_N], visits.number[visit_N]
        attempts_N = np.zeros(len(visit_N), np.int16)
        empty_N = np.array([not len(found.cells) for found in places])[visit_N]
        for n in np.flatnonzero(out_N | empty_N).tolist():
            spare = self._spare(int(sample_ids_N[n]), 1, visits, int(visit_N[n]))
            attempts_N[n], rows_N[n], number_N[n] = spare.attempt, spare.row, spare.visit
            x_N[n], y_N[n] = spare.x_px0, spare.y_px0
        shape = sample_ids_SB.shape
        return ChapterPlan(
            sample_ids_SB,
            rows_N.astype(np.int32).reshape(shape),
            mpp_N.reshape(shape),
            x_N.reshape(shape),
            y_N.reshape(shape),
            attempts_N.reshape(shape),
            number_N.reshape(shape),
        )

    def _corners_px0(
        self,
        places: Sequence[SlidePlaces],
        sample_ids_N: NDArray[np.int64],
        steps_N: NDArray[np.int64],
        visits: Visits,
        visit_N: NDArray[np.int64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corners of the tiles of visits to slides with these places; meaningless for one without any.

        An epoch of a slide holds each of its places once: strips of T places in a row, in keyed order, then what is
        left over.
        """
        turns = self.spec.tiles_per_visit
        count_N = np.array([len(found.cells) or 1 for found in places])[visit_N]
        epoch_N, index_N = np.divmod(visits.earlier[visit_N] * turns + steps_N % turns, count_N)
        strips_N = np.maximum(count_N // turns, 1)
        strip_N, within_N = np.divmod(index_N, turns)
        keys_N = subkeys(self._keys["strip"], visits.q[visit_N], visits.row[visit_N], epoch_N)
        strip_N = np.where(
            strip_N < strips_N, permute_many(keys_N, np.minimum(strip_N, strips_N - 1), strips_N), strip_N
        )
        entry_N = np.minimum(strip_N * turns + within_N, count_N - 1)
        cells = [found.cells if len(found.cells) else _ANY_CELL for found in places]
        cell_N = np.array(
            [cells[visit][entry] for visit, entry in zip(visit_N.tolist(), entry_N.tolist(), strict=True)]
        )
        frames, sizes_N = Frames.of([found.squares for found in places]).take(visit_N), visits.size[visit_N]
        x_N, y_N = frames.corners_px0(cell_N, sizes_N)
        if epoch_N.any():
            # Past the first epoch the grid's places are used up: near them lies tissue not yet seen.
            shifts_N2 = uniforms(self._keys["jitter"], sample_ids_N, 2) - 0.5
            moved_x_N, moved_y_N = frames.moved_px0(x_N, y_N, sizes_N, shifts_N2)
            x_N, y_N = np.where(epoch_N > 0, moved_x_N, x_N), np.where(epoch_N > 0, moved_y_N, y_N)
        return x_N, y_N

    def _spare(self, sample_id: int, first_attempt: int, visits: Visits, visit: int) -> TilePlan:
        """The first spare of a sample that can be drawn: never a place of the grid."""
        step = sample_id // self.spec.tiles_per_step
        q, pool = int(visits.q[visit]), int(visits.pool[visit])
        stratum = self._supply.stratum[pool]
        sizes = visits.size[visit : visit + 1]
        for attempt in range(first_attempt, MAX_ATTEMPTS + 1):
            draws = uniforms(subkey(self._keys["spare"], sample_id), np.array([attempt]), 5)
            if attempt <= _ATTEMPTS_AT_RESIDENTS and self._strata.copied[stratum]:
                row = self._visitor.resident(visits, visit, draws[0, 0])
            else:
                row = self._any_row(pool, draws[0, 0], draws[0, 1])
            if self._exclusions.get(row, _NEVER) <= step:
                continue
            found = self._places(row, q)
            if not len(found.cells):
                continue
            cells = found.cells[[int(draws[0, 2] * len(found.cells))]]
            frame = Frames.of([found.squares])
            x, y = frame.corners_px0(cells, sizes)
            moved_x, moved_y = frame.moved_px0(x, y, sizes, draws[:, 3:] - 0.5)
            if moved_x[0] == x[0] and moved_y[0] == y[0]:
                continue
            mpp = float(visits.mpp[visit])
            return TilePlan(sample_id, attempt, row, mpp, float(moved_x[0]), float(moved_y[0]), -1 - sample_id)
        raise PlanError(
            f"no tile is left for a sample at {describe_mpp(float(visits.mpp[visit]))}",
            value=f"{MAX_ATTEMPTS} attempts among {self._strata.names[stratum]}",
            expected=f"slides with regions of {self.spec.region_px} px that hold {self.spec.min_tissue:.0%} tissue",
            remedy="lower data.min_tissue, give this stratum a weight of 0 in data.weights, or look at why its slides "
            "are refused",
        )

    def _any_row(self, pool: int, patient_draw: float, slide_draw: float) -> int:
        patient = _pick(self._supply.patient_at, pool, patient_draw)
        return int(self._supply.rows[_pick(self._supply.slide_at, patient, slide_draw)])

    def _out_from(self, rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """First step at which each of these slides is out."""
        if not self._exclusions:
            return np.full(len(rows_N), _NEVER)
        return np.array([self._exclusions.get(row, _NEVER) for row in rows_N.tolist()])

    def _places(self, row: int, q: int) -> SlidePlaces:
        """Places of a slide at a magnification; those used last are kept."""
        found = self._cache.get((row, q))
        if found is None:
            slide, spec = self._rows[row], self.spec
            mpp = float(slide["mpp"])
            size_px0 = int(slide["width_px0"]), int(slide["height_px0"])
            side_px0 = spec.region_px * self._coarsest_mpp[q] / mpp
            mask_px0 = float(slide["mask_um"]) / mpp
            found = find_places(self._mask_of(row), size_px0, side_px0, mask_px0, spec.min_tissue)
            self._cache[row, q] = found
            self._cached_places += len(found.cells)
            while len(self._cache) > 1 and (self._cached_places > _CACHED_PLACES or len(self._cache) > _CACHED_SLIDES):
                self._cached_places -= len(self._cache.popitem(last=False)[1].cells)
        self._cache.move_to_end((row, q))
        return found


def _pick(starts: NDArray[Any], group: int, draw: float) -> int:
    """One of the members of a group, all alike; `starts` says where the members of each group begin."""
    first, end = int(starts[group]), int(starts[group + 1])
    return first + int(draw * (end - first))
