"""report.html of a run folder: one file, nothing loaded from elsewhere, readable without script."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from regraft.engine.files import write_text
from regraft.engine.report import by_task, layers, provenance, sections
from regraft.engine.report.curves import training_curves
from regraft.engine.report.data import ReportData
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.style import SCRIPT, STYLE
from regraft.engine.report.summary import summary

PARTS = (
    sections.tiles,
    training_curves,
    sections.evaluations,
    by_task.overview,
    by_task.each,
    layers.layer_weights,
    sections.confusion,
    sections.regression,
    sections.calibration,
    sections.per_class,
    sections.worst,
    provenance.data_notes,
    provenance.settings,
)


def write_report(folder: Path, data: ReportData) -> Path:
    """Write `report.html` into the run folder, whole or not at all, and return its path."""
    return write_text(Path(folder) / "report.html", render(data))


def render(data: ReportData) -> str:
    """The page. What `data` lacks is left out; that nothing was recorded at all is said."""
    eyebrow, lead = el("p", "Training report", class_="eyebrow"), el("p", summary(data), class_="lead")
    header = el("header", eyebrow, el("h1", data.name), lead)
    body = el("body", el("main", header, [part(data) for part in PARTS]), el("script", Markup(SCRIPT)))
    head = el("head", _meta(data.name), el("style", Markup(STYLE)))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _meta(title: str) -> list[Markup]:
    # The page shows texts and labels of strangers. They are escaped; should one slip through all the same, the
    # browser runs no script but ours and loads nothing.
    ours = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{ours}'; base-uri 'none'"
    return [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} · training report"),
    ]
