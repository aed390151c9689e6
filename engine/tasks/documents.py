"""Documents as sequences to learn a language from: packed to full length, or as pairs of parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])|\n+")
LEAST = 8  # tokens of text that are worth a sequence of their own


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `end` of document `row`."""

    row: int
    start: int
    end: int


def full_length(lengths: Sequence[int], room: int, specials: int) -> tuple[list[Part], list[int]]:
    """Documents cut so that they fill units of `room` tokens, specials included, one after the other; and how many parts
    each unit has. Parts of a unit do not see each other."""
    parts: list[Part] = []
    units = [0]
    left = room
    for row, length in enumerate(lengths):
        at = 0
        while at < length:
            if left < specials + min(LEAST, length - at):
                units.append(0)
                left = room
            end = min(length, at + left - specials)
            parts.append(Part(row, at, end))
            units[-1] += 1
            left -= specials + end - at
            at = end
    return parts, [count for count in units if count]


@dataclass(frozen=True)
class Pair:
    """Two parts; `label` 0: the second follows the first, 1: it does not."""

    first: Part
    second: Part
    label: int


def sentence_starts(text: str) -> list[int]:
    """Characters at which sentences begin."""
    return sorted({0, *(found.end() for found in SENTENCE_END.finditer(text) if found.end() < len(text))})


def pairs(sentences: Sequence[Sequence[int]], room: int, how: str, rng: np.random.Generator) -> list[Pair]:
    """Pairs of at most `room` tokens in all. `sentences`: for each document the tokens its sentences begin at, and its
    end. 'nsp': half of the second parts are of another document; 'order': half of the pairs are swapped."""
    found: list[Pair] = []
    able = [row for row, bounds in enumerate(sentences) if len(bounds) > 1 and bounds[-1] > 0]
    for row in able:
        bounds = sentences[row]
        at = 0
        while at < len(bounds) - 1:
            last = at + 1
            while last < len(bounds) - 1 and bounds[last + 1] - bounds[at] <= room:
                last += 1
            if last - at > 1:
                middle = int(rng.integers(at + 1, last))
                first, second = Part(row, bounds[at], bounds[middle]), Part(row, bounds[middle], bounds[last])
                wrong = bool(rng.integers(2)) and (how == "order" or len(able) > 1)
                if wrong and how == "order":
                    first, second = second, first
                elif wrong:
                    second = _elsewhere(sentences, able, row, room - (first.end - first.start), rng)
                    last = middle  # what was not used is used next
                found.append(_shortened(first, second, room, int(wrong)))
            at = last
    return found


def _elsewhere(
    sentences: Sequence[Sequence[int]], able: Sequence[int], row: int, room: int, rng: np.random.Generator
) -> Part:
    other = row
    while other == row:
        other = able[int(rng.integers(len(able)))]
    bounds = sentences[other]
    at = int(rng.integers(len(bounds) - 1))
    last = at + 1
    while last < len(bounds) - 1 and bounds[last + 1] - bounds[at] <= room:
        last += 1
    return Part(other, bounds[at], bounds[last])


def _shortened(first: Part, second: Part, room: int, label: int) -> Pair:
    sizes = [first.end - first.start, second.end - second.start]
    while sum(sizes) > room:
        long = int(sizes[1] >= sizes[0])
        sizes[long] -= sum(sizes) - room if sizes[long] - (sum(sizes) - room) >= sizes[1 - long] else 1
    return Pair(
        Part(first.row, first.start, first.start + sizes[0]),
        Part(second.row, second.start, second.start + sizes[1]),
        label,
    )
