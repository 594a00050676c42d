"""What follows from running a model with other weights: /intervention, /sensitivity, /sharpness and /loss."""

from __future__ import annotations

from collections.abc import Mapping

from dynamics.schema.variable import Variable

#: Dimensions of the group beside ``step``, each with a coordinate.
INTERVENTION_AXES = ("arm", "k", "scale", "task")
#: Variables that are true or false; false, too, where nothing was run.
INTERVENTION_FLAGS = ("resolved", "separable", "headline")
_REFERENCE = "Song, Ahn & Yun 2025, arXiv 2405.16002"
_PER_ARM = ("step", "arm", "k", "scale", "task")
_PER_K = ("step", "k", "task")
_OVER_SPLITS = (
    "95 %, from the delete-one-group jackknife and the variance between splits, Student's t of groups − 1; conditional "
    "on the directions"
)
_FIELLER = "95 %, by Fieller, from the same errors as those of effects; conditional on the directions"
_ON_FULL = "on and off as c, D at scale 1; of samples held out from the directions, mean over splits"


def _with_interval(name: str, variable: Variable, interval: str) -> dict[str, Variable]:
    ends = {
        f"{name}_{end}": Variable(variable.dims, variable.units, f"{variable.long_name}, {side} end", interval)
        for end, side in (("low", "lower"), ("high", "upper"))
    }
    return {name: variable, **ends}


#: The group that follows from running the arms of an update.
INTERVENTION: Mapping[str, Variable] = {
    **_with_interval(
        "effect",
        Variable(
            _PER_ARM,
            "nat",
            "fall of the loss",
            "D(λx) = mean of ℓ_i(θ) − ℓ_i(θ + λx) over samples whose groups gave no direction, mean over splits; "
            "positive: x lowers the loss. Losses are the tasks', as the model in evaluation mode gives them",
            _REFERENCE,
        ),
        _OVER_SPLITS,
    ),
    "predicted_effect": Variable(
        _PER_ARM,
        "nat",
        "fall of the loss to first order",
        "−mean of ⟨g_i, λx⟩ from K and b alone: descriptive, may be ten times the effect. Of full and off without "
        "what lies outside the space; NaN for arms made otherwise",
    ),
    **_with_interval(
        "score_effect",
        Variable(
            ("step", "arm", "k", "task"),
            "score",
            "change of the score",
            "mean of score_i(θ + x) − score_i(θ), in the task's units; NaN for tasks without a score of their own",
        ),
        _OVER_SPLITS,
    ),
    "required_groups": Variable(
        ("step", "arm", "k", "task"),
        "1",
        "groups that would resolve the effect",
        "(2.8 sd/|D|)², sd of a group's effect: found with 80 % power at 5 %",
    ),
    "captured": Variable(
        _PER_K,
        "1",
        "share of the squared norm in the directions",
        "c = ‖Π_k δ‖²/‖δ‖², of all of δ, what lies outside the space included; mean over folds",
    ),
    **_with_interval(
        "interaction",
        Variable(_PER_K, "nat", "interaction of the two parts", f"I = D(full) − D(on) − D(off); {_ON_FULL}"),
        _OVER_SPLITS,
    ),
    **_with_interval(
        "attributed",
        Variable(
            _PER_K,
            "nat",
            "effect attributed to the part",
            "φ = ½(D(on) + D(full) − D(off)), Shapley: with half of the interaction",
        ),
        _OVER_SPLITS,
    ),
    **_with_interval(
        "excess",
        Variable(
            _PER_K,
            "nat",
            "effect beyond the share of the norm",
            "T = φ − c D(full), with c of each fold: 0 for any part that is random with respect to δ, and for every "
            "part of a step −η∇L",
        ),
        _OVER_SPLITS,
    ),
    "excess_p": Variable(
        _PER_K,
        "1",
        "p of no excess, of all k and tasks together",
        "max-T over k × tasks by 9,999 random signs of centred group means; Bonferroni below 12 groups",
    ),
    **_with_interval(
        "share",
        Variable(
            _PER_K,
            "1",
            "share of the effect",
            "s = φ/D(full): the two parts' add to 1; NaN where not resolved or not separable",
        ),
        _FIELLER,
    ),
    **_with_interval(
        "efficiency", Variable(_PER_K, "1", "share of the effect over share of the norm", "s/c; NaN with s"), _FIELLER
    ),
    **_with_interval(
        "sufficiency", Variable(_PER_K, "1", "effect of the part alone", "D(on)/D(full); NaN with s"), _FIELLER
    ),
    **_with_interval(
        "necessity", Variable(_PER_K, "1", "effect lost without the part", "1 − D(off)/D(full); NaN with s"), _FIELLER
    ),
    "relative_excess": Variable(
        _PER_K, "1", "excess over the whole effect", "T/D(full); NaN where D(full) is not resolved: a run's measure"
    ),
    "resolved": Variable(_PER_K, "1", "whole effect told from 0", "the interval of D(full) excludes 0"),
    "separable": Variable(_PER_K, "1", "parts have shares", "|I| ≤ ½|D(full)| at scale 1"),
    "separable_scale": Variable(
        _PER_K,
        "1",
        "largest scale at which parts have shares",
        "largest λ of the grid with |I(λ)| ≤ ½|D(λ full)|; NaN if none",
    ),
    "norm": Variable(("step", "arm", "k"), "weight", "norm of the arm", "root of the mean of ‖x‖² over folds"),
    "headline": Variable(
        ("step", "k"),
        "1",
        "whether k is the headline's",
        "16, or the largest of 1, 2, 4, 8, 16 of at most a quarter of a fold's samples",
    ),
}


_PER_MATRIX = ("step", "matrix")
_PER_DIRECTION = ("step", "matrix", "index")
_PER_TRUNCATION = ("step", "truncation", "task")
_DIRECTIONS = "ΔW = Σ σ_i u_i v_iᵀ is the adapter's whole update"
_HELD_OUT = "mean over the two halves, each evaluated with what was chosen on the other"

#: What each singular direction of the adapters does to the loss, and adapters without some of them.
SENSITIVITY: Mapping[str, Variable] = {
    "singular_value": Variable(
        _PER_DIRECTION, "weight", "singular value of the update", f"σ_i, descending; {_DIRECTIONS}"
    ),
    "loss_slope": Variable(
        (*_PER_DIRECTION, "task"),
        "loss/weight",
        "slope of the loss along a singular value",
        f"g_i = ∂L/∂σ_i = u_iᵀ(∇_W L)v_i, L the mean loss of the task's samples; {_DIRECTIONS}. Σ σ_i g_i over all "
        "matrices is the derivative of L(λΔW) at λ = 1",
        "in the line of Spectral Surgery, arXiv 2603.03995",
    ),
    "kept_by_effect": Variable(
        _PER_DIRECTION,
        "1",
        "direction kept by effect",
        "of all directions of all matrices, in the order of their first-order effect −σ_i g_i on the pooled loss (what "
        "removing the direction adds to it), the fewest that hold the stated share of all positive effects",
    ),
    "rank_by_effect": Variable(
        _PER_MATRIX,
        "1",
        "number of directions kept by effect",
        "directions of the matrix with kept_by_effect, chosen from all groups",
    ),
    "rank_by_energy": Variable(
        _PER_MATRIX, "1", "number of directions kept by energy", "fewest directions that hold 99 % of Σσ²"
    ),
    "reason": Variable(
        _PER_MATRIX, "1", "reason of a missing slope or truncation", "empty where there is nothing to say"
    ),
    "directions": Variable(
        ("step", "truncation"),
        "1",
        "number of directions kept",
        "of all matrices, mean over the two halves. effect: those that one half of the groups chooses by effect; "
        "sigma_top, random, sigma_tail: as many of each matrix, of largest σ, at random, of smallest σ; energy: "
        "rank_by_energy of each matrix, of largest σ; none: no direction",
    ),
    "parameters": Variable(
        ("step", "truncation"), "1", "number of parameters kept", "Σ rank·(out + in) over the matrices, of directions"
    ),
    **_with_interval(
        "truncation_effect",
        Variable(
            _PER_TRUNCATION,
            "nat",
            "effect of a truncation",
            "mean over held-out samples of ℓ_i(whole adapter) − ℓ_i(truncated adapter): negative if the truncated "
            f"adapter is worse; truncations as for directions; {_HELD_OUT}",
            "controls: Shortcuts in the Tail, arXiv 2606.07596",
        ),
        _OVER_SPLITS,
    ),
    "predicted_truncation_effect": Variable(
        _PER_TRUNCATION,
        "nat",
        "effect of a truncation to first order",
        f"Σ σ_i g_i over the removed directions, g_i of the held-out samples; {_HELD_OUT}",
    ),
    "loss": Variable(("step", "task"), "nat", "loss of the whole adapter", "mean over the task's samples"),
    "groups": Variable(("step", "task"), "1", "number of groups", "groups with a sample of each task"),
}

_PER_TASK = ("step", "task")
_PER_TASK_PAIR = ("step", "task", "task_")
_CRITICAL = (
    "95 %, by Fieller: all t at which the mean difference cannot be told from 0, by the jackknife over groups; "
    "conditional on the direction"
)
_KALRA = "Kalra et al. 2026, arXiv 2601.16979"

#: How far a step can go before the loss is higher than where it began.
SHARPNESS: Mapping[str, Variable] = {
    **_with_interval(
        "critical_step",
        Variable(
            _PER_TASK,
            "1",
            "critical step",
            "t_c = min{t > 0 : L(θ + tδ) > L(θ)}, L the mean loss of the task's samples, δ the step: below 1, the step "
            "as it is raises the loss",
            _KALRA,
        ),
        f"{_CRITICAL}. 0 where the interval reaches below",
    ),
    **_with_interval(
        "critical_sharpness",
        Variable(
            _PER_TASK,
            "1",
            "critical sharpness",
            "λ_c = 2/(η t_c), η the learning_rate, or 1 where it is NaN; DᵀHD/Dᵀg on a quadratic with δ = −ηD. Above "
            "2/η, the step as it is raises the loss",
            _KALRA,
        ),
        f"{_CRITICAL}. The upper end is NaN where t = 0 is among them",
    ),
    "resolved": Variable(
        _PER_TASK, "1", "critical step resolved", "the interval of t_c is bounded and above 0: true or false"
    ),
    "reason": Variable(
        _PER_TASK, "1", "reason of a missing critical step", "empty where there is one with its interval"
    ),
    "passes": Variable(
        _PER_TASK,
        "1",
        "forward passes of the search",
        "passes over the samples for which nothing was at hand, the one without any change included",
    ),
    **_with_interval(
        "relative_sharpness",
        Variable(
            _PER_TASK_PAIR,
            "1",
            "relative critical sharpness",
            "2/η_c with η_c = min{η > 0 : L_{task_}(θ − η∇L_task) > L_{task_}(θ)}: large where a step on task soon "
            "raises the loss of task_; g_iᵀH_j g_i/g_iᵀg_j on quadratics. Low-rank matrices are moved along the "
            "gradients of their factors, to first order",
            _KALRA,
        ),
        f"{_CRITICAL}. The upper end is NaN where t = 0 is among them",
    ),
    "relative_reason": Variable(
        _PER_TASK_PAIR, "1", "reason of a missing relative sharpness", "empty where there is one with its interval"
    ),
    "relative_passes": Variable(
        _PER_TASK_PAIR, "1", "forward passes of the search along a gradient", "passes over the samples of task_"
    ),
    "loss": Variable(_PER_TASK, "nat", "loss at the start", "L(θ), mean over the task's samples"),
    "groups": Variable(_PER_TASK, "1", "number of groups", "groups with a sample of each task"),
    "learning_rate": Variable(
        ("step",), "1", "learning rate of gradient descent", "η of a step δ = −η∇L; NaN for other optimizers"
    ),
}

_SINCE = "since the training began; positive: the loss rose"
#: What a record holds of the losses of probe samples.
LOSS_RECORD: Mapping[str, Variable] = {
    "sample_loss": Variable(
        ("step", "sample"), "nat", "loss of a sample", "ℓ_i(θ_t), the task's own; NaN where it is not finite"
    ),
    "start_loss": Variable(
        ("step", "sample"), "nat", "loss of a sample when training began", "ℓ_i(θ₀); NaN where θ₀ is unknown"
    ),
    "first_order": Variable(
        ("step", "matrix", "task"),
        "nat",
        "change of the loss to first order, by matrix",
        "mean of ⟨∇_W ℓ_i(θ₀), W_t − W₀⟩ over the task's samples",
    ),
    "curvature": Variable(
        _PER_TASK,
        "nat",
        "curvature along the update",
        "δᵀFδ with δ = θ_t − θ₀ and F the task's Fisher at θ₀, from labels drawn from the model's own prediction, one "
        "draw a sample; NaN for tasks with a loss of their own",
        "Kunstner, Balles & Hennig 2019, arXiv 1905.12558",
    ),
    "scaled_loss": Variable(
        ("scale", "sample"),
        "nat",
        "loss of a sample with a share of the update",
        "ℓ_i(θ₀ + λ(θ_t − θ₀)) at the step scaled_step, for each scale λ",
        "Wortsman et al. 2022, arXiv 2109.01903",
    ),
}
#: How the losses of probe samples changed since the training began.
LOSS: Mapping[str, Variable] = {
    **{name: LOSS_RECORD[name] for name in ("sample_loss", "first_order", "scaled_loss")},
    **_with_interval(
        "change",
        Variable(
            _PER_TASK,
            "nat",
            "change of the loss",
            f"mean of ℓ_i(θ_t) − ℓ_i(θ₀) over the task's samples {_SINCE}. Samples without a loss at θ₀ are left out",
        ),
        "95 %, paired by sample, from the delete-one-group jackknife, Student's t of groups − 1",
    ),
    "predicted_first": Variable(
        _PER_TASK,
        "nat",
        "change of the loss to first order",
        "Σ over matrices of ⟨∇L(θ₀), ΔW⟩, ΔW the change since the training began; over of_matrices fewer where some "
        "have no gradient in weight space. NaN where not measured",
    ),
    "predicted_second": Variable(
        _PER_TASK,
        "nat",
        "change of the loss to second order",
        "predicted_first + δᵀFδ/2, F the task's Fisher at θ₀ from sampled labels, in place of the Hessian",
    ),
    "layer_share": Variable(
        ("step", "layer", "task"),
        "1",
        "share of the change to first order, by layer",
        "Σ over the layer's matrices of ⟨∇L(θ₀), ΔW⟩ over predicted_first: shares add to 1, and may be negative. "
        'The layer "" is that of matrices in none',
    ),
}

#: Groups of interventions.
INTERVENTION_GROUPS: Mapping[str, Mapping[str, Variable]] = {
    "intervention": INTERVENTION,
    "sensitivity": SENSITIVITY,
    "sharpness": SHARPNESS,
    "loss": LOSS,
}
