"""Index slides: what each is, how it is scaled and where its tissue lies; needed once before pretraining.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/index.py SLIDES --out INDEX [--sidecar SLIDES.csv]

SLIDES is a folder, an s3:// prefix or one slide; INDEX a folder or an s3:// prefix. The sidecar, by default
slides.csv in SLIDES, gives um/px to slides that do not say theirs: columns slide,mpp. Running the command again
examines only what is new, has changed or was refused. Output never names a slide; INDEX/protected does, and only
its owner should be able to read it. Exit status: 0, or 2 with a one-line diagnosis as the last line.
"""

import argparse
import time

from histoscale.cluster.job import connect, location, run_job

SECONDS_BETWEEN_LINES = 2.0


def main() -> None:
    """Read the arguments, build the index, say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", metavar="SLIDES", help="a folder, an s3:// prefix or one slide")
    parser.add_argument("--out", required=True, metavar="INDEX", help="where the index goes")
    parser.add_argument("--sidecar", metavar="CSV", help="um/px of slides that do not say theirs: columns slide,mpp")
    arguments = parser.parse_args()

    from histoscale.slides.build import IndexProgress, build_index
    from histoscale.slides.index import describe

    slides, out = location(arguments.slides, "SLIDES"), location(arguments.out, "--out")
    sidecar = location(arguments.sidecar, "--sidecar") if arguments.sidecar else None
    said_s = 0.0

    def tell(progress: IndexProgress) -> None:
        nonlocal said_s
        if time.monotonic() - said_s < SECONDS_BETWEEN_LINES and progress.done < progress.total:
            return
        said_s = time.monotonic()
        print(progress.line(), flush=True)

    for line in describe(build_index(slides, out, sidecar=sidecar, connect=connect, progress=tell)):
        print(line)
    print(f"index: {out}")


if __name__ == "__main__":
    run_job(main)
