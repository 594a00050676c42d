"""What records hold of probe samples: the Fisher's K and b, and scores, checked and joined over steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.findings import Finding
from dynamics.schema import Variable
from dynamics.text import encodable

GROUPS: Mapping[str, Mapping[str, Variable]] = {"fisher": schema.FISHER_RECORD, "score": schema.SCORE}
_COORDINATES = ("step", "block", "evaluated_at_step", *schema.SAMPLE_LABELS)
_SPACES = ("tangent", "factor", "weight")
#: Beyond, sums of squares are no numbers any more.
_LARGEST_NUMBER = 1e100


def probe_problems(record: Mapping[str, xr.Dataset]) -> Iterator[tuple[str, str]]:
    """Groups of a record that cannot be used, each with what is wrong with it, in words that go on from its name."""
    for name, known in GROUPS.items():
        if name in record and (problem := next(_problems(record[name], known), None)):
            yield name, f"'{name}' {problem}"


def _problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    fisher = "gram" in known
    labels = dict.fromkeys(schema.SAMPLE_LABELS, ("sample",)) if fisher else {}
    texts = {"block": ("block",), **labels} if fisher else {"task": ("task",)}
    whole = {"step": ("step",), **({"evaluated_at_step": ("step",)} if fisher else {})}
    optional = {"momentum": schema.FISHER_MOMENTUM} if fisher else {"direction": schema.SCORE_DIRECTION}
    stated = {name: variable for name, variable in optional.items() if name in dataset.variables}
    numbers = {name: variable.dims for name, variable in {**known, **stated}.items()}
    for expected, kinds in ((texts, "U"), (whole, "iu"), (numbers, "fiu")):
        for name, dims in expected.items():
            if name not in dataset.variables or dataset[name].dims != dims or dataset[name].dtype.kind not in kinds:
                yield f"lacks {name!r} with the dimensions {dims}"
                return
    if dataset.sizes["step"] != 1:
        yield "is not of one step"
    axis = "block" if fisher else "task"
    names = dataset[axis].values.tolist()
    if len(set(names)) < len(names) or names != encodable(names):
        yield f"has a {axis} whose name is no text, or another's too"
    if any((np.abs(dataset[name].values) > _LARGEST_NUMBER).any() for name in known):
        yield f"has a number beyond {_LARGEST_NUMBER:g}"
    if fisher:
        yield from _gram_problems(dataset)


def _gram_problems(dataset: xr.Dataset) -> Iterator[str]:
    if dataset.sizes["sample"] != dataset.sizes["sample_"] or not dataset.sizes["sample"]:
        yield "has no square K"
        return
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
    if int(dataset["evaluated_at_step"].values[0]) > int(dataset["step"].values[0]):
        yield "was evaluated at a later step"


def joined_fisher(parts: Sequence[xr.Dataset], keep: re.Pattern[str]) -> tuple[xr.Dataset | None, list[Finding]]:
    """K and b of all steps; of those that probed the same samples in the same way as the last one.

    Args:
        parts: One step each, ascending.
        keep: Blocks whose name it finds are kept, and ``global``.
    """
    if not parts:
        return None, []
    same = [part for part in parts if _is_alike(part, parts[-1])]
    found = []
    if len(same) < len(parts):
        steps = [int(part["step"].values[0]) for part in parts if not _is_alike(part, parts[-1])]
        found.append(_other_samples(f"{len(steps)} steps", "the last one", steps))
    whole = xr.concat(same, "step", data_vars="all", coords="minimal", compat="override", join="outer")
    blocks = whole["block"].values.tolist()
    whole = whole.isel(block=[name == schema.GLOBAL or keep.search(name) is not None for name in blocks])
    return whole.assign_attrs(parts[-1].attrs), found


def with_probed(captured: xr.Dataset | None, probed: xr.Dataset | None) -> tuple[xr.Dataset | None, list[Finding]]:
    """K and b of the training's own records and of its probed checkpoints; where both have a step, that of the records.

    Probed checkpoints are left out, with a finding, if they were probed in another way than the records.
    """
    if captured is None or probed is None:
        return (probed if captured is None else captured), []
    if not _is_alike(captured, probed):
        steps = probed["step"].values.tolist()
        return captured, [_other_samples(f"{len(steps)} probed checkpoints", "the records of the training", steps)]
    new = probed.sel(step=~probed["step"].isin(captured["step"].values))
    if not new.sizes["step"]:
        return captured, []
    whole = xr.concat([captured, new], "step", data_vars="all", coords="minimal", compat="override", join="outer")
    # The order of blocks stays that of the records, which the union of names does not keep.
    names = dict.fromkeys([*captured["block"].values.tolist(), *probed["block"].values.tolist()])
    return whole.sel(block=list(names)).sortby("step").assign_attrs(captured.attrs), []


def raw_fisher(tree: xr.DataTree) -> xr.Dataset | None:
    """What a stored result keeps of its probed checkpoints: as :data:`dynamics.schema.FISHER_RECORD` has it."""
    if "probed" in tree.children:
        return tree["probed"].to_dataset().load()
    if "captured" in tree.attrs or "fisher" not in tree.children:
        return None
    fisher, shares = tree["fisher"].to_dataset(), tree["concentration"].to_dataset()
    own = [name for name in schema.FISHER_RECORD if name in fisher]
    found = fisher[own].assign(share_outside_space=shares["share_outside_space"])
    return found.drop_vars([name for name in found.coords if name not in _COORDINATES]).load()


def joined_scores(parts: Sequence[xr.Dataset]) -> xr.Dataset | None:
    """Scores of all steps."""
    return xr.concat(parts, "step", data_vars="all", join="outer") if parts else None


def _other_samples(what: str, reference: str, steps: Sequence[int]) -> Finding:
    return Finding(
        "OD312",
        f"{what} probed other samples, or another space, than {reference}; their Fisher is left out.",
        "Probe the same samples throughout a training.",
        evidence={"steps": list(steps)},
    )


def _is_alike(one: xr.Dataset, other: xr.Dataset) -> bool:
    labels = all(np.array_equal(one[name].values, other[name].values) for name in schema.SAMPLE_LABELS)
    return labels and all(one.attrs.get(name) == other.attrs.get(name) for name in ("space", "fisher", "reduction"))
