"""What a run draws from where, before it starts: counted from the tables of the plan."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoscale.sampling.places import coarsest_scan_mpp
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.supply import Strata, Supply


@dataclass(frozen=True)
class StratumReport:
    """One stratum at one magnification.

    Attributes:
        name: Such as `site=A, stain=H&E`.
        share: Its share of the magnification's tiles.
        patients: Patients with a slide that serves the magnification.
        slides: Slides that serve it.
        tiles: Tiles of the run.
        tiles_per_slide: Mean over the slides; of these, each place is drawn once before any comes again.
        most_tiles_per_slide: Of a slide of the patient with the fewest: patients are visited alike. Copied slides give
            the tiles of whole stays, so that a short run takes none from many of them.
    """

    name: str
    share: float
    patients: int
    slides: int
    tiles: float
    tiles_per_slide: float
    most_tiles_per_slide: float


@dataclass(frozen=True)
class MagnificationReport:
    """One magnification, or one bin of a range of scales.

    Attributes:
        mpp: Its finest scale.
        coarsest_mpp: Its coarsest scale, the same where it is one scale.
        share: Its share of all tiles.
        slides: Slides that serve it.
        tiles: Tiles of the run.
        strata: Its strata, in the order of their codes.
    """

    mpp: float
    coarsest_mpp: float
    share: float
    slides: int
    tiles: float
    strata: tuple[StratumReport, ...]


@dataclass(frozen=True)
class PlanReport:
    """The whole run.

    Attributes:
        magnifications: In the order of the mix.
        serves: Column -> value -> how many slides with it serve each magnification. Where only one scanner serves the
            finest scale, scale and scanner are confounded.
    """

    magnifications: tuple[MagnificationReport, ...]
    serves: Mapping[str, Mapping[str, tuple[int, ...]]]


def make_report(
    spec: PlanSpec,
    rows: NDArray[Any],
    columns: Sequence[str],
    values: Sequence[Sequence[str]],
    strata: Strata,
    supply: Supply,
) -> PlanReport:
    """The report of a plan that is made of these."""
    total = sum(scale.share for scale in spec.magnifications)
    found = []
    for q, scale in enumerate(spec.magnifications):
        share = scale.share / total
        tiles = spec.tiles * share
        pools = _pools(int(supply.table_of[q]), tiles, strata, supply, spec.tiles_per_visit)
        slides = sum(pool.slides for pool in pools)
        found.append(MagnificationReport(scale.finest_mpp, scale.coarsest_mpp, share, slides, tiles, pools))
    return PlanReport(tuple(found), _serves(spec, rows, columns, values))


def _pools(table: int, tiles: float, strata: Strata, supply: Supply, turns: int) -> tuple[StratumReport, ...]:
    found = []
    for pool in range(supply.pool_at[table], supply.pool_at[table + 1]):
        ends = supply.slide_at[supply.patient_at[pool] : supply.patient_at[pool + 1] + 1]
        patients, slides, fewest = len(ends) - 1, int(ends[-1] - ends[0]), int(np.diff(ends).min())
        share = float(supply.slots[pool] / (supply.cycle_mask[table] + 1))
        own = tiles * share
        stratum, most = supply.stratum[pool], own / patients / fewest
        if strata.copied[stratum]:
            stay_tiles = float(supply.stay[pool] * turns)
            most = min(own, math.ceil(most / stay_tiles) * stay_tiles)
        found.append(StratumReport(strata.names[stratum], share, patients, slides, own, own / slides, most))
    return tuple(found)


def _serves(
    spec: PlanSpec, rows: NDArray[Any], columns: Sequence[str], values: Sequence[Sequence[str]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    served = [rows["mpp"] <= coarsest_scan_mpp(scale.finest_mpp, spec.max_upsample) for scale in spec.magnifications]
    found = {}
    for column, (name, names) in enumerate(zip(columns, values, strict=True)):
        codes = rows["strata"][:, column]
        counts_QV = [np.bincount(codes[which], minlength=len(names)).tolist() for which in served]
        found[name] = {value: tuple(counts) for value, *counts in zip(names, *counts_QV, strict=True)}
    return found


def fingerprint(spec: PlanSpec, snapshot_id: str, exclusions: Mapping[int, int]) -> str:
    """16 hex digits that name a plan: everything that decides it."""
    content = {"spec": asdict(spec), "snapshot": snapshot_id, "exclusions": sorted(exclusions.items())}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
