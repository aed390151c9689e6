"""One shard: a safetensors file of some rows' features, memory-mapped when read.

    keys      U8  [N, 16]  what each row was computed from (`row_keys`)
    lengths   I32 [N]      tokens of each text
    features  [R, J, H]    R = N pooled rows, or all tokens one text after the other; J layers; F32, BF16, F16 or I8
    scales    F32 [R, J]   int8 only: value = features * scales

safetensors, because anything that reads model weights reads it, a header and plain arrays can be mapped without a copy,
and it knows bf16. The header's metadata holds each array's CRC-32, and that of
what the header says.
"""

from __future__ import annotations

import uuid
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regraft.engine.errors import StoreError
from regraft.engine.features.header import DTYPES, FORMAT, Header, OtherVersion, metadata, read_header
from regraft.engine.features.root import command
from regraft.engine.files import write_bytes

if TYPE_CHECKING:
    import torch

STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "I8"}


class DamagedShard(StoreError):
    """A shard that is not what was written."""


@dataclass
class Shard:
    """A finished shard. Arrays are views of the mapped file; nothing is read before it is used."""

    path: Path
    header: Header
    content: np.ndarray
    start: int
    checked: bool = field(default=False)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # asked for in every batch

    def array(self, name: str) -> np.ndarray:
        about = self.header.arrays[name]
        piece = self.content[self.start + about.first : self.start + about.last]
        return piece.view(DTYPES[about.dtype]).reshape(about.shape)

    def __contains__(self, name: str) -> bool:
        return name in self.header.arrays

    def __len__(self) -> int:
        return self.header.arrays["lengths"].shape[0]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return len(self.content)

    @cached_property
    def offsets(self) -> np.ndarray:
        """First row of each text in `features`, [N + 1]; for pooled shards the text's own number."""
        if self.header.pooled:
            return np.arange(len(self) + 1)
        return np.concatenate([[0], np.cumsum(self.array("lengths"), dtype=np.int64)])

    def tensor(self, name: str = "features") -> torch.Tensor:
        """The array as torch sees it, in the mapped memory itself."""
        import torch

        if name not in self._tensors:
            found = torch.from_numpy(self.array(name))
            as_bf16 = self.header.arrays[name].dtype == "BF16"
            self._tensors[name] = found.view(torch.bfloat16) if as_bf16 else found
        return self._tensors[name]

    def check(self) -> None:
        """Compare every array with its checksum, once a process. Raises DamagedShard naming the file."""
        if not self.checked:
            self._compare(*self.header.arrays)
            self.checked = True

    def check_addresses(self) -> None:
        """The same for what says which rows are here. Raises DamagedShard: a wrong key is a row that nobody finds."""
        self._compare("keys", "lengths")
        rows = self.header.arrays["features"].shape[0]
        if rows != self.offsets[-1]:
            raise _damaged(self.path, f"{rows} rows of features for {self.offsets[-1]} tokens")

    def _compare(self, *names: str) -> None:
        for name in names:
            if zlib.crc32(self.array(name).reshape(-1).view(np.uint8).data) != self.header.crc32[name]:
                raise _damaged(self.path, f"the checksum of its {name} is wrong")


def _damaged(path: Path, why: str) -> DamagedShard:
    cure = command(path.parent.parent, "verify", "--delete")
    return DamagedShard(f"{path}: damaged: {why}. Delete it with {cure}; its rows are then computed again")


def open_shard(path: Path) -> Shard:
    """Map a shard and check its header, its size and which rows it holds. Raises StoreError naming the file, and
    FileNotFoundError."""
    try:
        if not path.stat().st_size:
            raise _damaged(path, "0 bytes")
        # Copy on write: torch wants memory it may write to, the file never changes.
        content = np.memmap(path, dtype=np.uint8, mode="c")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from None
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    try:
        header = read_header(content[8:start].tobytes())
    except OtherVersion as other:
        cure = command(path.parent.parent, "prune", "--store", path.parent.name)
        raise StoreError(
            f"{path}: written by another version of Regraft (format {other}; this one reads {FORMAT}). Use that version, "
            f"or remove the store with {cure} and compute it again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(path, f"its header: {type(error).__name__} {error}"[:160]) from None
    if start + header.bytes != len(content):
        raise _damaged(path, f"{len(content)} bytes, expected {start + header.bytes}")
    shard = Shard(path, header, content, start)
    shard.check_addresses()
    return shard


def write_shard(
    folder: Path, keys: np.ndarray, lengths: np.ndarray, features: torch.Tensor, *, precision: str, pooled: bool
) -> Path:
    """Write rows [R, J, H] in `precision` as a new shard, whole or not at all. Raises OSError."""
    from safetensors.torch import save

    arrays = {"keys": _tensor(keys), "lengths": _tensor(lengths.astype(np.int32)), **stored(features, precision)}
    sums = {name: zlib.crc32(_bytes(value).data) for name, value in arrays.items()}
    kinds = {"keys": "U8", "lengths": "I32", "features": STORED[precision], "scales": "F32"}
    about = metadata({name: (kinds[name], value.shape) for name, value in arrays.items()}, sums, pooled)
    path = folder / f"{uuid.uuid4().hex[:16]}.safetensors"
    write_bytes(path, [save(arrays, about)])
    return path


def stored(features: torch.Tensor, precision: str) -> dict[str, torch.Tensor]:
    """Rows as they are kept. int8: scale = largest magnitude of a row / 127, so a row of zeros stays zeros."""
    import torch

    if precision != "int8":
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        return {"features": features.to(kind).contiguous()}
    rows = features.float()
    scales = rows.abs().amax(dim=-1) / 127
    levels = torch.round(rows / scales.clamp_min(1e-30)[..., None]).clamp_(-127, 127)
    return {"features": levels.to(torch.int8).contiguous(), "scales": scales.contiguous()}


def restored(features: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Kept rows as fp32."""
    rows = features.float()
    return rows if scales is None else rows.mul_(scales[..., None])


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
