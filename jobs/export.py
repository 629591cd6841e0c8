r"""Export the backbone of a run's checkpoint (the EMA teacher) in a layout that others load, with proof.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/export.py --run RUN --format timm --out DIR [--step N] [--licence TEXT] [--tiles DIR]

RUN is the --out of jobs/pretrain.py, DIR a folder or an s3:// prefix that is empty or holds an earlier export of the
same run in the same format, which is replaced. Formats:

    timm           for timm.create_model
    huggingface    for transformers.AutoModel (Dinov2WithRegistersModel); refuses qk_norm and vit_gigantic14_reg8

Both hold plain torch code, files for TRIDENT and eva, a model card, and parity.json: the tokens of other
implementations beside ours over real tiles. docs/guides/export.md explains each file. Where an implementation computes
something else nothing is written. Exit status: 0, or with a one-line diagnosis as the last line 2, or 75 where the same
command may succeed later, as a bucket was away.
"""

import argparse

from histoscale.cluster.job import location, run_job


def main() -> None:
    """Read the arguments, export, say what was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="RUN", help="the run folder (a folder or an s3:// prefix)")
    parser.add_argument("--format", required=True, help="timm or huggingface")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the export goes")
    parser.add_argument("--step", type=int, metavar="N", help="of a committed checkpoint; the newest without it")
    parser.add_argument("--licence", metavar="TEXT", help="under which you give the weights away; goes into the card")
    parser.add_argument(
        "--tiles", metavar="DIR", help="images to prove with; without it tiles of the run's slides, or drawn tissue"
    )
    arguments = parser.parse_args()

    from histoscale.checkpoint.manifest import Commit
    from histoscale.cluster.export_tiles import tiles_to_prove_with
    from histoscale.cluster.run_folder import require_run
    from histoscale.export.parity import ParityTiles
    from histoscale.export.run import ExportRequest, export_run
    from histoscale.export.tiles import tiles_of_folder
    from histoscale.storage import open_store

    run_store = open_store(location(arguments.run, "--run"))
    recipe = require_run(run_store)

    def find_tiles(commit: Commit) -> ParityTiles:
        if arguments.tiles is not None:
            return tiles_of_folder(open_store(location(arguments.tiles, "--tiles")))
        tiles, problem = tiles_to_prove_with(run_store, recipe, commit)
        if problem is not None:
            print(f"warning: proven over drawn tissue: {problem}")
        return tiles

    request = ExportRequest(location(arguments.out, "--out"), arguments.format, arguments.step, arguments.licence)
    result = export_run(run_store, recipe, request, find_tiles)
    print(f"exported {recipe.model.arch} at step {result.marker.step}: {result.parameters:,} parameters")
    for line in result.parity.lines():
        print(line)
    print(f"export: {result.uri}")


if __name__ == "__main__":
    run_job(main)
