"""Which tiles of a plan are looked at at every checkpoint: the first of each magnification."""

from collections.abc import Callable, Sequence

from histoscale.sampling.plan import Plan, TilePlan

Mpp = float | tuple[float, float]

_MOST_LOOKED_AT = 32_768  # tiles, where a magnification is rare


def place_of(mpp: float, mix: Sequence[Mpp]) -> int:
    """Which magnification of a mix a scale belongs to, a range being one."""
    for place, entry in enumerate(mix):
        finest, coarsest = entry if isinstance(entry, tuple) else (entry, entry)
        if finest <= mpp <= coarsest:
            return place
    return min(range(len(mix)), key=lambda place: abs(_finest(mix[place]) - mpp))


def first_tiles(
    plan: Plan, mix: Sequence[Mpp], count: int, fits: Callable[[TilePlan], bool] = lambda _: True
) -> list[TilePlan]:
    """The gallery: by magnification, within one in the order of the plan.

    Args:
        plan: The plan without exclusions: a slide that leaves the run must change no other tile.
        mix: Its magnifications.
        count: Tiles in all, in equal parts of each magnification.
        fits: Whether a tile may be in the gallery; asked once for each, in the order of the plan.
    """
    wanted = max(1, count // len(mix))
    found: list[list[TilePlan]] = [[] for _ in mix]
    for sample_id in range(min(plan.spec.tiles, _MOST_LOOKED_AT)):
        if all(len(tiles) >= wanted for tiles in found):
            break
        tile = plan.tile(sample_id)
        tiles = found[place_of(tile.mpp, mix)]
        if len(tiles) < wanted and fits(tile):
            tiles.append(tile)
    return [tile for tiles in found for tile in tiles]


def asking_tiles(tiles: Sequence[TilePlan], mix: Sequence[Mpp], count: int) -> list[int]:
    """Places of the tiles whose neighbours are looked for, ascending.

    Of each magnification they are the first tiles of different slides, as far as it has so many, so that a tile which
    leaves the gallery is replaced and moves no other.

    Args:
        tiles: The gallery.
        mix: Its magnifications.
        count: How many are wanted, in equal parts of each magnification.
    """
    asking: list[int] = []
    for place in range(len(mix)):
        own = [at for at, tile in enumerate(tiles) if place_of(tile.mpp, mix) == place]
        first_of: dict[int, int] = {}
        for at in own:
            first_of.setdefault(tiles[at].row, at)
        different = list(first_of.values())
        share = count * (place + 1) // len(mix) - count * place // len(mix)
        asking += [*different, *(at for at in own if at not in different)][:share]
    return sorted(asking)


def _finest(mpp: Mpp) -> float:
    return mpp[0] if isinstance(mpp, tuple) else mpp
