"""Counter-based randomness: every draw is a pure function of a seed and of what it is for.

No generator has a state, so a draw is the same on every machine, at every world size and in every order.
The mixing function is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), a bijection of 64-bit words with full avalanche.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_FEISTEL_ROUNDS = 6


def key(seed: int, *words: int | str) -> int:
    """64-bit key for one purpose, named by `words`: `key(seed, "crops", step)`."""
    text = "\x1f".join([str(seed), *(f"{type(word).__name__}:{word}" for word in words)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(draw_key: int, ids: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` uniform numbers for each id: float64 [len(ids), count] in [0, 1), each row a function of its id alone."""
    rows_N1 = _mix(np.asarray(ids).astype(np.uint64)[:, None] ^ np.uint64(draw_key))
    columns_1C = np.arange(1, count + 1, dtype=np.uint64)[None, :] * np.uint64(_GOLDEN_GAMMA)
    words_NC = _mix(rows_N1 + columns_1C)
    return (words_NC >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(draw_key: int, index: int, length: int) -> int:
    """Where a keyed permutation of `range(length)` sends `index`: O(1), no table.

    A Feistel network over the smallest even number of bits that holds `length`, walked along its cycle until
    the value lies in range (fewer than four rounds of it on average).
    """
    if length <= 1:
        return 0
    half_bits = ((length - 1).bit_length() + 1) // 2
    half_mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & half_mask
        for round_number in range(_FEISTEL_ROUNDS):
            word = _mix_int(draw_key ^ (right + ((round_number + 1) << 40)))
            left, right = right, left ^ (word & half_mask)
        value = (left << half_bits) | right
        if value < length:
            return value


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _mix_int(word: int) -> int:
    word &= _MASK_64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return word ^ (word >> 31)
