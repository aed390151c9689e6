"""Tags of words and the spans they spell: IOB1, IOB2, BIOES (also written BILOU and BMES), or one tag a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from regraft.engine.errors import nearest

SCHEMES = ("iob1", "iob2", "bioes", "none")
PREFIXES = {"iob1": "BIO", "iob2": "BIO", "bioes": "BIOES"}
ALIASES = {"L": "E", "U": "S", "M": "I"}
MISTYPED = re.compile(r"^[BIESLUM]\W|^[BIESLUM]_")  # the prefix in B_PER or B:PER
Chunk = tuple[int, int, str]  # first word, word after the last, type


def split_tag(tag: str) -> tuple[str, str]:
    """'B-PER' as ('B', 'PER'); 'O' as ('O', '')."""
    prefix, _, kind = tag.partition("-")
    return ALIASES.get(prefix, prefix), kind


def is_scheme_tag(tag: str) -> bool:
    """Whether a tag can belong to a scheme with prefixes."""
    prefix, kind = split_tag(tag)
    return tag == "O" or (prefix in "BIES" and len(prefix) == 1 and bool(kind))


def guess_scheme(sentences: Iterable[Sequence[str]]) -> str:
    """The scheme that the tags of a file are written in.

    'none' where most tags (O aside) have no prefix; the odd one that has none in another file is left for `refuse`.
    Else 'bioes' where some end is marked, 'iob1' where B marks only what touches a span of its type and some span
    begins with I, and 'iob2' for the rest, a file of O alone among them.
    """
    plain = marked = 0
    ends = begins_with_i = stray_b = False
    for tags in sentences:
        before = ("O", "")
        for tag in tags:
            if not is_scheme_tag(tag):
                plain += 1
                before = ("O", "")
                continue
            prefix, kind = split_tag(tag)
            marked += tag != "O"
            ends |= prefix in "ES"
            goes_on = before[0] != "O" and before[1] == kind
            begins_with_i |= prefix == "I" and not goes_on
            stray_b |= prefix == "B" and not goes_on
            before = (prefix, kind)
    if plain > marked:
        return "none"
    if ends:
        return "bioes"
    return "iob1" if begins_with_i and not stray_b else "iob2"


def refuse(tags: Sequence[str], scheme: str) -> tuple[int, str] | None:
    """The first tag that `scheme` does not allow where it stands, and why; None where all are allowed."""
    before = ("O", "")
    for i, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        allowed = PREFIXES[scheme]
        if tag != "O" and (not kind or prefix not in allowed or len(prefix) != 1 or prefix == "O"):
            known = [f"{p}-{kind or MISTYPED.sub('', tag)}" for p in allowed if p != "O"]
            return (
                i,
                f"tag {tag!r} is not of the scheme {scheme}{nearest(tag, known)}; expected O or one of {allowed.replace('O', '')} "
                "with -TYPE (data.tag_scheme: none takes every tag as it stands)",
            )
        if scheme == "iob2" and prefix == "I" and (before[0] == "O" or before[1] != kind):
            return i, (
                f"tag {tag!r} continues what did not begin (scheme iob2): expected 'B-{kind}'; "
                "data.tag_scheme: iob1 lets a span begin so"
            )
        if scheme == "bioes":
            inside = before[0] in "BI"
            if (prefix in "IE") != inside or (inside and before[1] != kind):
                return i, f"tag {tag!r} does not follow {'-'.join(filter(None, before))!r} (scheme bioes)"
        before = (prefix, kind)
    if scheme == "bioes" and before[0] in "BI":
        return len(tags) - 1, f"tag {tags[-1]!r} ends the sentence, but not the span (scheme bioes)"
    return None


def chunks(tags: Sequence[str]) -> list[Chunk]:
    """Spans as conlleval reads tags of any scheme: an I or E after O or after another type begins one."""
    found: list[Chunk] = []
    start, before, before_kind = 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        ends = before in "ES" or (before in "BI" and (prefix in "BSO" or kind != before_kind))
        if before != "O" and ends:
            found.append((start, i, before_kind))
        if prefix != "O" and (prefix in "BS" or before in "ESO" or kind != before_kind):
            start = i
        before, before_kind = prefix, kind
    return found


def strict_chunks(tags: Sequence[str], scheme: str) -> list[Chunk]:
    """Only spans that are spelled in full: B I* (and no I alone) for iob2; S, or B I* E, for bioes."""
    found: list[Chunk] = []
    start, open_kind = 0, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        if open_kind is not None and not (prefix in "IE" and kind == open_kind):
            if scheme != "bioes":
                found.append((start, i, open_kind))
            open_kind = None
        if prefix == "B":
            start, open_kind = i, kind
        elif prefix == "S":
            found.append((i, i + 1, kind))
        elif prefix == "E" and open_kind is not None:
            found.append((start, i + 1, kind))
            open_kind = None
    return found


def spell(spans: Iterable[Chunk], words: int, scheme: str) -> list[str]:
    """Tags of `words` words for spans that do not overlap. For 'none' each word has the type of its span, or ''."""
    tags = ["" if scheme == "none" else "O"] * words
    after = ""
    for first, last, kind in sorted(spans):
        if scheme == "none":
            tags[first:last] = [kind] * (last - first)
        elif scheme == "bioes" and last - first == 1:
            tags[first] = f"S-{kind}"
        else:
            tags[first:last] = [f"I-{kind}"] * (last - first)
            # IOB1 marks a beginning only where the span touches one of the same type.
            if scheme != "iob1" or (first and after == f"{first}-{kind}"):
                tags[first] = f"B-{kind}"
            if scheme == "bioes":
                tags[last - 1] = f"E-{kind}"
        after = f"{last}-{kind}"
    return tags


def tag_names(kinds: Sequence[str], scheme: str) -> tuple[str, ...]:
    """All tags of a scheme, 'O' first."""
    if scheme == "none":
        return tuple(kinds)
    prefixes = "BIES" if scheme == "bioes" else "BI"
    return ("O", *(f"{prefix}-{kind}" for kind in kinds for prefix in prefixes))


def forbidden(tags: Sequence[str], scheme: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a scheme forbids: transitions [C, C] (from, to), starts [C], ends [C], each True where it does."""
    count = len(tags)
    moves, starts, ends = np.zeros((count, count), bool), np.zeros(count, bool), np.zeros(count, bool)
    if scheme == "none":
        return moves, starts, ends
    parts = [split_tag(tag) for tag in tags]
    for j, (prefix, kind) in enumerate(parts):
        goes_on = prefix in "IE"
        starts[j] = goes_on and scheme != "iob1"
        ends[j] = scheme == "bioes" and prefix in "BI"
        for i, (before, before_kind) in enumerate(parts):
            if scheme == "bioes":
                moves[i, j] = (before in "BI") != goes_on or (goes_on and before_kind != kind)
            elif scheme == "iob2":
                moves[i, j] = goes_on and (before == "O" or before_kind != kind)
    return moves, starts, ends
