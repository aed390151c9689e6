"""report.html of a run: curves, figures, worst errors, data, settings on one self-contained page."""

from regraft.engine.report.data import Best, ReportData, read_history
from regraft.engine.report.page import write_report

__all__ = ["Best", "ReportData", "read_history", "write_report"]
