"""docs/measures.md from the schema: `python -m tests.measures_page` writes it.

Formula, unit, dimensions and source of a variable come from `dynamics.schema`; what it is measured from, its pitfall
and an example stand here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dynamics
from dynamics import schema
from dynamics.spectra import measures

PAGE = Path(__file__).parents[1] / "docs" / "measures.md"

HEAD = """# Measures

Every variable of a result, as `dynamics.schema` defines it. The same words are in the result itself:
`tree["update"]["stable_rank"].attrs["definition"]`.

σ are the singular values of one matrix, largest first. *Energy* means σ², *amplitude* σ. The ends of a 95 % interval,
`…_low` and `…_high`, are listed with the number they belong to. A missing number is NaN; a finding gives the reason.
"""


class Group(NamedTuple):
    """What the page says of one group of the result: its inputs, and a line of code that reads it."""

    inputs: str
    example: str


GROUPS: Mapping[str, Group] = {
    "update": Group(
        "Measured from the singular values σ of the update ΔW of each matrix. `kind` is `total` (since the start of "
        "training) or `increment` (since the previous step). With `--top K` entropy_energy of dense matrices is NaN, "
        "and lies between `entropy_energy_low` and `entropy_energy_high`.",
        'tree["update"]["stable_rank"].sel(kind="total").median("matrix")',
    ),
    "null": Group(
        "Measured from draws of the null model: random updates of the same shape and rank. Each measure of `/update` "
        "has its mean here under the same name, and its 5 % and 95 % points as `…_low` and `…_high`.",
        'tree["update"]["stable_rank"] / tree["null"]["stable_rank"]',
    ),
    "gradient": Group(
        "Measured from the gradients as the optimizer saw them, at captured steps. Measures have the names and "
        "formulas of `/update`, with σ of the gradient.",
        'tree["gradient"]["norm_before_clip"].sum("matrix")',
    ),
    "path": Group(
        "Measured from inner products of the updates at all pairs of checkpoints, summed over matrices.",
        'full["path"]["straightness"]',
    ),
    "base": Group(
        "Measured from the update and the weights before training, W⁰, with `--base`; directions with `--intruders`.",
        'full["base"]["relative_size"].isel(step=-1).to_series().nlargest(3)',
    ),
    "weights": Group(
        "Measured from the singular values of the last checkpoint's weights, with `--weights`. Names and formulas are "
        "those of `/update`.",
        'full["weights"]["stable_rank"]',
    ),
    "fisher": Group(
        "Measured from K = GGᵀ, the inner products of the gradients of N probe samples, for each block of parameters "
        "and each task; `all` stands for all samples.",
        'tree["fisher"]["ln_participation_ratio"].sel(block="global", task="all")',
    ),
    "concentration": Group(
        "Measured from K, b = Gδ and ‖δ‖², where δ is the update: how much of it lies in the k leading informative "
        "directions, beside a random direction and a fresh gradient.",
        'tree["concentration"]["gain"].sel(block="global", k=4)',
    ),
    "tasks": Group(
        "Measured from the blocks of K that belong to two tasks.",
        'tree["tasks"]["overlap"].sel(block="global").isel(step=-1)',
    ),
    "intervention": Group(
        "Measured by running the model with versions of an update (`arm`) added to the weights from which it began, on "
        "samples whose groups gave no direction. `scale` is the length λ; `all` stands for all samples.",
        'tree["intervention"]["effect"].sel(arm="on", scale=1.0, task="all")',
    ),
    "sensitivity": Group(
        "Measured from the gradients of an adapter's factors on the tasks' samples, and from the losses of truncated "
        "adapters on the half of the groups that did not choose. [Interventions](interventions.md) has the question.",
        'tree["sensitivity"]["truncation_effect"].sel(task="all", truncation=["effect", "energy"])',
    ),
    "sharpness": Group(
        "Measured from losses of the model at several lengths of a step. `all` stands for all samples. "
        "[Interventions](interventions.md#how-far-can-a-step-go) has the question.",
        'tree["sharpness"]["critical_sharpness"].sel(task="all")',
    ),
    "loss": Group(
        "Measured on the probe samples of tasks, as the model is and as it was when the newest training began. "
        "[Interventions](interventions.md#what-did-training-gain-and-forget) has the question.",
        'tree["loss"]["change"].sel(task="vqa")',
    ),
    "routing": Group(
        "Measured from the tokens that routers sent to each expert in the forward passes of a "
        "captured step, and from the norms of `/update` and `/gradient`. A layer is a block of experts. "
        "[Recording](recording.md#experts-and-their-routing) says what is counted.",
        'tree["routing"]["load"].isel(step=-1, layer=0)',
    ),
    "score": Group(
        "Measured on the probe samples of tasks that have a `score`, or read from the Trainer's log and score files.",
        'tree["score"]["score"].sel(task="vqa")',
    ),
    "association": Group(
        "Measured from measures and scores of several runs. `measure` and `task` name the pair.",
        'study["association"]["coefficient"].sel(task="vqa/accuracy")',
    ),
    "score_comparison": Group(
        "Measured from the scores of the runs of two groups, at the last step that all have.",
        'study["score_comparison"]["verdict"]',
    ),
    "comparison": Group(
        "Measured from a measure of the runs of two groups, at the same steps.",
        'study["comparison"]["mean_difference"]',
    ),
}

#: What a reader gets wrong about a number most easily.
PITFALLS: Mapping[str, str] = {
    "update/singular_value": "Entries beyond `count` are NaN, not 0.",
    "update/frobenius_norm": "Grows with the size of the matrix. Compare matrices by `/base/relative_size`.",
    "update/entropy_energy": "Its largest value is ln r. Compare matrices of different rank by `entropy_deficit`.",
    "update/entropy_amplitude": "Larger than `entropy_energy`; other tools call either of them entropy.",
    "update/effective_rank_energy": "Counts directions that hold energy, not directions that matter to the loss.",
    "update/effective_rank_amplitude": "Small singular values weigh more, and rounding noise with them.",
    "update/participation_ratio": "Hardly sees directions with little energy.",
    "update/stable_rank": "One outlier brings it to 1, whatever the other directions do.",
    "update/nuclear_rank": "Normalised by σ₁ alone, like `stable_rank`.",
    "update/dominant_ratio": "1/`stable_rank`: the two are one piece of evidence.",
    "update/energy_top_k": "1 for every update of rank 4 or less.",
    "update/rank_at_energy": "An integer: a small change of the spectrum can move it by one.",
    "update/numerical_rank": "Depends on the format in which the weights are stored.",
    "update/condition_number": "One direction close to 0 makes it huge.",
    "update/gini": "Depends on the rank: compare matrices of equal rank.",
    "update/hoyer": "Depends on the rank: compare matrices of equal rank.",
    "update/entropy_deficit": "Any trained update has one. Its size compares runs; it is no test.",
    "update/null_percentile": "0 for nearly any update made of gradients, so it hardly compares runs.",
    "update/marchenko_pastur_outliers": "NaN for fewer than three singular values.",
    "update/quantisation_limited": "Where it is true, compare measures above rounding instead.",
    "update/path_length": "More checkpoints make a longer path: compare equal spacing.",
    "update/increment_cosine": "Depends on the spacing of steps; noise pulls it towards 0 and below.",
    "update/suggested_rank": "Holds the energy of this update; it does not say which rank scores best.",
    "update/effective_rank_block_diagonal": "Of all matrices as one: it grows with their number.",
    "gradient/norm_after_clip": "Equal to the norm before clipping where nothing was clipped.",
    "path/length": "More checkpoints make a longer path: compare equal spacing.",
    "path/straightness": "Falls with the number of checkpoints, as straightness_null does: noise lengthens the path.",
    "path/component_share": "A random walk, too, has most of it in one direction: component_share_null.",
    "path/participation_ratio": "A random walk, too, has one close to 1: participation_ratio_null.",
    "base/relative_size": "Matrices that start at 0, such as biases of adapters, have none.",
    "base/intruders": "Random updates of the same singular values make some too: compare with `intruders_null`.",
    "fisher/spectral_entropy": "Grows with N. Compare at equal N, or compare `ln_participation_ratio`.",
    "fisher/spectral_entropy_normalised": "Still depends on N.",
    "fisher/dominant_ratio": "Falls with N, and the plug-in is too large.",
    "fisher/participation_ratio": "Its interval is too short where few large samples carry the Fisher (OD412).",
    "fisher/ln_participation_ratio": "The number to compare runs by, on one common set of probe samples.",
    "fisher/ln_participation_ratio_directional": "Of gradients of length 1: a different question from the raw one.",
    "fisher/rarefied_spectral_entropy_deviation": "Not a standard error.",
    "concentration/captured": "Always far above a random direction. Read it beside `null_gradient`.",
    "concentration/null_isotropic": "Every gradient exceeds it: it shows nothing about concentration.",
    "concentration/gain": "Adam's scaling alone brings it below 1: read `gain_optimizer` beside it.",
    "concentration/gain_optimizer": "Equal to `gain` under plain SGD of weights; NaN for checkpoints without records.",
    "concentration/concentrated": "Undecided, not false, where `null_batch` exceeds `null_batch_limit`.",
    "concentration/rayleigh_ratio": "Above 1 for every gradient.",
    "concentration/share_outside_space": "This part of the update is left out of the concentration.",
    "tasks/cosine": "NaN where a mean gradient cannot be told from 0: probe more samples.",
    "tasks/cosine_raw": "Noise draws it towards 0: few samples look like independent tasks.",
    "tasks/conflict_rate": "Counts only pairs that are decided.",
    "tasks/noise_scale": "With heavy-tailed gradients its interval is too short.",
    "tasks/transfer": "Of a step of plain gradient descent, not of Adam.",
    "tasks/divergence": "Depends on N and on the tasks' sizes. The test uses `divergence_normalised`.",
    "intervention/effect": "Of the directions found, and of one update: another training would have another.",
    "intervention/predicted_effect": "No effect: it was 10 times the effect where a step overshoots.",
    "intervention/captured": "Says nothing about effects: updates with the same share may be all gain or all harm.",
    "intervention/interaction": "Where it is large, the effect of a part depends on the rest: neither has a share.",
    "intervention/attributed": "Includes half of the interaction. Read `effect` of `on` for the part alone.",
    "intervention/excess_p": "Of all k and tasks together. The headline is read by the interval of `excess`.",
    "intervention/share": "Below 0 and above 1 where one part works against the other.",
    "intervention/efficiency": "1 is what a plain gradient step has, whatever the directions.",
    "intervention/relative_excess": "Large where the whole effect is small, however well it is resolved.",
    "intervention/required_groups": "If the effect is as large as estimated; for effects near 0 it is a guess.",
    "sensitivity/loss_slope": "Near a minimum it is noise about 0. It says nothing about large changes of σ.",
    "sensitivity/rank_by_effect": "First order only: read `truncation_effect` before cutting anything.",
    "sensitivity/truncation_effect": "Removing a direction is no small step: expect it to differ from the prediction.",
    "sensitivity/parameters": "Of all matrices together: compare truncations, not models.",
    "sharpness/critical_step": "Of this direction: along another one the loss may rise far sooner.",
    "sharpness/critical_sharpness": "Not the Hessian's largest eigenvalue: far below it until training is unstable.",
    "sharpness/relative_sharpness": "Gradients and losses are of the same samples, so few samples make it too small.",
    "sharpness/reason": "With several tasks, one may have a critical step where another has none.",
    "loss/change": "In the units of the tasks' losses: sums over tokens unless a task says `mean`.",
    "loss/predicted_first": "Of a long training it may have the wrong sign: compare it with `change`.",
    "loss/predicted_second": "The Fisher stands for the Hessian, which it is near where the model predicts well.",
    "loss/layer_share": "Large and of both signs where the layers' parts nearly cancel.",
    "loss/scaled_loss": "A share of the update is another model, not an earlier step.",
    "routing/load": "Neighbouring tokens choose alike: loads exceed chance without any preference of the router.",
    "routing/largest_share_chance": "Of independent tokens. A real router exceeds it without any fault.",
    "routing/dead": "Of this step's tokens: a rarely chosen expert is not dead.",
    "routing/margin": "Logits of different layers and models have different scales.",
    "routing/update_norm": "Includes weight decay and momentum: an expert without a token may move.",
    "routing/load_update_correlation": "Of few experts it is noisy, and Adam makes updates depend less on load.",
    "score/standard_error": "Of the items alone: it says nothing about other seeds.",
    "association/coefficient": "Of runs, not of checkpoints; a common cause such as faster learning remains in it.",
    "association/p_value": "Only the headline's stands as it is; read `p_familywise` for all others.",
    "association/coefficient_given_loss": "As good as the logged loss.",
    "score_comparison/normal_low": "Of this score alone, and only if normal. The decision is `holds`.",
    "score_comparison/verdict": "Undecided with few runs, whatever they show.",
    "score_comparison/at_step": "Of the last step that all runs have: a run that stopped early holds all back.",
    "comparison/p_value": "Of this step alone: read `mean_p_value`, or `p_familywise`.",
    "comparison/mean_low": "A difference that is not significant is not a difference of 0: read the interval.",
    "comparison/decidable": "False with few runs, whatever they show.",
}

_SIGMA = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
#: Measures of one spectrum, for the example σ = 4, 3, 2, 1.
_OF_SPECTRUM: Mapping[str, Callable[[], Any]] = {
    "entropy_energy": lambda: dynamics.spectral_entropy(_SIGMA, weights="energy"),
    "entropy_amplitude": lambda: dynamics.spectral_entropy(_SIGMA, weights="amplitude"),
    "effective_rank_energy": lambda: dynamics.effective_rank(_SIGMA, weights="energy"),
    "effective_rank_amplitude": lambda: dynamics.effective_rank(_SIGMA, weights="amplitude"),
    "participation_ratio": lambda: dynamics.participation_ratio(_SIGMA),
    "stable_rank": lambda: dynamics.stable_rank(_SIGMA),
    "nuclear_rank": lambda: measures.nuclear_rank(_SIGMA),
    "dominant_ratio": lambda: dynamics.dominant_ratio(_SIGMA),
    "energy_top_k": lambda: measures.energy_top_k(_SIGMA),
    "rank_at_energy": lambda: measures.rank_at_energy(_SIGMA),
    "condition_number": lambda: measures.condition_number(_SIGMA),
    "gini": lambda: measures.gini(_SIGMA),
    "hoyer": lambda: measures.hoyer(_SIGMA),
}


def measures_page() -> str:
    """Return the page."""
    parts = [HEAD]
    for name, group in GROUPS.items():
        parts.append(f"## /{name}\n\n{group.inputs}\n\n```python\nprint({group.example})\n```\n")
        variables = described(name)
        parts += [entry(name, variable, variables) for variable in variables if not is_end(variable, variables)]
    return "\n".join(parts)


def entry(group: str, name: str, variables: Mapping[str, schema.Variable]) -> str:
    """Return what the page says of one variable."""
    variable = variables[name]
    unit = "" if variable.units == "1" else f", in {escaped(variable.units)}"
    dims = ", ".join(variable.dims)
    lines = [f"### `{name}`\n\n{escaped(sentence(variable.long_name))}{unit}; over {dims}.\n"]
    facts = {
        "Formula": escaped(variable.definition),
        "Source": escaped(variable.reference),
        "Interval": escaped(interval(name, variables)),
        "Pitfall": PITFALLS.get(f"{group}/{name}", ""),
        "Example": example(group, name),
    }
    listed = [f"- **{title}**: {text}\n" for title, text in facts.items() if text]
    return "\n".join([*lines, "".join(listed)] if listed else lines)


def interval(name: str, variables: Mapping[str, schema.Variable]) -> str:
    """Return how the ends of a number's interval are found."""
    end = next((variables[end] for end in ends(name) if end in variables), None)
    return "" if end is None else end.definition.removeprefix("low end of the 95 % interval: ")


def ends(name: str) -> tuple[str, ...]:
    """Return the names under which the low and the high end of a number's interval stand."""
    stem = name.removesuffix("_centred")
    centred = name[len(stem) :]
    return tuple(f"{stem}_{side}{centred}" for side in ("low", "high"))


def is_end(name: str, variables: Mapping[str, schema.Variable]) -> bool:
    """Return whether a variable is the end of another one's interval."""
    return any(name in ends(other) for other in variables)


def example(group: str, name: str) -> str:
    """Return a measure's value for one spectrum."""
    if group != "update" or name not in _OF_SPECTRUM:
        return ""
    return f"σ = 4, 3, 2, 1 gives {float(_OF_SPECTRUM[name]()):.4g}."


def sentence(text: str) -> str:
    """Return a text with a capital letter."""
    return text[:1].upper() + text[1:]


def escaped(text: str) -> str:
    """Return a text in which no character is Markdown."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def described(group: str) -> Mapping[str, schema.Variable]:
    """Return the variables of a group; what is measured of a spectrum as in `/update` stands there alone."""
    table: Mapping[str, schema.Variable] = getattr(schema, group.upper())
    if group not in ("null", "gradient", "weights"):
        return table
    repeated = {f"{name}{end}" for name in schema.MEASURES for end in ("", "_low", "_high")}
    return {name: variable for name, variable in table.items() if name not in repeated}


if __name__ == "__main__":
    PAGE.write_text(measures_page())
