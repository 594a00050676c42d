"""Variables of what follows from spectra: updates, gradients, null models, summaries, the path, the base; the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dynamics.schema.variable import PER_MATRIX, Variable

_ROY, _GOLUB = "Roy & Vetterli 2007", "Golub & Van Loan"
#: The measures of an update's spectrum.
MEASURES: Mapping[str, Variable] = {
    name: Variable(PER_MATRIX, units, long_name, definition, reference)
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
            "fewest directions holding 90 % of Σσ²",
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
    "singular_value": Variable((*PER_MATRIX, "index"), "weight", "singular value"),
    "count": Variable(PER_MATRIX, "1", "number of singular values"),
    "factor_rank": Variable(PER_MATRIX, "1", "number of columns of the factors"),
    "decomposition": Variable(PER_MATRIX, "1", "how the singular values were found"),
    "frobenius_norm": Variable(PER_MATRIX, "weight", "Frobenius norm of the update"),
    "spectral_norm": Variable(PER_MATRIX, "weight", "largest singular value"),
    "nuclear_norm": Variable(PER_MATRIX, "weight", "sum of singular values"),
    **MEASURES,
    "is_zero": Variable(PER_MATRIX, "1", "the update is exactly zero"),
    "quantisation_limited": Variable(
        PER_MATRIX, "1", "rounding of the storage format spoils the spectrum", "quantisation_noise_share > 0.1"
    ),
    "quantisation_noise_share": Variable(
        PER_MATRIX,
        "1",
        "predicted share of rounding noise in the energy",
        "Σ ulp²/12 of the stored factors, carried to the product, over ‖·‖_F²",
    ),
    "rounding_edge": Variable(
        PER_MATRIX,
        "weight",
        "largest singular value of rounding noise alone",
        "√(largest row sum of v) + √(largest column sum of v), v = ulp²/12 of the stored weights; of dense matrices, "
        "NaN for factors",
    ),
    "rank_above_rounding": Variable(
        PER_MATRIX,
        "1",
        "singular values beyond the rounding noise's edge",
        "number of σ > rounding_edge; of dense matrices, NaN for factors",
    ),
    "entropy_energy_above_rounding": Variable(
        PER_MATRIX,
        "nat",
        "spectral entropy (energy) less the rounding floor",
        "−Σ p ln p over σ > rounding_edge, p ∝ σ² − mean v·max(out, in); NaN where nothing is left",
    ),
    "effective_rank_energy_above_rounding": Variable(
        PER_MATRIX,
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
        "fewest directions that hold 99 % of Σσ² of the newest total",
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

#: Bounds of the entropy; in /update and /weights of an analysis that asked for leading singular values.
BOUNDS: Mapping[str, Variable] = {
    f"entropy_energy_{bound}": Variable(
        PER_MATRIX,
        "nat",
        f"{words} bound of the spectral entropy (energy)",
        f"{words} bound of −Σ p ln p with p = σ²/Σσ², from the leading σ, Σσ² and Σσ⁴; NaN where all σ are known",
        "Harremoës & Topsøe 2001; Audenaert 2007",
    )
    for bound, words in (("low", "lower"), ("high", "upper"))
}

_GRADIENT_OF = (
    "of a dense weight ∇W; of a LoRA pair s(∇_B·A + B·∇_A), what a small step along the factors' gradients does to the "
    "matrix"
)
#: How much the gradients of a step's micro-batches differ; results of earlier versions do not have it.
GRADIENT_NOISE: Mapping[str, Variable] = {
    "micro_norm": Variable(
        ("step", "matrix"),
        "loss/weight",
        "gradient norm of a micro-batch",
        "√ of the mean of ‖n g_b‖² over the n backward passes of the step on the first process, g_b what each adds to "
        "the gradient before clipping; NaN for a single one on a single process",
    ),
    "micro_batches": Variable(
        ("step",), "1", "micro-batches behind a gradient", "backward passes of the step times processes; NaN if unknown"
    ),
    "batch_size": Variable(
        ("step",), "samples", "samples behind a gradient", "of the optimizer's step; NaN if unknown"
    ),
    "signal": Variable(
        ("step", "matrix"),
        "(loss/weight)²",
        "squared norm of the mean gradient",
        "‖μ‖² = (n‖g‖² − s)/(n − 1), g the step's gradient before clipping, s = micro_norm², n = micro_batches: "
        "unbiased for micro-batches of equal size, and below 0 where noise outweighs it",
        "McCandlish et al. 2018, arXiv 1812.06162",
    ),
    "noise": Variable(
        ("step", "matrix"),
        "(loss/weight)²",
        "variance of the gradient",
        "tr Cov(g) = (s − ‖g‖²)/(n − 1), of the step's gradient before clipping: unbiased, as signal",
        "McCandlish et al. 2018, arXiv 1812.06162",
    ),
    "noise_to_signal": Variable(
        ("step",),
        "1",
        "noise to signal of the gradient",
        "Σ noise/Σ signal over matrices and over this and the nine recorded steps before it: 1 where a step's noise is "
        "as large as its mean. NaN where the sum of signals is not above 0",
    ),
    "noise_scale": Variable(
        ("step",),
        "samples",
        "noise scale",
        "noise_to_signal times batch_size: tr Σ/‖μ‖², the batch at which noise and mean are equally large",
        "McCandlish et al. 2018, arXiv 1812.06162",
    ),
}
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
    **GRADIENT_NOISE,
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
    "noise_energy": Variable(PER_MATRIX, "weight²", "predicted energy of the storage's rounding"),
    "inner_product": Variable(("step", "matrix"), "weight²", "inner product with the previous increment"),
}
#: What a raw update has besides if leading singular values were asked for: known of whole spectra without the others.
RAW_REMAINDER: Mapping[str, Variable] = {
    **{name: UPDATE[name] for name in ("frobenius_norm", "participation_ratio")},
    **BOUNDS,
}
#: The raw gradient, from which everything in /gradient follows.
RAW_GRADIENT: Mapping[str, Variable] = {
    name: GRADIENT[name]
    for name in (
        *("singular_value", "count", "factor_rank", "norm_before_clip", "norm_after_clip"),
        *("micro_norm", "micro_batches", "batch_size"),
    )
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
            PER_MATRIX,
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
            (*PER_MATRIX, "index"),
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
_WALK = (
    "a walk through the same checkpoints whose steps have the same lengths and are orthogonal, as independent ones are "
    "in a space of high dimension"
)
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
    "straightness_null": Variable(
        ("step",), "1", "straightness of a random walk", f"√Σ‖Δ_s‖²/Σ‖Δ_s‖ up to t, Δ_s the steps: {_WALK}"
    ),
    "component_share_null": Variable(
        ("segment", "component"),
        "1",
        "share of a principal direction of a random walk",
        f"eigenvalue of K_tu = Σ_(s ≤ min(t, u)) ‖Δ_s‖² over its trace: {_WALK}",
        "Antognini & Sohl-Dickstein 2018",
    ),
    "participation_ratio_null": Variable(
        ("segment",), "1", "directions a random walk moves in", f"1/Σ share² of component_share_null: {_WALK}"
    ),
    "matrices": Variable(
        ("segment",), "1", "number of matrices", "those that every checkpoint of the training has in one shape"
    ),
}
_SHUTTLEWORTH = "Shuttleworth et al. 2024"
_OF_ROWS = "over evenly spaced rows with about 2¹⁸ entries, of smaller matrices over all"
#: The newest update of each matrix beside the weight that it changed.
BASE: Mapping[str, Variable] = {
    "relative_size": Variable(("step", "matrix"), "1", "relative size of the update", "‖ΔW‖_F/‖W⁰‖_F"),
    **{
        name: Variable(("matrix",), units, long_name, definition, reference)
        for name, units, long_name, definition, reference in (
            ("base_norm", "weight", "Frobenius norm of the base", "‖W⁰‖_F", ""),
            (
                "changed_share",
                "1",
                "share of the base's numbers that the update changes",
                "of dense weights, entries that differ from W⁰ once both are in the coarser of their formats; else "
                f"entries with round(W⁰ + ΔW) ≠ W⁰ in the format of W⁰; {_OF_ROWS}. Dense weights of which none of "
                "these rows differs are compared whole",
                "",
            ),
            (
                "lost_in_merge",
                "1",
                "share of the update that merging loses",
                "‖round(W⁰ + ΔW) − (W⁰ + ΔW)‖_F²/‖ΔW‖_F², rounded to the format of W⁰: 0 if nothing is lost, 1 if "
                f"the merged weights are the base's; NaN for dense weights; {_OF_ROWS}",
                "",
            ),
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
#: Dimensions of what is always there of a training's path, and of updates beside the base's weights. Results of earlier
#: versions have no null of the path.
OF_CHECKPOINTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "path": {name: variable.dims for name, variable in PATH.items() if not name.endswith("_null")},
    "base": {name: BASE[name].dims for name in ("relative_size", "base_norm")},
}
