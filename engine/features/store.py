"""A folder of shards that all hold the same kind of features, each row addressed by its text.

STORE/<key>/store.json           the FeatureSpec, for people and for `regraft features list`
STORE/<key>/<name>.safetensors   finished shards (shard.py)
STORE/<key>/lock                 held while rows are added
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path

import numpy as np

from regraft.engine.data.cache import mark_used
from regraft.engine.data.rows import Rows
from regraft.engine.errors import StoreError
from regraft.engine.features.header import FORMAT, KEY_BYTES
from regraft.engine.features.root import command
from regraft.engine.features.shard import Shard, open_shard
from regraft.engine.features.spec import FeatureSpec
from regraft.engine.files import remove_leftovers, write_text


def row_keys(rows: Rows) -> np.ndarray:
    """What identifies each row's text and pair, [N, 16] uint8."""
    blake, joined = hashlib.blake2b, []
    if rows.pairs is None:
        for text in rows.texts:
            joined.append(blake(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest())
    else:
        for text, pair in zip(rows.texts, rows.pairs, strict=True):
            # The length in front: no two pairs give the same bytes.
            content = f"{len(text)}\0{text}{pair}".encode("utf-8", "surrogatepass")
            joined.append(blake(content, digest_size=KEY_BYTES, person=b"pair").digest())
    return np.frombuffer(b"".join(joined), dtype=np.uint8).reshape(-1, KEY_BYTES)


class FeatureStore:
    """The shards of one spec. `find` tells where rows are; `locked` is held while some are added.

    Raises StoreError for a store of another version and for a shard whose header or size is wrong.
    """

    def __init__(self, root: Path, spec: FeatureSpec) -> None:
        self.spec = spec
        self.folder = root / spec.key
        self.shards: list[Shard] = []
        self._sorted = np.zeros((0, 2), dtype=np.uint64)
        self._where = np.zeros((0, 2), dtype=np.int64)
        self.refresh()

    def refresh(self) -> None:
        """Read which shards there are now."""
        check_format(self.folder)
        known = {shard.path: shard for shard in self.shards}
        self.shards = []
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                self.shards.append(known.get(path) or open_shard(path))
            except FileNotFoundError:  # deleted meanwhile, to keep to a disk limit
                continue
        if not self.shards:
            return
        halves = np.concatenate([np.ascontiguousarray(s.array("keys")).view("<u8") for s in self.shards])
        owner = np.repeat(np.arange(len(self.shards)), [len(s) for s in self.shards])
        row = np.concatenate([np.arange(len(s)) for s in self.shards])
        order = np.argsort(halves[:, 0], kind="stable")
        self._sorted, self._where = halves[order], np.stack([owner, row], axis=1)[order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(shard, row in it) of each key, [N, 2] int64; -1 where it is not there."""
        wanted = np.ascontiguousarray(keys).view("<u8")
        found = np.full((len(wanted), 2), -1, dtype=np.int64)
        if len(self._sorted):
            at = np.minimum(np.searchsorted(self._sorted[:, 0], wanted[:, 0]), len(self._sorted) - 1)
            here = (self._sorted[at] == wanted).all(axis=1)
            found[here] = self._where[at[here]]
        return found

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Indices into `keys` of the rows to compute, each text once, in order."""
        absent = np.flatnonzero(self.find(keys)[:, 0] < 0)
        if not len(absent):
            return absent
        _, first = np.unique(np.ascontiguousarray(keys[absent]).view("<u8"), axis=0, return_index=True)
        return absent[np.sort(first)]

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the store for adding rows; another process that wants to waits. A kill lets go of it. Raises StoreError
        where the folder cannot be written to."""
        with ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Without a buffer: one that could not be written would fail again when the file is closed.
                file = held.enter_context((self.folder / "lock").open("a+b", buffering=0))
                self._wait_for(file, say)
                file.seek(0)
                file.truncate()
                file.write(str(os.getpid()).encode())
                remove_leftovers(self.folder)
                if not (self.folder / "store.json").is_file():
                    content = {"format": FORMAT, **asdict(self.spec)}
                    write_text(self.folder / "store.json", json.dumps(content, indent=2) + "\n")
            except OSError as error:
                raise not_written(self.folder, error) from error
            self.refresh()
            yield

    def _wait_for(self, file: RawIOBase, say: Callable[[str], None]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            say(f"features: process {(file.read() or b'?').decode().strip()} is computing them; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)

    def used(self, shards: Sequence[int]) -> None:
        """Put these shards at the end of the queue for deletion."""
        for number in shards:
            mark_used(self.shards[number].path)


def check_format(folder: Path) -> None:
    """Raises StoreError for a store that another version wrote."""
    about = folder / "store.json"
    cure = f"remove it with {command(folder.parent, 'prune', '--store', folder.name)} and compute it again"
    try:
        found = json.loads(about.read_text(encoding="utf-8"))["format"]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StoreError(f"{about}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{about}: damaged ({type(error).__name__} {error}). The store cannot be used: {cure}"
        ) from None
    if found != FORMAT:
        raise StoreError(
            f"{folder}: written by another version of Regraft (format {found}; this one reads {FORMAT}). Use that "
            f"version, or {cure}"
        )


def not_written(folder: Path, error: OSError) -> StoreError:
    """What to say of a store that a write into it failed."""
    from regraft.engine.training.folder import disk_is_full

    root = folder.parent
    if disk_is_full(error):
        return StoreError(
            f"{folder}: the disk is full. Finished shards are kept; free some space, with "
            f"{command(root, 'prune', '--to', '2')} for one, and start the same command again to go on"
        )
    in_the_way = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if in_the_way is not None:
        return StoreError(f"features.store: {root}: {in_the_way} is a file; expected a folder, or a name that is free")
    return StoreError(f"{folder}: cannot be written: {error.strerror or error}. Finished shards are kept")
