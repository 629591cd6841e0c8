"""Where readers run: on the trainers' nodes while there are CPUs, then on the others."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from histoscale.bench.feed import BlankReader
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.tile_check import TileCheck
from histoscale.stream.feed import RankFeed
from histoscale.stream.reader import ReaderSpec
from histoscale.stream.windows import FeedSpec, RankShare, start_feed

PLAN = PlanSpec(
    seed=0,
    tiles=10**6,
    tiles_per_step=8,
    replicas=8,
    chapter_steps=1,
    tiles_per_visit=1,
    region_px=32,
    mix=((0.5, 1.0),),
    max_upsample=1.1,
    min_tissue=0.5,
)


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """Two real nodes beside the head, by node id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
        for kind, cpus in (("other", 3), ("trainer", 2)):
            cluster.add_node(num_cpus=cpus, labels={"kind": kind}, object_store_memory=2 * 10**8)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        try:
            yield {node["NodeID"]: node["Labels"].get("kind", "head") for node in ray.nodes()}
        finally:
            ray.shutdown()
            cluster.shutdown()


class NodeReader(BlankReader):
    """Says in the place of the slide which node it is on."""

    def __call__(self, row: pa.Table) -> pa.Table:
        block = super().__call__(row)
        node = int(ray.get_runtime_context().get_node_id()[:7], 16)
        slides = pa.array([[node] * len(block["slides"][0])], pa.list_(pa.int32()))
        return block.set_column(block.schema.get_field_index("slides"), "slides", slides)


@pytest.mark.parametrize(("readers", "expected"), [(2, {"trainer"}), (4, {"trainer", "other"})])
def test_readers_fill_the_trainers_nodes_first(nodes: dict[str, str], readers: int, expected: set[str]) -> None:
    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    reader = ReaderSpec("", "", PLAN, {}, TileCheck(0.0, 0.0), Path("/nonexistent"), 0)
    spec: Any = FeedSpec(40, reader, (readers, readers), first_on={"kind": "in(trainer)"}, read_with=NodeReader)
    feed = RankFeed(spec, RankShare(start_feed(spec), "a", 0, 1), 0)
    kinds = {int(node[:7], 16): kind for node, kind in nodes.items()}
    seen = Counter(
        kinds[int(batch.slides[0])]
        for step in range(spec.steps)
        for batch in feed.micro_batches(step)
        if batch is not None
    )
    feed.close()
    assert set(seen) - {"head"} == expected
