"""The run folder: whose run it holds, whether that run has finished, and whether its disk is full."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regraft.engine.config import NOT_DECISIVE, RunConfig, config_hash
from regraft.engine.errors import RegraftError, TrainingError
from regraft.engine.files import file_sha256
from regraft.engine.machine import versions
from regraft.engine.methods.settings import libraries


@dataclass(frozen=True)
class RunResult:
    """What a finished run left. `metrics`: of the best checkpoint, by split; `earlier`: it had finished before."""

    folder: Path
    best_step: int
    metrics: dict[str, dict[str, float]]
    seconds: float
    steps: int
    earlier: bool = False


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of space; libraries wrap the system's error in their own or only quote it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in ("No space left", "Disk quota exceeded", "os error 28")):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def telling_full_disk(folder: Path) -> Iterator[None]:
    """Raises TrainingError with the cure where a write in the block fails for want of space."""
    try:
        yield
    except RegraftError:
        raise
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise TrainingError(
            f"{folder}: the disk is full. Everything saved before is intact; free some space and start the same command "
            "again to go on"
        ) from error


def open_run_folder(folder: Path, config: RunConfig, restart: bool) -> RunResult | None:
    """Look into the run folder; the result, where the same run has already finished. Nothing is changed.

    Raises TrainingError where a file is in the way, or the folder belongs to a run with another configuration or on
    other rows, unless it is to be replaced (`restart`).
    """
    mark = folder / "run.json"
    in_the_way = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if in_the_way is not None:
        raise TrainingError(f"run: {folder}: {in_the_way} is a file; expected a folder, or a name that is free")
    if restart or not mark.exists():
        return None
    try:
        state = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainingError(f"{mark}: cannot be read ({error}); start with --restart") from None
    kept = _completed(state["config"])
    if state["config_hash"] != config_hash(config) and (kept is None or config_hash(kept) != config_hash(config)):
        there = state["config"] if kept is None else kept.model_dump(mode="json")
        changed = _changed(there, config.model_dump(mode="json"))
        raise TrainingError(
            f"{folder}: holds a run with another configuration ({changed}). Choose another run folder with "
            "--set run=FOLDER, or start with --restart to replace it"
        )
    refuse_other_rows(folder, state.get("data", {}), fingerprints(config))
    if not state.get("finished"):
        return None
    result = state["result"]
    return RunResult(folder, result["best_step"], result["metrics"], result["seconds"], result["steps"], earlier=True)


def _completed(kept: dict[str, Any]) -> RunConfig | None:
    """A kept configuration, with defaults for the keys that there were not yet when its run began."""
    try:
        return RunConfig.model_validate(kept)
    except ValidationError:
        return None


def clear_run_folder(folder: Path) -> None:
    """Throw away what a run left."""
    for name in ("checkpoints", "best", "trackers"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "run.json", "report.html", "evaluation.json"):
        (folder / name).unlink(missing_ok=True)


def fingerprints(config: RunConfig) -> dict[str, str]:
    """A hash of every file of rows, by its path; those that are not files here (hub datasets, say) have none."""
    sections = [task.data for task in config.tasks.values()] if config.tasks else [config.data]
    paths = {str(p) for data in sections for p in (data.train, data.dev, data.test) if p and Path(p).is_file()}
    return {path: file_sha256(Path(path)) for path in sorted(paths)}


def refuse_other_rows(folder: Path, then: dict[str, str], now: dict[str, str]) -> None:
    """Raise TrainingError where a file of rows is not what it was when the run began."""
    changed = [path for path in then if path in now and now[path] != then[path]]
    if changed:
        raise TrainingError(
            f"{', '.join(changed)}: changed since the run in {folder} began, so its steps cannot go on and its figures are "
            "of other rows. Choose another run folder with --set run=FOLDER, or start with --restart to replace it"
        )


def versions_of(config: RunConfig) -> dict[str, str]:
    """Versions of what decides the numbers of this run."""
    return versions(*libraries(config.method, config.training.optimizer))


def _changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _changed(a, b, f"{prefix}{key}.")
            parts += [inner] if inner else []
        elif a != b and key not in NOT_DECISIVE:
            parts.append(f"{prefix}{key}: {a} there, {b} here")
    return "; ".join(parts)
