"""Jobs of `regraft compare` in processes of their own, which start with what they import imported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

GRACE = 5.0  # seconds a worker may be late before it is stopped


@dataclass(frozen=True)
class Ended:
    """How a job ended: `late`: its time was up; `why`: the last it said, where it failed, else ''."""

    late: bool
    why: str


class Workers:
    """Runs one job at a time. A context: no process outlives it.

    On Linux every job is done by a fork of one process, the origin, that imports what the next job takes and does nothing
    else: importing torch and transformers takes seconds, and is paid for once instead of by every way. Elsewhere a
    process is started for every job, as forks are not safe there.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._errors = scratch / "errors"
        self._origin: subprocess.Popen[str] | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def do(self, job: dict[str, Any], deadline: float, take: Callable[[dict[str, Any]], None]) -> Ended:
        """Have `job` done (see `worker.work`) until `deadline`, in seconds since 1970; `take`: is told what it prints."""
        file = self._scratch / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        origin = self._started()
        began = self._errors.stat().st_size
        group, code, late = 0, None, threading.Event()

        def time_is_up() -> None:
            late.set()
            _kill(group)
            self._end()

        timer = threading.Timer(max(1.0, deadline - time.time() + GRACE), time_is_up)
        timer.start()
        try:
            assert origin.stdin is not None and origin.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # what it said is read below
                print(file, file=origin.stdin, flush=True)
            for line in origin.stdout:
                record = _record(line)
                if "group" in record:
                    group = record["group"]
                elif "ended" in record:
                    code = record["ended"]
                    break
                else:
                    take(record)
            else:
                code = origin.wait()
        finally:
            timer.cancel()
            if code is None:  # interrupted
                _kill(group)
                self._end()
        if late.is_set() or not code:
            return Ended(late.is_set(), "")
        with self._errors.open("rb") as errors:
            errors.seek(began)
            said = errors.read().decode(errors="replace").strip()
        return Ended(False, said.splitlines()[-1] if said else f"ended with {code}")

    def _started(self) -> subprocess.Popen[str]:
        if self._origin is None or self._origin.poll() is not None:
            command = [sys.executable, "-m", "regraft.engine.compare.worker", str(os.getpid())]
            with self._errors.open("ab") as errors:
                self._origin = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                )
        return self._origin

    def _end(self) -> None:
        if self._origin is not None and self._origin.poll() is None:
            _kill(self._origin.pid)
            self._origin.wait()


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        if group:
            os.killpg(group, signal.SIGKILL)


def _record(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
