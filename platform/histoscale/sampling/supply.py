"""Which slides serve a magnification, by stratum and patient: flat tables, made once from the columns of the index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import PlanError
from histoscale.sampling.places import coarsest_scan_mpp
from histoscale.sampling.rows import COPIED
from histoscale.sampling.shares import MOST_STRATA, capped, cycle, whole_slots
from histoscale.sampling.spec import PlanSpec
from histoscale.seeding import key, uniforms
from histoscale.units import describe_mpp

_LEAST_SHARE = 1e-12  # of the largest


@dataclass(frozen=True)
class Strata:
    """The strata of an archive. Slides that are read from copies are strata of their own beside the others like them.

    Attributes:
        of_row: int32 [N], the stratum of each row.
        codes: uint32 [S, C], codes of each stratum in the C columns of `spec.balance`.
        weights: float64 [S], the product of the recipe's weights; 0 leaves a stratum out.
        names: How to call each stratum, such as `site=A, stain=H&E`, or `site=A, stain=H&E, copied`.
        whole: int32 [S], equal for the strata that the recipe takes for one.
        copied: bool [S], whether its slides are read from copies.
    """

    of_row: NDArray[np.int32]
    codes: NDArray[np.uint32]
    weights: NDArray[np.float64]
    names: tuple[str, ...]
    whole: NDArray[np.int32]
    copied: NDArray[np.bool_]


@dataclass(frozen=True)
class Supply:
    """Tables of all magnifications, one after the other; those that the same slides serve share theirs.

    A pool is a stratum among the slides that serve a magnification. Pools, patients and slides are numbered through
    all tables; `patient_at` and `slide_at` say where those of a pool and of a patient begin, and end with the total.

    Attributes:
        table_of: int64 [Q], the table of each magnification.
        cycle_at: int64 [E], where the cycle of each table begins in `pattern` and `rank`.
        cycle_mask: int64 [E], slots of each cycle less one; slots are a power of two.
        cycle_bits: int64 [E], its logarithm.
        pattern: int32, the pool of each slot.
        rank: int32, slots of the same pool before it in the cycle.
        pool_at: int64 [E + 1], first pool of each table.
        slots: int64 [K], slots of each pool.
        stratum: int32 [K], the stratum of each pool.
        stay: int64 [K], visits to a slide in each of its stays: 1, but for copied slides.
        block: int64 [K], from each multiple of this number on, that many stays in a row are at different slides.
        patient_at: int64 [K + 1].
        slide_at: int32 [P + 1].
        rows: int32, rows of the catalogue.
    """

    table_of: NDArray[np.int64]
    cycle_at: NDArray[np.int64]
    cycle_mask: NDArray[np.int64]
    cycle_bits: NDArray[np.int64]
    pattern: NDArray[np.int32]
    rank: NDArray[np.int32]
    pool_at: NDArray[np.int64]
    slots: NDArray[np.int64]
    stratum: NDArray[np.int32]
    stay: NDArray[np.int64]
    block: NDArray[np.int64]
    patient_at: NDArray[np.int64]
    slide_at: NDArray[np.int32]
    rows: NDArray[np.int32]


def find_strata(spec: PlanSpec, rows: NDArray[Any], columns: Sequence[str], values: Sequence[Sequence[str]]) -> Strata:
    """The strata of all rows.

    Args:
        spec: Which columns make the strata, and the weights.
        rows: Structured array with the fields `strata` and `flags` of the catalogue.
        columns: Names of the columns.
        values: What the codes of each column stand for.

    Raises:
        PlanError: An unknown column or value, or far too many strata.
    """
    codes_NC = rows["strata"]
    of_row = np.zeros(len(rows), np.int64)
    codes_SC = np.zeros((1, 0), np.uint32)
    weights_S = np.ones(1)
    for name in spec.balance:
        if name not in columns:
            raise PlanError(
                "data.balance names a column that the index does not have",
                value=name,
                expected=", ".join(columns) or "no column at all: the slides were indexed without strata",
                remedy="correct data.balance, or index the slides with a sidecar that holds this column",
            )
        column = columns.index(name)
        by_value = _weights(spec, name, values[column])
        combined = (of_row << 32) | codes_NC[:, column]
        found, of_row = np.unique(combined, return_inverse=True)
        if len(found) > MOST_STRATA:
            raise PlanError(
                "the columns of data.balance cut the archive into too many strata",
                value=len(found),
                expected=f"at most {MOST_STRATA}",
                remedy=f"take {name} out of data.balance",
            )
        before, codes = found >> 32, (found & 0xFFFFFFFF).astype(np.uint32)
        codes_SC = np.concatenate([codes_SC[before], codes[:, None]], axis=1)
        weights_S = weights_S[before] * by_value[codes]
    names = tuple(_name(spec.balance, stratum, columns, values) for stratum in codes_SC.tolist())
    copied_N = (rows["flags"] & COPIED) != 0
    found, of_row = np.unique(of_row * 2 + copied_N, return_inverse=True)
    whole, copied = found // 2, found % 2 == 1
    names = tuple(names[stratum] + ", copied" * apart for stratum, apart in zip(whole, copied.tolist(), strict=True))
    return Strata(of_row.astype(np.int32), codes_SC[whole], weights_S[whole], names, whole.astype(np.int32), copied)


def _weights(spec: PlanSpec, name: str, values: Sequence[str]) -> NDArray[np.float64]:
    given = spec.weights.get(name, {})
    if unknown := sorted(set(given) - set(values)):
        raise PlanError(
            f"data.weights.{name} names values that no slide has",
            value=", ".join(unknown),
            expected=", ".join(values),
            remedy="correct the names, or take them out",
        )
    return np.array([given.get(value, 1.0) for value in values])


def _name(balance: Sequence[str], codes: list[int], columns: Sequence[str], values: Sequence[Sequence[str]]) -> str:
    parts = [f"{name}={values[columns.index(name)][code]}" for name, code in zip(balance, codes, strict=True)]
    return ", ".join(parts) or "all slides"


class _Table:
    """One table: the slides up to some scale, sorted by stratum, patient and row."""

    def __init__(
        self,
        rows: NDArray[np.int32],
        strata: NDArray[np.int32],
        patients: NDArray[np.uint32],
        whole_S: NDArray[np.int32],
    ) -> None:
        new_pool = np.ones(len(rows), bool)
        new_pool[1:] = strata[1:] != strata[:-1]
        new_patient = new_pool.copy()
        new_patient[1:] |= patients[1:] != patients[:-1]
        self.rows = rows
        self.slide_at = np.flatnonzero(new_patient).astype(np.int32)
        self.patient_at = np.flatnonzero(new_pool[self.slide_at])
        self.stratum = strata[self.slide_at[self.patient_at]]
        slides_of_patient = np.diff(self.slide_at, append=len(rows))
        self.slides = np.diff(self.slide_at[self.patient_at], append=len(rows))
        # The slides of a pool whose patients all had as few slides as the one with the fewest: no slide is visited
        # more often than one of that patient.
        patients_of_pool = np.diff(self.patient_at, append=len(self.slide_at))
        self.evened = patients_of_pool * np.minimum.reduceat(slides_of_patient, self.patient_at)
        # A round visits each patient once. Rounds whose number divides that of every patient's slides lie within one
        # turn of each patient through the slides.
        self.block = patients_of_pool * np.gcd.reduceat(slides_of_patient, self.patient_at)
        self.whole = whole_S[self.stratum]
        self.part = self._parts(patients[self.slide_at], patients_of_pool, slides_of_patient)

    def _parts(
        self,
        patients_P: NDArray[np.uint32],
        patients_of_pool: NDArray[np.int64],
        slides_of_patient: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Part of each pool in its stratum of the recipe, whose patients weigh alike, and so the slides of each."""
        if len(np.unique(self.whole)) == len(self.whole):
            return np.ones(len(self.whole))
        same_patient = (np.repeat(self.whole, patients_of_pool).astype(np.int64) << 32) | patients_P
        which = np.unique(same_patient, return_inverse=True)[1]
        weights_P = slides_of_patient / np.bincount(which, slides_of_patient)[which]
        weights_K = np.bincount(np.repeat(np.arange(len(self.whole)), patients_of_pool), weights_P)
        parts_K: NDArray[np.float64] = weights_K / np.bincount(self.whole, weights_K)[self.whole]
        return parts_K


def make_supply(spec: PlanSpec, rows: NDArray[Any], strata: Strata) -> Supply:
    """Tables of every magnification of the mix.

    Raises:
        PlanError: No slide serves a magnification, there are fewer slides than `slides`, or `max_tiles_per_slide` is
            too low for the run.
    """
    weighted = _drawn_from(spec, strata)
    sort_key = (strata.of_row.astype(np.int64) << 32) | rows["patient"]
    order = np.argsort(sort_key, kind="stable").astype(np.int32)
    del sort_key
    order = order[weighted[order]]
    slide_mpp, stratum_of, patient_of = rows["mpp"][order], strata.of_row[order], rows["patient"][order]
    tables: dict[int, _Table] = {}
    counts = []
    for scale in spec.magnifications:
        served = slide_mpp <= coarsest_scan_mpp(scale.finest_mpp, spec.max_upsample)
        count = int(np.count_nonzero(served))  # fewer slides serve finer scales: equal counts are equal sets
        if not count:
            raise _nothing_serves(spec, scale.finest_mpp, slide_mpp)
        if count not in tables:
            tables[count] = _Table(order[served], stratum_of[served], patient_of[served], strata.whole)
        counts.append(count)
    headroom = _headroom(spec, [tables[count] for count in counts])
    table_of = np.array([list(tables).index(count) for count in counts])
    return _join(spec, list(tables.values()), table_of, strata, headroom)


def _drawn_from(spec: PlanSpec, strata: Strata) -> NDArray[np.bool_]:
    """Which rows are drawn from: bool [N].

    Rows are in the order of keyed hashes, so the first ones are a random part, and a smaller part lies in a larger one.
    """
    drawn: NDArray[np.bool_] = strata.weights[strata.of_row] > 0.0
    if spec.slides is None:
        return drawn
    count = int(np.count_nonzero(drawn))
    if count < spec.slides:
        raise PlanError(
            "data.slides asks for more slides than there are",
            value=spec.slides,
            expected=f"at most the {count} of the index that data.weights leaves in",
            remedy="lower it, or add slides",
        )
    return drawn & (np.cumsum(drawn) <= spec.slides)


def _headroom(spec: PlanSpec, tables: Sequence[_Table]) -> float:
    """How many times its part of the slides a pool may get, so that no slide gives more than its cap.

    A slide that serves everything gives the sum over magnifications; that many times the mean it may reach.
    """
    if spec.max_tiles_per_slide is None:
        return np.inf
    total = sum(scale.share for scale in spec.magnifications)
    mean_tiles = sum(
        spec.tiles * scale.share / total / int(table.evened.sum())
        for scale, table in zip(spec.magnifications, tables, strict=True)
    )
    if mean_tiles > spec.max_tiles_per_slide:
        raise PlanError(
            "data.max_tiles_per_slide is too low for this run, even if all slides were used alike",
            value=spec.max_tiles_per_slide,
            expected=f"{int(np.ceil(mean_tiles))} or more",
            remedy="raise it, add slides, shorten schedule.images, or lower the shares of scales that few slides serve",
        )
    return spec.max_tiles_per_slide / mean_tiles


def _join(spec: PlanSpec, tables: list[_Table], table_of: NDArray[np.int64], strata: Strata, headroom: float) -> Supply:
    pools = np.cumsum([0, *(len(table.stratum) for table in tables)])
    patients = np.cumsum([0, *(len(table.slide_at) for table in tables)])
    slides = np.cumsum([0, *(len(table.rows) for table in tables)])
    all_slots, patterns, ranks = [], [], []
    for table, first_pool in zip(tables, pools, strict=False):
        shares = _shares(spec, table, strata.weights)
        if np.isfinite(headroom):
            shares = capped(shares, headroom * table.evened / table.evened.sum())
        slots = whole_slots(shares)
        phases = uniforms(key(spec.seed, "plan", "phase"), table.stratum.astype(np.int64), 1)[:, 0]
        pattern, rank = cycle(slots, phases)
        all_slots.append(slots)
        patterns.append(pattern + np.int32(first_pool))
        ranks.append(rank)
    lengths = np.array([len(pattern) for pattern in patterns])
    stratum = np.concatenate([table.stratum for table in tables])
    return Supply(
        table_of=table_of,
        cycle_at=np.cumsum(lengths) - lengths,
        cycle_mask=lengths - 1,
        cycle_bits=np.array([int(length).bit_length() - 1 for length in lengths]),
        pattern=np.concatenate(patterns),
        rank=np.concatenate(ranks),
        pool_at=pools,
        slots=np.concatenate(all_slots),
        stratum=stratum,
        stay=np.where(strata.copied[stratum], spec.resident_visits, 1),
        block=np.concatenate([table.block for table in tables]),
        patient_at=np.append(
            np.concatenate([table.patient_at + first for table, first in zip(tables, patients, strict=False)]),
            patients[-1],
        ),
        slide_at=np.append(
            np.concatenate([table.slide_at + first for table, first in zip(tables, slides, strict=False)]), slides[-1]
        ).astype(np.int32),
        rows=np.concatenate([table.rows for table in tables]),
    )


def _shares(spec: PlanSpec, table: _Table, weights_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of the pools of a table; the smallest stay positive at any temperature."""
    _, first, which = np.unique(table.whole, return_index=True, return_inverse=True)
    slides_W = np.bincount(which, table.slides)
    sizes_W = (slides_W / slides_W.max()) ** (1.0 / spec.temperature) * weights_S[table.stratum[first]]
    sizes_W = np.maximum(sizes_W, _LEAST_SHARE * sizes_W.max())
    shares_W = sizes_W / sizes_W.sum()
    shares_K: NDArray[np.float64] = shares_W[which] * table.part
    return shares_K


def _nothing_serves(spec: PlanSpec, mpp: float, slide_mpp: NDArray[np.float64]) -> PlanError:
    scans = f"{len(slide_mpp)} slides at {slide_mpp.min():g} to {slide_mpp.max():g} um/px" if len(slide_mpp) else ""
    return PlanError(
        f"no slide serves {describe_mpp(mpp)}",
        value=scans or "no slides",
        expected=f"a slide at {mpp * spec.max_upsample:g} um/px or finer",
        remedy="add slides, take this magnification out of data.mix, or look for weights of 0 in data.weights",
    )
