"""Processes of one run, started one by one as a cluster's launcher does: no one watches over them and stops the others."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
from forks import Forked

from conftest import FORKS


def start_ranks(
    arguments: Sequence[object],
    folders: Sequence[Path],
    *,
    program: Sequence[str] = ("-m", "regraft.engine"),
    **env: str,
) -> list[Forked | subprocess.Popen[str]]:
    """`regraft ARGUMENTS` once a folder, each rank with its folder as working directory. `program`: what Python runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = os.environ | {
        "WORLD_SIZE": str(len(folders)),
        "LOCAL_WORLD_SIZE": str(len(folders)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
        **env,
    }
    command = [*program, *map(str, arguments)]
    return [
        FORKS.start(command, cwd=folder, env=shared | {"RANK": str(number), "LOCAL_RANK": str(number)})
        for number, folder in enumerate(folders)
    ]


def ended(ranks: Sequence[Forked | subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit code and standard error of each, none of which may take longer than that."""
    try:
        return [(rank.wait(seconds), rank.communicate()[1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def ran_to_the_end(
    arguments: Sequence[object], folder: Path, count: int, *, program: Sequence[str] = ("-m", "regraft.engine")
) -> list[Path]:
    """`count` ranks that ended well, each in a new folder of its own below `folder`; those, by rank."""
    folders = [folder / str(rank) for rank in range(count)]
    for own in folders:
        own.mkdir(parents=True)
    for code, errors in ended(start_ranks(arguments, folders, program=program)):
        assert code == 0, errors
    return folders


def rank_one(parent: Forked | subprocess.Popen[str]) -> psutil.Process:
    """The second rank that `--processes` started."""
    return max(psutil.Process(parent.pid).children(), key=lambda p: p.pid)
