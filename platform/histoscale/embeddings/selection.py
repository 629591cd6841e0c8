"""Which slides of an index are embedded. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import EmbeddingError
from histoscale.slides.catalogue import Catalogue

_SHOWN = 5


@dataclass(frozen=True)
class Selection:
    """What of an index is wanted.

    Attributes:
        slide_ids: These alone; empty for all.
        where: Column of the index -> the value that it must have.
        limit: The first so many of them, by id; None for all.
    """

    slide_ids: tuple[str, ...] = ()
    where: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None

    @classmethod
    def parse(cls, slides: str | None, where: Sequence[str], limit: int | None) -> Self:
        """What a command line says.

        Args:
            slides: Slide ids with commas between.
            where: Each `column=value`.
            limit: As the field.

        Raises:
            EmbeddingError: A condition has another form, or the limit leaves nothing.
        """
        pairs = [text.partition("=") for text in where]
        odd = [text for text, (column, equals, _) in zip(where, pairs, strict=True) if not column or not equals]
        if odd:
            raise EmbeddingError("--where is no condition", value=odd[0], expected="column=value")
        if limit is not None and limit < 1:
            raise EmbeddingError("--limit leaves no slide", value=limit, expected="1 or more")
        ids = tuple(dict.fromkeys(text.strip() for text in (slides or "").split(",") if text.strip()))
        return cls(ids, {column: value for column, _, value in pairs}, limit)

    def rows(self, catalogue: Catalogue, withdrawn: Collection[str]) -> list[int]:
        """The rows of the wanted slides that are not withdrawn, ascending.

        Raises:
            EmbeddingError: There is no such slide, column or value, or nothing is left.
        """
        unknown = [name for name in self.slide_ids if not catalogue.has(name)]
        if unknown:
            raise EmbeddingError(
                f"{len(unknown)} of {len(self.slide_ids)} slides are not in the index",
                value=", ".join(unknown[:_SHOWN]),
                expected="slide ids of 32 hexadecimal digits, of the index's current snapshot",
                remedy="index them first, or take their ids from the protected part of the index",
            )
        wanted = np.zeros(len(catalogue), np.bool_) if self.slide_ids else np.ones(len(catalogue), np.bool_)
        wanted[[catalogue.row_of(name) for name in self.slide_ids]] = True
        for column, value in self.where.items():
            wanted &= _has_value(catalogue, column, value)
        wanted[[catalogue.row_of(name) for name in withdrawn if catalogue.has(name)]] = False
        rows: list[int] = np.flatnonzero(wanted).tolist()
        if not rows:
            raise EmbeddingError(
                "no slide of the index is wanted",
                value=f"{len(catalogue)} slides, {len(withdrawn)} of them withdrawn",
                expected="one slide or more",
                remedy="loosen --slides and --where",
            )
        return rows[: self.limit]


def _has_value(catalogue: Catalogue, column: str, value: str) -> NDArray[np.bool_]:
    if column not in catalogue.columns:
        raise EmbeddingError(
            "the index has no such column",
            value=column,
            expected=f"one of {', '.join(catalogue.columns)}" if catalogue.columns else "an index with columns",
            remedy="correct --where, or index the slides again with this column in --strata",
        )
    place = catalogue.columns.index(column)
    values = catalogue.values[place]
    if value not in values:
        shown = ", ".join(map(repr, values[:_SHOWN])) + (" and more" if len(values) > _SHOWN else "")
        raise EmbeddingError(f"no slide has this {column}", value=value, expected=f"one of {shown}")
    has: NDArray[np.bool_] = catalogue.rows["strata"][:, place] == values.index(value)
    return has
