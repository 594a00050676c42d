"""The contract of the result: groups, variables, dimensions, units. Everything that reads a result relies on it.

Variables with their formula and source, and arrays that get them by name: how rooms say what their numbers are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from dynamics.text import encodable

KINDS = ("total", "increment")
QUANTILES = (0.25, 0.5, 0.75)
#: How singular values were found, by number: not at all, from triangular factors, the Gram of the shorter side, an SVD.
DECOMPOSITIONS = ("none", "qr_core", "gram", "svd", "failed")

_PER_MATRIX = ("step", "kind", "matrix")


@dataclass(frozen=True)
class Variable:
    """One variable of a result: all that is said of it, said once.

    Args:
        dims: Dimensions, in order.
        units: UDUNITS-like; ``"1"`` for pure numbers.
        long_name: For axis labels.
        definition: Formula, with what enters it.
        reference: Source of the formula, or ``""``.
    """

    dims: tuple[str, ...]
    units: str
    long_name: str
    definition: str = ""
    reference: str = ""

    @property
    def attributes(self) -> dict[str, str]:
        """Units and long name; definition and reference where there are any.

        >>> SCORE["items"].attributes
        {'units': '1', 'long_name': 'number of items scored'}
        """
        stated = {"definition": self.definition, "reference": self.reference}
        return {"units": self.units, "long_name": self.long_name, **{key: text for key, text in stated.items() if text}}


_ROY, _GOLUB = "Roy & Vetterli 2007", "Golub & Van Loan"
#: The measures of an update's spectrum.
MEASURES: Mapping[str, Variable] = {
    name: Variable(_PER_MATRIX, units, long_name, definition, reference)
    for name, units, long_name, definition, reference in (
        (
            "entropy_energy",
            "nat",
            "spectral entropy (energy)",
            "−Σ p ln p with p = σ²/Σσ²",
            "Shannon entropy of the normalised squared spectrum",
        ),
        ("entropy_amplitude", "nat", "spectral entropy (amplitude)", "−Σ p ln p with p = σ/Σσ", _ROY),
        (
            "effective_rank_energy",
            "1",
            "effective rank (energy)",
            "exp(−Σ p ln p) with p = σ²/Σσ²",
            "exp of Shannon's entropy of the energies",
        ),
        ("effective_rank_amplitude", "1", "effective rank (amplitude)", "exp(−Σ p ln p) with p = σ/Σσ", _ROY),
        (
            "participation_ratio",
            "1",
            "participation ratio",
            "(Σσ²)²/Σσ⁴",
            "Rényi number of order 2 of the energies",
        ),
        ("stable_rank", "1", "stable rank", "Σσ²/σ₁²", "Rudelson & Vershynin 2007"),
        ("nuclear_rank", "1", "nuclear rank", "Σσ/σ₁", "nuclear over spectral norm"),
        ("dominant_ratio", "1", "dominant ratio ρ", "σ₁²/Σσ²", "1/stable rank"),
        (
            "energy_top_k",
            "1",
            "energy in the leading directions",
            "share of Σσ² in the 4 largest directions",
            "explained variance",
        ),
        (
            "rank_at_energy",
            "1",
            "rank at a share of energy",
            "fewest directions holding 90% of Σσ²",
            "explained variance",
        ),
        (
            "numerical_rank",
            "1",
            "numerical rank",
            "number of σ > tol·σ₁; of products tol = ‖E‖_F/σ₁ with E the predicted rounding of the product, at least "
            "max(out, in)·2⁻⁵²; of dense matrices and gradients tol = max(out, in)·ε of the storage format, √ε where "
            "that exceeds 0.1",
            f"{_GOLUB}; of products Weyl's inequality, of dense matrices LAPACK's default tolerance",
        ),
        ("condition_number", "1", "condition number", "σ₁ over the smallest of the stored σ", _GOLUB),
        ("gini", "1", "Gini coefficient of the energies", "Gini coefficient of σ², zeros counted", "Gini 1912"),
        ("hoyer", "1", "Hoyer sparseness", "(√r − ‖σ‖₁/‖σ‖₂)/(√r − 1), zeros counted", "Hoyer 2004"),
        (
            "marchenko_pastur_outliers",
            "1",
            "singular values beyond the null's edge",
            "number of σ above the update's own median σ times the 99 % point of σ₁/median σ under the null; NaN for "
            "fewer than three σ or a zero median",
            "noise scale by the median: Gavish & Donoho 2014",
        ),
        (
            "entropy_deficit",
            "nat",
            "entropy below the null model's mean",
            "mean energy entropy of the null, minus entropy_energy; null of a total: a random LoRA of the same shape "
            "and rank; of a LoRA's increment: white noise of the same size in the factors, from where they were; of a "
            "dense matrix: a Gaussian one. Gradients are not white: any update made of them has a deficit",
            "independent Gaussian factors, drawn as Bartlett triangles (Bartlett 1933); dense: Dumitriu & Edelman 2002",
        ),
        (
            "null_percentile",
            "%",
            "percentile among draws of the null model",
            "share of the null's draws (256; fewer of increments and of large dense matrices) whose energy entropy is "
            "smaller, in %; near 0 for any update made of gradients, so compare runs by entropy_deficit",
            "Monte-Carlo percentile",
        ),
    )
}

_CHAIN = "entropy of the direct sum of all updates, by the chain rule H(w) + Σ w SE, w ∝ ‖ΔW‖_F²"
UPDATE: Mapping[str, Variable] = {
    "singular_value": Variable((*_PER_MATRIX, "index"), "weight", "singular value"),
    "count": Variable(_PER_MATRIX, "1", "number of singular values"),
    "factor_rank": Variable(_PER_MATRIX, "1", "number of columns of the factors"),
    "decomposition": Variable(_PER_MATRIX, "1", "how the singular values were found"),
    "frobenius_norm": Variable(_PER_MATRIX, "weight", "Frobenius norm of the update"),
    "spectral_norm": Variable(_PER_MATRIX, "weight", "largest singular value"),
    "nuclear_norm": Variable(_PER_MATRIX, "weight", "sum of singular values"),
    **MEASURES,
    "is_zero": Variable(_PER_MATRIX, "1", "the update is exactly zero"),
    "quantisation_limited": Variable(
        _PER_MATRIX, "1", "rounding of the storage format spoils the spectrum", "quantisation_noise_share > 0.1"
    ),
    "quantisation_noise_share": Variable(
        _PER_MATRIX,
        "1",
        "predicted share of rounding noise in the energy",
        "Σ ulp²/12 of the stored factors, carried to the product, over ‖·‖_F²",
    ),
    "rounding_edge": Variable(
        _PER_MATRIX,
        "weight",
        "largest singular value of rounding noise alone",
        "√(largest row sum of v) + √(largest column sum of v), v = ulp²/12 of the stored weights; of dense matrices, "
        "NaN for factors",
    ),
    "rank_above_rounding": Variable(
        _PER_MATRIX,
        "1",
        "singular values beyond the rounding noise's edge",
        "number of σ > rounding_edge; of dense matrices, NaN for factors",
    ),
    "entropy_energy_above_rounding": Variable(
        _PER_MATRIX,
        "nat",
        "spectral entropy (energy) less the rounding floor",
        "−Σ p ln p over σ > rounding_edge, p ∝ σ² − mean v·max(out, in); NaN where nothing is left",
    ),
    "effective_rank_energy_above_rounding": Variable(
        _PER_MATRIX,
        "1",
        "effective rank (energy) less the rounding floor",
        "exp(entropy_energy_above_rounding)",
    ),
    **{
        f"{side}_factor_{part}": Variable(("step", "matrix", *dims), "1", f"{words} of {factor}")
        for side, factor in (("left", "B, scales included"), ("right", "A"))
        for part, dims, words in (
            ("value", ("index",), "singular value at the previous step"),
            ("change", (), "Frobenius norm of the change since the previous step"),
        )
    },
    "path_length": Variable(
        ("step", "matrix"),
        "weight",
        "sum of the increments' Frobenius norms",
        "Σ ‖increment‖_F since the start of the training, or since its first step here where that is unknown",
    ),
    "increment_cosine": Variable(
        ("step", "matrix"),
        "1",
        "cosine with the previous increment",
        "⟨Δ_t, Δ_{t−1}⟩/(‖Δ_t‖_F ‖Δ_{t−1}‖_F), from r×r cross-Grams",
    ),
    "suggested_rank": Variable(
        ("matrix",),
        "1",
        "rank that holds the stated share of energy of the newest total",
        "fewest directions that hold 99% of Σσ² of the newest total",
    ),
    "frobenius_norm_all": Variable(("step", "kind"), "weight", "Frobenius norm over all matrices"),
    "entropy_energy_block_diagonal": Variable(("step", "kind"), "nat", "spectral entropy of the direct sum", _CHAIN),
    "effective_rank_block_diagonal": Variable(
        ("step", "kind"), "1", "effective rank of the direct sum", f"exp of the {_CHAIN}"
    ),
    "participation_ratio_block_diagonal": Variable(
        ("step", "kind"), "1", "participation ratio of the direct sum", "1/Σ(w²/PR), w ∝ ‖ΔW‖_F²"
    ),
    "frobenius_norm_by_role": Variable(("step", "kind", "role_name"), "weight", "Frobenius norm over a role"),
    "energy_share_by_role": Variable(("step", "kind", "role_name"), "1", "share of the energy in a role"),
    "entropy_energy_by_role": Variable(
        ("step", "kind", "role_name"),
        "nat",
        "spectral entropy of a role's direct sum",
        _CHAIN.replace("all updates", "its updates"),
    ),
}

_GRADIENT_OF = (
    "of a dense weight ∇W; of a LoRA pair s(∇_B·A + B·∇_A), what a small step along the factors' gradients does to the "
    "matrix"
)
#: Gradients as the optimizer saw them; of a low-rank matrix those of its factors, and what they do to the matrix.
GRADIENT: Mapping[str, Variable] = {
    "norm_before_clip": Variable(
        ("step", "matrix"),
        "loss/weight",
        "gradient norm before clipping",
        "√Σ‖∂L/∂p‖² over the matrix's trainable parameters p at the end of the step's last backward pass, reduced over "
        "processes, summed over accumulation, without the loss scale",
    ),
    "norm_after_clip": Variable(
        ("step", "matrix"),
        "loss/weight",
        "gradient norm after clipping",
        "the same as the optimizer takes it, after clipping",
    ),
    "singular_value": Variable(
        ("step", "matrix", "index"), "loss/weight", "singular value of the gradient", f"after clipping, {_GRADIENT_OF}"
    ),
    "count": Variable(("step", "matrix"), "1", "number of singular values"),
    "factor_rank": Variable(("step", "matrix"), "1", "number of columns of the factors"),
    "frobenius_norm": Variable(
        ("step", "matrix"), "loss/weight", "Frobenius norm of the gradient", f"√Σσ² after clipping, {_GRADIENT_OF}"
    ),
    **{name: replace(measure, dims=("step", "matrix")) for name, measure in MEASURES.items()},
}

#: The raw update, from which everything in /update follows: what is recorded at one step, or read from checkpoints.
RAW_UPDATE: Mapping[str, Variable] = {
    **{
        name: UPDATE[name]
        for name in (
            "singular_value",
            "count",
            "factor_rank",
            "decomposition",
            "rounding_edge",
            "left_factor_value",
            "right_factor_value",
            "left_factor_change",
            "right_factor_change",
        )
    },
    "noise_energy": Variable(_PER_MATRIX, "weight²", "predicted energy of the storage's rounding"),
    "inner_product": Variable(("step", "matrix"), "weight²", "inner product with the previous increment"),
}
#: The raw gradient, from which everything in /gradient follows.
RAW_GRADIENT: Mapping[str, Variable] = {
    name: GRADIENT[name] for name in ("singular_value", "count", "factor_rank", "norm_before_clip", "norm_after_clip")
}
#: Coordinates of /update and /gradient.
COORDINATES: Mapping[str, Variable] = {
    name: Variable((dim,), "1", words)
    for name, dim, words in (
        ("step", "step", "optimizer step"),
        ("kind", "kind", "since the start, or since the last step"),
        ("matrix", "matrix", "weight matrix"),
        ("index", "index", "position in descending order"),
        ("role_name", "role_name", "role within the layer"),
        ("segment", "step", "number of the training"),
        ("from_step", "step", "previous step of the same training, −1 if none, 0 the start"),
        ("layer", "matrix", "layer number, −1 if none"),
        ("role", "matrix", "role within the layer"),
        ("stack", "matrix", "stack of layers"),
        ("out", "matrix", "output dimension"),
        ("in", "matrix", "input dimension"),
        ("adapter_rank", "matrix", "adapter rank, 0 for a dense matrix"),
        ("storage", "matrix", "format in which the factors are stored"),
    )
}
#: Coordinates that belong to a dimension of /update.
UPDATE_COORDINATES: Mapping[str, str] = {
    name: coordinate.dims[0] for name, coordinate in COORDINATES.items() if coordinate.dims != (name,)
}

_STATISTICS = {"": "mean", "_low": "5 % point", "_high": "95 % point"}
#: Measures of which the null model has a mean and a band.
NULL_MEASURES = tuple(name for name in MEASURES if name not in ("numerical_rank", "entropy_deficit", "null_percentile"))
#: The null model beside each number of /update.
NULL: Mapping[str, Variable] = {
    **{
        f"{name}{bound}": Variable(
            _PER_MATRIX,
            MEASURES[name].units,
            f"{MEASURES[name].long_name} of the null, {words}",
            f"{words} over 256 products of Gaussian factors of the same shape; of a LoRA's increment over white noise "
            "in its factors, of a dense matrix over Gaussian ones, fewer where they are large",
        )
        for name in NULL_MEASURES
        for bound, words in _STATISTICS.items()
    },
    **{
        f"singular_value{bound}": Variable(
            (*_PER_MATRIX, "index"),
            "weight",
            f"singular value of the null of the same norm, {_STATISTICS[bound]}",
            f"{_STATISTICS[bound]} of σ/‖σ‖_F over the draws, times this update's frobenius_norm",
        )
        for bound in ("_low", "_high")
    },
    "entropy_energy_gaussian": Variable(
        ("matrix",),
        "nat",
        "mean spectral entropy of a dense Gaussian matrix of the same shape",
        "ψ(mn+1) − ψ(max+1) − (min−1)/(2 max)",
        "Page 1993",
    ),
}


def _over_matrices(variable: Variable, *dims: str) -> tuple[str, ...]:
    return (*(dim for dim in variable.dims if dim != "matrix"), *dims)


#: Quartiles over matrices of /update, and medians of the null model.
SUMMARY: Mapping[str, Variable] = {
    **{
        f"{name}_quantile": Variable(
            _over_matrices(UPDATE[name], "quantile"), UPDATE[name].units, f"{name}, quartiles over matrices"
        )
        for name in ("frobenius_norm", "path_length", "increment_cosine", *MEASURES)
    },
    **{
        f"{name}_null{bound}": Variable(
            _over_matrices(MEASURES[name]), MEASURES[name].units, f"null of {name}, {words}, median over matrices"
        )
        for name in NULL_MEASURES
        for bound, words in _STATISTICS.items()
    },
}
#: The same of /gradient.
SUMMARY_GRADIENT: Mapping[str, Variable] = {
    **{
        f"{name}_quantile": Variable(
            ("step", "quantile"), GRADIENT[name].units, f"{name} of the gradient, quartiles over matrices"
        )
        for name in ("norm_before_clip", "norm_after_clip", "frobenius_norm", *MEASURES)
    },
    **{
        f"{name}_null{bound}": Variable(("step",), MEASURES[name].units, f"{name} of the null, median over matrices")
        for name in NULL_MEASURES
        for bound in _STATISTICS
    },
}
#: Spectra of the weights themselves at the last checkpoint.
WEIGHTS: Mapping[str, Variable] = {
    name: replace(
        UPDATE[name],
        dims=tuple(dim for dim in UPDATE[name].dims if dim not in ("step", "kind")),
        long_name=UPDATE[name].long_name.replace("of the update", "of the weight"),
    )
    for name in (
        "singular_value",
        "count",
        "decomposition",
        "frobenius_norm",
        "spectral_norm",
        "nuclear_norm",
        *MEASURES,
    )
}

#: The Trainer's log, a row for each logged (segment, step).
TRAINING: Mapping[str, Variable] = {"value": Variable(("log", "metric"), "as logged", "logged number")}
#: Coordinates of /training, and of /score where the scores are from the Trainer's log.
LOG_COORDINATES: Mapping[str, Variable] = {
    "metric": Variable(("metric",), "1", "name of the number in the log"),
    "log_segment": Variable(("log",), "1", "number of the training"),
    "log_step": Variable(("log",), "1", "optimizer step"),
    "step": Variable(("step",), "1", "optimizer step"),
    "task": Variable(("task",), "1", "name of the score in the log"),
    "segment": Variable(("step",), "1", "number of the training"),
}

SCORE: Mapping[str, Variable] = {
    "score": Variable(("step", "task"), "task units", "score"),
    "items": Variable(("step", "task"), "1", "number of items scored"),
    "standard_error": Variable(("step", "task"), "task units", "standard error of the score"),
}
#: Beside a score where its task says so.
SCORE_DIRECTION = Variable(("step", "task"), "1", "+1: higher is better, -1: lower is better, 0: not known")

#: What is kept of the Fisher at each step; everything else follows from it. K = GGᵀ is unnormalised.
FISHER_RECORD: Mapping[str, Variable] = {
    "gram": Variable(("step", "block", "sample", "sample_"), "(loss/weight)²", "inner products K of gradients"),
    "update_product": Variable(("step", "block", "sample"), "loss", "inner products b of gradients with the update"),
    "update_norm_squared": Variable(("step", "block"), "weight²", "squared norm of the update inside the space"),
    "share_outside_space": Variable(("step", "block"), "1", "share of the update outside the space"),
    "dimension": Variable(("step", "block"), "1", "dimension of the space"),
    "loss": Variable(("step", "sample"), "nat", "loss of each probe sample"),
}
#: Beside the record, where the optimizer is known: β₁ of Adam, the momentum of SGD; NaN where it is not.
FISHER_MOMENTUM = Variable(("step",), "1", "momentum of the optimizer")
#: The path of each training (segment) through weight space, all matrices together.
PATH: Mapping[str, Variable] = {
    "gram": Variable(
        ("step", "step_"),
        "weight²",
        "inner products of the updates",
        "⟨ΔW_t, ΔW_u⟩ summed over matrices; NaN between trainings",
    ),
    "distance": Variable(("step",), "weight", "distance from the start", "‖ΔW_t‖_F over all matrices"),
    "length": Variable(
        ("step",), "weight", "length of the path", "Σ‖ΔW_s − ΔW_{s−1}‖_F up to t, through checkpoints, from the start"
    ),
    "straightness": Variable(("step",), "1", "straightness", "distance/length: 1 on a straight line"),
    "component_share": Variable(
        ("segment", "component"),
        "1",
        "share of a principal direction",
        "eigenvalue of gram over its trace, uncentred",
    ),
    "participation_ratio": Variable(("segment",), "1", "directions the path moved in", "1/Σ share²"),
    "matrices": Variable(
        ("segment",), "1", "number of matrices", "those that every checkpoint of the training has in one shape"
    ),
}
_SHUTTLEWORTH = "Shuttleworth et al. 2024"
#: The newest update of each matrix beside the weight that it changed.
BASE: Mapping[str, Variable] = {
    "relative_size": Variable(("step", "matrix"), "1", "relative size of the update", "‖ΔW‖_F/‖W⁰‖_F"),
    **{
        name: Variable(("matrix",), units, long_name, definition, reference)
        for name, units, long_name, definition, reference in (
            ("base_norm", "weight", "Frobenius norm of the base", "‖W⁰‖_F", ""),
            (
                "overlap_left",
                "1",
                "overlap of left subspaces",
                "‖U_kᵀU⁰_k‖_F²/k of update and base; 1: the same subspace",
                "",
            ),
            ("overlap_right", "1", "overlap of right subspaces", "‖V_kᵀV⁰_k‖_F²/k of update and base", ""),
            ("overlap_left_null", "1", "overlap of left subspaces by chance", "k/out", ""),
            ("overlap_right_null", "1", "overlap of right subspaces by chance", "k/in", ""),
            (
                "energy_left",
                "1",
                "energy of the update in the base's leading left directions",
                "‖U⁰_kᵀΔW‖_F²/‖ΔW‖_F²",
                "",
            ),
            (
                "energy_right",
                "1",
                "energy of the update in the base's leading right directions",
                "‖ΔW V⁰_k‖_F²/‖ΔW‖_F²",
                "",
            ),
            (
                "intruders",
                "1",
                "intruder dimensions",
                "of the k leading left directions of W⁰ + ΔW: max_i |⟨u, u⁰_i⟩| < ε",
                _SHUTTLEWORTH,
            ),
            (
                "intruders_null",
                "1",
                "intruder dimensions by chance",
                "mean over updates of the same σ, turned at random",
                _SHUTTLEWORTH,
            ),
            (
                "intruder_energy",
                "1",
                "energy in intruder dimensions",
                "their share of the k leading σ²",
                _SHUTTLEWORTH,
            ),
            (
                "intruder_energy_null",
                "1",
                "energy in intruder dimensions by chance",
                "as for intruders_null",
                _SHUTTLEWORTH,
            ),
        )
    },
}
#: Dimensions of what is always there of a training's path, and of updates beside the base's weights.
OF_CHECKPOINTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "path": {name: variable.dims for name, variable in PATH.items()},
    "base": {name: BASE[name].dims for name in ("relative_size", "base_norm")},
}


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

SAMPLE_LABELS = ("sample_task", "sample_group", "sample_id")
#: The block of all trainable parameters together, and the task that stands for all samples.
GLOBAL, ALL = "global", "all"
_SQUARED = "(loss/weight)²"
_PER_BLOCK = ("step", "block")
_PER_TASK = ("step", "block", "task")
_PER_PAIR = ("step", "block", "task", "task_")
_PER_CURVE = ("step", "block", "task", "n")
_PER_K = ("step", "block", "k")


def _with_interval(name: str, variable: Variable, how: str) -> dict[str, Variable]:
    """Return a variable and the ends of its 95 % interval."""
    ends = {
        f"{name}_{end}": Variable(
            variable.dims,
            variable.units,
            f"{variable.long_name}, {end} end",
            f"{end} end of the 95 % interval: {how}",
            variable.reference,
        )
        for end in ("low", "high")
    }
    return {name: variable, **ends}


_JACKKNIFE = (
    "delete-one-group jackknife, Student's t with groups − 1 degrees of freedom; the number is corrected for its bias "
    "of O(1/groups) by the same"
)
_WIDENED = (
    "delete-one-group jackknife, Student's t with min(groups, effective_groups) − 1 degrees of freedom, at least 1; "
    "the number is corrected for its bias of O(1/groups) by the same"
)
_INFINITESIMAL = (
    "infinitesimal jackknife over groups, of the plug-in value about its own expectation at this N, not about the "
    "Fisher's: the bias in N is not part of it"
)
_F = "F = GᵀG/N, uncentred, of per-sample gradients G; K = GGᵀ"
_DIRECTIONS = "the Fisher of directions, of normalised gradients g/‖g‖, in which all samples weigh the same"
_SE = "Shannon entropy of the normalised spectrum (von Neumann entropy of F/tr F)"

#: The group that follows from K alone, with the numbers of the record from which everything can be computed again.
FISHER: Mapping[str, Variable] = {
    **{name: FISHER_RECORD[name] for name in ("gram", "update_product", "update_norm_squared", "dimension", "loss")},
    "samples": Variable(("step", "task"), "1", "number of probe samples", "samples of each task"),
    "groups": Variable(("step", "task"), "1", "number of groups of probe samples", "groups with a sample of each task"),
    "trace": Variable(_PER_TASK, _SQUARED, "trace of the Fisher", f"tr K/N; {_F}"),
    **_with_interval(
        "eigenvalue",
        Variable((*_PER_TASK, "index"), _SQUARED, "eigenvalue of the Fisher", f"eig(K)/N, descending, plug-in; {_F}"),
        f"of ln λ, {_INFINITESIMAL}",
    ),
    **_with_interval(
        "spectral_entropy",
        Variable(
            _PER_TASK, "nat", "spectral entropy SE", "−Σ p ln p, p = λ/Σλ, plug-in: too small in expectation", _SE
        ),
        _INFINITESIMAL,
    ),
    "spectral_entropy_normalised": Variable(
        _PER_TASK, "1", "spectral entropy, normalised by sample rank", "SE/ln min(N, d)", _SE
    ),
    "spectral_entropy_centred": Variable(
        _PER_TASK, "nat", "spectral entropy of the centred Fisher", "SE of F − ḡḡᵀ, from HKH/N, plug-in", _SE
    ),
    "spectral_entropy_block_diagonal": Variable(
        ("step", "task"),
        "nat",
        "spectral entropy of the block-diagonal Fisher",
        "H(w) + Σ w SE over the blocks but the global one, w = tr F_l/Σ tr F: an upper bound of the global SE",
        "chain rule of entropy",
    ),
    **_with_interval(
        "dominant_ratio",
        Variable(
            _PER_TASK,
            "1",
            "dominant ratio ρ",
            "λ₁/Σλ, plug-in: too large in expectation",
            "largest share of the spectrum",
        ),
        "from dominant_ratio_split to the plug-in ratio, each end moved outwards by the plug-in's sampling error "
        "(infinitesimal jackknife over groups)",
    ),
    "dominant_ratio_split": Variable(
        _PER_TASK,
        "1",
        "dominant ratio ρ, of held-out directions",
        "Rayleigh quotient of one half's first direction on the other half over its trace, mean over random halves of "
        "the groups: too small in expectation",
    ),
    "dominant_ratio_noise_reduced": Variable(
        _PER_TASK,
        "1",
        "dominant ratio ρ, noise reduced",
        "(λ₁ − (tr − λ₁)/(N − 1))/tr; for independent samples of similar norms only",
        "Yata & Aoshima 2012",
    ),
    "dominant_ratio_centred": Variable(
        _PER_TASK, "1", "dominant ratio of the centred Fisher", "λ₁/Σλ of F − ḡḡᵀ, plug-in"
    ),
    **_with_interval(
        "participation_ratio",
        Variable(
            _PER_TASK,
            "1",
            "participation ratio",
            "Σ K_ii K_jj/Σ K_ij² over pairs of different groups: (tr F)²/tr F² by U-statistics",
        ),
        f"of its logarithm, {_WIDENED}",
    ),
    **_with_interval(
        "ln_participation_ratio",
        Variable(
            _PER_TASK,
            "nat",
            "log participation ratio",
            "ln of participation_ratio, Rényi's entropy of order 2; SE is at least this, and its low end bounds SE",
            "Rényi 1961",
        ),
        _WIDENED,
    ),
    "participation_ratio_plug_in": Variable(
        _PER_TASK, "1", "participation ratio, plug-in", "(tr K)²/‖K‖_F²: too small in expectation"
    ),
    "participation_ratio_centred": Variable(
        _PER_TASK,
        "1",
        "participation ratio of the centred Fisher",
        "(tr HKH)²/‖HKH‖_F², plug-in: too small in expectation",
    ),
    **_with_interval(
        "participation_ratio_directional",
        Variable(
            _PER_TASK,
            "1",
            "participation ratio of gradients' directions",
            f"participation_ratio of {_DIRECTIONS}: 1 over the mean squared cosine of pairs of different groups",
        ),
        f"of its logarithm, {_WIDENED}",
    ),
    **_with_interval(
        "ln_participation_ratio_directional",
        Variable(
            _PER_TASK,
            "nat",
            "log participation ratio of gradients' directions",
            f"ln_participation_ratio of {_DIRECTIONS}",
        ),
        _WIDENED,
    ),
    "spectral_entropy_directional": Variable(
        _PER_TASK, "nat", "spectral entropy of gradients' directions", f"SE of {_DIRECTIONS}, plug-in", _SE
    ),
    "dominant_ratio_directional": Variable(
        _PER_TASK, "1", "dominant ratio of gradients' directions", f"λ₁/Σλ of {_DIRECTIONS}, plug-in"
    ),
    "effective_groups": Variable(
        _PER_TASK,
        "1",
        "effective number of groups",
        "N_eff = (Σ k_g)²/Σ k_g², k_g = Σ K_ii over a group's samples: the number of groups if all weigh the same",
        "Kish 1965",
    ),
    "largest_group_share": Variable(
        _PER_TASK,
        "1",
        "share of the largest group in the trace",
        "largest k_g/Σ k_g, k_g = Σ K_ii over a group's samples",
    ),
    "largest_samples_share": Variable(
        _PER_TASK, "1", "share of the three largest samples in the trace", "their Σ K_ii over tr K"
    ),
    "rarefied_spectral_entropy": Variable(
        _PER_CURVE,
        "nat",
        "spectral entropy of n groups",
        "mean plug-in SE of n groups with one sample of each, over random subsets without replacement",
        "rarefaction: Gotelli & Colwell 2001",
    ),
    "rarefied_spectral_entropy_deviation": Variable(
        _PER_CURVE,
        "nat",
        "deviation of it over subsets",
        "standard deviation over the random subsets; no standard error",
    ),
    "rarefied_dominant_ratio": Variable(
        _PER_CURVE, "1", "dominant ratio of n groups", "mean plug-in ρ of the same subsets", "Gotelli & Colwell 2001"
    ),
    "rarefied_participation_ratio": Variable(
        _PER_CURVE,
        "1",
        "participation ratio of n groups",
        "mean plug-in PR of the same subsets",
        "Gotelli & Colwell 2001",
    ),
}

_SHARE = "Σ_{j≤k} ⟨δ, v_j⟩²/‖δ‖², v_j the leading eigenvectors of the"
_HALVES = "over random halves of the groups: directions from one half, gradients from the other"
_RATIO = "central 95 % of update over null gradient, over halves and draws"

#: The group that follows from K, b and ‖δ‖.
CONCENTRATION: Mapping[str, Variable] = {
    "captured": Variable(_PER_K, "1", "share of the update in k leading directions", f"{_SHARE} Fisher of all samples"),
    "null_isotropic": Variable(
        _PER_K, "1", "the same share of a random direction", "k/d, mean of Beta(k/2, (d − k)/2)"
    ),
    "null_isotropic_low": Variable(_PER_K, "1", "isotropic null, low end", "2.5 % point of Beta(k/2, (d − k)/2)"),
    "null_isotropic_high": Variable(_PER_K, "1", "isotropic null, high end", "97.5 % point of Beta(k/2, (d − k)/2)"),
    **{
        f"{name}{suffix}": described
        for suffix, which in (("", "Fisher"), ("_centred", "centred Fisher"))
        for name, described in {
            "captured_split": Variable(
                _PER_K,
                "1",
                f"share of the update, directions of half the {which}",
                f"{_SHARE} {which} of half the groups",
            ),
            "null_gradient": Variable(
                _PER_K,
                "1",
                f"share of a fresh gradient, directions of half the {which}",
                f"mean share of fresh mean gradients of null_batch samples, {_HALVES}; compare with "
                f"captured_split{suffix}",
            ),
            "null_gradient_low": Variable(_PER_K, "1", "gradient null, low end", "2.5 % point over halves and draws"),
            "null_gradient_high": Variable(
                _PER_K, "1", "gradient null, high end", "97.5 % point over halves and draws"
            ),
            "gain": Variable(
                _PER_K, "1", f"gain over a gradient ({which})", f"captured_split{suffix}/null_gradient{suffix}"
            ),
            "ln_gain": Variable(
                _PER_K,
                "nat",
                f"log gain over a gradient ({which})",
                "median of ln(update/null gradient), over halves and draws: about 0 for a fresh gradient",
            ),
            "gain_low": Variable(_PER_K, "1", "gain, low end", _RATIO),
            "gain_high": Variable(_PER_K, "1", "gain, high end", _RATIO),
        }.items()
    },
    "concentrated": Variable(
        _PER_K,
        "1",
        "more concentrated than a gradient",
        "gain_low > 1 and gain_low_centred > 1, for a null_batch of at most null_batch_limit. A fresh gradient is so "
        "with a probability of up to 5 %; blocks, steps and k share samples and draws: together or not at all",
    ),
    "null_batch": Variable(
        ("step",),
        "1",
        "batch of the null gradients",
        "samples behind the update, batch size × equally weighted batches (steps and momentum); NaN if not known",
    ),
    "null_batch_limit": Variable(
        ("step",),
        "1",
        "largest batch of the null gradients for which the flag is given",
        "8 × half of the probe samples",
    ),
    **_with_interval(
        "rayleigh_ratio",
        Variable(_PER_BLOCK, "1", "Rayleigh ratio", "(δᵀFδ/‖δ‖²)/(tr F/d): 1 for a random direction, at most d·ρ"),
        f"of its logarithm, {_WIDENED}",
    ),
    "relative_rayleigh_ratio": Variable(
        _PER_BLOCK, "1", "Rayleigh quotient over the largest", "(δᵀFδ/‖δ‖²)/λ₁, λ₁ plug-in"
    ),
    "update_norm": Variable(
        _PER_BLOCK, "weight", "norm of the update inside the space", "‖δ‖; decoupled weight decay is part of it"
    ),
    "share_outside_space": Variable(
        _PER_BLOCK,
        "1",
        "share of the update outside the space",
        "share of ‖δ‖² that no gradient in this space can produce",
    ),
}

_PAIRS = "over pairs of samples of different groups"

#: The group that follows from K and the tasks of its samples.
TASKS: Mapping[str, Variable] = {
    **_with_interval(
        "cosine",
        Variable(
            _PER_PAIR,
            "1",
            "cosine of mean gradients",
            f"⟨μ_s, μ_t⟩/(‖μ_s‖‖μ_t‖), each {_PAIRS}; NaN where unresolved; cut at ±1",
        ),
        _JACKKNIFE,
    ),
    "unresolved": Variable(
        _PER_PAIR,
        "1",
        "cosine that is not resolved",
        "the interval of ‖μ‖² of one of the tasks reaches 0, or is not known",
    ),
    "cosine_raw": Variable(
        _PER_PAIR, "1", "cosine of mean gradients, attenuated", "ḡ_s·ḡ_t/(‖ḡ_s‖‖ḡ_t‖): noise draws it to 0"
    ),
    "magnitude_similarity": Variable(
        _PER_PAIR,
        "1",
        "similarity of gradients' magnitudes",
        f"2‖μ_s‖‖μ_t‖/(‖μ_s‖² + ‖μ_t‖²), norms {_PAIRS}",
        "Yu et al. 2020",
    ),
    "conflict_rate": Variable(
        _PER_BLOCK,
        "1",
        "share of decided pairs of tasks in conflict",
        "pairs whose cosine's interval lies below 0, over those whose interval does not hold 0",
    ),
    "decided_pairs": Variable(
        _PER_BLOCK, "1", "pairs of tasks that are decided", "pairs whose cosine's interval does not hold 0"
    ),
    **_with_interval(
        "overlap",
        Variable(_PER_PAIR, "1", "overlap of Fishers", f"tr F_sF_t/√(tr F_s² tr F_t²), Hilbert–Schmidt, {_PAIRS}"),
        f"of its logarithm, {_WIDENED}",
    ),
    **_with_interval(
        "noise_scale",
        Variable(
            _PER_TASK,
            "1",
            "simple noise scale",
            f"tr Σ/‖μ‖² in samples, ‖μ‖² {_PAIRS}; NaN where ‖μ‖² is not resolved",
            "McCandlish et al. 2018",
        ),
        f"of its logarithm, {_WIDENED}",
    ),
    **_with_interval(
        "transfer",
        Variable(
            _PER_PAIR,
            "1/learning rate",
            "first-order transfer",
            f"⟨μ_s, μ_t⟩/L_t, {_PAIRS}: relative fall of the loss of task_ per unit of learning rate of a gradient "
            "step on task; in factor space only",
            "first order of Fifty et al. 2021",
        ),
        _JACKKNIFE,
    ),
    "spectral_entropy_mixture": Variable(_PER_BLOCK, "nat", "SE of the pooled Fisher", "SE(F), plug-in"),
    "spectral_entropy_within": Variable(_PER_BLOCK, "nat", "SE within tasks", "Σ w SE(F_s), w = tr K_ss/tr K, plug-in"),
    "divergence": Variable(
        _PER_BLOCK,
        "nat",
        "divergence χ of tasks' Fishers",
        "SE(F) − Σ w SE(F_s), from 0 (the same normalised Fisher) to H(w) (disjoint); plug-in: too large at small N",
        "Holevo's quantity; Briët & Harremoës 2009",
    ),
    "divergence_largest": Variable(_PER_BLOCK, "nat", "largest possible χ", "H(w) = −Σ w ln w"),
    "divergence_normalised": Variable(
        _PER_BLOCK,
        "nat",
        "divergence χ of equally large tasks",
        "χ of K̃ = DKD, each sample divided by √(tr K_ss/n_s) of its task s: the statistic of the permutation test",
        "Holevo's quantity; Briët & Harremoës 2009",
    ),
    "divergence_normalised_largest": Variable(
        _PER_BLOCK, "nat", "largest possible χ of equally large tasks", "H(n/N) = −Σ (n_s/N) ln(n_s/N)"
    ),
    **{
        f"divergence_null_{end}": Variable(
            _PER_BLOCK,
            "nat",
            f"χ of one normalised Fisher, {end} end",
            f"{point} % point of divergence_normalised over permuted labels, traces normalised under each; never "
            "subtracted",
        )
        for end, point in (("low", "2.5"), ("high", "97.5"))
    },
    "divergence_p_value": Variable(
        _PER_BLOCK,
        "1",
        "p of χ",
        "chance of such a divergence_normalised if tasks have the same normalised Fisher: (b + 1)/(B + 1) permutations",
    ),
    **_with_interval(
        "purity_gap",
        Variable(
            _PER_BLOCK,
            "1",
            "purity lost by mixing tasks",
            f"Σ w tr f_s² − tr(Σ w f_s)², f = F/tr F, {_PAIRS}: 0 if tasks have the same normalised Fisher",
        ),
        _JACKKNIFE,
    ),
    "sharing": Variable(
        _PER_BLOCK,
        "1",
        "sharing of directions",
        "1 − purity_gap/Σ w(1 − w) tr f_s²: 1 same normalised Fisher, 0 disjoint",
    ),
}

#: Groups that follow from the records of the Fisher.
FISHER_GROUPS: Mapping[str, Mapping[str, Variable]] = {"fisher": FISHER, "concentration": CONCENTRATION, "tasks": TASKS}

ROOT_ATTRIBUTES = (
    "toolkit_version",
    "library_versions",
    "git_commit",
    "configuration",
    "inputs",
    "seed",
    "created",
    "run",
    "findings",
)
#: Prefixes that wrappers put before the live model's names.
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
_JSON_ATTRIBUTES = ("library_versions", "configuration", "inputs", "findings")


def labelled(variables: Mapping[str, Variable], arrays: Mapping[str, np.ndarray]) -> dict[str, xr.Variable]:
    """Return arrays as labelled variables, with the dimensions and attributes that the schema gives their names.

    Args:
        variables: One group of the schema, e.g. ``SCORE``.
        arrays: Name → values.

    Raises:
        KeyError: If a name is not in the group.

    >>> labelled(SCORE, {"items": np.ones((2, 1))})["items"].dims
    ('step', 'task')
    """
    return {
        name: xr.Variable(variables[name].dims, array, variables[name].attributes) for name, array in arrays.items()
    }


def attributes(variable: Variable, definition: str = "", reference: str = "") -> dict[str, str]:
    """Attributes of a variable; definition and reference only where they are given.

    >>> attributes(SCORE["items"])
    {'units': '1', 'long_name': 'number of items scored'}
    """
    stated = {"definition": definition, "reference": reference}
    return {"units": variable.units, "long_name": variable.long_name, **{k: v for k, v in stated.items() if v}}


def layer_and_role(name: str) -> tuple[int, str, str]:
    """Layer number (−1 if none), role within the layer, and the stack of layers it belongs to.

    >>> layer_and_role("model.layers.3.self_attn.q_proj")
    (3, 'self_attn.q_proj', 'model.layers')
    >>> layer_and_role("vision_tower.encoder.layers.0.mlp.experts.5.fc1")
    (0, 'mlp.experts.*.fc1', 'vision_tower.encoder.layers')
    >>> layer_and_role("model.layers.2.experts.gate_up_proj[7]")
    (2, 'experts.gate_up_proj[*]', 'model.layers')
    >>> layer_and_role("lm_head")
    (-1, 'lm_head', '')
    """
    parts = name.split(".")
    # Nine digits: what is longer is no layer number, and would not fit an integer.
    index = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) <= 9), None)
    if index is None or index == len(parts) - 1:
        return -1 if index is None else int(parts[index]), re.sub(r"\[\d+\]", "[*]", name), ""
    role = ".".join("*" if part.isdecimal() else part for part in parts[index + 1 :])
    return int(parts[index]), re.sub(r"\[\d+\]", "[*]", role), ".".join(parts[:index])


def check(tree: xr.DataTree) -> None:
    """Checks a result against every rule of the schema.

    Args:
        tree: One run's result, or a tree with one such result under each ``/runs/<name>``.

    Raises:
        ValueError: Names every rule that is broken.
    """
    runs = tree.children.get("runs")
    trees = {"": tree} if runs is None else {f"/runs/{name}": child for name, child in runs.children.items()}
    broken = [f"{path}{problem}" for path, run in trees.items() for problem in _problems(run)]
    for name, variables in (("association", ASSOCIATION), ("comparison", COMPARISON)):
        if name in tree.children:
            broken += _variable_problems(f"/{name}", tree[name].to_dataset(), variables, complete=True)
    if runs is not None and not trees:
        broken.append("/runs is empty")
    if broken:
        raise ValueError("The result breaks its schema: " + "; ".join(broken) + ".")


def _problems(tree: xr.DataTree) -> Iterator[str]:
    yield from (f"/ lacks the attribute {name!r}" for name in ROOT_ATTRIBUTES if name not in tree.attrs)
    if not isinstance(tree.attrs.get("seed", 0), int | np.integer):
        yield f"/ attribute 'seed' is {tree.attrs['seed']!r}, expected an integer"
    for name in _JSON_ATTRIBUTES:
        if name in tree.attrs and not _is_json(tree.attrs[name]):
            yield f"/ attribute {name!r} is not strict JSON"
    if "update" not in tree.children:
        yield "/update is missing"
        return
    update = tree["update"].to_dataset()
    yield from _variable_problems("/update", update, UPDATE, complete=True)
    yield from _coordinate_problems(update)
    yield from _step_problems(update)
    yield from _spectrum_problems(update)
    if "gradient" in tree.children:
        yield from _variable_problems("/gradient", tree["gradient"].to_dataset(), GRADIENT, complete=True)
    if "score" in tree.children:
        yield from _variable_problems("/score", tree["score"].to_dataset(), SCORE, complete=True)
    for name, variables in FISHER_GROUPS.items():
        if name in tree.children:
            dataset = tree[name].to_dataset()
            yield from _variable_problems(f"/{name}", dataset, variables, complete=True)
            yield from _fisher_problems(f"/{name}", dataset)
    for name, dims in OF_CHECKPOINTS.items():
        if name in tree.children:
            yield from _dimension_problems(f"/{name}", tree[name].to_dataset(), dims)
    if "null" in tree.children:
        yield from _variable_problems("/null", tree["null"].to_dataset(), NULL, complete=False)


def _dimension_problems(group: str, dataset: xr.Dataset, known: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    yield from (f"{group} lacks {name!r}" for name in known if name not in dataset)
    yield from (
        f"{group}/{name} has dimensions {dataset[name].dims}, expected {dims}"
        for name, dims in known.items()
        if name in dataset and dataset[name].dims != dims
    )


def _fisher_problems(group: str, dataset: xr.Dataset) -> Iterator[str]:
    if "evaluated_at_step" not in dataset.coords:
        yield f"{group} lacks the coordinate 'evaluated_at_step'"
    if "task" in dataset.dims and ALL not in dataset["task"].values:
        yield f"{group} lacks the task {ALL!r}"


def last_step_with(array: xr.DataArray) -> int:
    """The last step with a number; the last one at all if there is none.

    >>> last_step_with(xr.DataArray([1.0, np.nan], {"step": [5, 10]}, "step"))
    5
    """
    others = [dim for dim in array.dims if dim != "step"]
    known = array.notnull().any(others).values
    steps = array["step"].values
    return int(steps[known][-1] if known.any() else steps[-1])


def _is_json(text: object) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(str(text), parse_constant=refuse)
    except ValueError:
        return False
    return True


def _variable_problems(
    group: str, dataset: xr.Dataset, known: Mapping[str, Variable], *, complete: bool
) -> Iterator[str]:
    if complete:
        yield from (f"{group} lacks {name!r}" for name in known if name not in dataset)
    for name, variable in dataset.data_vars.items():
        expected = known.get(str(name))
        if expected is not None and variable.dims != expected.dims:
            yield f"{group}/{name} has dimensions {variable.dims}, expected {expected.dims}"
        yield from (
            f"{group}/{name} lacks the attribute {key!r}" for key in ("units", "long_name") if key not in variable.attrs
        )
        if str(name) in MEASURES and group in ("/update", "/gradient"):
            lacking = [key for key in ("definition", "reference") if key not in variable.attrs]
            yield from (f"{group}/{name} lacks the attribute {key!r}" for key in lacking)
            if variable.dtype != np.float64:
                yield f"{group}/{name} is {variable.dtype}, expected float64"


def _coordinate_problems(update: xr.Dataset) -> Iterator[str]:
    for name, dim in UPDATE_COORDINATES.items():
        if name not in update.coords or update[name].dims != (dim,):
            yield f"/update lacks the coordinate {name!r} on {dim!r}"
    if "kind" in update.coords and tuple(update["kind"].values) != KINDS:
        yield f"/update kind is {tuple(update['kind'].values)}, expected {KINDS}"
    if "matrix" in update.coords and not update.indexes["matrix"].is_unique:
        yield "/update has two matrices of one name"
    if "matrix" in update.coords:
        wrapped = [name for name in update["matrix"].values.tolist() if name.startswith(WRAPPERS)]
        yield from (f"/update matrix {name!r} has a wrapper's prefix" for name in wrapped)
    if "adapter_rank" in update.coords and (update["adapter_rank"] < 0).any():
        yield "/update adapter_rank is negative"


def _step_problems(update: xr.Dataset) -> Iterator[str]:
    if not {"step", "from_step", "segment"} <= set(update.coords):
        return
    steps = update["step"].values
    if steps.dtype != np.int64:
        yield f"/update step is {steps.dtype}, expected int64"
    if len(np.unique(steps)) != len(steps) or (np.diff(steps) < 0).any():
        yield "/update steps are not unique and ascending"
    if (steps < 0).any():
        yield "/update steps are negative"
    if update["from_step"].dtype != np.int64:
        yield f"/update from_step is {update['from_step'].dtype}, expected int64"
    segment = dict(zip(steps.tolist(), update["segment"].values.tolist(), strict=True))
    for step, origin in zip(steps.tolist(), update["from_step"].values.tolist(), strict=True):
        if origin > 0 and (origin >= step or segment.get(origin) != segment[step]):
            yield f"/update from_step {origin} of step {step} is not an earlier step of its segment"


def _spectrum_problems(update: xr.Dataset) -> Iterator[str]:
    if not {"singular_value", "count"} <= set(update.data_vars):
        return
    values, count = update["singular_value"], update["count"]
    if values.dims != UPDATE["singular_value"].dims or count.dims != UPDATE["count"].dims:
        return
    if values.dtype != np.float64:
        yield f"/update/singular_value is {values.dtype}, expected float64"
    array = values.values
    beyond = np.arange(array.shape[-1]) >= count.values[..., None]
    if np.isfinite(array[beyond]).any():
        yield "/update/singular_value holds numbers beyond count"
    if (np.diff(np.nan_to_num(array, nan=-1.0), axis=-1) > 0).any():
        yield "/update/singular_value is not descending"
    if (array < 0).any():
        yield "/update/singular_value holds negative numbers"
    if np.isinf(array).any():
        yield "/update/singular_value holds infinity"
    if "from_step" in update.coords and (count.sel(kind="increment").values[update["from_step"].values < 0] > 0).any():
        yield "/update has an increment where from_step is -1"
    for name in ("is_zero", "quantisation_limited"):
        if name in update and update[name].dtype != bool:
            yield f"/update/{name} is {update[name].dtype}, expected bool"
    if {"is_zero", "dominant_ratio"} <= set(update.data_vars):
        ratio, zero = update["dominant_ratio"].values, update["is_zero"].values.astype(bool)
        if np.isfinite(ratio[zero]).any():
            yield "/update has measures of an update that is zero"
        if (ratio > 1 + 1e-9).any():
            yield "/update/dominant_ratio is above 1"


# Records: the same rules over one step, before anything is computed from what a stranger may have written.

_FORMATS = ("F64", "F32", "BF16", "F16")
_SPACES = ("tangent", "factor", "weight")
_COUNTS = ("count", "factor_rank", "decomposition")
_TEXTS = ("kind", "matrix", "role", "stack", "storage", "block", "task", *SAMPLE_LABELS)
#: No training has as many steps, no matrix as many rows.
_LARGEST_INTEGER = 10**12
#: Chance is drawn from factors of that many columns, at the cost of its square; no adapter comes near.
_LARGEST_RANK = 4096
#: Beyond, sums of squares are not numbers any more.
_LARGEST_NUMBER = 1e100
_SMALLEST = {"from_step": -1, "layer": -1, "out": 1, "in": 1}


def check_record(
    record: Mapping[str, xr.Dataset], tables: Mapping[str, Mapping[str, Variable]], optional: Collection[str] = ()
) -> dict[str, str]:
    """Check one record against the schema.

    Args:
        record: Name of the group → its numbers.
        tables: Name of the group → its variables; other groups are not looked at.
        optional: Variables that a record may lack.

    Returns:
        Name of the group → the first rule that it breaks, in words that follow its name; empty if all can be used.
    """
    problems = {}
    for name, table in tables.items():
        if name in record:
            dataset = record[name]
            known = {key: variable for key, variable in table.items() if key in dataset or key not in optional}
            if problem := next(_record_problems(dataset, known), None):
                problems[name] = problem
    return problems


def _record_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    """Yield what is wrong with one group of a record. Each rule relies on those before it: only the first counts."""
    dims = _record_dimensions(known)
    for name, expected in dims.items():
        if name not in dataset.variables or dataset.variables[name].dims != expected:
            yield f"lacks {name!r} with the dimensions {expected}"
    for name in dims:
        text, whole = name in _TEXTS, name in _COUNTS or name not in known
        wanted = "text" if text else "whole numbers of 64 bits" if whole else "numbers"
        dtype = dataset.variables[name].dtype
        if not (dtype.kind == "U" if text else dtype == np.int64 if whole else dtype.kind == "f"):
            yield f"holds no {wanted} in {name!r}"
    if dataset.sizes["step"] != 1:
        yield "is not of one step"
    if "kind" in dataset.dims and tuple(dataset.variables["kind"].values.tolist()) != KINDS:
        yield f"is not of the kinds {KINDS}"
    for name in dims:
        values = dataset.variables[name].values
        if values.dtype == np.int64 and values.size:
            least = _SMALLEST.get(name, 0)
            if not (least <= int(values.min()) and int(values.max()) < _LARGEST_INTEGER):
                yield f"has a number in {name!r} that is not from {least} to {_LARGEST_INTEGER - 1}"
    for axis in ("matrix", "block", "task"):
        names = dataset.variables[axis].values.tolist() if axis in dims else []
        if len(set(names)) < len(names):
            yield f"has two {'matrices' if axis == 'matrix' else axis + 's'} of one name"
        if names != encodable(names):
            yield f"has a {axis} whose name is not text"
        if axis == "matrix" and any(name.startswith(WRAPPERS) for name in names):
            yield f"has a {axis} whose name begins with a wrapper's prefix"
    for name in ("from_step", "evaluated_at_step"):
        if name in dims and bool(dataset.variables[name] >= dataset.variables["step"] + (name != "from_step")):
            yield "is an increment since a later step" if name == "from_step" else "was evaluated at a later step"
    if "storage" in dims and not set(dataset.variables["storage"].values.tolist()) <= set(_FORMATS):
        yield f"is stored in a format that is none of {', '.join(_FORMATS)}"
    yield from _recorded_spectrum_problems(dataset, known) if "singular_value" in known else ()
    for name in (name for name in known if name not in _COUNTS):
        numbers = dataset.variables[name].values.astype(np.float64)
        least = 0.0 if "singular_value" in known and name != "inner_product" else -_LARGEST_NUMBER
        # A gradient that is not finite has a norm that says so.
        allowed = np.isnan(numbers) | (numbers >= least) & (numbers <= _LARGEST_NUMBER)
        if not (allowed | (np.isposinf(numbers) & name.startswith("norm"))).all():
            yield f"has a number in {name!r} that is not from {least:g} to {_LARGEST_NUMBER:g}"
    yield from _recorded_gram_problems(dataset) if "gram" in known else ()


def _record_dimensions(known: Mapping[str, Variable]) -> dict[str, tuple[str, ...]]:
    """Return the coordinates and variables that a group of a record has."""
    coordinates: dict[str, tuple[str, ...]] = {"step": ("step",)}
    if "gram" in known:
        coordinates |= {"block": ("block",), "evaluated_at_step": ("step",)}
        coordinates |= dict.fromkeys(SAMPLE_LABELS, ("sample",))
    elif "singular_value" in known:
        per_kind = "kind" in known["count"].dims
        coordinates |= {name: (name,) for name in ("matrix", "index", *(["kind"] if per_kind else []))}
        coordinates |= {name: (dim,) for name, dim in UPDATE_COORDINATES.items() if per_kind or dim != "step"}
    else:
        coordinates["task"] = ("task",)
    return coordinates | {name: variable.dims for name, variable in known.items()}


def _recorded_spectrum_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    values, count, rank = (dataset.variables[name].values for name in ("singular_value", "count", "factor_rank"))
    shortest = np.minimum(dataset.variables["out"].values, dataset.variables["in"].values)
    factored = dataset.variables["adapter_rank"].values > 0
    # A dense matrix has as many as it is wide, factors as many as they have columns.
    possible = np.where(rank > 0, np.where(factored, np.minimum(rank, shortest), shortest), 0)
    if (count != possible).any() or count.max(initial=0) > values.shape[-1]:
        yield "does not count the singular values that its matrices have"
    if (rank[..., factored] > _LARGEST_RANK).any():
        yield f"has factors of more than {_LARGEST_RANK} columns"
    if "from_step" in dataset.coords and dataset.variables["from_step"].values[0] < 0 and count[:, 1].any():
        yield "has an increment since nothing"
    if "decomposition" in known and (dataset.variables["decomposition"].values >= len(DECOMPOSITIONS)).any():
        yield "has singular values that were found in an unknown way"
    inside = np.arange(values.shape[-1]) < count[..., None]
    if not np.isnan(values[~inside]).all():
        yield "has more singular values than it counts"
    missing = np.isnan(values) & inside
    if (missing.any(-1) & (missing.sum(-1) < count)).any():
        yield "lacks some of its singular values"
    sides = [np.isfinite(dataset.variables[name].values) for name in known if name.endswith("factor_value")]
    if any((~side[..., :-1] & side[..., 1:]).any() for side in sides):
        yield "has a gap in the singular values of its factors"
    if sides and (sum(side.sum(-1) for side in sides) > np.where(factored, rank[:, 1], 0)).any():
        yield "has more singular values of factors than its increments have columns"
    if (values < 0).any() or (values > _LARGEST_NUMBER).any():
        yield f"has a number in 'singular_value' that is not from 0 to {_LARGEST_NUMBER:g}"
    if (np.diff(np.where(inside, values, 0.0), axis=-1) > 0).any():
        yield "has singular values that are not in descending order"


def _recorded_gram_problems(dataset: xr.Dataset) -> Iterator[str]:
    if dataset.sizes["sample"] != dataset.sizes["sample_"] or not dataset.sizes["sample"]:
        yield "has no square K"
    if dataset.attrs.get("space") not in _SPACES or not isinstance(dataset.attrs.get("batch_size"), int):
        yield "does not say its space and its batch size"
    if not isinstance(dataset.attrs.get("fisher"), str) or not isinstance(dataset.attrs.get("reduction"), str):
        yield "does not say its kind and its reduction"
    k = np.nan_to_num(dataset["gram"].values)
    size = np.abs(k).max((2, 3), initial=0.0)
    apart = np.abs(k - k.swapaxes(2, 3)).max((2, 3), initial=0.0)
    if (apart > 1e-4 * size).any() or (np.diagonal(k, axis1=2, axis2=3) < 0).any():
        yield "has a K that is no Gram matrix"
    elif (np.linalg.eigvalsh(k) < -1e-4 * size[..., None] * k.shape[-1]).any():
        yield "has a K with a negative eigenvalue"
