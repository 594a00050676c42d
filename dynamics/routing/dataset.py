"""Records of routing → ``/routing``: loads, their entropy and extremes, and who was trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float

from dynamics import schema
from dynamics.routing.uniform_null import dead_probability, largest_share
from dynamics.spectra.dataset import parts_of_sums

#: Experts of a token are chosen, or all of them have a weight.
CHOSEN, SOFT = "top-k", "soft"
#: The number of an expert in what follows the name of the module that holds it.
_NUMBER = re.compile(r"(?:(?:\.[^\[\]@]*)?\[(\d+)\]|\.(?:experts?_)?(\d+)(?:\..*)?)(?:@.*)?")


def routing_record(
    step: int, layers: Mapping[str, tuple[Float[np.ndarray, " _"], float, float]], about: Mapping[str, Sequence]
) -> xr.Dataset:
    """Return the record of one step.

    Args:
        step: Which one.
        layers: Name → tokens of each expert, tokens routed, mean margin.
        about: ``routing`` (``"top-k"`` or ``"soft"``) and ``held_in`` (names of the modules below the layer that hold
            its experts, joined by commas), of each layer.
    """
    most = max((len(assigned) for assigned, *_ in layers.values()), default=0)
    padded = np.full((1, len(layers), most), np.nan)
    for row, (assigned, *_) in enumerate(layers.values()):
        padded[0, row, : len(assigned)] = assigned
    arrays = {
        "assigned": padded,
        "tokens": np.array([[tokens for _, tokens, _ in layers.values()]], dtype=np.float64),
        "margin": np.array([[margin for *_, margin in layers.values()]], dtype=np.float64),
    }
    coords = {
        "step": [step],
        "layer": np.array(list(layers), dtype=str),
        "expert": np.arange(most, dtype=np.int64),
        "experts": ("layer", np.array([len(assigned) for assigned, *_ in layers.values()], dtype=np.int64)),
        **{name: ("layer", np.array(list(about[name]), dtype=str)) for name in ("routing", "held_in")},
    }
    return xr.Dataset(schema.label_arrays(schema.ROUTING_RECORD, arrays), coords)


def joined_routing(parts: Sequence[xr.Dataset]) -> xr.Dataset | None:
    """Return the records of all steps, over the layers and experts of any of them; ``None`` if there are none.

    A layer that a step did not pass through is NaN there.

    >>> joined_routing([])
    """
    if not parts:
        return None
    layers: dict[str, xr.Dataset] = {}
    for part in parts:
        layers |= {str(name): part for name in part["layer"].values}
    most = max(part.sizes["expert"] for part in parts)
    stripped = [part.drop_vars(schema.ROUTING_COORDINATES).reindex(expert=np.arange(most)) for part in parts]
    whole = xr.concat(stripped, "step", join="outer", combine_attrs="override").sortby("step")
    whole = whole.sel(layer=list(layers))
    return whole.assign_coords(
        {
            name: ("layer", np.array([part[name].sel(layer=layer).item() for layer, part in layers.items()]))
            for name in schema.ROUTING_COORDINATES
        }
    )


def measure_routing(record: xr.Dataset, update: xr.Dataset, gradient: xr.Dataset | None = None) -> xr.Dataset:
    """Return ``/routing``.

    Args:
        record: Joined records.
        update: ``/update`` of the same run, for the size of each expert's increments.
        gradient: ``/gradient``, ``None`` without one.
    """
    assigned, tokens = record["assigned"].values, record["tokens"].values
    experts = record["experts"].values.astype(np.float64)[None]
    total = np.nansum(assigned, -1)
    routed = np.isfinite(tokens) & (total > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        load = np.where(routed[..., None], assigned / total[..., None], np.nan)
        entropy = np.where(routed, -np.nansum(load * np.log(np.where(load > 0, load, 1.0)), -1), np.nan)
        chooses = routed & (tokens > 0) & (record["routing"].values != SOFT)[None]
        k = np.where(chooses, total / tokens, np.nan)
    largest = np.where(routed, np.nan_to_num(load).max(-1, initial=0.0), np.nan)
    numbers = {
        "assigned": assigned,
        "tokens": tokens,
        "margin": record["margin"].values,
        "load": load,
        "entropy": entropy,
        "effective_experts": np.exp(entropy),
        "largest_share": largest,
        "largest_share_chance": largest_share(tokens, k, np.broadcast_to(experts, tokens.shape)),
        "dead": np.where(routed, (assigned == 0).sum(-1), np.nan),
        "dead_chance": experts * dead_probability(tokens, k, np.broadcast_to(experts, tokens.shape)),
        "update_norm": _norms(record, update, "increment"),
        "gradient_norm": _norms(record, gradient, ""),
    }
    numbers["load_update_correlation"] = _correlations(load, numbers["update_norm"])
    coords = {name: record[name] for name in ("step", "layer", "expert", *schema.ROUTING_COORDINATES)}
    return xr.Dataset(schema.label_arrays(schema.ROUTING, numbers), coords)


def holders(record: xr.Dataset) -> list[tuple[str, int, int]]:
    """Return the modules that hold experts, each with the number of its layer and how many experts that has.

    >>> holders(routing_record(1, {"mlp": (np.ones(3), 3.0, 1.0)}, {"routing": ["top-k"], "held_in": ["experts"]}))
    [('mlp.experts', 0, 3)]
    """
    columns = (record[name].values.tolist() for name in ("layer", "held_in", "experts"))
    return [
        (f"{layer}.{word}".strip("."), row, int(experts))
        for row, (layer, words, experts) in enumerate(zip(*columns, strict=True))
        for word in words.split(",")
        if word
    ]


def matrices_by_expert(record: xr.Dataset, names: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yield layer, expert and matrix, by number, for each matrix that belongs to one expert.

    >>> record = routing_record(1, {"mlp": (np.ones(3), 3.0, 1.0)}, {"routing": ["top-k"], "held_in": ["experts"]})
    >>> list(matrices_by_expert(record, ["mlp.experts.down_proj[2]", "mlp.experts.0.w1", "mlp.gate"]))
    [(0, 2, 0), (0, 0, 1)]
    """
    modules = holders(record)
    for number, name in enumerate(names):
        for prefix, row, experts in modules:
            match = _NUMBER.fullmatch(name[len(prefix) :]) if name.startswith(prefix) else None
            if match is not None and (expert := int(match[1] or match[2])) < experts:
                yield row, expert, number


def _norms(record: xr.Dataset, group: xr.Dataset | None, kind: str) -> Float[np.ndarray, "step layer expert"]:
    """Return the norm of each expert's matrices together, of those with a value: checkpoints may name others."""
    shape = [record.sizes[name] for name in ("step", "layer", "expert")]
    if group is None:
        return np.full(shape, np.nan)
    norm = group["frobenius_norm"].sel(kind=kind) if kind else group["norm_before_clip"]
    names = norm["matrix"].values.tolist()
    values = norm.reindex(step=record["step"].values).transpose("step", "matrix").values
    squares, counts = np.zeros(shape), np.zeros(shape[1:])
    counted = np.isfinite(values).any(0) & ~np.array(parts_of_sums(names), dtype=bool)
    for layer, expert, matrix in matrices_by_expert(record, names):
        if counted[matrix]:
            squares[:, layer, expert] += values[:, matrix] ** 2
            counts[layer, expert] += 1
    return np.where(counts > 0, np.sqrt(squares), np.nan)


def at_step(routing: xr.Dataset, step: int | None) -> xr.Dataset:
    """Return ``/routing`` at one step, the last one with a load by default.

    Raises:
        ValueError: If it has no such step.
    """
    if step is None:
        present = np.flatnonzero(routing["load"].notnull().any(["layer", "expert"]).values)
        return routing.isel(step=int(present[-1]) if len(present) else -1)
    if step not in routing["step"].values:
        raise ValueError(f"Expected a step with routing, got {step}. There are: {routing['step'].values.tolist()}.")
    return routing.sel(step=step)


def _correlations(load: Float[np.ndarray, "step layer expert"], norms: Float[np.ndarray, "step layer expert"]):
    from scipy import stats  # only where there are experts: it takes longer to import than most runs to analyse

    both = np.isfinite(load) & np.isfinite(norms)
    ranks = [stats.rankdata(np.where(both, one, np.nan), axis=-1, nan_policy="omit") for one in (load, norms)]
    # Ranks from 1 to n have the mean (n + 1)/2, whatever ties there are.
    of_load, of_norm = (np.where(both, rank - (both.sum(-1, keepdims=True) + 1) / 2, 0.0) for rank in ranks)
    size = np.sqrt((of_load**2).sum(-1) * (of_norm**2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((both.sum(-1) >= 3) & (size > 0), (of_load * of_norm).sum(-1) / size, np.nan)
