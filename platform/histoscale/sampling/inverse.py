"""The plan backwards: which samples come from a slide, without looking at any other sample.

Every table of the plan leads from a visit's number to a slide by keyed permutations, and each of these can be undone:
slide -> stays -> visits of its stratum -> visits of the magnification -> slots. So the cost grows with what a slide
gave, not with the run.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from histoscale.sampling.mixture import Mixture
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.supply import Supply
from histoscale.seeding import key, subkeys, uniforms_below, unpermute_many

_PART = 1 << 18  # visits at a time: a row of slots for each


class Inverse:
    """Undoes what `sampling/visits.py` does.

    Args:
        spec: What decides the plan beside the slides.
        supply: Which slides serve what.
    """

    def __init__(self, spec: PlanSpec, supply: Supply) -> None:
        self._spec, self._supply = spec, supply
        self._mixture = Mixture([scale.share for scale in spec.magnifications], spec.tiles_per_step)
        self._keys = {name: key(spec.seed, "plan", name) for name in ("replica", "order", "patient", "slide", "spare")}

    def pools_of(self, row: int) -> Iterator[tuple[int, int]]:
        """Each magnification that a slide serves, and its pool there."""
        for q in range(len(self._supply.table_of)):
            found = self._place(row, q)
            if found is not None:
                yield q, found[1]

    def rows_of(self, pool: int) -> NDArray[np.int32]:
        """The slides of a pool."""
        first, last = self._supply.slide_at[self._supply.patient_at[pool : pool + 2]]
        return self._supply.rows[first:last]

    def samples_of(self, row: int, q: int, stop: int) -> NDArray[np.int64]:
        """The samples of steps before `stop` whose visits go to a slide at a magnification, ascending: int64 [N]."""
        spec, place = self._spec, self._place(row, q)
        groups = -(-stop // spec.tiles_per_visit)
        if place is None or not groups:
            return np.zeros(0, np.int64)
        starts, before = self._mixture.starts(q, groups)
        numbers = self._visits(place, q, int(before[-1]))
        parts = [self._slots(numbers[at : at + _PART], starts, before) for at in range(0, len(numbers), _PART)]
        samples = np.sort(np.concatenate([np.zeros(0, np.int64), *parts]))
        return samples[samples < stop * spec.tiles_per_step]

    def may_be_spares(
        self, row: int, sample_ids: NDArray[np.int64], first_attempt: int, last_attempt: int
    ) -> NDArray[np.bool_]:
        """Whether one of the attempts at each sample draws a slide: bool [N]; only for slides read in place."""
        supply = self._supply
        keys = subkeys(self._keys["spare"], sample_ids)
        found = np.zeros(len(sample_ids), bool)
        pools = {pool for _, pool in self.pools_of(row)}
        for attempt in range(first_attempt, last_attempt + 1):
            draws_N2 = uniforms_below(keys, attempt, 2)
            for pool in pools:
                first, end = (int(at) for at in supply.patient_at[pool : pool + 2])
                patients = first + (draws_N2[:, 0] * (end - first)).astype(np.int64)
                slides = supply.slide_at[patients].astype(np.int64)
                slides += (draws_N2[:, 1] * (supply.slide_at[patients + 1] - slides)).astype(np.int64)
                found |= supply.rows[slides] == row
        return found

    def _place(self, row: int, q: int) -> tuple[int, int, int] | None:
        """Slide, pool and patient, as the tables number them; None where the slide does not serve a magnification."""
        supply = self._supply
        table = int(supply.table_of[q])
        first_pool, last_pool = supply.pool_at[table : table + 2]
        first, last = supply.slide_at[supply.patient_at[[first_pool, last_pool]]]
        found = np.flatnonzero(supply.rows[first:last] == row)
        if not len(found):
            return None
        slide = int(first) + int(found[0])
        patient = int(np.searchsorted(supply.slide_at, slide, side="right")) - 1
        pool = int(np.searchsorted(supply.patient_at, patient, side="right")) - 1
        return slide, pool, patient

    def _visits(self, place: tuple[int, int, int], q: int, count: int) -> NDArray[np.int64]:
        """Numbers, among the first `count` visits of a magnification, of those to a slide: int64 [N]."""
        supply, pool = self._supply, place[1]
        table = int(supply.table_of[q])
        cycle = slice(int(supply.cycle_at[table]), int(supply.cycle_at[table] + supply.cycle_mask[table]) + 1)
        slots = np.flatnonzero(supply.pattern[cycle] == pool)
        turns = ((count >> int(supply.cycle_bits[table])) + 1) * len(slots)
        turn = self._turns(place, q, turns)
        cycles, rank = np.divmod(turn, len(slots))
        number = (cycles << int(supply.cycle_bits[table])) + slots[rank]
        return number[number < count]

    def _turns(self, place: tuple[int, int, int], q: int, count: int) -> NDArray[np.int64]:
        """Numbers, among the first `count` visits to a pool, of those to one of its slides."""
        supply, (slide, pool, patient) = self._supply, place
        first_patient, first_slide = int(supply.patient_at[pool]), int(supply.slide_at[patient])
        patients = int(supply.patient_at[pool + 1]) - first_patient
        slides = int(supply.slide_at[patient + 1]) - first_slide
        length, block = int(supply.stay[pool]), int(supply.block[pool])
        # A block may be begun and its stays cut short by the end: count them all, what is past it is dropped later.
        stays = (count // (block * length) + 1) * block
        turns_through = np.arange(stays // (patients * slides) + 1, dtype=np.int64)
        ones = np.ones_like(turns_through)
        keys = subkeys(self._keys["slide"], ones * q, ones * patient, turns_through)
        rounds = turns_through * slides + unpermute_many(keys, ones * (slide - first_slide), ones * slides)
        keys = subkeys(self._keys["patient"], ones * q, ones * pool, rounds)
        stay = rounds * patients + unpermute_many(keys, ones * (patient - first_patient), ones * patients)
        number, within_block = np.divmod(stay, block)
        first = within_block // self._spec.resident_slides * self._spec.resident_slides
        at_once = np.minimum(self._spec.resident_slides, block - first)
        begin = number * block * length + first * length + within_block - first
        turn: NDArray[np.int64] = (begin[:, None] + np.arange(length) * at_once[:, None]).reshape(-1)
        return turn[turn < count]

    def _slots(
        self, numbers: NDArray[np.int64], starts: NDArray[np.int64], before: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The samples of visits of a magnification."""
        spec = self._spec
        turns, b = spec.tiles_per_visit, spec.tiles_per_micro_batch
        group = np.searchsorted(before, numbers, side="right") - 1
        position = starts[group] + numbers - before[group]
        row, column = np.divmod(position, spec.replicas)
        replica = unpermute_many(subkeys(self._keys["replica"], group), column, np.full(len(group), spec.replicas))
        order_keys = subkeys(self._keys["order"], group[:, None], replica[:, None], np.arange(b)[None, :])
        order = np.argsort(order_keys, axis=1, kind="stable")
        slot = np.argmax(order == row[:, None], axis=1)
        steps = group[:, None] * turns + np.arange(turns)
        samples: NDArray[np.int64] = (steps * spec.replicas + replica[:, None]) * b + slot[:, None]
        return samples.reshape(-1)
