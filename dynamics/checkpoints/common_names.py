"""One name for one matrix in all checkpoints of a run.

A library that is updated during a training spells names differently afterwards, some ways of saving write tied weights
twice and others once, and an adapter that is only there to be compared with is no part of any sum. Whatever differs
between checkpoints is settled here, before they are compared.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from dynamics.checkpoints.alignment import Size, aligned, expert_forms
from dynamics.checkpoints.base import Base
from dynamics.checkpoints.checkpoint import Content
from dynamics.checkpoints.duplicates import same_tensors
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.matrices import Product
from dynamics.checkpoints.names import natural_order, shown
from dynamics.checkpoints.ties import Tied, embedding_of, equal_keys, tied_everywhere
from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.findings import Finding
from dynamics.text import some

#: Adapters that a training keeps beside the one it trains, or for another model.
_APART = re.compile(
    r"(.*[_-])?(ref|reference|frozen|teacher|critic|value|reward)([_-](policy|model|adapter|head))?", re.IGNORECASE
)


def with_common_names(
    contents: Sequence[Content], steps: Sequence[int], adapters: Sequence[str], base: Base | None
) -> tuple[list[Content], list[Finding]]:
    """The contents of a run's checkpoints under common names, each matrix once, and what was settled.

    Args:
        contents: In ascending order of step.
        steps: Step of each.
        adapters: Names of all adapters of the run.
        base: The weights before training, if they are known.
    """
    findings: list[Finding] = []
    spelled = []
    last = next((content for content in reversed(contents) if content.products), None)
    for content, step in zip(contents, steps, strict=True):
        renamed = content if last is None or content is last else _spelled_like(content, last)
        spelled.append(renamed)
        new = [name for name in renamed.products if name not in content.products]
        if new:
            old = [name for name in content.products if name not in renamed.products]
            findings.append(
                Finding(
                    "OD136",
                    f"{some(old)}: called {some(new)} in the last checkpoint. They are taken for the same, by name and "
                    "shape.",
                    step=step,
                    evidence={"matrices": new, "called": old},
                )
            )
    untied, ties = _each_once(spelled, base)
    parted, sums = _without_false_sums(untied, steps, adapters)
    return parted, [*findings, *ties, *sums]


# --- spelling ------------------------------------------------------------------------------------


def _spelled_like(content: Content, last: Content) -> Content:
    """A checkpoint's matrices under the names of the last checkpoint, where it is clear which is which."""
    products = dict(content.products)
    names: dict[str, str] = {}
    used: set[str] = set()
    for suffix in dict.fromkeys(_suffix(name) for name in last.ranks.keys() | last.products.keys()):
        wanted, held = _sizes(last, suffix), _sizes(content, suffix)
        missing = {name: size for name, size in wanted.items() if name not in held}
        spare = {name: size for name, size in held.items() if name not in wanted}
        if not missing or not spare:
            continue
        shaped = {name: size for name, size in missing.items() if size is not None}
        forms = expert_forms(
            {name: products[f"{name}{suffix}"] for name in spare if f"{name}{suffix}" in products}, shaped
        )
        sizes = {name: size or (0, 0) for name, size in spare.items()}
        sizes |= {name: (form.product.shape.out, form.product.shape.in_) for name, form in forms.items()}
        for new, old in aligned(missing, sizes).items():
            if missing[new] not in (None, sizes[old]):
                continue
            if old in forms:
                products[f"{new}{suffix}"] = forms[old].product
                used |= {f"{part}{suffix}" for part in forms[old].parts}
            else:
                names[f"{old}{suffix}"] = f"{new}{suffix}"
    # What stacks or single experts were made of is not there a second time.
    products = {name: product for name, product in products.items() if name not in used}
    if not names and products.keys() == content.products.keys():
        return content
    renamed = {names.get(name, name): product for name, product in products.items()}
    ranks = {names.get(name, name): rank for name, rank in content.ranks.items()}
    ranks = {name: rank for name, rank in ranks.items() if name in renamed or name not in content.products}
    ranks |= {name: 0 for name in renamed if name not in ranks}
    return replace(
        content,
        products={name: renamed[name] for name in sorted(renamed, key=natural_order)},
        ranks=ranks,
        tied={names.get(name, name): names.get(first, first) for name, first in content.tied.items()},
        sources={names.get(name, name): source for name, source in content.sources.items()},
    )


def _suffix(name: str) -> str:
    stem, at, adapter = name.rpartition("@")
    return f"@{adapter}" if at and stem else ""


def _sizes(content: Content, suffix: str) -> dict[str, Size | None]:
    """Matrices of one adapter without its name, refused ones too, which have no size."""
    names = [name for name in (*content.products, *content.ranks) if _suffix(name) == suffix]
    shapes = {name: content.products[name].shape if name in content.products else None for name in names}
    return {
        name.removesuffix(suffix): None if shape is None else (shape.out, shape.in_) for name, shape in shapes.items()
    }


# --- ties ----------------------------------------------------------------------------------------


def _each_once(contents: Sequence[Content], base: Base | None) -> tuple[list[Content], list[Finding]]:
    """Tied weights once; where training untied them, both wherever they can be told."""
    states: list[tuple[Collection[str], Tied]] = [
        (content.products.keys(), content.tied) for content in contents if content.products
    ]
    pairs = {name: first for _, tied in states for name, first in tied.items()}
    if base is not None and pairs:
        shapes = {name: content.products[name].shape for content in contents for name in content.products}
        states.append(_in_base(base, pairs, shapes))
    one, untied = tied_everywhere(states)
    findings = []
    if one:
        findings.append(
            Finding(
                "OD135",
                f"{some(one)}: the same numbers as {some(dict.fromkeys(one.values()))} wherever both are saved. Tied "
                "weights are one matrix and count once.",
                evidence={"tied": one},
            )
        )
    if untied:
        findings.append(
            Finding(
                "OD135",
                f"{some(untied)}: equal to {some(dict.fromkeys(untied.values()))} in one state, different in another: "
                "training untied them. They count as two matrices.",
                evidence={"untied": untied},
            )
        )
    return [_with_heads(_merged(content, one), contents, one) for content in contents], findings


def _in_base(
    base: Base, pairs: Mapping[str, str], shapes: Mapping[str, MatrixShape]
) -> tuple[set[str], dict[str, str]]:
    """Names of the pairs that the base has, and which of them repeat another one there."""
    matrices = base.find({name: shapes[name] for pair in pairs.items() for name in pair})
    keys = {name: product.key for name, (_, product) in matrices.items() if product.key}
    try:
        equal = equal_keys(base.weights, dict.fromkeys(keys.values()))
    except UnreadableFile:  # reported where its matrices are read
        return set(), {}
    first = {name: equal.get(key, key) for name, key in keys.items()}
    tied = {a: b for a, b in pairs.items() if a in first and b in first and first[a] == first[b]}
    return set(keys), tied


def _merged(content: Content, one: Mapping[str, str]) -> Content:
    """Each tied matrix under the first of its names."""
    if not one.keys() & content.products.keys():
        return content
    products: dict[str, Product] = {}
    for name in sorted(content.products, key=lambda name: name in one):
        products.setdefault(one.get(name, name), content.products[name])
    ordered = {name: products[name] for name in sorted(products, key=natural_order)}
    ranks = {name: rank for name, rank in content.ranks.items() if name not in one}
    return replace(content, products=ordered, ranks=ranks | dict.fromkeys(ordered.keys() - ranks.keys(), 0))


def _with_heads(content: Content, contents: Sequence[Content], one: Mapping[str, str]) -> Content:
    """An output layer that was not saved, since it was still the input embedding, where others have it."""
    if content.ties_head is False or not content.products:
        return content
    shapes = {
        name: product.shape
        for other in contents
        for name, product in other.products.items()
        if name not in content.products and name not in one and product.shape.holds == "weight"
    }
    heads = {name: embedding_of(name, shape, content.products) for name, shape in shapes.items()}
    added = {name: content.products[embedding] for name, embedding in heads.items() if embedding is not None}
    if not added:
        return content
    products = {**content.products, **added}
    ordered = {name: products[name] for name in sorted(products, key=natural_order)}
    return replace(content, products=ordered, ranks={**content.ranks, **dict.fromkeys(added, 0)})


# --- several adapters ----------------------------------------------------------------------------


def _without_false_sums(
    contents: Sequence[Content], steps: Sequence[int], adapters: Sequence[str]
) -> tuple[list[Content], list[Finding]]:
    """No sums of adapters where one of them is a reference: they are never active together."""
    apart = dict(_apart(contents, steps, adapters)) if len(adapters) > 1 else {}
    if not apart:
        return list(contents), []
    names = ", ".join(map(shown, adapters))
    why = "; ".join(f"{shown(name)} {reason}" for name, reason in apart.items())
    message = f"Adapters {names} are given one by one, without their sum: {why}."
    parted = [
        replace(
            content,
            products={name: product for name, product in content.products.items() if _suffix(name)},
            findings=tuple(one for one in content.findings if not one.evidence.get("sum")),
        )
        for content in contents
    ]
    return parted, [Finding("OD121", message, evidence={"adapters": list(adapters), "apart": list(apart)})]


def _apart(contents: Sequence[Content], steps: Sequence[int], adapters: Sequence[str]) -> Iterator[tuple[str, str]]:
    for adapter in adapters:
        if _APART.fullmatch(adapter):
            yield adapter, "is called like an adapter that is only compared with"
            continue
        held = [
            (step, content.files[adapter])
            for step, content in zip(steps, contents, strict=True)
            if adapter in content.files
        ]
        first = held[0][1] if held else None
        if first is not None and len(held) > 1 and all(same_tensors({"": first}, {"": file}) for _, file in held[1:]):
            yield adapter, f"holds the same weights from step {held[0][0]} to {held[-1][0]}"
