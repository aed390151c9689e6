"""A process that has imported what every command needs and forks for each: a test of the command line costs the command
alone, not the seconds that importing torch and transformers takes.

The child is a process of its own with the caller's environment, folder and standard streams; it runs `python -m
regraft.engine` to its end.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

# Read by the program or by pytest as it runs, or put to use below. Any other variable may have been read while something
# was imported.
READ_LATE = ("REGRAFT_", "PYTEST_", "COLUMNS", "PYTHONPATH")

IMPORTED = (
    "accelerate",
    "onnxruntime",
    "sklearn.metrics",
    "torch",
    "transformers",
    "transformers.models.bert.modeling_bert",
    "regraft.engine.export",
    "regraft.engine.methods.adapt",
    "regraft.engine.predict",
    "regraft.engine.report",
    "regraft.engine.training.finish",
    "regraft.engine.training.recipes",
    "regraft.engine.training.run",
)


class Forks:
    """One such process, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._environment: dict[str, str] = {}
        self._lock = threading.Lock()

    def can_run(self) -> bool:
        """Whether today's environment is the one that everything was imported in."""
        return not self._environment or self._environment == _read_early()

    def run(
        self, arguments: list[str], *, timeout: float, input: str | None = None, cwd: str | Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of the command line with its output captured. Raises TimeoutExpired."""
        with self._lock, tempfile.TemporaryDirectory(prefix="fork-") as name:
            process, folder = self._started(), Path(name)
            given = folder / "input"
            given.write_bytes((input or "").encode())
            request: dict[str, Any] = {"arguments": arguments, "folder": name, "environment": dict(os.environ)}
            request |= {"cwd": str(cwd or Path.cwd()), "input": str(given) if input is not None else os.devnull}
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            late = threading.Timer(timeout, os.kill, (child, signal.SIGKILL))
            late.start()
            status = process.stdout.readline()
            if not late.is_alive():
                raise subprocess.TimeoutExpired(arguments, timeout)
            late.cancel()
            code = os.waitstatus_to_exitcode(int(status))
            said = [(folder / stream).read_text(encoding="utf-8") for stream in ("output", "errors")]
            return subprocess.CompletedProcess(arguments, code, *said)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._environment = _read_early()
            command = [sys.executable, __file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            atexit.register(self._process.kill)
        return self._process


def _read_early() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(READ_LATE)}


def serve() -> None:
    """Fork for each request on standard input; tell its process number, then how it ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(ended_code(request))
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def ended_code(request: dict[str, Any]) -> int:
    """The command's exit code, once it has ended as the interpreter would end it. Only libraries' own threads are not waited
    for: they stayed behind in the process that was forked."""
    code: Any = 0
    try:
        become(request)
        sys.argv = ["regraft", *request["arguments"]]
        runpy.run_module("regraft.engine", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def become(request: dict[str, Any]) -> None:
    """Take the caller's environment, folder and standard streams."""
    os.environ.clear()
    os.environ.update(request["environment"])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:0] = paths
    os.chdir(request["cwd"])
    folder = Path(request["folder"])
    for number, path, flags in (
        (0, request["input"], os.O_RDONLY),
        (1, folder / "output", os.O_WRONLY | os.O_CREAT),
        (2, folder / "errors", os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    serve()
