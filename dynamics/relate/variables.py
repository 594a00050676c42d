"""What this room adds to the result: units, long name and definition of each variable."""

from __future__ import annotations

from collections.abc import Mapping

from dynamics.described import Described
from dynamics.schema import Variable


def _described(dims: tuple[str, ...], rows: Mapping[str, tuple[str, ...]]) -> dict[str, Described]:
    return {name: Described(Variable(dims, row[0], row[1]), *row[2:]) for name, row in rows.items()}


_PERMUTATION = "share of permutations of whole runs at least as extreme, the observed one among them"

ASSOCIATION: Mapping[str, Described] = _described(
    ("measure", "task"),
    {
        "coefficient": ("1", "correlation with the score", "see method; positive: better scores where it is higher"),
        "low": ("1", "correlation, low end", "low end of the 95 % interval (jackknife over runs, or Bonett & Wright)"),
        "high": ("1", "correlation, high end", "high end of the 95 % interval"),
        "p_value": ("1", "p-value", f"two-sided, {_PERMUTATION}", "Phipson & Smyth 2010"),
        "p_familywise": (
            "1",
            "p-value adjusted over measures × tasks",
            "share of permutations whose largest |correlation| over all pairs is at least as large (max-T)",
            "Westfall & Young 1993",
        ),
        "q_value": ("1", "false discovery rate", "over measures × tasks", "Benjamini & Hochberg 1995"),
        "smallest_p": ("1", "smallest possible p", "share of permutations that are as extreme as the most extreme one"),
        "decidable": ("1", "a p of 0.05 is possible", "smallest_p ≤ 0.05"),
        "holds": ("1", "the association is shown", "headline: p_value ≤ 0.05; others: p_familywise ≤ 0.05"),
        "n_runs": ("1", "number of runs", "runs that have both"),
        "n_units": ("1", "number of independent units", "runs, or clusters of runs"),
        "n_steps": ("1", "number of steps", "steps at which every one of these runs has both"),
        "units_needed": ("1", "units for a power of 0.8", "n·((1.96 + 0.84)·SE/z)², if the truth is as estimated"),
        "effective_steps": (
            "1",
            "effective number of steps of one run",
            "1/N* = 1/N + (2/N) Σ_j (1 − j/N) ρ_xx(j) ρ_yy(j); NaN for several runs",
            "Pyper & Peterman 1998",
        ),
        "mixed_slope": (
            "1",
            "slope of a mixed model",
            "standardised score ~ standardised measure + step (factor) + (1 | run), REML; within and between runs",
        ),
        "mixed_low": ("1", "slope, low end", "95 % Wald interval; too narrow where residuals depend on each other"),
        "mixed_high": ("1", "slope, high end", "95 % Wald interval; too narrow where residuals depend on each other"),
        "mixed_converged": ("1", "the mixed model converged", "false also where none was fitted"),
        "method": ("1", "method", "what the coefficient is and what is permuted"),
        "reason": ("1", "reason of a missing coefficient", "empty where there is one"),
        "statement": ("1", "statement", "the result in words"),
    },
)


_STEPS = ("comparison", "measure", "step")
_OVERALL = ("comparison", "measure")
_RELABELLED = "two-sided, share of relabellings at least as extreme, the observed one among them"
_MAX_T = "share of relabellings whose largest |t| over all measures is at least as large (max-T)"

COMPARISON: Mapping[str, Described] = {
    **_described(
        _STEPS,
        {
            "difference": ("of the measure", "first group minus second", "of means over units, at the same step"),
            "low": ("of the measure", "difference, low end", "95 % interval, Student's t; Welch's where unpaired"),
            "high": ("of the measure", "difference, high end", "95 % interval, Student's t; Welch's where unpaired"),
            "effect_size": (
                "1",
                "effect size",
                "difference over standard deviation (of differences where paired), times Hedges' correction",
                "Hedges & Olkin 1985",
            ),
            "p_value": ("1", "p-value at this step", _RELABELLED, "Phipson & Smyth 2010"),
            "p_familywise": (
                "1",
                "p-value adjusted over measures × steps",
                "share of relabellings whose largest |t| over measures and steps is at least as large (max-T)",
                "Westfall & Young 1993",
            ),
        },
    ),
    **_described(
        _OVERALL,
        {
            "mean_difference": ("of the measure", "difference of means over steps", "of each unit's mean over steps"),
            "mean_low": ("of the measure", "its low end", "95 % interval, Student's t; Welch's where unpaired"),
            "mean_high": ("of the measure", "its high end", "95 % interval, Student's t; Welch's where unpaired"),
            "mean_effect_size": ("1", "its effect size", "as effect_size", "Hedges & Olkin 1985"),
            "mean_p_value": ("1", "its p-value", _RELABELLED, "Phipson & Smyth 2010"),
            "mean_p_familywise": ("1", "its p-value adjusted over measures", _MAX_T, "Westfall & Young 1993"),
            "mean_q_value": ("1", "its false discovery rate", "over measures", "Benjamini & Hochberg 1995"),
            "smallest_p": ("1", "smallest possible p", "share of relabellings as extreme as the most extreme one"),
            "decidable": ("1", "a p of 0.05 is possible", "smallest_p ≤ 0.05"),
            "holds": (
                "1",
                "the difference is shown",
                "headline: mean_p_value ≤ 0.05; others: mean_p_familywise ≤ 0.05",
            ),
            "n_units": ("1", "number of units", "pairs, or runs of both groups"),
            "n_steps": ("1", "number of steps", "steps at which every run of the two groups has the measure"),
            "units_needed": ("1", "units for a power of 0.8", "n·((1.96 + 0.84)·SE/d)², if the truth is as estimated"),
            "statement": ("1", "statement", "the result in words"),
        },
    ),
    **_described(
        ("comparison",),
        {
            "method": ("1", "method", "what is compared and how labels are permuted"),
            "n_pairs": ("1", "number of pairs", "0 where runs are not paired"),
            "n_first": ("1", "units of the first group", "runs, or means over a pair's runs"),
            "n_second": ("1", "units of the second group", "runs, or means over a pair's runs"),
        },
    ),
    **_described(
        ("comparison", "measure", "loss_level"),
        {
            f"at_loss_{name}": ("of the measure", f"difference at equal loss{end}", "descriptive: loss is an outcome")
            for name, end in (("difference", ""), ("low", ", low end"), ("high", ", high end"))
        },
    ),
    **_described(("run", "step", "measure"), {"value": ("of the measure", "measure of each run", "as given")}),
    **_described(
        ("group", "step", "measure"),
        {"group_median": ("of the measure", "median over runs", "over runs that have it at this step")},
    ),
}
