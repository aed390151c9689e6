"""`regraft train --processes N`: start the ranks on this machine, watch them, and say which one failed and why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from regraft.engine.config import RunConfig
from regraft.engine.errors import ConfigError, TrainingError

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


def check_processes(config: RunConfig, processes: int) -> None:
    """Raise ConfigError where a run cannot be shared by so many."""
    if processes < 1:
        raise ConfigError(f"--processes {processes}: expected at least 1")
    if processes > config.training.batch_size:
        raise ConfigError(
            f"--processes {processes}: training.batch_size is {config.training.batch_size}, so some would never have a "
            "sequence; raise it or use fewer processes"
        )
    if processes > 1 and config.unfreeze.gradual:
        raise ConfigError("unfreeze.gradual: what is trained changes on the way, which several processes cannot do")


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `regraft train` with `arguments` in that many processes; 0 when all ended well.

    Raises TrainingError naming the first rank that failed, and its reason; the other ranks are stopped.
    """
    ranks = [_start(arguments, n, processes, port) for port in [_free_port()] for n in range(processes)]
    try:
        while True:
            codes = [r.process.poll() for r in ranks]
            if any(codes):
                time.sleep(SETTLE_SECONDS)
                failed = _culprit([(r, r.process.poll()) for r in ranks])
                raise TrainingError(_describe(*failed, processes))
            if all(c == 0 for c in codes):
                return 0
            time.sleep(POLL_SECONDS)
    finally:
        _stop(ranks)


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
    command = [sys.executable, "-m", "regraft.engine", "train", *arguments]
    quiet = number > 0
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL if quiet else None, stderr=errors if quiet else None
    )
    return Rank(number, process, errors)


def _has_gpu() -> bool:
    # Asked of the driver's files: importing torch here would cost seconds and memory for a process that only waits.
    return any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _culprit(codes: list[tuple[Rank, int | None]]) -> tuple[Rank, int]:
    # Killed from outside first, then a refusal with a message, then whatever else: a lost peer makes the others fail.
    failed = [(r, c) for r, c in codes if c]
    return min(failed, key=lambda item: (item[1] >= 0, item[1] != 2, item[0].number))


def _describe(rank: Rank, code: int, processes: int) -> str:
    if code < 0:
        why = f"was ended by {signal.Signals(-code).name}"
        why += " (out of memory, or from outside)" if code == -signal.SIGKILL else ""
    else:
        why = f"ended with code {code}" + (f": {rank.last_words()}" if rank.number else ", see its message above")
    return (
        f"rank {rank.number} of {processes} {why}. The other ranks were stopped; everything up to the last checkpoint is "
        "kept, and the same command goes on from there, with any number of processes"
    )


def _stop(ranks: list[Rank]) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
    until = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
        rank.errors.close()
