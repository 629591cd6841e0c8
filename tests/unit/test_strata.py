import numpy as np
import pytest

from histoscale.errors import SlideIndexError
from histoscale.slides.likeness import LIKENESS_DTYPE, duplicates, look
from histoscale.slides.locate import LocatedSlide
from histoscale.slides.sidecar import Sidecar
from histoscale.slides.strata import gather_strata, parse_pattern
from histoscale.storage import ObjectInfo


def slides(*paths: str) -> tuple[LocatedSlide, ...]:
    return tuple(LocatedSlide(path, (ObjectInfo(path, 1, "e"),)) for path in paths)


def test_strata_come_from_tables_and_from_paths_the_tables_first() -> None:
    known = slides("north/HE/1.svs", "north/IHC/2.svs", "south/HE/3.svs", "south/HE/4.svs")
    first = Sidecar(values={"north/HE/1.svs": {"scanner": "a", "patient": "p1"}}, columns=("scanner",))
    second = Sidecar(
        values={
            path: {"scanner": "b", "site": "South"} for path in ("north/HE/1.svs", "south/HE/3.svs", "south/HE/4.svs")
        },
        columns=("scanner", "site"),
    )
    found = gather_strata(known, [first, second], parse_pattern("(?P<site>[^/]+)/(?P<stain>HE|IHC)/(?P<patient>2)?"))
    assert found.columns == ("scanner", "site", "stain")
    assert found.of == {
        "north/HE/1.svs": ("a", "South", "HE"),
        "north/IHC/2.svs": ("", "north", "IHC"),
        "south/HE/3.svs": ("b", "South", "HE"),
        "south/HE/4.svs": ("b", "South", "HE"),
    }
    assert found.patients == {"north/HE/1.svs": "p1", "north/IHC/2.svs": "2"}
    assert "svs" not in repr(found)


def test_without_tables_and_pattern_there_are_no_strata() -> None:
    assert gather_strata(slides("a.svs"), [], None).of == {"a.svs": ()}


@pytest.mark.parametrize("pattern", ["(", "[^/]+/.*", "(?P<slide>x)", "(?P<mpp>x)"])
def test_a_pattern_that_names_no_strata_is_refused(pattern: str) -> None:
    with pytest.raises(SlideIndexError, match=r"--pattern (is not a regular expression|names no strata).*\?P<site>"):
        parse_pattern(pattern)


def table(column: str, *values: str) -> Sidecar:
    return Sidecar(values={f"{n}.svs": {column: value} for n, value in enumerate(values)}, columns=(column,))


def test_columns_that_could_identify_slides_are_refused_without_their_values() -> None:
    known = slides(*(f"{n}.svs" for n in range(20_004)))
    for values, fault in (
        (["MRN1", "MRN2", "MRN3"], "site has another value for each of 3 slides"),
        (["MRN", "1", "MRN"], "site holds names of slides"),
        (["MRN", "1.svs", "MRN"], "site holds names of slides"),
        ([f"MRN{n // 2}" for n in range(20_004)], "site has 10002 values"),
    ):
        with pytest.raises(SlideIndexError, match=fault) as caught:
            gather_strata(known, [table("site", *values)], None)
        assert "MRN" not in str(caught.value)
    assert gather_strata(known[:1], [table("site", "north")], None).of["0.svs"] == ("north",)


def test_more_columns_than_a_catalogue_has_and_a_pattern_that_fits_nothing_are_refused() -> None:
    tables = [table(f"c{n}", "a", "a") for n in range(9)]
    with pytest.raises(SlideIndexError, match=r"too many strata columns \(got 9; expected at most 8\)"):
        gather_strata(slides("0.svs", "1.svs"), tables, None)
    with pytest.raises(SlideIndexError, match="--pattern fits the path of no slide"):
        gather_strata(slides("0.svs"), [], parse_pattern("(?P<site>x+)/"))


def likeness(*entries: tuple[int, int, int, int], content: str = "") -> np.ndarray:
    rows = np.zeros(len(entries), LIKENESS_DTYPE)
    for row, (number, width, bits, tissue) in zip(rows, entries, strict=True):
        row["slide_id"], row["width_px0"], row["height_px0"], row["mpp"] = f"{number:032x}", width, 50, 0.25
        row["look"], row["tissue_px"], row["content"] = bits, tissue, content or f"own {number}"
    return rows


LOOK = 0x0F1E2D3C4B5A6978


def test_rescans_are_found_among_slides_of_one_geometry_and_look() -> None:
    near, far = LOOK ^ 0x1_0000_0001_0001, LOOK ^ 0b1111
    found = duplicates(
        likeness((5, 70, LOOK, 1000), (3, 70, near, 1010), (4, 71, LOOK, 1000), (6, 70, far, 1000), (7, 70, LOOK, 1100))
    )
    assert found == {f"{5:032x}": f"{3:032x}"}


def test_a_plain_look_says_nothing() -> None:
    assert duplicates(likeness((1, 70, 0, 1000), (2, 70, 0, 1000), (3, 70, 0x1F, 1000), (4, 70, 0x1F, 1000))) == {}


def test_copies_are_found_by_their_content_whatever_they_look_like() -> None:
    found = duplicates(likeness((2, 70, 0, 5), (1, 90, 1, 6), (3, 50, 2, 7), content="same"))
    assert found == {f"{2:032x}": f"{1:032x}", f"{3:032x}": f"{1:032x}"}
    assert duplicates(np.empty(0, LIKENESS_DTYPE)) == {}


def test_pairs_are_those_of_comparing_all_with_all() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 2**63, 20, np.uint64)
    bits = [looks[n % 20] ^ np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, 2, np.uint64)) for n in range(300)]
    rows = likeness(*((n, 70 + n % 2, int(bits[n]), 1000) for n in range(300)))
    expected = {}
    for n in range(300):
        alike = [m for m in range(n) if (m - n) % 2 == 0 and int(bits[m] ^ bits[n]).bit_count() <= 3]
        if alike:
            expected[f"{n:032x}"] = f"{alike[0]:032x}"
    assert len(expected) > 50
    assert duplicates(rng.permutation(rows)) == expected


def test_a_look_survives_a_rescan_and_tells_slides_apart() -> None:
    rng = np.random.default_rng(0)
    slide = np.kron(rng.integers(0, 255, (9, 9)), np.ones((30, 40)))[..., None].repeat(3, 2).astype(np.uint8)
    rescan = np.clip(slide * 0.9 + 12 + rng.normal(0, 2, slide.shape), 0, 255).astype(np.uint8)
    assert (look(slide) ^ look(rescan)).bit_count() <= 3
    assert (look(slide) ^ look(slide[:, ::-1])).bit_count() > 16
    # The oracle: brightness rises to the right in the upper half, falls in the lower.
    ramp = np.linspace(0, 255, 90).astype(np.uint8)
    halves = np.concatenate([np.tile(ramp, (40, 1)), np.tile(ramp[::-1], (40, 1))])
    assert look(halves[..., None].repeat(3, 2)) == 0xFFFFFFFF_00000000
