"""C for the hot spots on CPU: compiled once a machine with the compiler that is there, kept, loaded.

torch has no fused form of these on CPU, and each small operation of its own costs more for waking threads than for
its arithmetic. Where there is no compiler, or the process' OpenMP is not the one that the compiler links, everything
runs in plain torch and the reason is said once, to the log. `REGRAFT_KERNELS=reference` keeps to plain torch too.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.choice import choice
from regraft.kernels.dropout import LEVELS, scale_of

# -march=native: what is compiled here runs here, and is kept under this processor's name
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-std=gnu11")
COMPILE_SECONDS = 120
TYPES = (torch.float32, torch.bfloat16)
_log = logging.getLogger("regraft.kernels")


def takes(*tensors: Tensor) -> bool:
    """Whether the native form runs on these: each fp32 or bf16 on CPU, not traced, and plain torch not forced."""
    plain = all(type(x) is Tensor and x.device.type == "cpu" and x.dtype in TYPES for x in tensors)
    # asked last: it compiles the library, which a run on a GPU never needs
    return plain and not torch.compiler.is_compiling() and available()


def available() -> bool:
    """Whether there are native forms here, and plain torch is not forced."""
    return choice() == "auto" and library() is not None


def decisions(p: float) -> dict[str, float | int]:
    """What a problem says of its dropout: factor, threshold and a seed from torch's generator."""
    threshold = round(p * LEVELS)
    seed = int(torch.empty((), dtype=torch.int64).random_()) if threshold else 0
    return {"factor": scale_of(p), "threshold": threshold, "seed": seed}


def at(x: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's first value lies; NULL for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def call(name: str, *arguments: Any) -> int:
    """A function of the library; whole numbers go as 64 bits, but the last one, the number of threads, as an int.

    Raises RuntimeError where there is no library."""
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"{name}: C kernels are not available here")
    *others, threads = arguments
    return getattr(loaded, name)(*[ctypes.c_int64(x) if isinstance(x, int) else x for x in others], threads)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """kernels/native_*.c, compiled and loaded; None where that cannot be done here, which is said once."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        _log.info("fused CPU kernels run as plain torch: %s", str(detail).strip()[-500:])
        return None


def _compiled() -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("no C compiler (cc, or what CC names) is on the PATH")
    openmp = _loaded_openmp()
    here = Path(__file__).parent
    sources = sorted(here.glob("native_*.c"))
    texts = [path.read_bytes() for path in (*sources, *sorted(here.glob("native*.h")))]
    made_of = [*texts, *map(str.encode, (*FLAGS, compiler, str(openmp), _processor()))]
    kept = _folder() / f"{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:20]}.so"
    if not kept.is_file():
        _compile(compiler, sources, openmp, kept)
    return kept


def _compile(compiler: str, sources: list[Path], openmp: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:

        def run(*arguments: object) -> None:
            command = [compiler, *map(str, arguments)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS, cwd=folder)

        run(*FLAGS, "-c", *sources)
        # linked with the OpenMP that torch has loaded: a second one would have threads of its own on the same cores
        run("-shared", *(f"{source.stem}.o" for source in sources), openmp, "-lm", "-o", kept.name)
        (Path(folder) / kept.name).replace(kept)  # whoever compiled at the same time wrote the same


def _loaded_openmp() -> Path:
    """The OpenMP library that torch brought into this process. Raises RuntimeError where it is not GNU's."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")  # OSError where there is none: not Linux
    found = re.findall(r"(/\S*libgomp[^/\s]*)$", maps, flags=re.MULTILINE)
    if not found:
        raise RuntimeError("torch has not loaded GNU OpenMP (libgomp) here")
    return Path(found[0])


def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    marks = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", info, flags=re.MULTILINE)
    return "\n".join([platform.machine(), *sorted(set(marks))])


def _folder() -> Path:
    root = os.environ.get("REGRAFT_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "regraft") / "native"
