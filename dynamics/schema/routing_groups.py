"""Variables of the routing of mixtures of experts: who was chosen in training, and how much each expert moved."""

from __future__ import annotations

from collections.abc import Mapping

from dynamics.schema.variable import Variable

_PER_LAYER = ("step", "layer")
_PER_EXPERT = ("step", "layer", "expert")

#: What a record holds of routing.
ROUTING_RECORD: Mapping[str, Variable] = {
    "assigned": Variable(
        _PER_EXPERT,
        "tokens",
        "tokens sent to an expert",
        "number of tokens that the router sent to the expert with a weight other than 0, in the forward passes of the "
        "step over all micro-batches and processes; of soft routing Σ of the tokens' weights. Tokens that the model's "
        "attention mask leaves out are not counted, where the mask has as many entries as the router gets tokens and "
        "the choice is read token by token, not from the rows of experts alone. Passes that gradient checkpointing "
        "repeats, evaluation, generation and probes are not counted, nor are shared "
        "experts. NaN beyond experts, and throughout a layer of soft routing in which a weight is not finite",
    ),
    "tokens": Variable(_PER_LAYER, "tokens", "tokens routed", "tokens that the router was called with, as in assigned"),
    "margin": Variable(
        _PER_LAYER,
        "nat",
        "margin of the choice",
        "mean over tokens of the smallest logit among chosen experts minus the largest among the others; where the "
        "router returns probabilities, their logarithm (softmax) or log-odds (sigmoid) are the logits. Negative where "
        "a bias, groups or a capacity decide otherwise than the logits. Of soft routing, of the largest weight over "
        "the next. NaN where every expert is chosen or a logit is not finite",
    ),
}

_OVER_EXPERTS = "over the experts of a layer"
#: Measured from the record, and from the norms of the experts' matrices.
ROUTING: Mapping[str, Variable] = {
    **ROUTING_RECORD,
    "load": Variable(
        _PER_EXPERT, "1", "load of an expert", f"assigned/Σ assigned {_OVER_EXPERTS}; 1/experts if it is uniform"
    ),
    "entropy": Variable(
        _PER_LAYER,
        "nat",
        "entropy of the load",
        "−Σ load ln load; at most ln experts",
        "Shannon entropy",
    ),
    "effective_experts": Variable(
        _PER_LAYER, "1", "effective number of experts", "exp(entropy): equally loaded experts of the same entropy"
    ),
    "largest_share": Variable(
        _PER_LAYER, "1", "largest load", f"largest load {_OVER_EXPERTS}: from 1/experts to 1/k for k experts a token"
    ),
    "largest_share_chance": Variable(
        _PER_LAYER,
        "1",
        "largest load under uniform routing",
        "95 % of the time the largest load is at most this if each token chooses k of the experts uniformly: the "
        "smallest c/(T k) with E P(X > c) ≤ 0.05, X binomial of T tokens and probability k/E, k = Σ assigned/T. NaN of "
        "soft routing",
        "Bonferroni",
    ),
    "dead": Variable(_PER_LAYER, "1", "experts without a token", "number of experts with assigned = 0"),
    "dead_chance": Variable(
        _PER_LAYER,
        "1",
        "experts without a token under uniform routing",
        "E (1 − k/E)^T, expected if each of T tokens chooses k of E experts uniformly. NaN of soft routing",
    ),
    "update_norm": Variable(
        _PER_EXPERT,
        "weight",
        "norm of an expert's increment",
        "√ Σ ‖increment‖_F² over the expert's matrices in /update; NaN where they are not matrices of their own, are "
        "not trained, or the increment is unknown",
    ),
    "gradient_norm": Variable(
        _PER_EXPERT,
        "loss/weight",
        "norm of an expert's gradient",
        "√ Σ norm_before_clip² over the expert's matrices in /gradient; NaN as for update_norm",
    ),
    "load_update_correlation": Variable(
        _PER_LAYER,
        "1",
        "rank correlation of load and update",
        f"Spearman's coefficient of load and update_norm {_OVER_EXPERTS} at one step; NaN for fewer than 3 experts "
        "with both",
        "Spearman 1904",
    ),
}
#: What a layer is, beside its name.
ROUTING_COORDINATES: Mapping[str, str] = {"experts": "layer", "routing": "layer", "held_in": "layer"}
