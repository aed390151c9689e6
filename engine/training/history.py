"""What happened, one JSON object a line, and to accelerate's trackers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


class History:
    """Appends to metrics.jsonl. On resume the file is cut back to where the checkpoint was taken, so that a run that
    was killed leaves the same lines as one that was not."""

    def __init__(self, path: Path, *, keep_bytes: int, accelerator: Accelerator | None = None) -> None:
        self.path = path
        self.accelerator = accelerator
        path.touch()
        self._file = path.open("r+b")
        self._file.truncate(keep_bytes)
        self._file.seek(0, os.SEEK_END)

    @property
    def bytes(self) -> int:
        self._file.flush()
        return self._file.tell()

    def add(self, record: dict[str, Any]) -> None:
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        if self.accelerator and self.accelerator.log_with and "step" in record:
            self.accelerator.log(_flat(record), step=record["step"])

    def close(self) -> None:
        self._file.close()


def _flat(record: dict[str, Any]) -> dict[str, float]:
    kind = record["kind"]
    found = {f"{kind}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    for name, value in record.get("metrics", {}).items():
        found[f"{record.get('split', kind)}/{name}"] = value
    return found
