"""What a scalar mix learned: how much each of the encoder's layers counts."""

from __future__ import annotations

from regraft.engine.report.data import ReportData
from regraft.engine.report.formats import percent
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.tables import numbers, table, words


def layer_weights(data: ReportData) -> Markup | None:
    """Each layer's share after the soft-max; None where layers were not mixed."""
    found = data.details.get("layer_weights")
    if not found:
        return None
    top = max(row["weight"] for row in found["layers"])
    rows, best = [], set()
    for number, row in enumerate(found["layers"]):
        if row["weight"] == top:
            best.add(number)
        bar = "\u2588" * max(1, round(24 * row["weight"] / top))
        rows.append(["embeddings" if row["layer"] == 0 else f"layer {row['layer']}", percent(row["weight"]), bar])
    columns = words("Layer") + numbers("Weight") + words("")
    note = el("p", f"gamma {found['gamma']:.3f}; the features are gamma times the weighted sum of these layers.")
    return el("section", el("h2", "Learned layer weights"), table(columns, rows, kept=best), note)
