"""Processes that train as one: what goes wrong in one ends all of them, by its rank and reason, and none waits for ever."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from regraft.engine.errors import ConfigError, LostProcessError, RegraftError, TrainingError

ROLL_CALL_SECONDS = 5.0
STORE_SECONDS = 10.0
YIELDS = 20_000  # of a waiting process before it sleeps: some milliseconds, which is how far ranks are apart in a step
NAP_SECONDS = 0.0005
_patience = 1800.0  # seconds, as limit_waiting has set it; until then torch's own


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes torchrun, accelerate or `--processes` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def machines(sharding: str) -> int:
    """How many machines hold a whole set of shards each: 1 where all processes share one set.

    Raises ConfigError where the processes are not the same number on every machine.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes())))
    if sharding != "hybrid":
        return 1
    if processes() % here:
        raise ConfigError(
            f"training.sharding: hybrid needs as many processes on every machine; {processes()} in all are no multiple of "
            f"the {here} on this one. Start as many on each, or set sharding: full"
        )
    return processes() // here


def check_deepspeed(sharding: str) -> None:
    """Raise ConfigError where weights are to be shared out by DeepSpeed and there is none."""
    if sharding.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"training.sharding: {sharding} needs DeepSpeed, which is not installed: pip install deepspeed; or set sharding: "
            "full, which does the same without it"
        )


def meet(timeout: float) -> None:
    """Bring the processes together, through accelerate. From then on they wait at most `timeout` seconds for one of
    them; until then for as long as torch does, as some start later than others."""
    if "RANK" not in os.environ:
        return
    import torch
    from accelerate import PartialState

    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    PartialState(cpu=wants_cpu or not torch.cuda.is_available())
    torch.distributed.barrier()
    limit_waiting(timeout)


def part() -> None:
    """Leave the other processes once all is done; each has to. A thread of torch's that still lets go of the last numbers
    while the interpreter ends would abort this process: this waits for it."""
    if _met():
        from accelerate import PartialState

        PartialState().destroy_process_group()


def limit_waiting(timeout: float, group: Any = None) -> None:
    """How long, in seconds, an operation of `group` (None: of all processes) waits for the others."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    global _patience
    if group is None:
        _patience = timeout
    _set_pg_timeout(timedelta(seconds=timeout), group)


class _OthersLostError(RuntimeError):
    """Waited in vain for another process of this machine."""


def wait_until(holds: Callable[[], bool], process: int) -> None:
    """Wait, as long as operations of all processes may, for what another process of this machine does; it has the
    processor meanwhile where there are fewer than processes. `process`: its id."""
    for _ in range(YIELDS):
        if holds():
            return
        os.sched_yield()
    until = time.monotonic() + _patience
    while not holds():
        if time.monotonic() > until:
            raise _OthersLostError(f"timed out waiting for process {process}")
        if not _lives(process) and not holds():
            raise _OthersLostError(f"process {process} is gone")
        time.sleep(NAP_SECONDS)


def _lives(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"  # proc_pid_stat(5)


def _met() -> bool:
    if processes() == 1:
        return False
    from torch import distributed

    return distributed.is_initialized()


def end_at_once(code: int) -> None:
    """End this process where several have met, without taking the interpreter apart: threads of torch's that still wait
    for the others would abort it, and its exit code would no longer tell what happened. Does nothing to one alone."""
    if _met():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def together(doing: str) -> Iterator[None]:
    """A stretch that ends well for all processes or for none: where one fails, the others raise TrainingError with its
    rank and reason. No process may wait for another inside."""
    if not _met():
        yield
        return
    from torch import distributed

    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        if has_lost_others(error):
            raise
        failed = error
    reasons: list[str | None] = [None] * processes()
    distributed.all_gather_object(reasons, None if failed is None else _reason(failed))
    wrong = [n for n, reason in enumerate(reasons) if reason is not None]
    if not wrong:
        return
    alike = len(wrong) == processes() and len(set(reasons)) == 1
    if isinstance(failed, RegraftError):
        raise failed if alike else type(failed)(f"{_called(rank())}: {failed}") from failed
    if failed is not None:
        raise failed
    raise TrainingError(f"{_called(wrong[0])}, {doing}: {reasons[wrong[0]]}")


def _called(number: int) -> str:
    return f"rank {number} of {processes()}"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RegraftError) else f"{type(error).__name__}: {error}"


def agreed(value: float, how: str) -> float:
    """The 'largest' or 'smallest' of what the processes say; each has to ask."""
    if not _met():
        return value
    import torch
    from accelerate import PartialState
    from torch import distributed

    said = torch.tensor(value, dtype=torch.float64, device=PartialState().device)
    distributed.all_reduce(said, op={"largest": distributed.ReduceOp.MAX, "smallest": distributed.ReduceOp.MIN}[how])
    return float(said)


def has_lost_others(error: BaseException) -> bool:
    """Whether an operation failed because another process is gone, or did not come to it in time."""
    from torch import distributed

    if isinstance(error, _OthersLostError | getattr(distributed, "DistError", _OthersLostError)):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def who_is_missing(error: BaseException, timeout: float) -> LostProcessError:
    """After `has_lost_others`: an error that names the processes that do not answer."""
    waited = any(sign in str(error) for sign in ("Timed out", "timed out", "timeout"))
    missing = _missing()
    if missing is None:
        who = f"rank 0 of {processes()}, which the others ask through,"
    elif missing:
        who = " and ".join(f"rank {n}" for n in missing) + f" of {processes()}"
    else:
        who = f"one of {processes()} processes"
    if waited:
        why = f"did not come within {timeout:g} seconds (training.timeout): stopped, stuck, or far too slow"
    else:
        why = "is gone; its own message, or the system's, says why"
    return LostProcessError(
        f"{who} {why}. Everything up to the last checkpoint is kept, and the same command goes on from there"
    )


def _missing() -> list[int] | None:
    """Ranks that do not answer a roll call; None where the store it goes through does not answer either."""
    others = [n for n in range(processes()) if n != rank()]
    if len(others) == 1:
        return others
    found: list[list[int]] = []

    def call() -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        store.set(f"regraft/here/{rank()}", "yes")
        until = time.monotonic() + ROLL_CALL_SECONDS
        while True:
            absent = [n for n in others if not store.check([f"regraft/here/{n}"])]
            if not absent or time.monotonic() > until:
                found.append(absent)
                return
            time.sleep(0.2)

    # On a thread: a store whose process is stopped answers nothing at all.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(ROLL_CALL_SECONDS + STORE_SECONDS)
    return found[0] if found else None
