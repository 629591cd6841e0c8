r"""Embed whole slides with a run's teacher or an export: one HDF5 file of tile embeddings and coordinates per slide.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/embed.py --index INDEX --run RUN --out DIR [--mpp 0.5] [--embedding cls_mean]

INDEX is the --out of jobs/index.py, RUN that of jobs/pretrain.py; --export DIR takes that of jobs/export.py instead.
Files go to DIR/20x_224px_0px_overlap/features_MODEL/SLIDE_ID.h5 in the layout of TRIDENT: `features` [n, D], `coords`
[n, 2] at level 0. Tiles lie on a grid over the tissue, at exactly --mpp. Running the command again goes on where it was
killed, and embeds slides that are new or have changed. A slide that cannot be read is named, with its reason, in
left_out.jsonl. docs/guides/embedding.md has the layout; jobs/slides.py learns from such files. Exit status: 0, or with
a one-line diagnosis as the last line 2, or 75 where the same command may succeed later.
"""

import argparse
import time

from histoscale.cluster.job import connect, location, run_job


def main() -> None:
    """Read the arguments, embed what is left, say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--index", required=True, help="the slide index (a folder or an s3:// prefix)")
    source.add_argument("--run", help="a run folder, whose teacher embeds")
    source.add_argument("--export", metavar="DIR", help="an export, which embeds")
    add("--step", type=int, help="of the run's checkpoint; the newest by default")
    add("--out", required=True, metavar="DIR", help="where the files go (a folder or an s3:// prefix)")
    add("--mpp", type=float, default=0.5, help="um/px of the tiles (0.5, which is 20x)")
    add("--tile-px", type=int, help="side of a tile; by default that of the model's crops")
    add("--stride-px", type=int, help="distance between tiles; by default their side, so that none overlaps")
    add("--min-tissue", type=float, default=0.65, help="least share of tissue of a tile (0.65)")
    add("--embedding", default="cls_mean", help="cls, or cls_mean: with the mean of the patch tokens after it")
    add("--dtype", default="float16", help="of the files: float16 or float32")
    add("--slides", metavar="ID,...", help="only these slides, by id")
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only slides with this in the index")
    add("--limit", type=int, metavar="N", help="only the first N slides, to try it out")
    add("--name", help="of the model in the name of the folder; by default its shape and step")
    add("--readers", type=int, metavar="N", help="processes that read")
    add("--embedders", type=int, metavar="N", help="processes that embed; one per GPU by default")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where they embed")
    add("--max-bad-slides", type=int, default=1000, help="more unreadable slides end the job (1000, or 5 %% if less)")
    arguments = parser.parse_args()

    from histoscale.cluster.embedding import EmbeddingPlan, embed_slides, workforce
    from histoscale.cluster.run_folder import require_run
    from histoscale.embeddings.network import find_ref
    from histoscale.embeddings.progress import EmbeddingProgress
    from histoscale.embeddings.selection import Selection
    from histoscale.embeddings.tiling import Tiling
    from histoscale.storage import open_store

    selection = Selection.parse(arguments.slides, arguments.where, arguments.limit)
    weights = open_store(location(arguments.run or arguments.export, "--run or --export"))
    network = find_ref(weights, require_run(weights) if arguments.run else None, arguments.step)
    plan = EmbeddingPlan(
        location(arguments.index, "--index"),
        location(arguments.out, "--out"),
        network,
        Tiling.of(arguments.mpp, arguments.tile_px or network.image_px, arguments.stride_px, arguments.min_tissue),
        selection=selection,
        **{key: getattr(arguments, key) for key in ("embedding", "dtype", "name", "max_bad_slides")},
    )
    said_s = 0.0

    def tell(progress: EmbeddingProgress) -> None:
        nonlocal said_s
        if progress.is_over or time.monotonic() - said_s >= 5.0:
            said_s = time.monotonic()
            print(progress.line(), flush=True)

    connect()
    force = workforce(arguments.device, arguments.readers, arguments.embedders)
    print(f"{network.name}: {force.readers} readers, {force.embedders} embedders on {force.device}", flush=True)
    for line in embed_slides(plan, force, tell).lines():
        print(line)


if __name__ == "__main__":
    run_job(main)
