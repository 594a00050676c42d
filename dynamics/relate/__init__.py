"""Relate measures of runs to their scores, and groups of runs to each other, with uncertainty."""

from dynamics.relate.association import associate
from dynamics.relate.checkpoint_choice import choose_checkpoint
from dynamics.relate.comparison import compare
from dynamics.relate.findings import findings_of
from dynamics.relate.score_comparison import compare_scores
from dynamics.relate.score_tables import ScoreTable, rows_of, score_table

__all__ = [
    "ScoreTable",
    "associate",
    "choose_checkpoint",
    "compare",
    "compare_scores",
    "findings_of",
    "rows_of",
    "score_table",
]
