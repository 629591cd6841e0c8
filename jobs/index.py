r"""Index slides: what each is, how it is scaled and where its tissue lies; needed once before pretraining.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/index.py SLIDES --out INDEX

SLIDES is a folder, an s3:// prefix or one slide; INDEX a folder or an s3:// prefix. Running the command again examines
only what is new or has changed and what the storage did not give, and goes on where a killed run was. Slides that left
SLIDES leave the index; earlier snapshots stay, for the runs that began with them.

  slides.csv in SLIDES, or --sidecar CSV    slide,mpp              um/px of slides that do not say theirs
  --strata CSV (or columns of slides.csv)   slide,site,stain,...   up to 8 columns that sampling is balanced over;
                                            (again and again, also by id); `patient` is kept as a keyed id
  --pattern '(?P<site>[^/]+)/.*'            the same out of the slides' paths below SLIDES
  --exclude CSV                             slide or patient       withdraws slides of the index from training, and
                                            indexes nothing
  --report                                  writes INDEX/report.html: counts, scales, sites, pictures; no names

Output never names a slide; INDEX/protected does, and only its owner should be able to read it. Exit status: 0, or
with a one-line diagnosis as the last line 2, or 75 where the same command may succeed later, as a bucket was away.
"""

import argparse
import time

from histoscale.cluster.job import connect, location, run_job

SECONDS_BETWEEN_LINES = 2.0


def main() -> None:
    """Read the arguments, build the index or exclude slides, say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", metavar="SLIDES", help="a folder, an s3:// prefix or one slide")
    parser.add_argument("--out", required=True, metavar="INDEX", help="where the index goes")
    parser.add_argument("--sidecar", metavar="CSV", help="um/px of slides that do not say theirs: columns slide,mpp")
    parser.add_argument(
        "--strata", action="append", metavar="CSV", help="where slides come from: columns slide,site,stain,..."
    )
    parser.add_argument("--pattern", metavar="REGEX", help="the same: named groups, matched with paths below SLIDES")
    parser.add_argument("--exclude", metavar="CSV", help="withdraw slides, and no more: columns slide, patient or both")
    parser.add_argument("--report", action="store_true", help="write INDEX/report.html")
    arguments = parser.parse_args()

    from histoscale.slides.archive import read_csv, slides_root
    from histoscale.slides.build import build_index
    from histoscale.slides.exclusions import exclude, require_alone
    from histoscale.slides.index import describe
    from histoscale.slides.progress import IndexProgress
    from histoscale.slides.report import write_report
    from histoscale.storage import open_store

    slides, out = location(arguments.slides, "SLIDES"), location(arguments.out, "--out")
    sidecar = location(arguments.sidecar, "--sidecar") if arguments.sidecar else None
    withdrawn = location(arguments.exclude, "--exclude") if arguments.exclude else None
    strata = [location(text, "--strata") for text in arguments.strata or ()]
    said_s = 0.0

    def tell(progress: IndexProgress) -> None:
        nonlocal said_s
        if time.monotonic() - said_s < SECONDS_BETWEEN_LINES and progress.done < progress.total:
            return
        said_s = time.monotonic()
        print(progress.line(), flush=True)

    if withdrawn:
        require_alone({name: getattr(arguments, name) for name in ("sidecar", "strata", "pattern", "report")})
        content = read_csv(withdrawn, "the CSV of --exclude")
        done = exclude(open_store(out), slides_root(slides)[0].uri, content)
        print(f"exclusion {done.number}: {len(done.slide_ids)} slides, for every run that starts from now on")
        return
    sources = {"sidecar": sidecar, "strata": strata, "pattern": arguments.pattern}
    for line in describe(build_index(slides, out, **sources, connect=connect, progress=tell)):
        print(line)
    print(f"index: {out}")
    if arguments.report:
        print(f"report: {write_report(open_store(out))}")


if __name__ == "__main__":
    run_job(main)
