"""report.html of a run folder: one file, nothing loaded from elsewhere, readable without script."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from regraft.engine.report import sections
from regraft.engine.report.curves import training_curves
from regraft.engine.report.data import ReportData
from regraft.engine.report.files import write_whole
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.style import SCRIPT, STYLE
from regraft.engine.report.summary import summary


def write_report(folder: Path, data: ReportData) -> Path:
    """Write `report.html` into the run folder, whole or not at all, and return its path."""
    return write_whole(Path(folder) / "report.html", render(data))


def render(data: ReportData) -> str:
    """The page. What is missing in `data` is left out; nothing recorded at all is said."""
    head = el("header", el("p", "Training report", class_="eyebrow"), el("h1", data.name), el("p", summary(data), class_="lead"))
    body = [head, sections.tiles(data), training_curves(data), sections.evaluations(data), sections.confusion(data)]
    body += [sections.regression(data), sections.calibration(data), sections.per_class(data), sections.worst(data)]
    body += [sections.data_notes(data), sections.settings(data)]
    page = el(
        "html", el("head", _meta(data.name), el("style", Markup(STYLE))),
        el("body", el("main", body), el("script", Markup(SCRIPT))), lang="en",
    )  # fmt: skip
    return f"<!doctype html>\n{page}\n"


def _meta(title: str) -> list[Markup]:
    # The page shows texts and labels of strangers. They are escaped; should one slip through all the same, the
    # browser runs no script but ours and loads nothing.
    ours = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{ours}'; base-uri 'none'; form-action 'none'"
    return [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} · training report"),
    ]
