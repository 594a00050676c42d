"""5: measures × scores → association with uncertainty; groups of runs → differences with uncertainty."""

from dynamics.relate.association import associate
from dynamics.relate.comparison import compare
from dynamics.relate.notes import association_notes, comparison_notes
from dynamics.relate.score_table import ScoreTable, score_table, scores_of

__all__ = [
    "ScoreTable",
    "associate",
    "association_notes",
    "compare",
    "comparison_notes",
    "score_table",
    "scores_of",
]
