"""Embeds slides with actors: the driver hands out batches and refers to what comes of them; pixels never pass it.

A slide's batches go from readers to embedders, and its file is written by a reader once all are there. A slide whose
processes die is done again; bounds on batches under way bound the memory.
"""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from histoscale.cluster.embedding_actors import Done, EmbedderActor, ReaderActor
from histoscale.cluster.failures import diagnosis_in, found_in
from histoscale.embeddings.files import SlideTiles
from histoscale.embeddings.folder import LeftOut
from histoscale.embeddings.network import NetworkRef
from histoscale.embeddings.reading import Source, kept_tiles, tiles_of
from histoscale.embeddings.tiling import reading_order
from histoscale.errors import ClusterError
from histoscale.slides.catalogue import Catalogue

BATCH_TILES = 128
_POLL_S = 2.0
_BATCHES_PER_WORKER = 2  # one that it works at, and one that is on its way
_TRIES = 3  # of a slide whose processes die
_DEATHS_IN_A_ROW = 3  # of each worker, before any batch is done
_CRASHED = "the processes that read and embedded it died"
_LOST: tuple[type[BaseException], ...] = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)

Kind: TypeAlias = Literal["reader", "embedder"]


@dataclass(frozen=True)
class Workforce:
    """How many processes work.

    Attributes:
        readers: Each on a CPU.
        embedders: Each on a CPU, and on a GPU with `cuda`.
        device: `cuda` or `cpu`.
    """

    readers: int
    embedders: int
    device: str


@dataclass(frozen=True)
class Embedded:
    """A slide whose file is written, with so many tiles; `refused` more could not be read."""

    slide_id: str
    tiles: int
    refused: int


Outcome: TypeAlias = Embedded | LeftOut


@dataclass(eq=False)
class _Worker:
    """An actor, and how many calls of it are under way."""

    kind: Kind
    handle: Any
    load: int = 0


@dataclass(eq=False)
class _Slide:
    """A slide in hand; `is_over`: nothing more is wanted of it."""

    row: int
    tiles: SlideTiles
    order: NDArray[np.int64]
    handed_out: int = 0
    is_over: bool = False
    features: dict[int, Any] = field(default_factory=dict)
    done: dict[int, Done] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        """How many it has."""
        return -(-len(self.order) // BATCH_TILES)


@dataclass(frozen=True)
class _Call:
    """A call under way: of a batch, of the writing of a file, or of a worker that gets ready."""

    workers: tuple[_Worker, ...]
    slide: _Slide | None = None
    batch: int | None = None
    features: Any = None


class EmbeddingPipeline:
    """Embeds the slides of a catalogue.

    Args:
        catalogue: The slides.
        source: What is read, and how it is embedded.
        network: The weights.
        out_uri: The folder of the embeddings.
        workforce: How many processes.

    Attributes:
        began_s: When the first batch was handed out, by the monotonic clock; None before.
    """

    def __init__(
        self, catalogue: Catalogue, source: Source, network: NetworkRef, out_uri: str, workforce: Workforce
    ) -> None:
        self._catalogue = catalogue
        self._source = source
        self._network = network
        self._out_uri = out_uri
        self._workforce = workforce
        self._workers: dict[Kind, list[_Worker]] = {"reader": [], "embedder": []}
        self._calls: dict[Any, _Call] = {}
        self._rows: deque[int] = deque()
        self._crashes: Counter[int] = Counter()
        self._current: _Slide | None = None
        self._unwritten: deque[_Slide] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._deaths = 0
        self.began_s: float | None = None

    def run(self, rows: Sequence[int]) -> Iterator[Outcome | None]:
        """What became of each slide, as it comes; None now and then, whenever work was handed out or nothing happened.

        Raises:
            ClusterError: Workers die before they have done anything.
            HistoscaleError: What a worker says, such as that the storage is away.
        """
        self._rows.extend(rows)
        for _ in range(self._workforce.readers):
            self._start("reader")
        for _ in range(self._workforce.embedders):
            self._start("embedder")
        try:
            while self._rows or self._current or self._unwritten or any(call.slide for call in self._calls.values()):
                self._write()
                self._hand_out()
                yield None
                ended, _ = ray.wait(list(self._calls), timeout=_POLL_S) if self._calls else ([], [])
                for ref in ended:
                    self._take(ref)
                while self._outcomes:
                    yield self._outcomes.popleft()
        finally:
            starting = [call.workers[0] for call in self._calls.values() if call.slide is None]
            for worker in [*starting, *self._workers["reader"], *self._workers["embedder"]]:
                with contextlib.suppress(RayError):
                    ray.kill(worker.handle)

    def _start(self, kind: Kind) -> None:
        """Ask for an actor; it is given work once it says that it is ready."""
        if kind == "reader":
            actor: Any = ray.remote(ReaderActor).options(num_cpus=1, max_restarts=0)
            worker = _Worker(kind, actor.remote(self._source, self._out_uri))
        else:
            gpus = 1 if self._workforce.device == "cuda" else 0
            actor = ray.remote(EmbedderActor).options(num_cpus=1, num_gpus=gpus, max_restarts=0)
            worker = _Worker(kind, actor.remote(self._network, self._source, self._workforce.device))
        self._calls[worker.handle.ready.remote()] = _Call((worker,))

    def _hand_out(self) -> None:
        """Give batches to the workers that are there, as many as they may hold."""
        readers, embedders = self._workers["reader"], self._workers["embedder"]
        if not readers or not embedders:
            return
        most = _BATCHES_PER_WORKER * (len(readers) + len(embedders))
        while sum(call.slide is not None for call in self._calls.values()) < most:
            slide = self._next_slide()
            if slide is None:
                return
            reader, embedder = _idlest(readers), _idlest(embedders)
            self.began_s = time.monotonic() if self.began_s is None else self.began_s
            number = slide.handed_out
            slide.handed_out += 1
            wanted = slide.order[number * BATCH_TILES : (number + 1) * BATCH_TILES]
            batch = reader.handle.read.remote(slide.row, slide.tiles.coords[wanted])
            features, done = embedder.handle.embed.options(num_returns=2).remote(batch)
            reader.load += 1
            embedder.load += 1
            self._calls[done] = _Call((reader, embedder), slide, number, features)

    def _next_slide(self) -> _Slide | None:
        """A slide with a batch that is not handed out; None where there is none."""
        if self._current and (self._current.is_over or self._current.handed_out == self._current.batches):
            self._current = None
        while self._current is None and self._rows:
            row = self._rows.popleft()
            tiles = tiles_of(self._catalogue, row, self._source.spec.tiling)
            if isinstance(tiles, str):
                self._outcomes.append(LeftOut(self._catalogue.slide_id(row), tiles, is_bad=False))
            else:
                self._current = _Slide(row, tiles, reading_order(tiles.coords, tiles.pitch_px0))
        return self._current

    def _take(self, ref: Any) -> None:  # noqa: ANN401 - Ray's references have no type
        """Go on from a call that has ended."""
        call = self._calls.pop(ref)
        for worker in call.workers:
            worker.load -= 1 if call.slide else 0
        try:
            result = ray.get(ref)
        except RayError as error:
            diagnosis = diagnosis_in(error)
            if diagnosis is not None:
                raise diagnosis from None
            if isinstance(error, RayTaskError) and not any(found_in(error, kind) for kind in _LOST):
                raise
            self._lose(call, error)
            return
        if call.slide is None:
            self._workers[call.workers[0].kind].append(call.workers[0])
        elif call.slide.is_over:
            return
        elif call.batch is None:
            call.slide.is_over = True
            refused = len(call.slide.tiles.coords) - result
            self._outcomes.append(Embedded(call.slide.tiles.slide_id, result, refused))
        else:
            self._deaths = 0
            self._take_batch(call.slide, call.batch, call.features, result)

    def _take_batch(self, slide: _Slide, number: int, features: Any, done: Done) -> None:  # noqa: ANN401
        slide.done[number], slide.features[number] = done, features
        if done.whole_slide is not None:
            self._leave_out(slide, done.whole_slide)
        elif len(slide.done) == slide.batches:
            in_order = [slide.done[n] for n in range(slide.batches)]
            if not any(len(each.kept) for each in in_order):
                reasons = sum((Counter(each.refused) for each in in_order), Counter[str]())
                self._leave_out(slide, reasons.most_common(1)[0][0])
                return
            self._unwritten.append(slide)

    def _write(self) -> None:
        """Have the files of finished slides written."""
        while self._unwritten and self._workers["reader"]:
            slide = self._unwritten.popleft()
            batches = range(slide.batches)
            kept, order = kept_tiles(slide.tiles, slide.order, [slide.done[n].kept for n in batches], BATCH_TILES)
            refused = len(slide.tiles.coords) - len(kept.coords)
            reader = _idlest(self._workers["reader"])
            reader.load += 1
            written = reader.handle.write.remote(kept, refused, order, *(slide.features[n] for n in batches))
            self._calls[written] = _Call((reader,), slide)

    def _leave_out(self, slide: _Slide, reason: str) -> None:
        slide.is_over = True
        self._outcomes.append(LeftOut(slide.tiles.slide_id, reason, is_bad=True))

    def _lose(self, call: _Call, error: RayError) -> None:
        """A process of a call has died: another one takes its place, and the slide is done again."""
        died = found_in(error, RayActorError)
        dead_id = getattr(died, "actor_id", None)
        dead = [worker for worker in call.workers if worker.handle._actor_id.hex() == dead_id]
        for worker in dead or (call.workers if died or call.slide is None else ()):
            present = self._workers[worker.kind]
            if worker in present:
                present.remove(worker)
            elif call.slide is not None:
                continue  # an earlier call of it has told already
            with contextlib.suppress(RayError):
                ray.kill(worker.handle)
            self._deaths += 1
            self._start(worker.kind)
        if self._deaths > _DEATHS_IN_A_ROW * (self._workforce.readers + self._workforce.embedders):
            raise ClusterError(
                "the processes that embed die before they have done anything",
                value=str(error).strip().splitlines()[0],
                expected="processes that live",
                remedy="look at the memory of the nodes; fewer --readers and --embedders need less",
            )
        if call.slide is None or call.slide.is_over:
            return
        self._crashes[call.slide.row] += 1
        if self._crashes[call.slide.row] >= _TRIES:
            self._leave_out(call.slide, _CRASHED)
            return
        call.slide.is_over = True
        self._rows.append(call.slide.row)


def _idlest(workers: Sequence[_Worker]) -> _Worker:
    return min(workers, key=lambda worker: worker.load)
