"""The folder of what can be made again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
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


def forget_oldest(
    candidates: Iterable[Path], kept_bytes: int = KEPT_BYTES, *, keep: Collection[Path] | None = None
) -> dict[Path, int]:
    """Delete the files that were unused for longest until all take at most `kept_bytes`; what was deleted, with its bytes.

    Those in `keep` stay (None: the newest, which was just made). A file that another process is reading stays readable
    to it until it is closed.
    """
    files = []
    for path in candidates:
        with contextlib.suppress(OSError):  # another process deleted it meanwhile
            found = path.stat()
            files.append((found.st_mtime_ns, found.st_size, path))
    files.sort()
    kept = {path for _, _, path in files[-1:]} if keep is None else keep
    total = sum(size for _, size, _ in files)
    gone: dict[Path, int] = {}
    for _, size, path in files:
        if total <= kept_bytes:
            break
        if path in kept:
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            gone[path] = size
            total -= size
    return gone
