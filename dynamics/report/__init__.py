"""A finished result told: as JSON, in a terminal, as one HTML page."""

from dynamics.report.page import page
from dynamics.report.summary import all_findings, summarise
from dynamics.report.terminal import terminal_summary

__all__ = ["all_findings", "page", "summarise", "terminal_summary"]
