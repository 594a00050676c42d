"""A finished result as JSON, in a terminal, and as one HTML page (``dynamics.report.page``).

The page imports matplotlib, so it is not imported here: a summary must not wait for that.
"""

from dynamics.findings import finding_line, finding_lines
from dynamics.report.summary import all_findings, summarise
from dynamics.report.terminal import terminal_answers, terminal_numbers
from dynamics.text import one_line

__all__ = [
    "all_findings",
    "finding_line",
    "finding_lines",
    "one_line",
    "summarise",
    "terminal_answers",
    "terminal_numbers",
]
