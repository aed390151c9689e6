"""Which of a kernel's two forms runs: the Triton kernel on CUDA, the plain torch reference everywhere else.

A caller never chooses. `REGRAFT_KERNELS` does, for a whole process, and `forced` for a block:
    auto        Triton where the tensor is on a GPU of sm_80 or newer and Triton is installed (the default)
    reference   plain torch always
    triton      Triton always; on CPU tensors that needs TRITON_INTERPRET=1, set before Triton is imported
Some have a form in C too, for fp32 and bf16 on CPU (native.py), under `auto`. Triton is imported when it is first asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "triton")
OLDEST = (8, 0)
_forced: list[str] = []
_log = logging.getLogger("regraft.kernels")


def choice() -> str:
    """The setting in force. Raises ValueError for a value of REGRAFT_KERNELS that is none."""
    value = _forced[-1] if _forced else os.environ.get("REGRAFT_KERNELS", "auto")
    if value not in CHOICES:
        raise ValueError(f"REGRAFT_KERNELS is {value!r}; it can be one of {', '.join(CHOICES)}")
    return value


@contextmanager
def forced(value: str) -> Iterator[None]:
    """Force a choice inside a `with` block (process-wide, so that autograd's own threads see it)."""
    if value not in CHOICES:
        raise ValueError(f"kernels can be forced to one of {', '.join(CHOICES)}, got {value!r}")
    _forced.append(value)
    try:
        yield
    finally:
        _forced.pop()


def use_triton(x: Tensor) -> bool:
    """Whether kernels on x's device run in Triton. Raises RuntimeError where Triton is forced and cannot run."""
    value = choice()
    if value == "reference":
        return False
    from regraft.kernels.lang import IS_INTERPRETED

    if value == "triton":
        reason = _cannot_be_forced(x)
        if reason:
            raise RuntimeError(f"Triton kernels are forced, but {reason}")
        return True
    if x.device.type != "cuda" or IS_INTERPRETED:
        return False
    reason = why_not(x.device.index or 0)
    return reason is None


@lru_cache(maxsize=64)
def why_not(device: int) -> str | None:
    """Why kernels on this CUDA device run as plain torch; None where they run in Triton. Said once, to the log."""
    from regraft.kernels.lang import HAS_TRITON

    reason = None
    if not HAS_TRITON:
        reason = "Triton is not installed"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, older than sm_80"
    if reason:
        _log.warning("fused kernels run as plain torch: %s", reason)
    return reason


def _cannot_be_forced(x: Tensor) -> str | None:
    from regraft.kernels.lang import HAS_TRITON, IS_INTERPRETED

    if not HAS_TRITON:
        return "Triton is not installed"
    if x.device.type == "cpu" and not IS_INTERPRETED:
        return "the tensor is on CPU and TRITON_INTERPRET=1 was not set before Triton was imported"
    return None
