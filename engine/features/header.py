"""What the header of a shard says, believed only where all of it fits together and with its checksum."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT = 1
# numpy has no bf16: its bits are read as uint16 and become bf16 in torch.
DTYPES = {"U8": "<u1", "I8": "<i1", "I32": "<i4", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
WIDTH = {"U8": 1, "I8": 1, "I32": 4, "F32": 4, "F16": 2, "BF16": 2}  # bytes a value
KEY_BYTES = 16
METADATA = "__metadata__"


class OtherVersion(Exception):
    """A shard that another version of Regraft wrote; the text is its format."""


@dataclass(frozen=True)
class Array:
    """Where an array lies, in bytes from the end of the header, and as what."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """`crc32`: of each array's bytes; `bytes`: of all arrays; `pooled`: one row a text."""

    arrays: dict[str, Array]
    crc32: dict[str, int]
    pooled: bool

    @property
    def bytes(self) -> int:
        return max(array.last for array in self.arrays.values())


def metadata(arrays: Mapping[str, tuple[str, Sequence[int]]], crc32: dict[str, int], pooled: bool) -> dict[str, str]:
    """safetensors' free part of the header. `arrays`: dtype and shape of each."""
    about = {"format": str(FORMAT), "pooled": "yes" if pooled else "no", "crc32": json.dumps(crc32)}
    return about | {"header": str(_checksum(arrays, about))}


def read_header(text: bytes) -> Header:
    """Raises OtherVersion, and ValueError, KeyError, TypeError or AttributeError for what no version wrote."""
    whole = json.loads(text)
    about = whole.pop(METADATA)
    if about["format"] != str(FORMAT):
        raise OtherVersion(str(int(about["format"])))
    arrays = {name: _array(name, said) for name, said in whole.items()}
    header = Header(arrays, json.loads(about["crc32"]), {"yes": True, "no": False}[about["pooled"]])
    _check(header)
    said = {name: (a.dtype, a.shape) for name, a in arrays.items()}
    # Shards of earlier versions have no checksum of the header.
    told = about.pop("header", None)
    if about.keys() != {"format", "pooled", "crc32"} or told not in (None, str(_checksum(said, about))):
        raise ValueError("the checksum of its header is wrong")
    return header


def _array(name: str, said: dict[str, Any]) -> Array:
    shape, places = said["shape"], said["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, *places)):
        raise ValueError(f"{name}: shape {shape} at {places}")
    array = Array(said["dtype"], tuple(shape), *places)
    if array.last - array.first != math.prod(shape) * WIDTH[array.dtype]:
        raise ValueError(f"{name}: {array.last - array.first} bytes for {array.dtype} {shape}")
    return array


def _check(header: Header) -> None:
    arrays = header.arrays
    rows, features = arrays["lengths"].shape[0], arrays["features"].shape
    wanted = {"keys": ("U8", (rows, KEY_BYTES)), "lengths": ("I32", (rows,))}
    if arrays["features"].dtype == "I8":
        wanted["scales"] = ("F32", features[:2])
    found = {name: (a.dtype, a.shape) for name, a in arrays.items() if name != "features"}
    if found != wanted or len(features) != 3 or arrays["features"].dtype not in ("F32", "BF16", "F16", "I8"):
        raise ValueError(f"its header names {found} beside features {features}")
    if header.pooled and features[0] != rows:
        raise ValueError(f"{features[0]} pooled rows of {rows} texts")
    if header.crc32.keys() != arrays.keys():
        raise ValueError(f"checksums of {sorted(header.crc32)}, arrays {sorted(arrays)}")
    end = 0
    for array in sorted(arrays.values(), key=lambda a: (a.first, a.last)):
        if array.first != end:
            raise ValueError(f"its arrays do not lie one behind the other: {array.first}, expected {end}")
        end = array.last


def _checksum(arrays: Mapping[str, tuple[str, Sequence[int]]], about: dict[str, str]) -> int:
    # Of what the header says, not of its bytes: it is itself in the header.
    said = [sorted((name, dtype, list(shape)) for name, (dtype, shape) in arrays.items()), sorted(about.items())]
    return zlib.crc32(json.dumps(said).encode())
