"""Confusion matrix as a heat map, and its most frequent mistakes."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.engine.report.formats import clip, compact, percent, width
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.svg import label, place, rect, svg

NUMBERED = 20  # classes up to which the cells hold numbers
NAMED = 30  # classes up to which rows and columns are named
DRAWN = 200  # classes up to which it is drawn at all
SLANT = 0.7071  # of names at 45 degrees


def heat_map(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> Markup | None:
    """Rows: the true class; columns: the predicted one; shade: share of the row. None beyond `DRAWN` classes."""
    n = len(labels)
    if not n or n > DRAWN:
        return None
    if n > NAMED:
        side = 420 / n
        return svg(421, 421, "Confusion matrix", _cells(labels, matrix, 0, 0, side), class_="matrix")
    side = min(42.0, max(21.0, 340 / n))
    names = [clip(name, 22) for name in labels]
    reach = [6.4 * width(name) + 12 for name in names]
    left, top = max(reach), max(reach) * SLANT + 6
    beyond = max(r * SLANT - (n - i - 0.5) * side for i, r in enumerate(reach))  # slanted names past the last column
    drawn = _cells(labels, matrix, left, top, side)
    for i, (name, full) in enumerate(zip(names, labels, strict=True)):
        middle, tip = (i + 0.5) * side, el("title", full)
        turned = f"translate({place(left + middle - 1)} {place(top - 7)}) rotate(-45)"
        drawn.append(label(name, left - 7, top + middle, "end"))
        drawn.append(el("text", tip, name, transform=turned, dy="0.33em"))
    size = left + side * n + max(beyond, 1), top + side * n + 1
    return svg(*size, "Confusion matrix", drawn, class_="matrix")


def _cells(
    labels: Sequence[str], matrix: Sequence[Sequence[int]], left: float, top: float, side: float
) -> list[Markup]:
    n = len(labels)
    gap = 1.0 if side > 12 else 0.0
    weakest, span = (0.08, 0.87) if n <= NAMED else (0.25, 0.7)
    drawn = [rect(left, top, side * n, side * n, "frame")]
    for i, row in enumerate(matrix):
        total = sum(row)
        for j, rows in enumerate(row):
            if not rows:
                continue
            share, x, y = rows / total, left + j * side, top + i * side
            # Mistakes are small shares; the root makes one in fifty visible without drowning one in two.
            strength = weakest + span * (share if i == j else share**0.6)
            what = f"{labels[i]}, right" if i == j else f"{labels[i]} taken for {labels[j]}"
            tip, class_ = f"{what}: {rows:,} rows ({percent(share)})", "right" if i == j else "wrong"
            drawn.append(rect(x + gap, y + gap, side - gap, side - gap, class_, tip, fill_opacity=f"{strength:.2f}"))
            if n <= NUMBERED:
                tone = "on-strong" if strength > 0.55 else "on-weak"
                drawn.append(label(compact(rows), x + (side + gap) / 2, y + (side + gap) / 2, class_=tone))
    return drawn


def most_confused(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[tuple[str, str, int, float]]:
    """Mistakes as true class, predicted class, rows, share of the true class's rows; most rows first."""
    found = []
    for i, row in enumerate(matrix):
        total = sum(row)
        found += [(labels[i], labels[j], rows, rows / total) for j, rows in enumerate(row) if rows and i != j]
    return sorted(found, key=lambda mistake: (-mistake[2], -mistake[3]))
