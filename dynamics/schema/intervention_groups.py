"""Variables of interventions: what the loss says of the directions of an update, and of an update without some."""

from __future__ import annotations

from collections.abc import Mapping

from dynamics.schema.variable import Variable

_PER_MATRIX = ("step", "matrix")
_PER_DIRECTION = ("step", "matrix", "index")
_PER_TRUNCATION = ("step", "truncation", "task")
_DIRECTIONS = "ΔW = Σ σ_i u_i v_iᵀ is the adapter's whole update"
_KEPT = (
    "directions are kept as truncation says: effect: chosen by effect on one half of the groups; sigma_top, random, "
    "sigma_tail: as many of each matrix, those of largest σ, at random, those of smallest σ; energy: the "
    "rank_by_energy of largest σ; none: no direction"
)
_FOLDS = "mean over the two halves, each evaluated with what was chosen on the other"

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
    "directions": Variable(("step", "truncation"), "1", "number of directions kept", f"of all matrices; {_KEPT}"),
    "parameters": Variable(
        ("step", "truncation"),
        "1",
        "number of parameters kept",
        f"Σ rank·(out + in) over the matrices; {_KEPT}",
    ),
    "truncation_effect": Variable(
        _PER_TRUNCATION,
        "loss",
        "effect of a truncation",
        f"mean over held-out samples of ℓ_i(whole adapter) − ℓ_i(truncated adapter): negative if the truncated adapter "
        f"is worse; {_KEPT}; {_FOLDS}",
        "controls: Shortcuts in the Tail, arXiv 2606.07596",
    ),
    **{
        f"truncation_effect_{end}": Variable(
            _PER_TRUNCATION,
            "loss",
            f"effect of a truncation, {end} end",
            f"{end} end of the 95 % interval: delete-one-group jackknife, Student's t with groups − 1 degrees of "
            "freedom; given the directions",
        )
        for end in ("low", "high")
    },
    "predicted_truncation_effect": Variable(
        _PER_TRUNCATION,
        "loss",
        "effect of a truncation to first order",
        f"Σ σ_i g_i over the removed directions, g_i of the held-out samples; {_FOLDS}",
    ),
    "loss": Variable(("step", "task"), "loss", "loss of the whole adapter", "mean over the task's samples"),
    "groups": Variable(("step", "task"), "1", "number of groups", "groups with a sample of each task"),
}

#: Groups of interventions.
INTERVENTION_GROUPS: Mapping[str, Mapping[str, Variable]] = {"sensitivity": SENSITIVITY}
