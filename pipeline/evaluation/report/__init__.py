"""The report of a run: one self-contained HTML page."""

from pipeline.evaluation.report.page import templates, write_report

__all__ = ["templates", "write_report"]
