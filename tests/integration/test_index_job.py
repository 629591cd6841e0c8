import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile

from histoscale.errors import SlideIndexError, StorageError
from histoscale.slides import build
from histoscale.slides.build import build_index
from histoscale.slides.catalogue import Locations, open_catalogue
from histoscale.slides.exclusions import read_exclusions
from histoscale.slides.identity import slide_id
from histoscale.slides.index import read_index, read_locations
from histoscale.slides.locate import locate
from histoscale.slides.progress import IndexProgress
from histoscale.slides.synthetic import make_slides
from histoscale.storage import join, open_store

ROOT = Path(__file__).parents[2]
RECORD_NUMBER = "MRN-4711-0815"
KEY = bytes(range(32))
SVS = f"{RECORD_NUMBER}.svs"
DICOM = f"{RECORD_NUMBER}-dicom"


@pytest.fixture(autouse=True)
def id_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSCALE_ID_KEY", KEY.hex())


@pytest.fixture
def slides(shared_data: Path, tmp_path: Path) -> Path:
    """CMU as SVS and DICOM, TCGA without um/px, and a cut SVS, all named by a record number."""
    folder = tmp_path / "slides"
    source = shared_data / "slides"
    copy_dicom(source / "CMU-1-Small-Region-dicom", folder / "2024" / DICOM)
    (folder / SVS).write_bytes((source / "CMU-1-Small-Region.svs").read_bytes())
    (folder / f"{RECORD_NUMBER}-tcga.svs").write_bytes((source / "TCGA-CR-7395-01A-01-TS1.svs").read_bytes())
    (folder / f"{RECORD_NUMBER}-cut.svs").write_bytes((folder / SVS).read_bytes()[:900_000])
    (folder / "notes.txt").write_text("not a slide")
    return folder


def copy_dicom(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def write_glass(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    glass = np.full((1024, 1024, 3), 243, np.uint8)
    tifffile.imwrite(path, glass, tile=(256, 256), resolution=(20_000, 20_000), resolutionunit="CENTIMETER")


def write_packbits(path: Path) -> None:
    """A slide that OpenSlide reads and that is not read in place."""
    stripes = np.full((1024, 1024, 3), 243, np.uint8)
    stripes[:, 300:700] = (190, 110, 160)
    scale = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, stripes, tile=(256, 256), compression="packbits", **scale)


def ids(*paths: str) -> set[str]:
    return {slide_id(KEY, path) for path in paths}


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_indexed_and_indexed_again_only_where_it_changed(
    cluster: None, slides: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "index")
    steps: list[IndexProgress] = []
    build_index(str(slides), out, progress=steps.append)
    index = read_index(open_store(out))

    assert {record.slide_id for record in index.records} == ids(SVS, f"2024/{DICOM}")
    reasons = {refusal.slide_id: refusal.reason for refusal in index.refusals}
    assert reasons.keys() == ids(f"{RECORD_NUMBER}-tcga.svs", f"{RECORD_NUMBER}-cut.svs")
    no_scale = reasons[slide_id(KEY, f"{RECORD_NUMBER}-tcga.svs")]
    assert "no microns per pixel" in no_scale
    assert "sidecar CSV (columns slide,mpp)" in no_scale
    assert [step.done for step in steps] == [0, 1, 2, 3, 4]
    assert all(step.total == 4 for step in steps)
    two = {record.vendor: record for record in index.records}
    assert (two["aperio"].width_px0, two["aperio"].height_px0) == (two["dicom"].width_px0, two["dicom"].height_px0)
    assert two["dicom"].mpp == pytest.approx(two["aperio"].mpp)
    located = {slide.path: slide.objects for slide in locate(open_store(slides).list()).slides}
    assert read_locations(open_store(out))[slide_id(KEY, SVS)].objects == located[SVS]

    (slides / "slides.csv").write_text(f"slide,mpp\n{RECORD_NUMBER}-tcga.svs,0.2527\n")
    assert build_index(str(slides), out, progress=steps.append).parent == index.snapshot_id
    again = read_index(open_store(out))
    # The cut slide is as it was, and is not tried again.
    assert (steps[-1].reused, steps[-1].accepted, steps[-1].refused) == (3, 1, 0)
    assert [refusal.slide_id for refusal in again.refusals] == [slide_id(KEY, f"{RECORD_NUMBER}-cut.svs")]
    tcga = {r.slide_id: r for r in again.records}[slide_id(KEY, f"{RECORD_NUMBER}-tcga.svs")]
    assert (tcga.mpp, tcga.mpp_origin) == (0.2527, "sidecar")
    assert read_index(open_store(out)).snapshot_id == again.snapshot_id != index.snapshot_id

    # The sidecar of the folder may name other slides than the one that is asked for.
    build_index(str(slides / SVS), str(tmp_path / "one"))
    assert {record.slide_id for record in read_index(open_store(tmp_path / "one")).records} == ids(SVS)

    (slides / "slides.csv").unlink()
    (slides / SVS).write_bytes((slides / SVS).read_bytes())
    assert build_index(str(slides), out, progress=steps.append).snapshot_id == index.snapshot_id
    assert (steps[-1].reused, steps[-1].accepted, steps[-1].refused) == (2, 1, 1)

    (slides / f"{RECORD_NUMBER}-cut.svs").unlink()
    shutil.rmtree(slides / "2024")
    build_index(str(slides), out, progress=steps.append)
    left = read_index(open_store(out))
    assert ({r.slide_id for r in left.records}, {r.slide_id for r in left.refusals}) == (
        ids(SVS),
        ids(f"{RECORD_NUMBER}-tcga.svs"),
    )
    assert {r.slide_id for r in read_index(open_store(out), again.snapshot_id).records} >= ids(SVS, f"2024/{DICOM}")
    assert {key for key in files_below(Path(out)) if key.startswith("pending")} == set()


def test_a_bucket_gives_the_ids_and_the_snapshot_of_the_folder(
    s3_env: Any, cluster: None, slides: Path, tmp_path: Path
) -> None:
    bucket = f"s3://{s3_env.make_bucket()}"
    store = open_store(join(bucket, "archive"))
    for key in files_below(slides):
        store.upload(slides / key, key)
    local = build_index(str(slides), str(tmp_path / "index"))
    remote = build_index(join(bucket, "archive"), join(bucket, "index"))
    assert remote.snapshot_id == local.snapshot_id
    remote_index, local_index = (
        read_index(open_store(join(bucket, "index"))),
        read_index(open_store(tmp_path / "index")),
    )
    assert remote_index.refusals == local_index.refusals
    assert len(remote_index.refusals) == 2
    catalogues = [
        open_catalogue(join(bucket, "index"), cache=tmp_path / "cache"),
        open_catalogue(str(tmp_path / "index")),
    ]
    for row in range(2):
        masks = [catalogue.mask(row) for catalogue in catalogues]
        assert np.array_equal(masks[0], masks[1])
        assert catalogues[0].layout(row) == catalogues[1].layout(row) != b""
        found = Locations(catalogues[0]).location(row)
        assert found == read_locations(open_store(join(bucket, "index")))[catalogues[0].slide_id(row)]
    assert read_index(open_store(join(bucket, "index"))).snapshot_id == local.snapshot_id
    location = read_locations(open_store(join(bucket, "index")))[slide_id(KEY, SVS)]
    assert (location.root_uri, location.objects[0].key) == (join(bucket, "archive"), SVS)

    build_index(join(bucket, "archive", SVS), join(bucket, "one"))
    assert {record.slide_id for record in read_index(open_store(join(bucket, "one"))).records} == ids(SVS)
    write_packbits(tmp_path / "copied.tif")
    open_store(join(bucket, "copied")).upload(tmp_path / "copied.tif", "copied.tif")
    # Too small a cache is no fault of the slide.
    with pytest.raises(SlideIndexError, match=r"no slide is accepted, and 1 could not be read: 1 x .* larger than the"):
        build_index(join(bucket, "copied"), join(bucket, "none"), cache_bytes=1000)
    assert not open_store(join(bucket, "none")).exists("index.json")


def test_a_wrong_bucket_is_a_diagnosis_and_nothing_is_written(s3_env: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="bucket"):
        build_index("s3://no-such-bucket/slides", str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("content", [(), ("a.txt", "b/c.parquet")])
def test_a_place_without_slides_is_a_diagnosis_and_nothing_is_written(content: tuple[str, ...], tmp_path: Path) -> None:
    for key in content:
        open_store(tmp_path / "slides").put(key, b"")
    expected = rf"no slides found \(got '{len(content)} other objects'; expected objects ending in \.svs .*\.dcm"
    with pytest.raises(SlideIndexError, match=expected):
        build_index(str(tmp_path / "slides"), str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_a_sidecar_that_is_absent_or_faulty_is_a_diagnosis_before_anything_is_written(tmp_path: Path) -> None:
    write_glass(tmp_path / "slides" / "a.tif")
    with pytest.raises(SlideIndexError, match="the sidecar CSV is not there"):
        build_index(str(tmp_path / "slides"), str(tmp_path / "index"), sidecar=str(tmp_path / "x.csv"))
    (tmp_path / "x.csv").write_text("slide,mpp\nb.tif,0.5\n")
    with pytest.raises(SlideIndexError, match="line 2: no such slide"):
        build_index(str(tmp_path / "slides"), str(tmp_path / "index"), sidecar=str(tmp_path / "x.csv"))
    assert not (tmp_path / "index").exists()


def test_no_tissue_anywhere_and_only_bad_slides_are_diagnoses_that_leave_no_index(
    cluster: None, tmp_path: Path
) -> None:
    write_glass(tmp_path / "slides" / f"{RECORD_NUMBER}.tif")
    out = tmp_path / "index"
    with pytest.raises(SlideIndexError, match=r"no tissue anywhere \(got '1 slides'.*Protected/refused\.csv"):
        build_index(str(tmp_path / "slides"), str(out))
    (tmp_path / "slides" / f"{RECORD_NUMBER}.svs").write_bytes(b"II*\0 and no more")
    with pytest.raises(SlideIndexError, match=r"all 2 slides are refused: 1 x .*1 x ") as caught:
        build_index(str(tmp_path / "slides"), str(out))
    assert RECORD_NUMBER not in str(caught.value)
    kept = {key for key in files_below(out) if not key.startswith("pending/")}
    assert kept == {"protected/id_key", "protected/refused.csv"}
    assert (out / "protected" / "refused.csv").read_text().count(str(tmp_path / "slides" / RECORD_NUMBER)) == 2


def test_a_slide_that_kills_its_reader_is_refused_and_the_others_are_not(
    cluster: None, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = slide_id(KEY, "deadly.tif")

    class Mortal(build._Examiner):
        def __call__(self, batch: Any) -> Any:
            if deadly in batch["slide_id"].to_pylist():
                os._exit(1)
            return super().__call__(batch)

    write_glass(tmp_path / "slides" / "deadly.tif")
    shutil.copy(shared_data / "slides" / "CMU-1-Small-Region.svs", tmp_path / "slides" / SVS)
    monkeypatch.setattr(build, "_Examiner", Mortal)
    build_index(str(tmp_path / "slides"), str(tmp_path / "index"))
    index = read_index(open_store(tmp_path / "index"))
    assert {record.slide_id for record in index.records} == ids(SVS)
    assert [(refusal.slide_id, refusal.reason) for refusal in index.refusals] == [(deadly, "its reader process died")]


def test_what_the_storage_does_not_give_is_tried_again_and_is_no_refusal(
    cluster: None, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, never = slide_id(KEY, "once.svs"), slide_id(KEY, "never.svs")

    class Unsteady(build._Examiner):
        def __call__(self, batch: Any) -> Any:
            (name,) = batch["slide_id"].to_pylist()
            mark = tmp_path / name
            if name == never or (name == once and not mark.exists()):
                mark.touch()
                return self.table([build._refused(name, "the server is overloaded") | {"unreachable": True}])
            return super().__call__(batch)

        @staticmethod
        def table(rows: list[dict[str, Any]]) -> Any:
            return pa.Table.from_pylist(rows, schema=build._OUTCOME_SCHEMA)

    for name in ("once.svs", "never.svs", SVS):
        (tmp_path / "slides").mkdir(exist_ok=True)
        shutil.copy(shared_data / "slides" / "CMU-1-Small-Region.svs", tmp_path / "slides" / name)
    steps: list[IndexProgress] = []
    with monkeypatch.context() as patch:
        patch.setattr(build, "_Examiner", Unsteady)
        snapshot = build_index(str(tmp_path / "slides"), str(tmp_path / "index"), progress=steps.append)
    assert (snapshot.slides, snapshot.refused, snapshot.unreachable) == (2, 0, 1)
    assert (steps[-1].accepted, steps[-1].unreachable, steps[-1].done) == (2, 1, 3)
    assert "unreachable: the server is overloaded" in (tmp_path / "index" / "protected" / "refused.csv").read_text()
    again = build_index(str(tmp_path / "slides"), str(tmp_path / "index"), progress=steps.append)
    assert (again.slides, again.unreachable) == (3, 0)
    assert (steps[-1].reused, steps[-1].accepted) == (2, 1)


KILLED = """
import sys, time
from histoscale.slides import build, pending

hanging = sys.argv[3]

class Hanging(build._Examiner):
    def __call__(self, batch):
        if batch["slide_id"].to_pylist() == [hanging]:
            time.sleep(600)
        return super().__call__(batch)

pending.MAX_AGE_S = 0.0
build._Examiner = Hanging
import ray
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
build.build_index(sys.argv[1], sys.argv[2])
"""


def test_a_killed_indexing_goes_on_where_it_was(cluster: None, shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    for name in ("a.svs", "b.svs", "hanging.svs"):
        shutil.copy(shared_data / "slides" / "CMU-1-Small-Region.svs", tmp_path / "slides" / name)
    places = [str(tmp_path / "slides"), str(tmp_path / "index")]
    with subprocess.Popen([sys.executable, "-c", KILLED, *places, slide_id(KEY, "hanging.svs")]) as process:
        deadline_s = time.monotonic() + 120
        while len(list(tmp_path.glob("index/pending/*.parquet"))) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.1)
        process.kill()
    assert not (tmp_path / "index" / "index.json").exists()
    steps: list[IndexProgress] = []
    assert build_index(*places, progress=steps.append).slides == 3
    assert (steps[0].reused, steps[-1].accepted) == (2, 1)
    assert list(tmp_path.glob("index/pending/*")) == []


@pytest.fixture
def run_job() -> Iterator[Callable[..., tuple[int, str, Path]]]:
    """Runs the job as its own process; returns its status, all its output and Ray's session folder."""
    folder = tempfile.mkdtemp(prefix="hsj", dir="/tmp")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HISTOSCALE_"))}

    def run(*arguments: str) -> tuple[int, str, Path]:
        command = [sys.executable, str(ROOT / "jobs" / "index.py"), *arguments]
        done = subprocess.run(
            command,
            env={**environment, "RAY_TMPDIR": folder},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout, Path(folder)

    yield run
    shutil.rmtree(folder, ignore_errors=True)


def test_a_record_number_in_the_keys_is_nowhere_but_in_the_protected_part(
    run_job: Callable[..., tuple[int, str, Path]], slides: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    status, output, session = run_job(str(slides), "--out", str(out))
    assert status == 0, output
    for said in ("accepted: 2 slides", "refused: 2 slides, by name in protected/refused.csv", "um/px: 0.50 x 2"):
        assert said in output
    assert f"snapshot: {read_index(open_store(out)).snapshot_id}" in output
    assert RECORD_NUMBER not in output

    public = {key for key in files_below(out) if not key.startswith("protected/")}
    assert {key.split("/")[0] for key in public} == {"index.json", "snapshots"}
    assert {Path(key).name for key in public} > {"catalogue.npy", "records.bin", "part-00000.parquet"}
    for key in public:
        assert RECORD_NUMBER.encode() not in (out / key).read_bytes()
        if key.endswith(".parquet"):
            table = pq.read_table(out / key)
            assert RECORD_NUMBER not in f"{table.schema} {table.to_pylist()}"
    (locations,) = out.glob("protected/*/locations/part-00000.parquet")
    protected = str(pq.read_table(locations).to_pylist())
    assert RECORD_NUMBER in protected
    logs = [path for path in session.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("ray-data" in str(path) for path in logs)
    assert [path for path in logs if RECORD_NUMBER.encode() in path.read_bytes()] == []


def test_strata_a_report_and_exclusions_through_the_job(
    run_job: Callable[..., tuple[int, str, Path]], slides: Path, tmp_path: Path
) -> None:
    (tmp_path / "strata.csv").write_text(f"slide,scanner,patient\n{DICOM},a,{RECORD_NUMBER}\n{SVS},a,\n")
    (tmp_path / "withdrawn.csv").write_text(f"patient\n{RECORD_NUMBER}\n")
    place = [str(slides), "--out", str(tmp_path / "index")]
    options = ["--strata", str(tmp_path / "strata.csv"), "--pattern", "(?P<year>[0-9]{4})/", "--report"]
    status, output, _ = run_job(*place, *options)
    assert status == 0, output
    for said in ("scanner: 1 values", "year: 2 values", f"report: {tmp_path}/index/report.html"):
        assert said in output
    status, excluded, _ = run_job(*place, "--exclude", str(tmp_path / "withdrawn.csv"))
    assert (status, excluded.strip()) == (0, "exclusion 1: 1 slides, for every run that starts from now on")
    (exclusion,) = read_exclusions(open_store(tmp_path / "index"))
    index = read_index(open_store(tmp_path / "index"))
    (dicom,) = (record for record in index.records if record.vendor == "dicom")
    assert exclusion.slide_ids == (dicom.slide_id,)
    assert dicom.strata == ("a", "2024")
    public = {key for key in files_below(tmp_path / "index") if not key.startswith("protected/")}
    assert {"report.html", "exclusions/0001.json"} < public
    for key in public:
        assert RECORD_NUMBER.encode() not in (tmp_path / "index" / key).read_bytes()
    assert RECORD_NUMBER not in output

    status, output, _ = run_job(*place, "--pattern", "(?P<site>")
    assert (status, output.count("\n")) == (2, 1)
    assert output.startswith("error: --pattern is not a regular expression")


def write_truncated(path: Path) -> None:
    make_slides(path.parent, count=1)[0].path.rename(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("fill", "diagnosis"),
    [
        (lambda path: None, "no slides found"),
        (write_truncated, "1 x"),
        (write_glass, "no tissue"),
    ],
    ids=["empty", "truncated", "no tissue"],
)
def test_the_job_ends_with_one_line_and_status_2_on_bad_input(
    run_job: Callable[..., tuple[int, str, Path]], tmp_path: Path, fill: Callable[[Path], None], diagnosis: str
) -> None:
    (tmp_path / "slides").mkdir()
    fill(tmp_path / "slides" / "a.svs")
    status, output, _ = run_job(str(tmp_path / "slides"), "--out", str(tmp_path / "index"))
    last = output.strip().splitlines()[-1]
    assert status == 2, output
    assert last.startswith("error: ")
    assert diagnosis in last
    assert not (tmp_path / "index" / "index.json").exists()


def test_the_job_names_a_bucket_that_is_not_there(
    s3_env: Any, run_job: Callable[..., tuple[int, str, Path]], tmp_path: Path
) -> None:
    status, output, _ = run_job("s3://no-such-bucket/slides", "--out", str(tmp_path / "index"))
    last = output.strip().splitlines()[-1]
    assert status == 2, output
    assert last.startswith("error: ")
    assert "no-such-bucket" in last
    assert not (tmp_path / "index").exists()
