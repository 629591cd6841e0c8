import itertools
from pathlib import Path

import pytest

from histoscale.errors import SlideIndexError
from histoscale.slides.identity import fingerprint, index_key, patient_id, slide_id
from histoscale.slides.locate import Located, LocatedSlide, locate, only_named
from histoscale.slides.sidecar import read_sidecar, read_withdrawn
from histoscale.storage import ObjectInfo, open_store

KEY = bytes(range(32))


def slides(*paths: str) -> tuple[LocatedSlide, ...]:
    return tuple(LocatedSlide(path, (ObjectInfo(path, 1, "e"),)) for path in paths)


def test_files_are_slides_by_suffix_in_any_case_and_the_rest_is_counted() -> None:
    keys = [
        "a/x.svs",
        "b.TIFF",
        "c.tif",
        "d.ndpi",
        "e.scn",
        "f.bif",
        "g.svslide",
        "notes.txt",
        "svs",
        "h.jpg",
        "i.mrxs",
        "k/j.vmu",
    ]
    located = locate(ObjectInfo(key, 1, "e") for key in keys)
    assert [slide.path for slide in located.slides] == sorted([*keys[:7], "i.mrxs", "k/j.vmu"])
    assert located.ignored == 3


def test_dicom_instances_of_one_folder_are_one_slide_whatever_the_order_of_the_listing() -> None:
    objects = [
        ObjectInfo("set/1.dcm", 5, "a"),
        ObjectInfo("set/2.dcm", 9, "b"),
        ObjectInfo("set/0.dcm", 9, "c"),
        ObjectInfo("set/sub/0.DCM", 1, "d"),
        ObjectInfo("top.dcm", 2, "e"),
    ]
    expected = Located(
        (
            LocatedSlide(".", (objects[4],)),
            LocatedSlide("set", (objects[2], objects[1], objects[0])),
            LocatedSlide("set/sub", (objects[3],)),
        ),
        ignored=0,
    )
    assert all(locate(order) == expected for order in itertools.permutations(objects))


def test_a_mirax_slide_is_its_file_and_the_files_of_the_folder_beside_it() -> None:
    keys = ["a/x.mrxs", "a/x/Data0000.dat", "a/x/Index.dat", "a/x/Slidedat.ini", "a/x/Thumbs.db", "a/x/sub/Data.dat"]
    keys += ["a/y.mrxs", "a/y/Data0000.dat", "a/z/Slidedat.ini"]
    objects = [ObjectInfo(key, 1, "e") for key in keys]
    for order in (objects, objects[::-1]):
        located = locate(order)
        assert [slide.path for slide in located.slides] == ["a/x.mrxs", "a/y.mrxs"]
        assert [info.key for info in located.slides[0].objects] == keys[:4]
        # A folder without its Slidedat.ini is none of MIRAX.
        assert [info.key for info in located.slides[1].objects] == ["a/y.mrxs"]
        assert located.ignored == 4


def test_a_hamamatsu_slide_is_its_file_and_those_of_its_folder_that_it_names() -> None:
    keys = ["v/s.vms", "v/s(0,1).jpg", "v/s.jpg", "v/s.opt", "v/s_macro.jpg", "v/other.jpg", "w/s.jpg"]
    (slide,), ignored = (located := locate(ObjectInfo(key, 1, "e") for key in keys)).slides, located.ignored
    assert [info.key for info in slide.objects] == [keys[0], *sorted(keys[1:6])]
    assert ignored == 1
    content = b"[Virtual Microscope Specimen]\r\nImageFile=s.jpg\r\nImageFile(0,1)=s(0,1).jpg\r\n"
    content += b"OptimisationFile=s.opt\r\nMacroImage=s_macro.jpg\r\n"
    assert [info.key for info in only_named(slide, content).objects] == keys[:4]


def test_what_names_a_slide_has_no_name_in_its_repr() -> None:
    assert "12345" not in repr(locate([ObjectInfo("MRN-12345/x.svs", 1, "e")]))


def test_slide_ids_are_stable_and_depend_on_key_and_path() -> None:
    # The oracle: printf 'a/b.svs' | openssl dgst -sha256 -mac HMAC -macopt hexkey:000102...1f
    assert slide_id(KEY, "a/b.svs") == "2e56f846e64816101b9877e8b00aae8d"
    assert slide_id(KEY, "a/c.svs") != slide_id(KEY, "a/b.svs") != slide_id(KEY[::-1], "a/b.svs")


def test_ids_of_slides_and_patients_and_fingerprints_of_one_text_differ() -> None:
    ids = {slide_id(KEY, "a"), patient_id(KEY, "a"), fingerprint(KEY, "a").hex()}
    assert len(ids) == 3
    assert all(len(name) == 32 for name in ids)
    assert patient_id(KEY, "a") == patient_id(KEY, "a") != patient_id(KEY[::-1], "a")


def test_a_name_that_is_not_utf8_has_an_id(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.svs").write_bytes(b"")
    (info,) = open_store(tmp_path).list()
    assert len(slide_id(KEY, info.key)) == 32


def test_the_id_key_is_made_once_and_kept_for_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HISTOSCALE_ID_KEY", raising=False)
    store = open_store(tmp_path / "protected", private=True)
    key = index_key(store)
    assert len(key) == 32
    assert key == index_key(store)
    assert key != index_key(open_store(tmp_path / "other", private=True))
    assert (tmp_path / "protected" / "id_key").stat().st_mode & 0o077 == 0
    assert (tmp_path / "protected").stat().st_mode & 0o077 == 0


def test_the_variable_gives_a_new_index_its_key_and_must_fit_the_stored_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, private=True)
    monkeypatch.setenv("HISTOSCALE_ID_KEY", KEY.hex())
    assert index_key(store) == KEY
    monkeypatch.delenv("HISTOSCALE_ID_KEY")
    assert index_key(store) == KEY
    monkeypatch.setenv("HISTOSCALE_ID_KEY", KEY[::-1].hex())
    with pytest.raises(SlideIndexError, match="not the id key of this index") as caught:
        index_key(store)
    assert KEY.hex() not in str(caught.value)


def test_a_malformed_key_is_refused_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, private=True)
    monkeypatch.setenv("HISTOSCALE_ID_KEY", "abc123")
    with pytest.raises(SlideIndexError, match="HISTOSCALE_ID_KEY is not an id key") as caught:
        index_key(store)
    assert "abc123" not in str(caught.value)
    assert not store.exists("id_key")
    monkeypatch.delenv("HISTOSCALE_ID_KEY")
    store.put("id_key", b"\xff" * 64)
    with pytest.raises(SlideIndexError, match="protected/id_key of the index is not an id key"):
        index_key(store)


def test_a_sidecar_names_slides_by_file_name_or_path() -> None:
    known = slides("a/x.svs", "b/y.svs", "c/y.svs", "d/set")
    text = "\ufeffmpp,slide\r\n0.5, x.svs \r\n0.25,b/y.svs\r\n\r\n1e0,d/set/\r\n"
    assert read_sidecar(text.encode(), known).mpp == {"a/x.svs": 0.5, "b/y.svs": 0.25, "d/set": 1.0}


def test_a_path_is_meant_before_the_same_name_deeper_down() -> None:
    assert read_sidecar(b"slide,mpp\nx.svs,0.5\n", slides("a/x.svs", "x.svs")).mpp == {"x.svs": 0.5}


def test_all_faults_of_a_sidecar_come_at_once_with_their_lines_and_no_names() -> None:
    known = slides("a/x.svs", "b/y.svs", "c/y.svs")
    lines = ["slide,mpp", "MRN7.svs,0.5", "x.svs,half", "a/x.svs,0.5", "y.svs,0.5", "b/y.svs,nan", "c/y.svs,1,2"]
    with pytest.raises(SlideIndexError) as caught:
        read_sidecar("\n".join(lines).encode(), known)
    text = str(caught.value)
    assert "6 faults" in text
    assert "line 2: no such slide in SLIDES" in text
    assert "line 3: mpp is not a number from" in text
    assert "line 4: slide given before" in text
    assert "line 5: 2 slides have this name: give the path" in text
    assert "line 6: mpp is not a number from" in text
    assert "line 7: more than 2 values" in text
    assert "svs" not in text


@pytest.mark.parametrize("mpp", ["0", "-0.5", "0.049", "21", "inf", "0,5", ""])
def test_um_per_px_that_no_scanner_has_is_refused(mpp: str) -> None:
    with pytest.raises(SlideIndexError, match=r"line 2: (mpp is not a number from|more than 2 values)"):
        read_sidecar(f"slide,mpp\nx.svs,{mpp}\n".encode(), slides("x.svs"))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "no column slide"),
        (b"slide\nx.svs\n", "no column beside slide"),
        (b"slide,mpp,a site\nx.svs,0.5,a\n", "unknown column 3"),
        (b"slide,a,b,c,d,e,f,g,h,i\n", "9 strata columns"),
        (b"MRN7.svs,0.5\n", "unknown column 1; unknown column 2; no column slide"),
        (b"slide,mpp,mpp\nx.svs,0.5,0.5\n", "column mpp twice"),
        (b'slide,mpp\n"x.svs"y,0.5\n', "not CSV"),
        (b"slide,mpp\n\xff,0.5\n", "not UTF-8 text"),
    ],
)
def test_a_file_that_is_not_a_sidecar_is_refused_without_its_content(data: bytes, fault: str) -> None:
    with pytest.raises(SlideIndexError, match=fault) as caught:
        read_sidecar(data, slides("x.svs"))
    assert "svs" not in str(caught.value)


def test_scales_and_strata_stand_in_one_file_and_may_each_be_left_open() -> None:
    text = "slide,mpp,site,patient\nx.svs,0.5,north,p1\ny.svs,,south,\nz.svs,1\n"
    found = read_sidecar(text.encode(), slides("x.svs", "y.svs", "z.svs"))
    assert found.mpp == {"x.svs": 0.5, "z.svs": 1.0}
    assert found.values == {"x.svs": {"site": "north", "patient": "p1"}, "y.svs": {"site": "south"}, "z.svs": {}}
    assert found.columns == ("site",)


def test_exclusions_name_slides_or_patients() -> None:
    known = slides("a/x.svs", "y.svs")
    found = read_withdrawn(b"patient,slide\n,x.svs\np1,\np1,\n,y.svs\n", known)
    assert (found.paths, found.patients) == (("a/x.svs", "y.svs"), ("p1",))
    assert read_withdrawn(b"patient\np2\n", known).patients == ("p2",)
    assert "p1" not in repr(found)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "no column slide or patient"),
        (b"slide,mpp\n", "unknown column 2"),
        (b"slide,patient\nx.svs,p\n", "line 2: one of slide and patient is to be given"),
        (b"slide,patient\n,\n", "line 2: one of slide and patient is to be given"),
        (b"slide\nMRN7.svs\n", "line 2: no such slide"),
    ],
)
def test_faults_of_a_list_of_exclusions_are_told_without_names(data: bytes, fault: str) -> None:
    with pytest.raises(SlideIndexError, match=fault) as caught:
        read_withdrawn(data, slides("x.svs"))
    assert "svs" not in str(caught.value)
