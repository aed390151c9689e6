"""Which tokens are hidden, and behind what: single tokens, whole words or spans of words (Devlin 2018, Joshi 2020)."""

from __future__ import annotations

import numpy as np

SPAN_P, LONGEST_SPAN = 0.2, 10  # SpanBERT: lengths in words are geometric, mean 3.8 after the cut
MEAN_SPAN = 3.8
HIDDEN, RANDOM = 0.8, 0.1  # shares of chosen tokens shown as the mask and as any token; the rest stay


def choose(words: np.ndarray, sequence: np.ndarray, share: float, how: str, rng: np.random.Generator) -> np.ndarray:
    """Tokens to be predicted, [T] bool: about `share` of those with a word, at least one in each sequence that has any.

    Shape: words [T], the word each token is of in its sequence, -1 for the model's own; sequence [T], ascending.
    """
    able = words >= 0
    if not able.any():
        return able
    new = np.ones(len(words), dtype=bool)
    if how != "token":
        new[1:] = (words[1:] != words[:-1]) | (sequence[1:] != sequence[:-1])
    group = np.cumsum(new) - 1  # tokens that are chosen together
    count = int(group[-1]) + 1
    first = np.flatnonzero(new)
    if how == "span":
        starts = rng.random(count) < share / MEAN_SPAN
        reach = np.minimum(rng.geometric(SPAN_P, count), LONGEST_SPAN)
        ends = np.zeros(count + 1, dtype=np.int64)
        where = np.flatnonzero(starts)
        np.add.at(ends, where, 1)
        np.add.at(ends, np.minimum(where + reach[where], count), -1)
        chosen = np.cumsum(ends[:-1]) > 0
    else:
        chosen = rng.random(count) < share
    found = chosen[group] & able
    # One in each sequence, so that no sequence is run for nothing.
    owners = np.unique(sequence[able])
    empty = np.setdiff1d(owners, sequence[found])
    for owner in empty:
        options = first[(sequence[first] == owner) & able[first]]
        if len(options):
            found |= (group == group[rng.choice(options)]) & able
    return found


def hide(ids: np.ndarray, chosen: np.ndarray, mask_id: int, vocabulary: int, rng: np.random.Generator) -> np.ndarray:
    """Token ids as the model sees them: of the chosen, 80% the mask, 10% any token, 10% themselves."""
    shown = ids.copy()
    where = np.flatnonzero(chosen)
    draw = rng.random(len(where))
    shown[where[draw < HIDDEN]] = mask_id
    anything = where[(draw >= HIDDEN) & (draw < HIDDEN + RANDOM)]
    shown[anything] = rng.integers(0, vocabulary, len(anything))
    return shown
