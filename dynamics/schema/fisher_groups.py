"""Variables of the Fisher: what is recorded of it, its spectrum, the concentration of updates, and the tasks."""

from __future__ import annotations

from collections.abc import Mapping

from dynamics.schema.variable import Variable

SAMPLE_LABELS = ("sample_task", "sample_group", "sample_id")
#: The block of all trainable parameters together, and the task that stands for all samples.
GLOBAL, ALL = "global", "all"
#: What is kept of the Fisher at each step; everything else follows from it. K = GGᵀ is unnormalised.
FISHER_RECORD: Mapping[str, Variable] = {
    "gram": Variable(
        ("step", "block", "sample", "sample_"),
        "(loss/weight)²",
        "inner products K of gradients",
        "K_ij = ⟨g_i, g_j⟩, g_i the gradient of the loss of probe sample i at the start of the increment",
    ),
    "update_product": Variable(
        ("step", "block", "sample"), "loss", "inner products b of gradients with the update", "b_i = ⟨g_i, δ⟩"
    ),
    "update_norm_squared": Variable(
        ("step", "block"), "weight²", "squared norm of the update inside the space", "‖δ‖²"
    ),
    "share_outside_space": Variable(
        ("step", "block"), "1", "share of the update outside the space", "1 − ‖δ‖²/‖increment‖²"
    ),
    "dimension": Variable(("step", "block"), "1", "dimension of the space", "d: number of directions δ can have"),
    "loss": Variable(
        ("step", "sample"), "nat", "loss of each probe sample", "the task's loss at the start of the increment"
    ),
}
#: Beside the record, where the optimizer is known; NaN where it is not.
FISHER_MOMENTUM = Variable(("step",), "1", "momentum of the optimizer", "β₁ of Adam, the momentum of SGD")
_SQUARED = "(loss/weight)²"
_PRECONDITIONER = "P the optimizer's preconditioner at the end of the increment, rates relative to the largest"
_DRAWN = "h drawn mean gradients, four for each half of the groups; for an optimizer that is not linear"
#: Beside the record, where the optimizer's steps are known: of gradients passed through it.
OPTIMIZER_RECORD: Mapping[str, Variable] = {
    "plain_optimizer": Variable(("step",), "1", "whether P is 1", "1 if G P Gᵀ and G P² Gᵀ are K: plain SGD"),
    "optimizer_gradients": Variable(
        ("step",),
        "1",
        "gradients behind the optimizer's second moments",
        "(Σw)²/Σw² of the weights of squared gradients in v̂, the fewest of any parameter; NaN without a second moment",
    ),
    "preconditioned_product": Variable(
        ("step", "block", "sample", "sample_"),
        _SQUARED,
        "inner products of gradients with preconditioned ones",
        f"⟨g_i, P g_j⟩, {_PRECONDITIONER}",
    ),
    "preconditioned_gram": Variable(
        ("step", "block", "sample", "sample_"),
        _SQUARED,
        "inner products of preconditioned gradients",
        f"⟨P g_i, P g_j⟩, {_PRECONDITIONER}",
    ),
    "drawn_product": Variable(
        ("step", "block", "sample", "draw"), _SQUARED, "inner products with drawn steps", f"⟨g_i, P(h)⟩, {_DRAWN}"
    ),
    "drawn_norm_squared": Variable(
        ("step", "block", "draw"), _SQUARED, "squared norms of drawn steps", f"‖P(h)‖², {_DRAWN}"
    ),
}
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
_POSSIBLE = "cut at {}: a Fisher of d dimensions has a participation ratio of 1 to d"
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
        "the groups (four splits, or one of more than 256 samples in more than 64 groups): too small in expectation",
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
        f"of its logarithm, {_WIDENED}; {_POSSIBLE.format('1 and d')}",
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
        f"{_WIDENED}; {_POSSIBLE.format('0 and ln d')}",
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
        f"of its logarithm, {_WIDENED}; {_POSSIBLE.format('1 and d')}",
    ),
    **_with_interval(
        "ln_participation_ratio_directional",
        Variable(
            _PER_TASK,
            "nat",
            "log participation ratio of gradients' directions",
            f"ln_participation_ratio of {_DIRECTIONS}",
        ),
        f"{_WIDENED}; {_POSSIBLE.format('0 and ln d')}",
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
_PASSED = (
    "those of null_gradient after P, the optimizer's preconditioner at the end of the increment: learning rates of "
    "parameter groups, Adam's 1/(√v̂ + ε), Muon's orthogonalisation; without momentum and weight decay. NaN where P is "
    "unknown, or optimizer_gradients is below 10"
)

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
            "null_optimizer": Variable(
                _PER_K,
                "1",
                f"share of a fresh step of the optimizer, directions of half the {which}",
                f"mean share of fresh mean gradients, {_PASSED}",
            ),
            "null_optimizer_low": Variable(
                _PER_K, "1", "optimizer's null, low end", "2.5 % point over halves and draws"
            ),
            "null_optimizer_high": Variable(
                _PER_K, "1", "optimizer's null, high end", "97.5 % point over halves and draws"
            ),
            "gain_optimizer": Variable(
                _PER_K,
                "1",
                f"gain over a step of the optimizer ({which})",
                f"captured_split{suffix}/null_optimizer{suffix}",
            ),
            "ln_gain_optimizer": Variable(
                _PER_K,
                "nat",
                f"log gain over a step of the optimizer ({which})",
                "median of ln(update/null step), over halves and draws: about 0 for a step along a fresh gradient",
            ),
            "gain_optimizer_low": Variable(
                _PER_K, "1", "gain over a step of the optimizer, low end", _RATIO.replace("gradient", "step")
            ),
            "gain_optimizer_high": Variable(
                _PER_K, "1", "gain over a step of the optimizer, high end", _RATIO.replace("gradient", "step")
            ),
        }.items()
    },
    "concentrated": Variable(
        _PER_K,
        "1",
        "more concentrated than a gradient",
        "gain_low > 1 and gain_low_centred > 1, for a null_batch of at most null_batch_limit. A fresh gradient is so "
        "with a probability of up to 5 %; blocks, steps and k share samples and draws: together or not at all",
    ),
    "concentrated_optimizer": Variable(
        _PER_K,
        "1",
        "more concentrated than a step of the optimizer",
        "gain_optimizer_low > 1 and gain_optimizer_low_centred > 1, for a null_batch of at most null_batch_limit",
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
    "optimizer_gradients": OPTIMIZER_RECORD["optimizer_gradients"],
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

#: Of /concentration, what earlier results lack: the null of the optimizer.
OPTIMIZER_NULL = frozenset(name for name in CONCENTRATION if "optimizer" in name)

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
        "χ of K̃ = DKD, each sample divided by √(tr K_ss/n_s) of its task s: the statistic of the permutation test. "
        "Of more than 256 samples, those of random whole groups, at most 256, are tested",
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
