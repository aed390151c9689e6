"""Which texts of a batch go through the graph together."""

from __future__ import annotations

import numpy as np


def like_lengths(lengths: np.ndarray, slack: int) -> list[np.ndarray]:
    """Indices of groups that run together: longest first, a new group where the empty cells exceed `slack`.

    A group of B items costs B * max(length) cells wherever the graph needs a rectangle; a run of its own costs
    about as much as `slack` empty cells. Shape: lengths [B] -> arrays that together hold each of 0..B-1 once.
    """
    order = np.argsort(-lengths, kind="stable")
    groups, start, empty = [], 0, 0
    for at, index in enumerate(order):
        empty += int(lengths[order[start]] - lengths[index])
        if empty > slack:
            groups.append(order[start:at])
            start, empty = at, 0
    groups.append(order[start:])
    return groups
