"""How a figure is written in a line or a table."""

from __future__ import annotations

SMALL = 1e-3  # below, four decimals would leave one digit or none


def figure(value: float) -> str:
    """Four decimals, as shares need; four digits for what is small: a mean squared error can be 4.3e-10."""
    return f"{value:.4g}" if 0 < abs(value) < SMALL else f"{value:.4f}"
