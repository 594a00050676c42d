"""Variables of scores, of associations with them, and of comparisons between groups of runs."""

from __future__ import annotations

from collections.abc import Mapping

from dynamics.schema.variable import Variable

SCORE: Mapping[str, Variable] = {
    "score": Variable(("step", "task"), "task units", "score"),
    "items": Variable(("step", "task"), "1", "number of items scored"),
    "standard_error": Variable(("step", "task"), "task units", "standard error of the score"),
}
#: Beside a score where its task says so.
SCORE_DIRECTION = Variable(("step", "task"), "1", "+1: higher is better, -1: lower is better, 0: not known")
#: Likewise, of tasks whose samples are known.
RETAINED = Variable(("task",), "1", "whether the task is of what the base model could do")


def _with_dims(dims: tuple[str, ...], rows: Mapping[str, tuple[str, ...]]) -> dict[str, Variable]:
    """Return variables of the same dimensions from units, long name, definition and reference."""
    return {name: Variable(dims, *row) for name, row in rows.items()}


_PERMUTED_SHARE = "share of permutations of whole runs at least as extreme, the observed one among them"
_ASSOCIATION_INTERVAL = (
    "95 % interval that excludes 0 exactly where the association is shown: the wider of r ± c·SE, c the 95 % point of "
    "the permutations (headline), or of the largest statistic (others: simultaneous), and of the jackknife over runs "
    "(ranks: Bonett & Wright); NaN where it cannot be decided"
)

#: Measures × scores of runs; at the root.
ASSOCIATION: Mapping[str, Variable] = _with_dims(
    ("measure", "task"),
    {
        "coefficient": ("1", "correlation with the score", "see method; positive: better scores where it is higher"),
        "low": ("1", "correlation, low end", _ASSOCIATION_INTERVAL),
        "high": ("1", "correlation, high end", _ASSOCIATION_INTERVAL),
        "p_value": (
            "1",
            "p-value",
            f"two-sided; the larger of the {_PERMUTED_SHARE}, and the p-value of the interval without permutations",
            "DiCiccio & Romano 2017, Phipson & Smyth 2010",
        ),
        "p_familywise": (
            "1",
            "p-value adjusted over measures × tasks",
            "the larger of the share of permutations whose largest |statistic| over all pairs is at least as large "
            "(max-T), and the p-value of the interval without permutations",
            "Westfall & Young 1993",
        ),
        "q_value": ("1", "false discovery rate", "over measures × tasks", "Benjamini & Hochberg 1995"),
        "smallest_p": ("1", "smallest possible p", "share of permutations that are as extreme as the most extreme one"),
        "smallest_p_adjusted": (
            "1",
            "smallest possible p that decides",
            "headline: smallest_p; others: share of permutations whose largest |statistic| reaches this pair's most",
        ),
        "decidable": ("1", "a p of 0.05 is possible", "smallest_p_adjusted ≤ 0.05"),
        "holds": ("1", "the association is shown", "headline: p_value ≤ 0.05; others: p_familywise ≤ 0.05"),
        "coefficient_given_loss": (
            "1",
            "correlation with the training loss held equal",
            "as coefficient, a cubic of the logged training loss removed from both; NaN where it is not logged",
        ),
        "n_runs": ("1", "number of runs", "runs that have both"),
        "n_units": ("1", "number of independent units", "runs, or clusters of runs"),
        "n_steps": ("1", "number of steps", "steps at which every one of these runs has both"),
        "effective_steps": (
            "1",
            "effective number of steps of one run",
            "1/N* = 1/N + (2/N) Σ_j (1 − j/N) ρ_xx(j) ρ_yy(j); NaN for several runs",
            "Pyper & Peterman 1998",
        ),
        "method": ("1", "method", "what the coefficient is and what is permuted"),
        "reason": ("1", "reason of a missing coefficient", "empty where there is one"),
        "statement": ("1", "statement", "the result in words"),
    },
)


_COMPARED_STEPS = ("comparison", "measure", "step")
_COMPARED = ("comparison", "measure")
_RELABELLED_P = (
    "two-sided; the larger of the share of relabellings at least as extreme, the observed one among them, and of "
    "Student's p-value (Welch's where unpaired)"
)
_RELABELLED_MAX_P = (
    "the larger of the share of relabellings whose largest |t| over all measures is at least as large (max-T), and of "
    "Student's p-value (where unpaired: degrees of freedom of the smaller group, times the measures)"
)
_STEP_INTERVAL = "95 % interval of this step alone, Student's t; Welch's where unpaired; NaN for fewer than 3 runs"
_COMPARISON_INTERVAL = (
    "interval that excludes 0 exactly where the difference is shown: ± c·SE, c the larger of the relabellings' "
    "critical value and Student's at 0.05/comparisons (other measures than the headline: simultaneous); NaN where "
    "it cannot be decided"
)

#: Groups of runs, two at a time; at the root.
COMPARISON: Mapping[str, Variable] = {
    **_with_dims(
        _COMPARED_STEPS,
        {
            "difference": ("of the measure", "first group minus second", "of means over units, at the same step"),
            "low": ("of the measure", "difference, low end", _STEP_INTERVAL),
            "high": ("of the measure", "difference, high end", _STEP_INTERVAL),
            "effect_size": (
                "1",
                "effect size",
                "difference over standard deviation (of differences where paired), times Hedges' correction",
                "Hedges & Olkin 1985",
            ),
            "p_value": ("1", "p-value at this step", _RELABELLED_P, "Phipson & Smyth 2010"),
            "p_familywise": (
                "1",
                "p-value adjusted over measures × steps",
                "the larger of the share of relabellings whose largest |t| over measures and steps is at least as "
                "large (max-T), and of Student's p-value; with groups of unequal spread it is too small",
                "Westfall & Young 1993",
            ),
        },
    ),
    **_with_dims(
        _COMPARED,
        {
            "mean_difference": ("of the measure", "difference of means over steps", "of each unit's mean over steps"),
            "mean_error": ("of the measure", "its standard error", "of the mean over units, or of two means"),
            "mean_low": ("of the measure", "its low end", _COMPARISON_INTERVAL),
            "mean_high": ("of the measure", "its high end", _COMPARISON_INTERVAL),
            "mean_effect_size": ("1", "its effect size", "as effect_size", "Hedges & Olkin 1985"),
            "mean_p_value": ("1", "its p-value", _RELABELLED_P, "Phipson & Smyth 2010"),
            "mean_p_familywise": (
                "1",
                "its p-value adjusted over measures",
                _RELABELLED_MAX_P,
                "Westfall & Young 1993",
            ),
            "mean_q_value": ("1", "its false discovery rate", "over measures", "Benjamini & Hochberg 1995"),
            "smallest_p": ("1", "smallest possible p", "share of relabellings as extreme as the most extreme one"),
            "smallest_p_adjusted": (
                "1",
                "smallest possible p that decides",
                "comparisons times: headline: smallest_p; others: the same of the largest |t| over all measures",
            ),
            "decidable": ("1", "a p of 0.05 is possible", "smallest_p_adjusted ≤ 0.05, and 3 runs in each group"),
            "holds": (
                "1",
                "the difference is shown",
                "comparisons times mean_p_value (headline) or mean_p_familywise (others) ≤ 0.05",
            ),
            "n_units": ("1", "number of units", "pairs, or runs of both groups"),
            "n_steps": ("1", "number of steps", "steps at which every run of the two groups has the measure"),
            "statement": ("1", "statement", "the result in words"),
        },
    ),
    **_with_dims(
        ("comparison",),
        {
            "method": ("1", "method", "what is compared and how labels are permuted"),
            "n_pairs": ("1", "number of pairs", "0 where runs are not paired"),
            "n_first": ("1", "units of the first group", "runs, or means over a pair's runs"),
            "n_second": ("1", "units of the second group", "runs, or means over a pair's runs"),
        },
    ),
    **_with_dims(("run", "step", "measure"), {"value": ("of the measure", "measure of each run", "as given")}),
    **_with_dims(
        ("group", "step", "measure"),
        {"group_median": ("of the measure", "median over runs", "over runs that have it at this step")},
    ),
}


_SCORED = ("comparison", "task")
_SCORED_RUNS = ("run", "task")
_NORMAL_INTERVAL = (
    "95 % interval of this score alone if scores of runs are normally distributed: Student's t, Welch's where "
    "unpaired; there also where relabelling cannot decide; NaN for fewer than 3 runs, and without any spread"
)

#: Scores of groups of runs, two at a time; at the root.
SCORE_COMPARISON: Mapping[str, Variable] = {
    **_with_dims(
        _SCORED,
        {
            "difference": ("task units", "score of the first group minus second", "of means over units, at `at_step`"),
            "first_mean": ("task units", "mean of the first group", "over its units"),
            "second_mean": ("task units", "mean of the second group", "over its units"),
            "error": ("task units", "its standard error", "of the mean over pairs, or of two means over runs"),
            "low": ("task units", "difference, low end", _COMPARISON_INTERVAL),
            "high": ("task units", "difference, high end", _COMPARISON_INTERVAL),
            "normal_low": ("task units", "difference, low end if normal", _NORMAL_INTERVAL),
            "normal_high": ("task units", "difference, high end if normal", _NORMAL_INTERVAL),
            "effect_size": (
                "1",
                "effect size",
                "difference over standard deviation (of differences where paired), times Hedges' correction",
                "Hedges & Olkin 1985",
            ),
            "p_value": ("1", "p-value", _RELABELLED_P, "Phipson & Smyth 2010"),
            "p_adjusted": (
                "1",
                "p-value that decides",
                "comparisons times p_value (headline), or times the share of relabellings whose largest |t| over the "
                "other scores is at least as large (max-T), Student's as in /comparison; scores that different runs "
                "lack are families of their own, by whose number it is multiplied",
                "Westfall & Young 1993",
            ),
            "smallest_p_adjusted": ("1", "smallest possible p_adjusted", "under the most extreme relabelling"),
            "decidable": ("1", "a p of 0.05 is possible", "smallest_p_adjusted ≤ 0.05, and 3 runs in each group"),
            "holds": ("1", "the difference is shown", "p_adjusted ≤ 0.05 where decidable"),
            "verdict": (
                "1",
                "verdict",
                "better, worse (first group against second), different (direction not known), not_shown, equal, "
                "undecided, or not_comparable",
            ),
            "n_first": ("1", "units of the first group", "runs that have the score, or means over a pair's runs"),
            "n_second": ("1", "units of the second group", "runs that have the score, or means over a pair's runs"),
            "n_pairs": ("1", "number of pairs", "0 where runs are not paired"),
            "method": ("1", "method", "what is compared and how labels are permuted"),
            "statement": ("1", "statement", "the result in words"),
        },
    ),
    **_with_dims(
        _SCORED_RUNS,
        {
            "score": (
                "task units",
                "score that is compared",
                "at the last step after the start at which every run with this score has it, else the run's last; "
                "`all`: mean over tasks of the standardised scores that every run has, higher is better",
            ),
            "at_step": ("1", "step of the score", "NaN where a run has none, and for `all`"),
        },
    ),
    **_with_dims(("group", "task"), {"group_mean": ("task units", "mean over runs", "over runs that have the score")}),
}
