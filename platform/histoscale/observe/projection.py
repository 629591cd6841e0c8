"""What pictures compute of embeddings: principal components with a sign that stays, and nearest neighbours.

Shape suffixes: N points, D width, K components, Q queries.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Points on their principal components.

    Attributes:
        scores: float64 [N, K].
        share: Of the variance, what each component holds: float64 [K].
    """

    scores: FloatArray
    share: FloatArray


def principal_components(points_ND: NDArray[np.floating], count: int, guide_N: NDArray[np.floating]) -> Projection:
    """Project points on their first principal components.

    The sign of a component means nothing, and another checkpoint has other axes. So each is turned until its scores
    grow with a quantity of the points that no checkpoint changes.

    Args:
        points_ND: The points; fewer than `count` + 1 of them leave the last scores 0.
        count: K.
        guide_N: Such a quantity, for example the darkness of a tile.
    """
    centred_ND = points_ND.astype(np.float64) - points_ND.mean(axis=0, dtype=np.float64)
    u_NM, s_M, _ = np.linalg.svd(centred_ND, full_matrices=False)
    kept = min(count, len(s_M))
    scores_NK = np.zeros((len(points_ND), count))
    share_K = np.zeros(count)
    scores_NK[:, :kept] = u_NM[:, :kept] * s_M[:kept]
    total = float((s_M**2).sum())
    share_K[:kept] = s_M[:kept] ** 2 / total if total > 0.0 else 0.0
    along_K = scores_NK.T @ (guide_N - guide_N.mean())
    return Projection(scores_NK * np.where(along_K < 0.0, -1.0, 1.0), share_K)


def nearest(
    embeddings_ND: NDArray[np.floating], owners_N: NDArray[np.int64], queries_Q: NDArray[np.int64], count: int
) -> list[list[tuple[int, float]]]:
    """The points nearest to each query by cosine, among those of other owners: (point, cosine), nearest first.

    Args:
        embeddings_ND: The points.
        owners_N: Whose each of them is, such as the row of its slide.
        queries_Q: Which points ask.
        count: How many are wanted; fewer where there are no more.
    """
    lengths_N1 = np.linalg.norm(embeddings_ND.astype(np.float64), axis=1, keepdims=True)
    unit_ND = embeddings_ND / np.maximum(lengths_N1, 1e-12)
    found = []
    for query in queries_Q.tolist():
        cosines_N = unit_ND @ unit_ND[query]
        cosines_N[owners_N == owners_N[query]] = -np.inf
        order = np.argsort(-cosines_N, kind="stable")[:count]
        found.append([(int(place), float(cosines_N[place])) for place in order if np.isfinite(cosines_N[place])])
    return found


def most_different(maps_BHN: NDArray[np.floating], count: int) -> list[int]:
    """The heads whose attention differs most: from the mean of all first, then from those that are taken already.

    Args:
        maps_BHN: Attention of B images, H heads and N patches.
        count: How many heads are wanted.
    """
    shares_BHN = maps_BHN / np.maximum(maps_BHN.sum(axis=-1, keepdims=True), 1e-12)
    taken = [shares_BHN.mean(axis=1)]
    heads: list[int] = []
    while len(heads) < min(count, maps_BHN.shape[1]):
        distances = np.min([np.abs(shares_BHN - one[:, None]).sum(axis=-1).mean(axis=0) for one in taken], axis=0)
        distances[heads] = -1.0
        heads.append(int(distances.argmax()))
        taken.append(shares_BHN[:, heads[-1]])
    return heads
