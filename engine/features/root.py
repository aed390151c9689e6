"""Where stores lie, and the commands that look after them as a user can type them."""

from __future__ import annotations

import shlex
from pathlib import Path

from regraft.engine.data.cache import cache_folder


def store_root(configured: str | None) -> Path:
    return Path(configured).expanduser() if configured else cache_folder() / "features"


def command(root: Path, *what: str) -> str:
    """`regraft features WHAT` in backquotes. It names `root` where that is not the usual folder: without it the command
    would look after other stores."""
    place = [] if root == store_root(None) else ["--root", str(root)]
    return f"`{shlex.join(['regraft', 'features', *what, *place])}`"
