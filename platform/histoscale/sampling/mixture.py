"""How many tiles of each magnification a group of steps holds: exact, random access, integers only.

Every group holds the floor or the ceiling of `share * tiles` of each magnification, never less or more. The
fractions are dealt by systematic sampling: their cumulative sums, shifted by an offset that all magnifications
share, gain a tile wherever they pass a whole number. (Rounding each cumulative share on its own would let
neighbouring bounds cross when a share is below one tile.) Offsets walk a lattice of one million points, so
after a million groups every share is exact, and sums over groups are sums of floors of a straight line.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

PARTS = 1_000_000
_STRIDE = 618_033  # golden section of PARTS and coprime to it: offsets of neighbouring groups lie far apart
_KEPT_GROUPS = 256


def parts_per_million(shares: Sequence[float]) -> tuple[int, ...]:
    """Positive shares as integers that sum to exactly one million: the largest remainders are rounded up."""
    total = sum(shares)
    exact = [share / total * PARTS for share in shares]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])
    for index in by_remainder[: PARTS - sum(parts)]:
        parts[index] += 1
    return tuple(parts)


class Mixture:
    """Positions 0 .. tiles - 1 of a group, cut into one run of neighbours for each magnification."""

    def __init__(self, shares: Sequence[float], tiles: int) -> None:
        cumulative = [0, *accumulate(parts_per_million(shares))]
        self._whole = [tiles * part // PARTS for part in cumulative]
        self._rest = [tiles * part % PARTS for part in cumulative]
        self._cuts: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def cut(self, group: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`bounds` and `before` of a group as arrays; those of the groups asked for last are kept."""
        if group not in self._cuts:
            if len(self._cuts) >= _KEPT_GROUPS:
                self._cuts.clear()
            self._cuts[group] = np.array(self.bounds(group), np.int64), np.array(self.before(group), np.int64)
        return self._cuts[group]

    def bounds(self, group: int) -> list[int]:
        """Where the runs of this group begin and end: Q + 1 integers, from 0 to `tiles`."""
        offset = group * _STRIDE % PARTS
        return [whole + (rest + offset) // PARTS for whole, rest in zip(self._whole, self._rest, strict=True)]

    def starts(self, q: int, groups: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of one magnification in groups 0 .. groups - 1: where its run begins, and how many tiles it had before.

        Both have an entry for `groups` itself; so many groups lie in memory.
        """
        offsets = np.arange(groups + 1, dtype=np.int64) * _STRIDE % PARTS
        first, last = (self._whole[edge] + (self._rest[edge] + offsets) // PARTS for edge in (q, q + 1))
        return first, np.concatenate([[0], np.cumsum(last - first)[:-1]])

    def before(self, group: int) -> list[int]:
        """How many tiles of each magnification all earlier groups hold: Q integers."""
        wraps = _floor_sum(group, 0)
        sums = [
            group * whole + _floor_sum(group, rest) - wraps for whole, rest in zip(self._whole, self._rest, strict=True)
        ]
        return [after - before for before, after in pairwise(sums)]


def _floor_sum(count: int, shift: int) -> int:
    """Sum of (shift + _STRIDE * g) // PARTS over g < count, in O(log PARTS) as in Euclid's algorithm."""
    slope, modulus, total = _STRIDE, PARTS, 0
    while count > 0:
        total += count * (count - 1) // 2 * (slope // modulus) + count * (shift // modulus)
        slope, shift = slope % modulus, shift % modulus
        top = slope * count + shift
        count, shift = divmod(top, modulus)
        slope, modulus = modulus, slope
    return total
