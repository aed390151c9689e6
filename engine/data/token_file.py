"""Token ids of a whole split in one file, memory-mapped when read.

8 bytes  magic and format
8 bytes  length of the header, little-endian
header   JSON: array sizes, counts, checksum
arrays   offsets int64, ids int32, types uint8 if there are any; each starts at a multiple of 64 bytes
"""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from regraft.engine.files import write_bytes

log = logging.getLogger(__name__)

MAGIC = b"RGTOKEN1"
ALIGN = 64
DTYPES = {"offsets": "<i8", "ids": "<i4", "types": "|u1"}
CHECKED = 64  # pieces of each array, evenly spread, go into the checksum
PIECE = 1 << 20  # bytes


def write_arrays(path: Path, given: dict[str, np.ndarray | None], counts: dict[str, int]) -> None:
    """Write the arrays that are not None. Raises OSError."""
    arrays = {name: np.ascontiguousarray(array, DTYPES[name]) for name, array in given.items() if array is not None}
    header = json.dumps(
        {
            "sizes": {name: len(array) for name, array in arrays.items()},
            "counts": counts,
            "checksum": checksum(arrays),
        }
    ).encode()
    pieces: list[bytes | memoryview] = [MAGIC + len(header).to_bytes(8, "little") + header]
    end = len(pieces[0])
    for array in arrays.values():
        pieces += [bytes(-end % ALIGN), array.data.cast("B")]
        end += -end % ALIGN + array.nbytes
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, pieces)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]] | None:
    """The arrays, read-only and memory-mapped, and the counts; None where there is no file, or it is damaged."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        arrays, header = _parse(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: damaged, made again: %s", path, error)
        return None
    return arrays, header["counts"]


def checksum(arrays: dict[str, np.ndarray]) -> int:
    """Of small arrays whole, of large ones in evenly spread pieces: cheap whatever their size."""
    found = 0
    for array in arrays.values():
        content = array.view(np.uint8)
        step = max(PIECE, len(content) // CHECKED)
        for start in range(0, len(content), step):
            found = zlib.crc32(content[start : start + PIECE].data, found)
        found = zlib.crc32(content[-PIECE:].data, found)
    return found


def _parse(content: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if content[:8].tobytes() != MAGIC:
        raise ValueError("not a file of tokens")
    end = 16 + int.from_bytes(content[8:16].tobytes(), "little")
    header = json.loads(content[16:end].tobytes())
    arrays = {}
    for name, size in header["sizes"].items():
        start = end + -end % ALIGN
        end = start + size * np.dtype(DTYPES[name]).itemsize
        if end > len(content):
            raise ValueError(f"{len(content)} bytes, expected at least {end}")
        arrays[name] = content[start:end].view(DTYPES[name])
    if end != len(content):
        raise ValueError(f"{len(content)} bytes, expected {end}")
    if checksum(arrays) != header["checksum"]:
        raise ValueError("the checksum is wrong")
    return arrays, header
