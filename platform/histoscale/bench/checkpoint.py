"""What a checkpoint costs the steps beside it, how many bytes it takes, and what restoring at another world size costs.

A ViT-B/14 with few tiles, so that its state is large beside its step; one process, a folder and a real S3 server. For
restoring, the state is cut as ZeRO 1 and 2 cut it (ranges of all parameters laid end to end) and as ZeRO 3 does (a
range of each), and each rank's ranges are read in turn. Nothing here needs Ray.
"""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import torch

from histoscale.bench.figure import Figure
from histoscale.bench.s3_server import s3_server
from histoscale.bench.step import Tiles, only_rank, random_tiles, step_recipe
from histoscale.checkpoint.fragments import EMA, MASTER, MOMENTS, Fragment
from histoscale.checkpoint.manifest import BYTES_PER_ELEMENT, Commit
from histoscale.checkpoint.reader import load_into, read_manifest
from histoscale.checkpoint.shard import HostShard
from histoscale.checkpoint.writer import Snapshot, commit_shards
from histoscale.config.recipe import Recipe
from histoscale.models import build_ssl_net
from histoscale.storage import Store, open_store
from histoscale.storage.local import LocalStore
from histoscale.train.trainer import Trainer, build_trainer

ARCH = "vit_b14"
TILES = 2
PROTOTYPES = 4096
KINDS = (MASTER, *MOMENTS, EMA)
_BUCKET = "checkpoints"
_PLAIN_STEPS = 4
_ROUNDS = 3
_SIZES = (1, 2, 3)

Shapes = dict[str, tuple[int, ...]]


def checkpoint(device: str = "cpu") -> Iterator[Figure]:
    """`checkpoint.stall_ratio`, `.bytes_ratio`, `.reshard_time_ratio`, `.reshard_bytes_ratio`."""
    recipe = step_recipe(ARCH, TILES, PROTOTYPES, "bf16" if device == "cuda" else "fp32")
    with only_rank(device) as folder:
        yield _stall(recipe, device, open_store(folder / "stall"))
        yield _bytes(recipe, device, Counted(folder / "bytes"))
        with s3_server():
            boto3.Session().client("s3").create_bucket(Bucket=_BUCKET)
            yield _stall(recipe, device, open_store(f"s3://{_BUCKET}/run"))
        yield from _resharding(recipe, folder / "reshard")


class Counted(LocalStore):
    """A folder that counts the bytes that go through it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written_bytes = self.read_bytes = 0

    def put_parts(self, key: str, parts: Any) -> None:  # noqa: ANN401 - as the method that it counts for
        """As in a folder."""
        self.written_bytes += sum(len(part) for part in parts)
        super().put_parts(key, parts)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """As in a folder."""
        data = super().get_range(key, start, length)
        self.read_bytes += len(data)
        return data


@dataclass
class _Loop:
    """Steps of one trainer, timed."""

    trainer: Trainer
    tiles: Tiles
    step: int = 0

    def seconds(self, count: int) -> list[float]:
        """Of so many steps."""
        return [self._timed()[0] for _ in range(count)]

    def _timed(self) -> tuple[float, Commit | None]:
        start_s = time.perf_counter()
        self.trainer.step(self.step, [self.tiles])
        self.step += 1
        committed = self.trainer.settle(wait=False)
        return time.perf_counter() - start_s, committed

    def with_checkpoint(self) -> tuple[float, list[float]]:
        """Seconds of the copy, and of the steps from it on until the commit is there."""
        start_s = time.perf_counter()
        self.trainer.begin_save(self.step)
        copy_s = time.perf_counter() - start_s
        steps_s = []
        committed = None
        while committed is None:
            step_s, committed = self._timed()
            steps_s.append(step_s)
        return copy_s, steps_s

    def waited_s(self) -> float:
        """Seconds of a checkpoint that is waited for."""
        start_s = time.perf_counter()
        self.trainer.save(self.step)
        return time.perf_counter() - start_s


def _stall(recipe: Recipe, device: str, store: Store) -> Figure:
    loop = _loop(recipe, device, store)
    loop.seconds(2)
    plain_s, copies_s, beside_s, extra_s, waited_s = [], [], [], [], []
    for _ in range(_ROUNDS):
        plain_s += loop.seconds(_PLAIN_STEPS)
        copy_s, steps_s = loop.with_checkpoint()
        plain_s += loop.seconds(_PLAIN_STEPS)
        step_s = statistics.median(plain_s[-2 * _PLAIN_STEPS :])
        copies_s.append(copy_s)
        beside_s.append(sum(steps_s))
        extra_s.append(copy_s + sum(steps_s) - step_s * len(steps_s))
        waited_s.append(loop.waited_s())
        loop.seconds(1)
    step_s, extra = statistics.median(plain_s), statistics.median(extra_s)
    details = {
        "store": "s3" if store.uri.startswith("s3:") else "local",
        "arch": recipe.model.arch,
        "device": device,
        "state_bytes": _state_bytes(_shapes(recipe)),
        "step_s": step_s,
        "copy_s": statistics.median(copies_s),
        "in_flight_s": statistics.median(beside_s),
        "extra_s": extra_s,
        "waited_s": statistics.median(waited_s),
        "share_of_interval": extra / (recipe.checkpoint.every_steps * step_s),
    }
    return Figure("checkpoint.stall_ratio", extra / step_s, "steps", statistics.median(waited_s) / step_s, details)


def _bytes(recipe: Recipe, device: str, store: Counted) -> Figure:
    loop = _loop(recipe, device, store)
    loop.seconds(1)
    loop.waited_s()
    state_bytes = _state_bytes(_shapes(recipe))
    details = {"state_bytes": state_bytes, "written_bytes": store.written_bytes}
    return Figure("checkpoint.bytes_ratio", store.written_bytes / state_bytes, "ratio", 1.0, details)


def _loop(recipe: Recipe, device: str, store: Store) -> _Loop:
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    trainer = build_trainer(recipe, place, store)
    trainer.resume()
    return _Loop(trainer, random_tiles(recipe))


def _shapes(recipe: Recipe) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(each.shape) for name, each in build_ssl_net(recipe).named_parameters()}


def _state_bytes(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values())) * BYTES_PER_ELEMENT * len(KINDS)


@dataclass(frozen=True)
class _Case:
    """A checkpoint of `old` workers restored by `new` ones.

    Attributes:
        s: Seconds of the slowest rank.
        same_s: The same where as many workers wrote it.
        bytes_ratio: Bytes read over bytes needed, of the worst rank.
    """

    cut: str
    old: int
    new: int
    s: float
    same_s: float
    bytes_ratio: float


def _resharding(recipe: Recipe, folder: Path) -> Iterator[Figure]:
    """Each world size restored from each, against itself; the worst case is the figure, all stand in the details."""
    shapes = _shapes(recipe)
    cases: list[_Case] = []
    for cut in ("end to end", "each"):
        store = Counted(folder / cut)
        commits = {size: _written(store, shapes, cut, size) for size in _SIZES}
        for new in _SIZES:
            found = {old: _restored(store, commits[old], shapes, cut, new) for old in _SIZES}
            cases += [_Case(cut, old, new, seconds, found[new][0], ratio) for old, (seconds, ratio) in found.items()]
        store.delete_prefix("checkpoints")
    slowest = max(case.s / case.same_s for case in cases)
    details = {"cases": [asdict(case) for case in cases]}
    yield Figure("checkpoint.reshard_time_ratio", slowest, "ratio", 1.0, details)
    yield Figure("checkpoint.reshard_bytes_ratio", max(case.bytes_ratio for case in cases), "ratio", 1.0)


def _written(store: Store, shapes: Shapes, cut: str, size: int) -> Commit:
    """A commit of `size` steps, by as many workers."""
    folder = f"checkpoints/step-{size:08d}.bench/"
    shards = []
    for rank in range(size):
        held = HostShard.of(_fragments(shapes, cut, rank, size))
        shards.append(replace(held, name=f"rank-{rank}-of-{size}.safetensors").write(store, folder))
    snapshot = Snapshot(size, 0, "bench", {}, shapes, [], {"workers": str(size)})
    return commit_shards(store, folder, snapshot, tuple(shards), [])


def _restored(store: Counted, commit: Commit, shapes: Shapes, cut: str, size: int) -> tuple[float, float]:
    """Seconds of the slowest rank, each at its best, and bytes read over bytes needed of the worst one."""
    seconds, ratios = [], []
    for rank in range(size):
        targets = _fragments(shapes, cut, rank, size)
        needed_bytes = sum(part.numel for part in targets.values()) * BYTES_PER_ELEMENT * len(KINDS)
        runs_s = []
        for _ in range(_ROUNDS):
            before_bytes, start_s = store.read_bytes, time.perf_counter()
            load_into(store, commit, targets, read_manifest(store, commit).shapes)
            runs_s.append(time.perf_counter() - start_s)
            read_bytes = store.read_bytes - before_bytes
        seconds.append(min(runs_s))
        ratios.append(read_bytes / needed_bytes)
    return max(seconds), max(ratios)


def _fragments(shapes: Shapes, cut: str, rank: int, size: int) -> dict[str, Fragment]:
    """What a rank owns; the values do not matter."""
    total, start, fragments = sum(map(math.prod, shapes.values())), 0, {}
    share = math.ceil(total / size)
    for name, shape in shapes.items():
        numel = math.prod(shape)
        if cut == "each":
            low, high = (min(numel, math.ceil(numel / size) * each) for each in (rank, rank + 1))
        else:
            low, high = (min(numel, max(0, share * each - start)) for each in (rank, rank + 1))
        start += numel
        if low < high:
            tensors = {kind: torch.rand(high - low) for kind in KINDS}
            fragments[name] = Fragment(low, high - low, shape, tensors)
    return fragments
