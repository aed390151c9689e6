"""One shard: a safetensors file of some rows' features, memory-mapped when read.

    keys      U8  [N, 16]  what each row was computed from (`row_keys`)
    lengths   I32 [N]      tokens of each text
    features  [R, J, H]    R = N pooled rows, or all tokens one text after the other; J layers; F32, BF16, F16 or I8
    scales    F32 [R, J]   int8 only: value = features * scales

safetensors, because anything that reads model weights reads it, a header and plain arrays can be mapped without a copy,
and it knows bf16. The header's metadata holds each array's CRC-32.
"""

from __future__ import annotations

import json
import uuid
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.errors import StoreError
from regraft.engine.files import write_bytes

if TYPE_CHECKING:
    import torch

FORMAT = 1
# numpy has no bf16: its bits are read as uint16 and become bf16 in torch.
DTYPES = {"U8": "<u1", "I8": "<i1", "I32": "<i4", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "I8"}


@dataclass
class Shard:
    """A finished shard. Arrays are views of the mapped file; nothing is read before it is used."""

    path: Path
    header: dict[str, Any]
    content: np.ndarray
    start: int
    checked: bool = field(default=False)

    def array(self, name: str) -> np.ndarray:
        about = self.header[name]
        first, last = about["data_offsets"]
        piece = self.content[self.start + first : self.start + last]
        return piece.view(DTYPES[about["dtype"]]).reshape(about["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self.header

    def __len__(self) -> int:
        return int(self.header["lengths"]["shape"][0])

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return len(self.content)

    @cached_property
    def offsets(self) -> np.ndarray:
        """First row of each text in `features`, [N + 1]; for pooled shards the text's own number."""
        if self.header["features"]["shape"][0] == len(self) and self.header["__metadata__"]["pooled"] == "yes":
            return np.arange(len(self) + 1)
        return np.concatenate([[0], np.cumsum(self.array("lengths"), dtype=np.int64)])

    def tensor(self, name: str = "features") -> torch.Tensor:
        """The array as torch sees it, in the mapped memory itself."""
        import torch

        found = torch.from_numpy(self.array(name))
        return found.view(torch.bfloat16) if self.header[name]["dtype"] == "BF16" else found

    def check(self) -> None:
        """Compare every array with its checksum, once a process. Raises StoreError naming the file."""
        if not self.checked:
            self._compare(*(name for name in self.header if name != "__metadata__"))
            self.checked = True

    def check_addresses(self) -> None:
        """The same for what says which rows are here. Raises StoreError: a wrong key is a row that nobody finds."""
        self._compare("keys", "lengths")

    def _compare(self, *names: str) -> None:
        sums = json.loads(self.header["__metadata__"]["crc32"])
        for name in names:
            if zlib.crc32(np.ascontiguousarray(self.array(name)).reshape(-1).view(np.uint8).data) != sums[name]:
                raise _corrupt(self.path, f"the checksum of its {name} is wrong")


def _corrupt(path: Path, why: str) -> StoreError:
    return StoreError(
        f"{path}: damaged: {why}. Delete it with `regraft features verify --delete`; its rows are then computed again"
    )


def open_shard(path: Path) -> Shard:
    """Map a shard and check its header and size. Raises StoreError naming the file."""
    try:
        # Copy on write: torch wants memory it may write to, the file never changes.
        content = np.memmap(path, dtype=np.uint8, mode="c")
        length = int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8 : 8 + length].tobytes())
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        found = header["__metadata__"]["format"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise _corrupt(path, str(error)[:120]) from None
    if found != str(FORMAT):
        raise StoreError(
            f"{path}: written by another version of Regraft (format {found}; this one reads {FORMAT}). Use that version, "
            f"or remove the store with `regraft features prune --store {path.parent.name}` and compute it again"
        )
    if max(ends) + 8 + length != len(content):
        raise _corrupt(path, f"{len(content)} bytes, expected {max(ends) + 8 + length}")
    shard = Shard(path, header, content, 8 + length)
    shard.check_addresses()
    return shard


def write_shard(
    folder: Path, keys: np.ndarray, lengths: np.ndarray, features: torch.Tensor, *, precision: str, pooled: bool
) -> Path:
    """Write rows [R, J, H] in `precision` as a new shard, whole or not at all. Raises OSError."""
    from safetensors.torch import save

    arrays = {"keys": _tensor(keys), "lengths": _tensor(lengths.astype(np.int32)), **stored(features, precision)}
    sums = {name: zlib.crc32(_bytes(value).data) for name, value in arrays.items()}
    about = {"format": str(FORMAT), "pooled": "yes" if pooled else "no", "crc32": json.dumps(sums)}
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
