"""The folder of what can be made again, and files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def cache_folder() -> Path:
    """REGRAFT_CACHE, or ~/.cache/regraft."""
    configured = os.environ.get("REGRAFT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "regraft"


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` to `path` beside it, synced and renamed: a reader, or a machine that stops, finds the old file
    or the new one. Raises OSError, leaving nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with beside.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
