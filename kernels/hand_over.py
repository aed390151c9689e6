"""Whose attention is faster for a shape on a GPU: this package's kernel or torch's own, by measurement.

`python bench/kernels_gpu.py --hand-over` measures on the GPU it runs on and writes `hand_over.json` beside this file:

    {"90": {"machine": "NVIDIA H200", "torch": "2.13.0", "date": "...", "faster": {"64 x 512, dropout": "own", ...}}}

by compute capability, then by head size, the longest sequence rounded up to one of LENGTHS, and whether there is dropout,
positions are rotary (torch's own then needs queries and keys turned beforehand), and a window cuts something off.
What has not been measured goes to torch's, which is known to be good and takes any head size up to 256.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent / "hand_over.json"
LENGTHS = (64, 128, 256, 512, 1024, 8192)
WHO = ("own", "aten")
_log = logging.getLogger("regraft.kernels")


def key_of(size: int, longest: int, *, dropout: bool = False, rotary: bool = False, window: bool = False) -> str:
    """The entry that a call belongs to: head size, longest sequence, and what else attention does."""
    length = next((n for n in LENGTHS if longest <= n), LENGTHS[-1])
    also = [name for name, on in (("dropout", dropout), ("rotary", rotary), ("window", window)) if on]
    return ", ".join([f"{size} x {length}", *also])


def faster(capability: int, key: str) -> str:
    """'own' or 'aten' for the shapes of an entry on a GPU of this compute capability (90 for sm_90)."""
    return MEASURED.get(capability, {}).get(key, "aten")


def read_table(path: Path) -> dict[int, dict[str, str]]:
    """What was measured, by compute capability; empty where nothing was, or where the file cannot be read, which is said."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {int(capability): dict(about["faster"]) for capability, about in content.items()}
        strange = sorted({who for entries in found.values() for who in entries.values()} - set(WHO))
        if strange:
            raise ValueError(f"{strange[0]!r} is neither 'own' nor 'aten'")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be read (%s); attention goes to torch's own", path, error)
        return {}
    return found


def write_table(path: Path, capability: int, entries: dict[str, str], about: dict[str, Any]) -> None:
    """Put one GPU's entries into the file; those of others stay. `about`: machine, versions, date."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content[str(capability)] = {**about, "faster": dict(sorted(entries.items()))}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


MEASURED = read_table(TABLE)
