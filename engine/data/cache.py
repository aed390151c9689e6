"""The folder of what can be made again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

KEPT_BYTES = 8 << 30  # tokens of some two billion words


def cache_folder() -> Path:
    """REGRAFT_CACHE, or ~/.cache/regraft."""
    configured = os.environ.get("REGRAFT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "regraft"


def mark_used(path: Path) -> None:
    """Let `path` count as the most recently used; where that cannot be written down, nothing is lost."""
    with contextlib.suppress(OSError):
        os.utime(path)


def forget_oldest(folder: Path, pattern: str, kept_bytes: int = KEPT_BYTES) -> list[Path]:
    """Delete the files that were unused for longest until the rest take at most `kept_bytes`; returns the deleted.

    A file that another process is reading stays readable to it until it is closed.
    """
    files = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process deleted it meanwhile
            found = path.stat()
            files.append((found.st_mtime_ns, found.st_size, path))
    total = sum(size for _, size, _ in files)
    gone = []
    for _, size, path in sorted(files)[:-1]:  # the newest is what was just made
        if total <= kept_bytes:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            gone.append(path)
            total -= size
    return gone
