"""Shares of strata: how large each is, and in which order the visits of a magnification go to them.

The order is a cycle of slots. Each stratum holds a whole number of them, as evenly spread as stride scheduling
puts them: its r-th slot wants to stand at (r + phase) / slots of the cycle, and slots are sorted by where they want
to stand. So every stretch of visits holds nearly the shares of the whole, and a visit's number leads to its stratum,
and to its number within that, by two look-ups.
"""

import numpy as np
from numpy.typing import NDArray

_LEAST_SLOTS = 1 << 16
_MOST_SLOTS = 1 << 22  # 32 MB for the two tables of a cycle
_SLOTS_PER_STRATUM = 64
_SLOTS_OF_THE_SMALLEST = 4
_DECIMALS = 6  # powers differ in their last bits between machines; slots must not

MOST_STRATA = _MOST_SLOTS // _SLOTS_PER_STRATUM


def capped(shares_S: NDArray[np.float64], caps_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of at most `caps_S`, by water-filling: what is cut goes to the others in proportion to their shares.

    Args:
        shares_S: Positive, of sum one.
        caps_S: Positive, of sum one or more.
    """
    by_cap = np.argsort(caps_S / shares_S, kind="stable")
    caps, shares = caps_S[by_cap], shares_S[by_cap]
    taken = np.concatenate([[0.0], np.cumsum(caps)[:-1]])
    left = np.cumsum(shares[::-1])[::-1]
    scales = (1.0 - taken) / left  # of all others, when that many are capped
    fits = np.flatnonzero(scales * shares <= caps)
    if not fits.size:  # the caps sum to exactly one, but for rounding
        evened_S: NDArray[np.float64] = caps_S / caps_S.sum()
        return evened_S
    capped_S: NDArray[np.float64] = np.minimum(caps_S, scales[fits[0]] * shares_S)
    return capped_S


def whole_slots(shares_S: NDArray[np.float64]) -> NDArray[np.int64]:
    """Positive shares as whole slots of a cycle, one or more each, by largest remainder; the sum is a power of two."""
    count = len(shares_S)
    shares_S = shares_S / shares_S.sum()
    wanted = max(
        _LEAST_SLOTS, _SLOTS_PER_STRATUM * count, min(_MOST_SLOTS, int(_SLOTS_OF_THE_SMALLEST / shares_S.min()))
    )
    total = 1 << (wanted - 1).bit_length()
    small_S = np.zeros(count, bool)
    while True:
        rest = (total - small_S.sum()) / shares_S[~small_S].sum()
        exact_S = np.round(np.where(small_S, 1.0, shares_S * rest), _DECIMALS)
        if not (exact_S < 1.0).any():
            break
        small_S |= exact_S < 1.0
    slots_S = np.floor(exact_S).astype(np.int64)
    by_remainder = np.argsort(np.round(slots_S - exact_S, _DECIMALS), kind="stable")
    slots_S[by_remainder[: total - slots_S.sum()]] += 1
    return slots_S


def cycle(slots_S: NDArray[np.int64], phases_S: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The order of a cycle of L slots: which stratum stands in each, and how many of its slots come before.

    Args:
        slots_S: Slots of each stratum, of sum L.
        phases_S: In [0, 1), what tells one cycle from another.

    Returns:
        Two tables, int32 [L].
    """
    stratum_L = np.repeat(np.arange(len(slots_S), dtype=np.int32), slots_S)
    first_S = np.cumsum(slots_S) - slots_S
    rank_L = (np.arange(len(stratum_L)) - first_S[stratum_L]).astype(np.int32)
    order_L = np.argsort((rank_L + phases_S[stratum_L]) / slots_S[stratum_L], kind="stable")
    return stratum_L[order_L], rank_L[order_L]
