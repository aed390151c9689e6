"""Whether the Hugging Face hub can be reached, asked once and quickly."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

REACH_TIMEOUT = 5.0  # seconds


@contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Whether the hub can be reached. Where it cannot, the hub's libraries work from their caches in this block
    instead of trying again and again (half a minute a file)."""
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or _answers(hub.ENDPOINT):
        yield not hub.HF_HUB_OFFLINE
        return
    # `datasets` copies the switch when it is imported.
    switches = [hub, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield False
    finally:
        for switch in switches:
            switch.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=REACH_TIMEOUT).close()
    except urllib.error.HTTPError:  # an answer, if not a kind one
        return True
    except (OSError, ValueError):
        return False
    return True
