"""What tests of measurements are given: runs and options as the commands make them."""

from __future__ import annotations

import argparse
from typing import Any

import harness

SPEED = harness.Claim("speed", "Something a second", "things/s")


def runs_of(**values: list[float]) -> list[harness.Run]:
    return [harness.Run("case", who, i, v) for who, some in values.items() for i, v in enumerate(some)]


def options_of(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"quick": True, "out": None, "threads": 1, "precision": "fp32", **changes})
