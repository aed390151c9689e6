"""Housekeeping of feature stores: what there is, whether it is whole, and what goes when space runs short."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.engine.data.cache import forget_oldest
from regraft.engine.errors import StoreError, nearest
from regraft.engine.features.shard import DamagedShard, open_shard


@dataclass(frozen=True)
class StoreInfo:
    """One store as it lies on disk. `used`: seconds since 1970 when its last shard was read; `spec` as in store.json."""

    folder: Path
    spec: dict[str, Any]
    shards: int
    rows: int
    bytes: int
    used: float

    def line(self) -> str:
        said = self.spec.get("layers")
        layers = ",".join(map(str, said)) if isinstance(said, list) else "?"
        age = max(0.0, time.time() - self.used)
        ago = f"{age / 86400:.0f} d" if age > 86400 else f"{age / 3600:.0f} h" if age > 3600 else f"{age / 60:.0f} min"
        what = (
            f"{self.spec.get('model', '?')}  layers {layers}  {self.spec.get('pooling')}  {self.spec.get('precision')}"
        )
        rows = f"{self.rows:,} rows" if self.rows >= 0 else "unreadable"
        return f"{self.folder.name}  {self.bytes / 1e6:10,.1f} MB  {rows}  {self.shards} shards  used {ago} ago  {what}"


def stores(root: Path) -> Iterator[StoreInfo]:
    """Every store under `root`, also those of other versions."""
    for folder in sorted(root.glob("*")) if root.is_dir() else ():
        about = folder / "store.json"
        if not about.is_file():
            continue
        try:
            said = json.loads(about.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            said = None
        spec: dict[str, Any] = said if isinstance(said, dict) else {}
        files = _shards(folder)
        rows = 0
        try:
            rows = sum(len(open_shard(f)) for f in files)
        except (StoreError, FileNotFoundError):
            rows = -1
        stats = [f.stat() for f in files]
        used = max((s.st_mtime for s in stats), default=about.stat().st_mtime)
        yield StoreInfo(folder, spec, len(files), rows, sum(s.st_size for s in stats), used)


def verify(root: Path, *, delete: bool = False) -> list[str]:
    """Read every shard and compare its checksums; what is wrong, one line a shard. `delete` removes damaged shards,
    whose rows are then computed when they are next needed."""
    wrong = []
    for store in stores(root):
        for file in _shards(store.folder):
            try:
                open_shard(file).check()
            except FileNotFoundError:  # deleted meanwhile, to keep to a disk limit
                continue
            except StoreError as error:
                wrong.append(str(error))
                if delete and isinstance(error, DamagedShard):
                    file.unlink(missing_ok=True)
                    wrong[-1] = f"{file}: damaged, deleted; its rows are computed again when they are next needed"
    return wrong


def prune(root: Path, limit: int, *, keep: Collection[Path] = ()) -> tuple[int, int]:
    """Delete the least recently used shards until all stores together take at most `limit` bytes; (shards, bytes)
    deleted. Shards in `keep` stay. A process that has a deleted shard mapped can go on reading it."""
    shards = [file for store in stores(root) for file in _shards(store.folder)]
    gone = forget_oldest(shards, limit, keep=keep)
    for store in stores(root):
        if not store.shards and not keep:
            shutil.rmtree(store.folder, ignore_errors=True)
    return len(gone), sum(gone.values())


def remove(root: Path, name: str) -> None:
    """Delete one store, of whatever version. Raises StoreError where there is none of that name."""
    folder = root / name
    if not (folder / "store.json").is_file():
        names = [p.name for p in root.glob("*")] if root.is_dir() else []
        raise StoreError(f"{root}: no store {name!r}{nearest(name, names)}; `regraft features list` names them")
    shutil.rmtree(folder)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.safetensors"))
