"""Which slide each visit goes to, at which scale: from a visit's number alone, for many visits at once.

The visits to a slide come in stays. Where slides are read in place, a stay is one visit. A slide that is read from a
copy stays for R visits, together with S - 1 others, so that one download serves them all.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.sampling.mixture import Mixture
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.supply import Supply
from histoscale.seeding import key, permute, permute_many, subkey, subkeys, uniforms

_MPP_DECIMALS = 6  # powers differ in their last bits between machines; scales must not


@dataclass(frozen=True)
class Visits:
    """N visits.

    Attributes:
        q: int64 [N], magnifications.
        pool: int64 [N], the stratum among the slides that serve it.
        row: int64 [N], row of the slide.
        earlier: int64 [N], how many visits at this magnification the slide had before.
        mpp: float64 [N], scale.
        size: float64 [N], side of a region in sides of the grid's squares.
        number: int64 [N], number of the visit in the run.
        first_stay: int64 [N], the first of the stays that take place at the same time.
        stays: int64 [N], how many these are, each at another slide.
    """

    q: NDArray[np.int64]
    pool: NDArray[np.int64]
    row: NDArray[np.int64]
    earlier: NDArray[np.int64]
    mpp: NDArray[np.float64]
    size: NDArray[np.float64]
    number: NDArray[np.int64]
    first_stay: NDArray[np.int64]
    stays: NDArray[np.int64]


class Visitor:
    """Deals the visits of a run to slides.

    Args:
        spec: What decides the plan beside the slides.
        supply: Which slides serve what.
    """

    def __init__(self, spec: PlanSpec, supply: Supply) -> None:
        scales = spec.magnifications
        self._spec, self._supply = spec, supply
        self._finest_mpp = np.array([scale.finest_mpp for scale in scales])
        self._coarsest_mpp = np.array([scale.coarsest_mpp for scale in scales])
        self._mixture = Mixture([scale.share for scale in scales], spec.tiles_per_step)
        self._keys = {name: key(spec.seed, "plan", name) for name in ("replica", "order", "patient", "slide", "mpp")}

    def visits(self, replica: int, groups: Iterable[int], slots: slice = slice(None)) -> Visits:
        """The visits of one replica in each group of steps; `slots`: which of the b in a group."""
        parts = [self._slots(replica, group, slots) for group in groups]
        q, j, number = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        supply = self._supply
        table = supply.table_of[q]
        # Visit j of q is visit `turn` of its pool.
        slot = supply.cycle_at[table] + (j & supply.cycle_mask[table])
        pool = supply.pattern[slot].astype(np.int64)
        turn = (j >> supply.cycle_bits[table]) * supply.slots[pool] + supply.rank[slot]
        first_stay, stays, index, visit_of_stay = self._stays(pool, turn)
        row, earlier_stays = self._slides(q, pool, first_stay + index)
        earlier = earlier_stays * supply.stay[pool] + visit_of_stay
        mpp = self._mpp(q, j)
        size = mpp / self._coarsest_mpp[q]
        return Visits(q, pool, row, earlier, mpp, size, number, first_stay, stays)

    def resident(self, visits: Visits, visit: int, draw: float) -> int:
        """Row of one of the slides that are in use together with that of a visit, all alike; `draw` in [0, 1)."""
        one = slice(visit, visit + 1)
        stay = visits.first_stay[one] + int(draw * int(visits.stays[visit]))
        row, _ = self._slides(visits.q[one], visits.pool[one], stay)
        return int(row[0])

    def _stays(self, pool: NDArray[np.int64], turn: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """First and number of the stays that a visit's is one of, its place among these, and its number within its own.

        S stays take place at the same time, their visits in turn. A block's last ones are fewer: slides that are in
        use at once are different ones, so that no slide is in its next stay before the last has ended.
        """
        supply, at_once = self._supply, self._spec.resident_slides
        stay, block = supply.stay[pool], supply.block[pool]
        number, within = np.divmod(turn, block * stay)
        first = within // (at_once * stay) * at_once
        stays = np.minimum(at_once, block - first)
        visit_of_stay, index = np.divmod(within - first * stay, stays)
        return number * block + first, stays, index, visit_of_stay

    def _slides(
        self, q: NDArray[np.int64], pool: NDArray[np.int64], stay: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row of the slide that each stay is at, and how many stays at this magnification it had before."""
        supply = self._supply
        first = supply.patient_at[pool]
        patients = supply.patient_at[pool + 1] - first
        patient_round, index = np.divmod(stay, patients)
        patient = first + permute_many(subkeys(self._keys["patient"], q, pool, patient_round), index, patients)
        first = supply.slide_at[patient].astype(np.int64)
        slides = supply.slide_at[patient + 1] - first
        earlier, index = np.divmod(patient_round, slides)
        slide = first + permute_many(subkeys(self._keys["slide"], q, patient, earlier), index, slides)
        return supply.rows[slide].astype(np.int64), earlier

    def _slots(
        self, replica: int, group: int, slots: slice
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Magnification, number among its visits and number among all visits, of slots of a micro-batch."""
        spec = self._spec
        # A micro-batch takes every V-th position, so that it holds the mix of the whole step.
        column = permute(subkey(self._keys["replica"], group), replica, spec.replicas)
        order_key = subkey(self._keys["order"], group, replica)
        order = np.argsort(subkeys(order_key, np.arange(spec.tiles_per_micro_batch)), kind="stable")
        position = order[slots] * spec.replicas + column
        bounds, before = self._mixture.cut(group)
        q = np.searchsorted(bounds, position, side="right") - 1
        return q, before[q] + position - bounds[q], group * spec.tiles_per_step + position

    def _mpp(self, q: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float64]:
        """Scale of each visit, log-uniform within a bin."""
        finest, coarsest = self._finest_mpp[q], self._coarsest_mpp[q]
        if np.array_equal(finest, coarsest):
            return finest
        draws = uniforms(self._keys["mpp"], subkeys(0, q, j).view(np.int64), 1)[:, 0]
        drawn = np.clip(np.round(finest * (coarsest / finest) ** draws, _MPP_DECIMALS), finest, coarsest)
        return np.where(finest < coarsest, drawn, finest)
