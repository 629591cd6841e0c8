"""DICOM sets: what is read in place, with which offset tables, and what is left to OpenSlide or refused."""

import io
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian

from histoscale.errors import SlideError
from histoscale.slides import dicom_layout
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tiled import TiledSlide, open_tiled
from histoscale.storage import ObjectInfo
from histoscale.storage.ranges import RangeReader, RangeRequest

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # the converter's own version id
SPACING_MM = 0.001996


class MemoryRanges:
    """Objects in memory; notes what was asked for."""

    def __init__(self, objects: Sequence[bytes]) -> None:
        self.objects = objects
        self.asked: list[RangeRequest] = []

    def submit(self, requests: Sequence[RangeRequest]) -> Future[list[bytes]]:
        future: Future[list[bytes]] = Future()
        future.set_result(self.fetch(requests))
        return future

    def fetch(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        self.asked += requests
        return [self.objects[int(r.key)][r.start : r.start + r.length] for r in requests]

    stats = RangeReader.stats
    close = RangeReader.close


def opened(*objects: bytes) -> TiledSlide | None:
    infos = [ObjectInfo(str(i), len(data), "1") for i, data in enumerate(objects)]
    return open_tiled(infos, MemoryRanges(objects), TableCache())


@pytest.fixture
def folder(shared_data: Path) -> Path:
    return shared_data / "slides" / "CMU-1-Small-Region-dicom"


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    """The level of 555 x 741 px in four frames, ready to be changed."""
    return pydicom.dcmread(folder / "level-2-frames-0-4.dcm")


def saved(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def frames_of(dataset: Dataset) -> list[bytes]:
    return list(generate_frames(dataset.PixelData, number_of_frames=int(dataset.NumberOfFrames)))


def test_a_set_has_a_level_for_each_object(folder: Path) -> None:
    paths = sorted(folder.iterdir(), key=lambda path: (-path.stat().st_size, path.name))
    slide = opened(*(path.read_bytes() for path in paths))
    assert slide is not None
    assert slide.info == open_slide(paths[0]).info
    assert slide.info.mpp_origin == "vendor"
    assert [level.object_index for level in slide.layout.levels[:4]] == [0, 1, 2, 3]


def extended(dataset: Dataset) -> None:
    pixels, offsets, lengths = encapsulate_extended(frames_of(dataset))
    dataset.PixelData = pixels
    dataset.ExtendedOffsetTable = offsets
    dataset.ExtendedOffsetTableLengths = lengths


def basic(dataset: Dataset) -> None:
    dataset.PixelData = encapsulate(frames_of(dataset), has_bot=True)


def without_table(dataset: Dataset) -> None:
    dataset.PixelData = encapsulate(frames_of(dataset), has_bot=False)


def nested(dataset: Dataset) -> None:
    """Sequences of undefined length, three deep, before the pixels."""
    inner, outer = Dataset(), Dataset()
    inner.ContentItemModifierSequence = DicomSequence([Dataset()])
    inner["ContentItemModifierSequence"].is_undefined_length = True
    outer.SpecimenPreparationSequence = DicomSequence([inner, Dataset()])
    outer["SpecimenPreparationSequence"].is_undefined_length = True
    dataset.SpecimenDescriptionSequence = DicomSequence([outer])
    dataset["SpecimenDescriptionSequence"].is_undefined_length = True
    for item in (inner, outer):
        item.is_undefined_length_sequence_item = True


def undefined_groups(dataset: Dataset) -> None:
    groups = dataset["SharedFunctionalGroupsSequence"]
    groups.is_undefined_length = True
    groups.value[0].is_undefined_length_sequence_item = True


@pytest.mark.parametrize("change", [extended, basic, without_table, nested, undefined_groups])
def test_every_way_to_write_it_gives_the_same_px(
    dataset: Dataset, tmp_path: Path, change: Callable[[Dataset], None]
) -> None:
    change(dataset)
    path = tmp_path / "a.dcm"
    path.write_bytes(saved(dataset))
    slide = opened(path.read_bytes())
    assert slide is not None
    assert slide.info.mpp == pytest.approx(SPACING_MM * 1000)
    expected = open_slide(path).read(0.0, 0.0, 760, slide.info.mpp)
    assert np.array_equal(slide.read(0.0, 0.0, 760, slide.info.mpp), expected)
    assert slide.layout.levels[0].offsets.inline == b"" or change is not extended


def assign(**values: object) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for name, value in values.items():
            setattr(dataset, name, value)

    return change


def sparse(dataset: Dataset) -> None:
    del dataset.DimensionOrganizationType


def uncompressed(dataset: Dataset) -> None:
    dataset.decompress()


def other_syntax(dataset: Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "change",
    [
        assign(ImageType=["ORIGINAL", "PRIMARY", "LABEL", "NONE"]),
        assign(ImageType="DERIVED"),
        assign(PhotometricInterpretation="YBR_FULL"),
        assign(SamplesPerPixel=1),
        assign(BitsStored=7),
        assign(TotalPixelMatrixFocalPlanes=3),
        assign(NumberOfOpticalPaths=2),
        assign(ConcatenationUID="1.2.3"),
        assign(DimensionOrganizationType="TILED_SPARSE"),
        assign(NumberOfFrames=5),
        assign(Rows=8000, Columns=8000, NumberOfFrames=1),
        sparse,
        uncompressed,
    ],
)
def test_other_kinds_are_left_to_openslide(dataset: Dataset, change: Callable[[Dataset], None]) -> None:
    assert opened(saved(dataset)) is not None
    change(dataset)
    assert opened(saved(dataset)) is None


def test_another_class_of_image_is_left_to_openslide(dataset: Dataset) -> None:
    data = saved(dataset)
    assert opened(data.replace(b"1.2.840.10008.5.1.4.1.1.77.1.6", b"1.2.840.10008.5.1.4.1.1.77.1.4", 1)) is None


def test_sets_that_do_not_belong_together_are_left_to_openslide(dataset: Dataset, folder: Path) -> None:
    data = saved(dataset)
    other = (folder / "level-3-frames-0-1.dcm").read_bytes()
    assert opened(data, other) is not None
    assert opened(data, data) is None, "two of one size"
    assert opened(data, b"no DICOM" * 100) is None
    dataset.SeriesInstanceUID = "1.2.3"
    assert opened(saved(dataset), other) is None


def test_large_sets_of_objects_are_left_to_openslide(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_layout, "_MAX_OBJECTS", 0)
    assert opened(saved(dataset)) is None


def test_a_walk_through_a_large_object_is_left_to_openslide(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    without_table(dataset)
    monkeypatch.setattr(dicom_layout, "_MAX_WALK_BYTES", 1000)
    assert opened(saved(dataset)) is None


def test_frames_of_several_items_are_left_to_openslide(dataset: Dataset) -> None:
    dataset.PixelData = encapsulate(frames_of(dataset), fragments_per_frame=2, has_bot=False)
    assert opened(saved(dataset)) is None


def test_frames_of_several_items_behind_a_table_are_refused(dataset: Dataset) -> None:
    dataset.PixelData = encapsulate(frames_of(dataset), fragments_per_frame=2, has_bot=True)
    slide = opened(saved(dataset))
    assert slide is not None
    with pytest.raises(SlideError, match="a frame that is not one item"):
        slide.read(0.0, 0.0, 100, slide.info.mpp)


def test_sequences_too_deep_or_elements_too_many_are_left_to_openslide(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested(dataset)
    data = saved(dataset)
    assert opened(data) is not None
    monkeypatch.setattr(dicom_layout, "_MAX_DEPTH", 1)
    assert opened(data) is None
    monkeypatch.setattr(dicom_layout, "_MAX_DEPTH", 16)
    monkeypatch.setattr(dicom_layout, "_MAX_ELEMENTS", 30)
    assert opened(data) is None


def element(tag: tuple[int, int]) -> bytes:
    return struct.pack("<HH", *tag)


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert old in data
    return data.replace(old, new, 1)


PIXELS = element((0x7FE0, 0x0010)) + b"OB\0\0\xff\xff\xff\xff"
TABLE = PIXELS + element((0xFFFE, 0xE000))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d[:3000].split(PIXELS)[0], "no pixels"),
        (lambda d: replaced(d, element((0x28, 0x10)) + b"US\x02\0", element((0x28, 0x10)) + b"US\x01\0"), "DICOM"),
        (lambda d: replaced(d, element((0x28, 0x10)) + b"US", element((0x28, 0x10)) + b"??"), "no known form"),
        (
            lambda d: replaced(d, element((0x28, 0x10)) + b"US\x02\0\xf4\x01", element((0x28, 0x10)) + b"US\x02\0\0\0"),
            "px",
        ),
        (lambda d: replaced(d, TABLE, PIXELS + element((0xFFFE, 0xE0DD))), "no offset table"),
        (lambda d: replaced(d, TABLE + b"\x10\0\0\0", TABLE + b"\x0c\0\0\0"), "another length"),
        (lambda d: replaced(d, TABLE + b"\x10\0\0\0" + bytes(4), TABLE + b"\x10\0\0\0\xff\xff\xff\x7f"), "order"),
        (lambda d: d[: len(d) // 2], "cut short|no item"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(
    dataset: Dataset, change: Callable[[bytes], bytes], match: str
) -> None:
    basic(dataset)
    with pytest.raises(SlideError, match=match):
        opened(change(saved(dataset)))


def test_damaged_sequences_are_refused(dataset: Dataset) -> None:
    nested(dataset)
    data = saved(dataset)
    at = data.index(element((0x0040, 0x0560)))
    with pytest.raises(SlideError, match="no item where one should be"):
        opened(data[: at + 12] + element((0x28, 0x10)) + data[at + 16 :])
    undefined_groups(dataset)
    data = saved(dataset)
    at = data.index(element((0x5200, 0x9229)))
    with pytest.raises(SlideError, match="no item where one should be"):
        opened(data[: at + 12] + element((0x28, 0x10)) + data[at + 16 :])


def test_an_extended_table_of_another_length_is_refused(dataset: Dataset) -> None:
    extended(dataset)
    dataset.ExtendedOffsetTable = dataset.ExtendedOffsetTable[:-8]
    with pytest.raises(SlideError, match="Extended Offset Table"):
        opened(saved(dataset))


def test_frames_without_header_are_refused(dataset: Dataset) -> None:
    extended(dataset)
    dataset.ExtendedOffsetTableLengths = struct.pack("<4Q", *([2**64 - 4] * 4))
    slide = opened(saved(dataset))
    assert slide is not None
    with pytest.raises(SlideError, match="a frame without a header"):
        slide.read(0.0, 0.0, 100, slide.info.mpp)


def test_elements_that_are_needed_must_be_there(dataset: Dataset) -> None:
    del dataset.BitsStored
    with pytest.raises(SlideError, match="no whole number in element 00280101"):
        opened(saved(dataset))


def test_objects_that_end_within_a_frame_are_refused(dataset: Dataset) -> None:
    without_table(dataset)
    with pytest.raises(SlideError, match="a frame that is no item of the object"):
        opened(saved(dataset)[:-1000])


@pytest.mark.parametrize("change", [lambda _: None, undefined_groups])
@pytest.mark.parametrize("spacing", [None, ["0.0005"], ["0.0005", "0.0007"]])
def test_scales_that_cannot_be_told_are_refused(
    dataset: Dataset, spacing: list[str] | None, change: Callable[[Dataset], None]
) -> None:
    change(dataset)
    dataset.SharedFunctionalGroupsSequence[0].FrameType = "VOLUME"
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if spacing is None:
        del measures.PixelSpacing
    else:
        measures.PixelSpacing = spacing
    with pytest.raises(SlideError, match=r"no microns per pixel|not square"):
        opened(saved(dataset))
