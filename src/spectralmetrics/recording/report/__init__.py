"""Recorded runs as one page for a browser."""

from spectralmetrics.recording.report.write import write_report

__all__ = ["write_report"]
