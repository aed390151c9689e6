"""The folder of what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """REGRAFT_CACHE, or ~/.cache/regraft."""
    configured = os.environ.get("REGRAFT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "regraft"
