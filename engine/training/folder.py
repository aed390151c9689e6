"""The run folder: whose run it holds, whether that run has finished, and whether its disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.engine.config import NOT_DECISIVE, RunConfig, config_hash
from regraft.engine.errors import RegraftError, TrainingError
from regraft.engine.machine import versions
from regraft.engine.methods.settings import libraries


@dataclass(frozen=True)
class RunResult:
    """What a finished run left. `metrics`: of the best checkpoint, by split."""

    folder: Path
    best_step: int
    metrics: dict[str, dict[str, float]]
    seconds: float
    steps: int


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
    """Make the run folder ready; the result, where the same run has already finished.

    Raises TrainingError when the folder belongs to a run with another configuration.
    """
    mark = folder / "run.json"
    if restart and int(os.environ.get("RANK", "0")) == 0:
        for name in ("checkpoints", "best"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "run.json", "report.html"):
            (folder / name).unlink(missing_ok=True)
    if not mark.exists():
        return None
    try:
        state = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainingError(f"{mark}: cannot be read ({error}); start with --restart") from None
    if state["config_hash"] != config_hash(config):
        changed = _changed(state["config"], config.model_dump(mode="json"))
        raise TrainingError(
            f"{folder}: holds a run with another configuration ({changed}). Choose another run folder with "
            "--set run=FOLDER, or start with --restart to replace it"
        )
    if not state.get("finished"):
        return None
    result = state["result"]
    return RunResult(folder, result["best_step"], result["metrics"], result["seconds"], result["steps"])


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
