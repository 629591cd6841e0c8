"""One rank's file of a checkpoint: its fragments in host memory, written from there in the format of safetensors.

The copy is all that training waits for. Writing lets go of the interpreter while it waits for a disk or a server, and
no second copy is made, in memory or on a scratch disk.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist

from histoscale.checkpoint.fragments import Fragment
from histoscale.checkpoint.manifest import BLOCK_ELEMENTS, BYTES_PER_ELEMENT, Piece, Shard, block_checksums
from histoscale.errors import StorageError
from histoscale.storage.store import Store

_HEADER_ALIGN_BYTES = 8


@dataclass(frozen=True)
class HostShard:
    """What a rank owns, as it was when it was copied.

    Attributes:
        name: Of its file.
        pieces: What each flat tensor holds.
        tensors: kind -> the fragments end to end, fp32 on the host.
    """

    name: str
    pieces: tuple[Piece, ...]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, fragments: Mapping[str, Fragment]) -> Self:
        """Copy this rank's fragments.

        Raises:
            StorageError: The host has no memory for them.
        """
        try:
            tensors = _copied(fragments)
        except (RuntimeError, MemoryError) as error:
            raise StorageError(
                "this rank's state could not be copied to host memory",
                value=type(error).__name__,
                remedy="give the workers' nodes room for a copy of the weights, moments and average of their ranks",
            ) from error
        name = f"rank-{dist.get_rank()}-of-{dist.get_world_size()}.safetensors"
        return cls(name, _pieces(fragments), tensors)

    def write(self, store: Store, folder: str) -> Shard:
        """Write the file into a folder; says what it holds.

        Raises:
            StorageError: It could not be written.
        """
        parts = {kind: tensor.view(torch.uint8).numpy().data for kind, tensor in sorted(self.tensors.items())}
        checksums = {kind: block_checksums(data, BLOCK_ELEMENTS) for kind, data in parts.items()}
        header = _header({kind: tensor.numel() for kind, tensor in sorted(self.tensors.items())})
        store.put_parts(folder + self.name, [memoryview(header), *parts.values()])
        size_bytes = len(header) + sum(len(data) for data in parts.values())
        return Shard(self.name, size_bytes, self.pieces, checksums, BLOCK_ELEMENTS)


@torch.no_grad()
def _copied(fragments: Mapping[str, Fragment]) -> dict[str, torch.Tensor]:
    parts = list(fragments.values())
    kinds = parts[0].tensors if parts else {}
    numel = sum(part.numel for part in parts)
    on_gpu = any(tensor.is_cuda for tensor in kinds.values())
    copies = {kind: torch.empty(numel, dtype=torch.float32, pin_memory=on_gpu) for kind in kinds}
    for kind, flat in copies.items():
        start = 0
        for part in parts:
            flat[start : start + part.numel].copy_(part.tensors[kind], non_blocking=on_gpu)
            start += part.numel
    if on_gpu:
        torch.cuda.synchronize()
    return copies


def _pieces(fragments: Mapping[str, Fragment]) -> tuple[Piece, ...]:
    pieces, start = [], 0
    for name, part in fragments.items():
        pieces.append(Piece(name, part.offset, part.numel, start))
        start += part.numel
    return tuple(pieces)


def _header(numels: Mapping[str, int]) -> bytes:
    """The head of a safetensors file of flat fp32 tensors, in the order in which their data follow."""
    entries, start_byte = {}, 0
    for kind, numel in numels.items():
        stop_byte = start_byte + numel * BYTES_PER_ELEMENT
        entries[kind] = {"dtype": "F32", "shape": [numel], "data_offsets": [start_byte, stop_byte]}
        start_byte = stop_byte
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text
