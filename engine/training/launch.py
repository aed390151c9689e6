"""`--processes N`: start the ranks on this machine, watch them, and say which one failed and why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from regraft.engine.config import RunConfig
from regraft.engine.errors import ConfigError, TrainingError
from regraft.engine.machine import end_with
from regraft.engine.training.together import check_deepspeed, machines

POLL_SECONDS = 0.1
SETTLE_SECONDS = 1.0  # a rank that dies takes others with it: wait until it can be told which was first
GRACE_SECONDS = 5.0


@dataclass
class Rank:
    number: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = [x.strip() for x in self.errors.read().decode(errors="replace").splitlines() if x.strip()]
        ours = [x for x in lines if x.startswith("regraft: ")]
        return (ours or lines or ["no message"])[-1].removeprefix("regraft: ")

    def is_stopped(self) -> bool:
        """Whether it was suspended from outside, as SIGSTOP does."""
        import psutil

        try:
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False


def check_processes(config: RunConfig, processes: int) -> None:
    """Raise ConfigError where a run cannot be shared by so many."""
    if processes < 1:
        raise ConfigError(f"--processes {processes}: expected at least 1")
    if processes > config.training.batch_size:
        raise ConfigError(
            f"--processes {processes}: training.batch_size is {config.training.batch_size}, so some would never have a "
            "sequence; raise it or use fewer processes"
        )
    check_deepspeed(config.training.sharding)
    if "RANK" in os.environ:
        machines(config.training.sharding)
    if processes > 1 and config.unfreeze.gradual:
        raise ConfigError("unfreeze.gradual: what is trained changes on the way, which several processes cannot do")


def launch(arguments: Sequence[str], processes: int, command: str = "train") -> int:
    """Run `regraft COMMAND` with `arguments` in that many processes; 0 when all ended well.

    Raises TrainingError naming the first rank that failed, and its reason; the other ranks are stopped.
    """
    port = _free_port()
    ranks: list[Rank] = []
    # A scheduler that ends a job asks this process alone: without a handler it would leave the ranks training behind.
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _told_to_end) if main else None
    try:
        for number in range(processes):
            ranks.append(_start([command, *arguments], number, processes, port))
        while True:
            codes = [r.process.poll() for r in ranks]
            if any(codes):
                time.sleep(SETTLE_SECONDS)
                raise TrainingError(_describe(ranks, command))
            if all(c == 0 for c in codes):
                return 0
            time.sleep(POLL_SECONDS)
    finally:
        _stop(ranks)
        if main:
            signal.signal(signal.SIGTERM, before)


def _told_to_end(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # asked again, it still has ranks to stop
    raise SystemExit(128 + number)


def _start(arguments: Sequence[str], number: int, processes: int, port: int) -> Rank:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 closed with the rank
    env = os.environ | {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if not _has_gpu():
        env["ACCELERATE_USE_CPU"] = "true"
    quiet = number > 0
    process = subprocess.Popen(
        [sys.executable, "-m", "regraft.engine", *arguments],
        env=env,
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=errors if quiet else None,
        preexec_fn=partial(end_with, os.getpid()) if sys.platform == "linux" else None,
    )
    return Rank(number, process, errors)


def _has_gpu() -> bool:
    # Asked of the driver's files: importing torch here would cost seconds and memory for a process that only waits.
    return any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _describe(ranks: list[Rank], command: str) -> str:
    codes = [(r, r.process.poll()) for r in ranks]
    stopped = [r for r, code in codes if code is None and r.is_stopped()]
    if stopped:
        who, why = stopped[0], "was stopped (SIGSTOP) and kept the others waiting for longer than training.timeout"
    else:
        who, code = _culprit([(r, code) for r, code in codes if code])
        why = _ending(who, code)
    kept = (
        "everything up to the last checkpoint is kept, and the same command goes on from there, with any number of "
        "processes"
        if command == "train"
        else "what is finished is kept, and the same command goes on from there"
    )
    return f"rank {who.number} of {len(ranks)} {why}. The other ranks were stopped; {kept}"


def _culprit(failed: list[tuple[Rank, int]]) -> tuple[Rank, int]:
    # Killed from outside first, then a refusal with a message, then whatever else: a lost peer makes the others fail (3).
    return min(failed, key=lambda item: (item[1] >= 0, item[1] != 2, item[0].number))


def _ending(rank: Rank, code: int) -> str:
    if code < 0:
        why = f"was ended by {signal.Signals(-code).name}"
        return why + (" (out of memory, or from outside)" if code == -signal.SIGKILL else "")
    return f"ended with code {code}" + (f": {rank.last_words()}" if rank.number else ", see its message above")


def _stop(ranks: list[Rank]) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
            rank.process.send_signal(signal.SIGCONT)  # one that is stopped would not hear it
    until = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
        rank.errors.close()
