r"""Learn from the embeddings of whole slides: probe labels with attention pooling, or cluster tiles into strata.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/slides.py --embeddings FOLDER --labels CSV --name TASK [--index INDEX] [--heatmaps]
        python jobs/slides.py --embeddings FOLDER --clusters 16

FOLDER is the features_... folder that jobs/embed.py named at its end.

  --labels CSV     slide_id,label[,group][,split]: gated attention (ABMIL) against the mean of the tiles, on splits that
                   no group (patient) is on both sides of. With --index, slides may go by their names or URIs, and
                   patients of the index are the groups. FOLDER/probes/TASK/ gets report.json, the attention of
                   every tile, and with --heatmaps a picture of each slide; none of it holds a name.
  --clusters K     mini-batch k-means; FOLDER/clusters/K/clusters.csv says which cluster each slide is mostly made of.
                   jobs/index.py --strata takes it, and data.balance=[cluster] then balances the next run over it.

Exit status: 0, or with a one-line diagnosis as the last line 2, or 75 where the same command may succeed later.
"""

import argparse

from histoscale.cluster.job import connect, location, run_job


def main() -> None:
    """Read the arguments, probe or cluster on a node of the cluster, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, metavar="FOLDER", help="a features_... folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", metavar="CSV", help="labels of slides")
    what.add_argument("--clusters", type=int, metavar="K", help="how many clusters")
    parser.add_argument("--index", help="of --labels: the slide index, for names and patients")
    parser.add_argument("--name", default="labels", help="of --labels: the task, in the names of files")
    parser.add_argument("--seeds", type=int, default=5, help="of --labels: splits, where the CSV has none (5)")
    parser.add_argument(
        "--max-tiles", type=int, default=4096, help="of --labels: tiles of a slide to learn from (4096)"
    )
    parser.add_argument("--heatmaps", action="store_true", help="of --labels: draw the attention")
    parser.add_argument("--sample", type=int, default=100_000, help="of --clusters: tiles to cluster (100,000)")
    parser.add_argument("--seed", type=int, default=0, help="of --clusters")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where attention is fitted")
    arguments = parser.parse_args()

    from histoscale.cluster.slide_tasks import SlideTask, run_task
    from histoscale.embeddings.slide_probe import ProbePlan

    task = SlideTask(
        location(arguments.embeddings, "--embeddings"),
        labels_uri=location(arguments.labels, "--labels") if arguments.labels else None,
        index_uri=location(arguments.index, "--index") if arguments.index else None,
        plan=ProbePlan(arguments.name, arguments.seeds, arguments.max_tiles, arguments.heatmaps),
        clusters=arguments.clusters or 0,
        sample=arguments.sample,
        seed=arguments.seed,
    )
    connect()
    for line in run_task(task, arguments.device, lambda line: print(line, flush=True)):
        print(line)


if __name__ == "__main__":
    run_job(main)
