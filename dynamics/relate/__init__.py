"""5: measures × scores → association with uncertainty; groups of runs → differences with uncertainty."""

from dynamics.relate.association import associate
from dynamics.relate.comparison import compare
from dynamics.relate.findings import association_notes, comparison_notes
from dynamics.relate.score_tables import ScoreTable, rows_of, score_table

__all__ = [
    "ScoreTable",
    "associate",
    "association_notes",
    "compare",
    "comparison_notes",
    "rows_of",
    "score_table",
]
