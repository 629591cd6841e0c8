"""Counter-based randomness: every draw is a pure function of a seed and of what it is for.

No generator has a state, so a draw is the same on every machine, at every world size and in every order.
The mixing function is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), a bijection of 64-bit words with full avalanche.
"""

import math
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_FEISTEL_ROUNDS = 8
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_GAMMA, _ONE = np.uint64(_GOLDEN_GAMMA), np.uint64(1)


def key(seed: int, *words: int | str) -> int:
    """64-bit key for one purpose, named by `words`: `key(seed, "crops", step)`."""
    text = "\x1f".join([str(seed), *(f"{type(word).__name__}:{word}" for word in words)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def subkey(draw_key: int, *words: int) -> int:
    """64-bit key below another key, one for each sequence of whole numbers: far cheaper than `key`."""
    for word in words:
        draw_key = _mix_int((draw_key ^ (word & _MASK_64)) + _GOLDEN_GAMMA)
    return draw_key


def subkeys(draw_key: int, *words: NDArray[np.integer]) -> NDArray[np.uint64]:
    """`subkey` of each column of words: uint64, the shape of the words broadcast together."""
    keys: NDArray[np.uint64] = np.full(1, draw_key, np.uint64)
    for word in words:
        keys = _mix((keys ^ word.astype(np.uint64)) + _GAMMA)
    return keys


def uniforms(draw_key: int, ids: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` uniform numbers for each id: float64 [len(ids), count] in [0, 1), each row a function of its id alone."""
    rows_N1 = _mix(np.asarray(ids).astype(np.uint64)[:, None] ^ np.uint64(draw_key))
    columns_1C = np.arange(1, count + 1, dtype=np.uint64)[None, :] * _GAMMA
    words_NC = _mix(rows_N1 + columns_1C)
    return (words_NC >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniforms_below(keys: NDArray[np.uint64], number: int, count: int) -> NDArray[np.float64]:
    """The row of `uniforms(key, [number], count)` for each of N keys: float64 [N, count]."""
    rows_N1 = _mix(np.uint64(number) ^ keys)[:, None]
    words_NC = _mix(rows_N1 + np.arange(1, count + 1, dtype=np.uint64)[None, :] * _GAMMA)
    return (words_NC >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(draw_key: int, index: int, length: int) -> int:
    """Where a keyed permutation of `range(length)` sends `index`: O(1), no table; `length` up to 2**48.

    A keyed rotation, which makes every image of an index equally likely however short the range, and a Feistel
    network over a rectangle of whole numbers that is nearly square and hardly larger than `length`, walked along
    its cycle until the value lies in range (one step, unless `length` is tiny).
    """
    width = math.isqrt(max(length - 1, 0)) + 1
    height = -(-length // width)
    value = (index + (_mix_int(draw_key + _round(_FEISTEL_ROUNDS)) >> 1)) % length
    while True:
        left, right = divmod(value, height)
        for turn in range(0, _FEISTEL_ROUNDS, 2):
            left = (left + (_mix_int(draw_key + _round(turn) ^ right) >> 1)) % width
            right = (right + (_mix_int(draw_key + _round(turn + 1) ^ left) >> 1)) % height
        value = left * height + right
        if value < length:
            return value


def permute_many(keys: NDArray[np.uint64], indices: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`permute` of N indices, each under its own key and in its own range: int64 [N]."""
    ranges = lengths.astype(np.uint64)
    widths = np.ceil(np.sqrt(lengths)).astype(np.uint64)
    heights = (ranges + widths - _ONE) // widths
    rotations = _mix(keys + np.uint64(_round(_FEISTEL_ROUNDS))) >> _ONE
    values = _through_feistel(keys, (indices.astype(np.uint64) + rotations) % ranges, widths, heights)
    while (beyond := np.flatnonzero(values >= ranges)).size:
        values[beyond] = _through_feistel(keys[beyond], values[beyond], widths[beyond], heights[beyond])
    return values.astype(np.int64)


def unpermute_many(
    keys: NDArray[np.uint64], values: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The indices that `permute_many` sends to N values: int64 [N]."""
    ranges = lengths.astype(np.uint64)
    widths = np.ceil(np.sqrt(lengths)).astype(np.uint64)
    heights = (ranges + widths - _ONE) // widths
    rotations = _mix(keys + np.uint64(_round(_FEISTEL_ROUNDS))) >> _ONE
    before = _back_through_feistel(keys, values.astype(np.uint64), widths, heights)
    while (beyond := np.flatnonzero(before >= ranges)).size:
        before[beyond] = _back_through_feistel(keys[beyond], before[beyond], widths[beyond], heights[beyond])
    return ((before + ranges - rotations % ranges) % ranges).astype(np.int64)


def _through_feistel(
    keys: NDArray[np.uint64], values: NDArray[np.uint64], widths: NDArray[np.uint64], heights: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = np.divmod(values, heights)
    for turn in range(0, _FEISTEL_ROUNDS, 2):
        # Half a word: a sum that wrapped around would not be a bijection.
        left = (left + (_mix(keys + np.uint64(_round(turn)) ^ right) >> _ONE)) % widths
        right = (right + (_mix(keys + np.uint64(_round(turn + 1)) ^ left) >> _ONE)) % heights
    return left * heights + right


def _back_through_feistel(
    keys: NDArray[np.uint64], values: NDArray[np.uint64], widths: NDArray[np.uint64], heights: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = np.divmod(values, heights)
    for turn in reversed(range(0, _FEISTEL_ROUNDS, 2)):
        right = (right + heights - (_mix(keys + np.uint64(_round(turn + 1)) ^ left) >> _ONE) % heights) % heights
        left = (left + widths - (_mix(keys + np.uint64(_round(turn)) ^ right) >> _ONE) % widths) % widths
    return left * heights + right


def _round(number: int) -> int:
    return (number + 1) * _GOLDEN_GAMMA & _MASK_64


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of every word; `words` is overwritten."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        words ^= words >> shift
        words *= factor
    words ^= words >> _SHIFTS[2]
    return words


def _mix_int(word: int) -> int:
    word &= _MASK_64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return word ^ (word >> 31)
