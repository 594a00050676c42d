"""Changes in the middle of a training: other parameters trained, other adapters active, scaled, merged or restarted.

Flags and identities are compared without a tensor operation, so that every step can be checked. Only the check whether
base weights were rewritten (ReLoRA merges an adapter and starts it again) reads a few of their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynamics.findings import Finding
from dynamics.text import counted, some
from probes.low_rank import LowRankMatrix
from probes.watched import Watched, WatchedModel, class_names, is_sharded

#: Entries of each base weight that are compared.
_SAMPLES = 128
#: A base weight that differs by more than this many times its rounding has been rewritten: merging an adapter and
#: taking it out again differs by once or twice.
_ROUNDINGS = 64
#: A base weight that differs by less has been rewritten if this is the correlation of its change with what the adapter
#: lost: 128 entries of noise reach it about once in 10⁸.
_CORRELATION = 0.5


class ModelState:
    """What the modules of a model say about its training: parameters and their flags, adapters and their settings.

    It refers to the modules and parameters, so that an identity is never that of a later object.

    >>> model = nn.Linear(2, 2)
    >>> state = ModelState(model)
    >>> state.has_changed()
    False
    >>> _ = model.bias.requires_grad_(False)
    >>> state.has_changed()
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._adapters = [module for module in self._modules if hasattr(module, "_active_adapter")]
        self._parameters = list(model.parameters())
        # FSDP 2 puts gathered parameters in the place of shards for a while.
        self._by_identity = not any(is_sharded(parameter) for parameter in self._parameters)
        self._settings = {id(module): _settings(module) for module in self._adapters}
        self._flags = self._read()
        self.trained = {id(parameter) for parameter in self._parameters if parameter.requires_grad}

    def has_changed(self) -> bool:
        """Return whether the model says something else now."""
        return self._read() != self._flags or list(map(_settings, self._adapters)) != [*self._settings.values()]

    @property
    def parameters(self) -> set[int]:
        """Return the model's parameters, by identity."""
        return {id(parameter) for parameter in self._parameters}

    def rescaled(self, later: ModelState) -> set[int]:
        """Return the parameters (by identity) of adapters whose scale differs later."""
        return self._of_adapters(later, lambda before, after: _other_scales(before.scales, after.scales))

    def merged(self, later: ModelState) -> set[int]:
        """Return the parameters (by identity) of adapters that are merged later, but not now."""
        return self._of_adapters(later, lambda before, after: set(after.merged) - set(before.merged))

    def _of_adapters(self, later: ModelState, names: Callable[[_Settings, _Settings], set[str]]) -> set[int]:
        parameters: set[int] = set()
        for module in self._adapters:
            if id(module) in later._settings:
                adapters = names(self._settings[id(module)], later._settings[id(module)])
                parameters |= {
                    id(parameter)
                    for path, parameter in (module.named_parameters() if adapters else ())
                    if adapters & set(path.split("."))
                }
        return parameters

    def _read(self) -> tuple[list[int], list[bool], list[int]]:
        """Return the children of all modules, and of all parameters their flags and who they are.

        Every training step asks twice, so nothing here is done module by module in Python.
        """
        children, parameters = (
            list(chain.from_iterable(map(methodcaller("values"), map(attrgetter(name), self._modules))))
            for name in ("_modules", "_parameters")
        )
        trainable = [parameter for parameter in parameters if parameter is not None]
        flags = list(map(attrgetter("requires_grad"), trainable))
        return list(map(id, children)), flags, list(map(id, parameters if self._by_identity else ()))


class _Settings(NamedTuple):
    """The settings of an adapter layer (PEFT's).

    Active adapters, merged ones, scales by adapter, whether all are off.
    """

    active: object
    merged: tuple[str, ...]
    scales: tuple[tuple[str, float], ...]
    disabled: bool


def _settings(module: Any) -> _Settings:
    active, scales = module._active_adapter, getattr(module, "scaling", None)
    return _Settings(
        tuple(active) if isinstance(active, list) else active,
        tuple(getattr(module, "merged_adapters", ())),
        tuple(
            (name, s) for name, s in (scales.items() if isinstance(scales, dict) else ()) if isinstance(s, int | float)
        ),
        bool(getattr(module, "_disable_adapters", False)),
    )


def _other_scales(before: Iterable[tuple[str, float]], after: Iterable[tuple[str, float]]) -> set[str]:
    later = dict(after)
    return {name for name, scale in before if name in later and later[name] != scale}


@dataclass(frozen=True)
class Change:
    """What changed in the watched matrices and beside them, by name.

    Args:
        began: Matrices that are trained now but were not.
        ended: Matrices that were trained but are not now.
        switched: Matrices whose active adapters differ now.
        partly: Matrices whose trained factors differ now.
        others: Trainable parameters in no watched matrix that began or ended.
        rescaled: Matrices whose adapters have a different scale now.
        merged: Matrices whose adapters were merged into the base weight.
        restarted: Matrices whose base weight was rewritten.
    """

    began: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    switched: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    rescaled: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(getattr(self, part.name) for part in fields(self))

    def findings(self, step: int, recorded: int) -> Iterator[Finding]:
        """Yield the findings that a user should see.

        Args:
            step: The last step done when the change was noticed.
            recorded: The captured step before it, −1 if there is none.
        """
        since = f"totals count from step {step}, or from the first step that trained them"
        matrices, parameters = ("matrix", "matrices"), ("parameter", "parameters")
        parts = [
            (self.began, matrices, f"training began for {{}}, whose {since}"),
            (self.switched, matrices, f"other adapters are active on {{}}, whose {since}"),
            (self.partly, matrices, "other factors of {} are trained"),
            (self.ended, matrices, "training ended for {}, which later records leave out"),
            (self.others, parameters, "training began or ended for {} outside the watched matrices"),
        ]
        changes = [text.format(_counted(names, *noun)) for names, noun, text in parts if names]
        if changes:
            yield Finding(
                "OD313",
                f"The set of trained parameters changed after step {step}: {'; '.join(changes)}.",
                "Compare the Fisher of all parameters (global) only between steps with the same trained parameters. "
                "Single matrices can be compared throughout.",
                step=step,
                evidence={
                    name: list(names[:20])
                    for name in ("began", "ended", "switched", "partly", "others")
                    if (names := getattr(self, name))
                }
                | {"last_record": recorded},
            )
        lost = "" if recorded == step else f" Their increment since step {recorded} is unknown and left out."
        if self.restarted:
            yield Finding(
                "OD314",
                f"The base weight of {_counted(self.restarted)} was rewritten after the record of step {recorded}, as "
                "by merging an adapter into it and starting the adapter again (ReLoRA). Totals count from step "
                f"{step}.{lost}",
                "Add the totals of the stretches as matrices, not as norms. Capture the steps at which adapters are "
                "merged to keep every increment.",
                step=step,
                evidence={"matrices": len(self.restarted), "names": list(self.restarted[:20])},
            )
        if self.rescaled:
            yield Finding(
                "OD315",
                f"The scale of the adapters of {_counted(self.rescaled)} changed after step {step}. Totals contain the "
                f"change of scale; increments do not.{lost}",
                "Set the scale before training, or read increments.",
                step=step,
                evidence={"matrices": len(self.rescaled), "names": list(self.rescaled[:20])},
            )
        if self.merged:
            yield Finding(
                "OD316",
                f"The adapters of {_counted(self.merged)} are merged into their base weights after step {step} and get "
                "no gradient there. Their recorded updates are still those of their factors.",
                "Call unmerge_adapter() before training continues.",
                step=step,
                evidence={"matrices": len(self.merged), "names": list(self.merged[:20])},
            )


def change_between(
    before: ModelState, after: ModelState, was: WatchedModel, now: WatchedModel, rewritten: Iterable[str] = ()
) -> Change:
    """Return what changed between two states of a model.

    Args:
        before, after: The states.
        was, now: The watched matrices of each.
        rewritten: Matrices whose base weight was rewritten.
    """
    old, new = ({matrix.name: matrix for matrix in model.watched if not matrix.part_of} for model in (was, now))
    both = [name for name in new if name in old]

    def of(parameters: set[int]) -> tuple[str, ...]:
        return tuple(name for name, matrix in new.items() if any(id(p) in parameters for p in matrix.sources))

    return Change(
        began=tuple(name for name in new if name not in old),
        ended=tuple(name for name in old if name not in new),
        switched=tuple(name for name in both if _identities(old[name].sources) != _identities(new[name].sources)),
        partly=tuple(
            name
            for name in both
            if _identities(old[name].sources) == _identities(new[name].sources)
            and any((id(p) in before.trained) != (id(p) in after.trained) for p in new[name].sources)
        ),
        others=tuple(sorted(set(was.uncovered) ^ set(now.uncovered))),
        rescaled=of(before.rescaled(after)),
        merged=of(before.merged(after)),
        restarted=tuple(rewritten),
    )


def _identities(parameters: Iterable[nn.Parameter]) -> list[int]:
    return [id(parameter) for parameter in parameters]


def _counted(names: Sequence[str], noun: str = "matrix", plural: str = "matrices") -> str:
    """Return how many, and the first of them."""
    return f"{counted(len(names), noun, plural)} ({some(names)})"


class BaseWeights:
    """A few entries of the base weight under each adapter, to see whether it was rewritten.

    Weights that are sharded, quantised or on the meta device are skipped, and so are those that an adapter is merged
    into.

    Args:
        model: The model in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._entries: dict[int, tuple[nn.Module, Tensor]] = {}  # by layer
        self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Take entries of new layers, and drop those of layers that are gone."""
        layers = {id(layer): layer for layer in self._model.modules() if "LoraLayer" in class_names(layer)}
        kept = {key: entry for key, entry in self._entries.items() if key in layers}
        new = {key: layer for key, layer in layers.items() if key not in kept and _base_weight(layer) is not None}
        self._entries = kept | {key: (layer, _entries(_base_weight(layer))) for key, layer in new.items()}

    @torch.no_grad()
    def rewritten(self, watched: Sequence[Watched], previous: Callable[[], Mapping[str, LowRankMatrix]]) -> list[str]:
        """Return the names of matrices whose base weight was rewritten, and take its entries anew.

        Args:
            watched: The matrices.
            previous: The sum of the adapters of each matrix at the last captured step.
        """
        weights = [(*entry, _base_weight(entry[0])) for entry in self._entries.values()]
        layers = [(layer, then, weight) for layer, then, weight in weights if weight is not None]
        now = [_entries(weight) for *_, weight in layers]
        if not layers or _equal([then for _, then, _ in layers], now):
            return []
        names: list[str] = []
        products = previous()
        for (layer, then, weight), entries in zip(layers, now, strict=True):
            factors = {id(parameter) for parameter in layer.parameters()}
            adapted = [
                matrix for matrix in watched if not matrix.part_of and any(id(p) in factors for p in matrix.sources)
            ]
            if adapted and _is_rewritten(layer, weight, then, entries, adapted[0], products.get(adapted[0].name)):
                names += [matrix.name for matrix in adapted]
                self._entries[id(layer)] = layer, entries
        return names


def _base_weight(layer: Any) -> Tensor | None:
    """Return the weight under an adapter; ``None`` where an adapter is merged into it or it is not plain numbers."""
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
    if not isinstance(weight, Tensor) or is_sharded(weight) or weight.is_meta or getattr(layer, "merged_adapters", ()):
        return None
    return weight.detach() if weight.is_floating_point() and weight.numel() else None


@lru_cache(maxsize=1000)
def _positions(size: int, device: torch.device) -> Tensor:
    """Return positions in a flattened weight of so many entries; the odd stride goes through all rows and columns."""
    stride = size // _SAMPLES | 1
    return torch.arange(_SAMPLES, device=device) * stride % size


def _entries(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return torch.take(weight, _positions(weight.numel(), weight.device))


def _equal(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Return whether all entries are the same, waiting for each device and format once."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for then, entries in zip(before, now, strict=True):
        if (then.device, then.dtype) != (entries.device, entries.dtype):
            return False
        pair = groups.setdefault((entries.device, entries.dtype), ([], []))
        pair[0].append(then)
        pair[1].append(entries)
    return all(torch.equal(torch.cat(then), torch.cat(entries)) for then, entries in groups.values())


def _is_rewritten(
    layer: nn.Module, weight: Tensor, then: Tensor, now: Tensor, matrix: Watched, previous: LowRankMatrix | None
) -> bool:
    before, after = then.double().to(now.device), now.double()
    change = after - before
    size = float(change.norm())
    if size > _ROUNDINGS * torch.finfo(now.dtype).eps * float(before.norm()):
        return True
    if size == 0 or previous is None or weight.ndim == 3:  # experts in one parameter
        return False
    product = matrix.read()
    assert isinstance(product, LowRankMatrix)
    lost = _product_entries(layer, weight, previous) - _product_entries(layer, weight, product)
    return float(change @ lost) > _CORRELATION * size * float(lost.norm())


def _product_entries(layer: Any, weight: Tensor, product: LowRankMatrix) -> Tensor:
    """Return the product at the positions of the entries, float64."""
    positions, columns = _positions(weight.numel(), weight.device), weight[0].numel()
    row, column = positions // columns, positions % columns
    if "Embedding" in class_names(layer) or getattr(layer, "fan_in_fan_out", False) is True:
        row, column = column, row
    left, right = product.left_factor.detach()[row].double(), product.right_factor.detach()[:, column].double()
    return (left * product.scales().to(left.device) * right.T).sum(1).to(weight.device)
