"""A process that has imported what every command needs and forks for each: a test of the command line costs the command
alone, not the seconds that importing torch and transformers takes.

The child is a process of its own with the caller's environment, folder and standard streams; it runs what `python ARGUMENTS`
runs, to its end. What it starts itself of `python -m regraft...` is forked from it in the same way.
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
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by the program or by pytest as it runs, or put to use below. Any other variable may have been read while something
# was imported.
READ_LATE = ("REGRAFT_", "PYTEST_", "COLUMNS", "PYTHONPATH", "TMPDIR")
READ_LATE += ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "ACCELERATE_USE_CPU")

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

POLL_SECONDS = 0.01


class Forks:
    """One such process, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._environment: dict[str, str] = {}
        self._lock = threading.Lock()

    def can_run(self, environment: Mapping[str, str] = os.environ) -> bool:
        """Whether this environment is the one that everything was imported in, and nothing is to be run before a command."""
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        if any((Path(path) / "sitecustomize.py").exists() for path in paths if path):
            return False
        return not self._environment or self._environment == _read_early(environment)

    def run(
        self, arguments: Sequence[str], *, timeout: float, input: str | None = None, cwd: str | Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of `regraft ARGUMENTS` with its output captured. Raises TimeoutExpired."""
        process = Forked(self, ["-m", "regraft.engine", *arguments], os.environ, cwd, input)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(list(arguments), process.wait(), *process.communicate())

    def start(
        self, arguments: Sequence[str], *, env: Mapping[str, str] = os.environ, cwd: str | Path | None = None
    ) -> Forked | subprocess.Popen[str]:
        """As `subprocess.Popen` of `python ARGUMENTS`, whose standard error `communicate` reads."""
        if self.can_run(env):
            return Forked(self, arguments, env, cwd)
        command = [sys.executable, *arguments]
        # a pipe for standard output that no one reads would hold up a long run
        return subprocess.Popen(command, env=env, cwd=cwd, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ask(self, **request: Any) -> Any:
        """What the process answers."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._environment = _read_early(os.environ)
                command = [sys.executable, __file__]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                atexit.register(self._process.kill)
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


class Forked:
    """A process that was forked; used like a Popen whose output goes to pipes."""

    def __init__(
        self,
        forks: Forks,
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: str | Path | None,
        input: str | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._forks = forks
        self._folder = tempfile.TemporaryDirectory(prefix="fork-")
        folder = Path(self._folder.name)
        given = folder / "input"
        given.write_bytes((input or "").encode())
        request: dict[str, Any] = {"arguments": list(map(str, arguments)), "folder": str(folder)}
        request |= {"environment": dict(env), "cwd": str(cwd or Path.cwd())}
        self.pid = int(forks.ask(**request, input=str(given) if input is not None else os.devnull))

    def poll(self) -> int | None:
        if self.returncode is None:
            status = self._forks.ask(ended=self.pid)
            self.returncode = None if status is None else os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(POLL_SECONDS)
        return code

    def communicate(self, timeout: float = float("inf")) -> tuple[str, str]:
        self.wait(timeout)
        folder = Path(self._folder.name)
        return (folder / "output").read_text(encoding="utf-8"), (folder / "errors").read_text(encoding="utf-8")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(READ_LATE)}


def serve() -> None:
    """Fork for each request on standard input and tell the child's process number, or how one has ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    answer = os.fdopen(os.dup(1), "w")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            found = status if pid else None
        else:
            found = os.fork()
            if found == 0:
                os._exit(ended_code(request))
        print(json.dumps(found), file=answer, flush=True)


def ended_code(request: dict[str, Any]) -> int:
    """The command's exit code, once it has ended as the interpreter would end it. Only libraries' own threads are not waited
    for: they stayed behind in the process that was forked."""
    try:
        become(request)
    except BaseException:
        traceback.print_exc()
        return 1
    return code_of(request["arguments"])


def code_of(arguments: Sequence[str]) -> int:
    """Run what `python ARGUMENTS` runs."""
    code: Any = 0
    tempfile.tempdir = None
    try:
        how, *rest = arguments
        if how == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif how == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [how, *rest]
            runpy.run_path(how, run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else 1


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
    open_streams()
    if hasattr(subprocess, "_fork_exec"):
        subprocess._fork_exec = fork_of(subprocess._fork_exec)


def open_streams() -> None:
    """Standard streams over what 0, 1 and 2 are now."""
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def fork_of(execute: Any) -> Any:
    """`subprocess`'s own way to start a program, but for the programs of this package: those go on from a fork of this
    process, with what is imported already, and with the descriptors, folder, environment and session that were asked for."""

    def start(arguments: Sequence[str], *options: Any) -> int:
        program, *rest = map(str, arguments)
        if program != sys.executable or rest[:1] != ["-m"] or not rest[1].startswith("regraft."):
            return execute(arguments, *options)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        # after executables, close_fds and pass_fds; the ends of pipes are the child's and the parent's in turn
        cwd, environment, read, _, _, write, _, errors = options[3:11]
        new_session, before = options[14], options[-2]
        for number, end in ((0, read), (1, write), (2, errors)):
            if end not in (-1, number):
                os.dup2(end, number)
        os.closerange(3, 65536)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if cwd is not None:
            os.chdir(cwd)
        if environment is not None:
            os.environ.clear()
            os.environ.update(os.fsdecode(pair).split("=", 1) for pair in environment)
        if new_session:
            os.setsid()
        if before is not None:
            before()
        open_streams()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined] # temporary folders that are the parent's to remove
        os._exit(code_of(rest))

    return start


if __name__ == "__main__":
    serve()
