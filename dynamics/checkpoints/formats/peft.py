r"""Keys and configuration of one PEFT adapter file → its matrices, and what is refused by name.

DoRA with its base: the whole change of the weight, which is no product of thin factors.

PEFT's merged weight is \(D\,(W_0 + s B A)\) with \(D = \mathrm{diag}(m / \lVert (W_0 + s B A)_{i\cdot} \rVert)\)
(``DoraLinearVariant.merge_safe``; Liu et al. 2024), so that

\[W' - W_0 = (D - I)\,W_0 + s\,D B A.\]

Modules that are trained whole beside an adapter: dense matrices, where there is a base.

``modules_to_save`` in the adapter's own file, and files beside it, such as LLaVA's ``non_lora_trainables.bin``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.base import UNPACKED, Base, fitted
from dynamics.checkpoints.files import Loader, TensorInfo, WeightFile, Weights
from dynamics.checkpoints.formats.distributed import DistributedWeights
from dynamics.checkpoints.formats.experts import Level, expert_products, targeted
from dynamics.checkpoints.formats.foreign import describe, is_adapter
from dynamics.checkpoints.formats.peft_config import NO_SCALE, SET_ALPHA, AdapterConfig, Budget
from dynamics.checkpoints.formats.transformers import ShardedWeights, sort_tensors
from dynamics.checkpoints.formats.variants import Refusal, Remark
from dynamics.checkpoints.matrices import FLOATS, Product, diagonal, plain
from dynamics.checkpoints.names import (
    AdapterKey,
    matrix_names,
    module_name,
    name_fault,
    natural_order,
    parse_key,
    shown,
)
from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.text import some
from probes.low_rank import LowRankMatrix

_PAIRS = (("A", "B"), ("embedding_A", "embedding_B"))
#: Parts beside the factors that leave the product as it is (VeLoRA's buffer, MonteCLoRA's sampler).
_BYSTANDERS = ("velora_embed", "monteclora_sampler")
_BASE = "Give the base weights (--base)."
_RENAME = "Save the adapter again from a model whose modules have plain names."
_SAVE = "Save the adapter again, or check that the file and adapter_config.json belong together."


@dataclass(frozen=True)
class Adapter:
    """What one adapter file holds.

    Args:
        products: Name of the matrix to its product, in the model's order.
        refused: Name of the matrix to the reason why it is not analysed.
        beside: Kind of other tensors to their keys (biases, saved modules, ...).
        refusal: Why the whole adapter is not analysed, if so.
        ranks: Rank of every matrix that has factors, refused or not, by name.
        remarks: How its products are to be read.
        sources: Name of the matrix to the base's name of it, where the two differ since layers are repeated.
        moved_start: As in the configuration.
    """

    products: Mapping[str, Product] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refusal: Refusal | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    moved_start: str = ""


def read_adapter(
    file: Weights, config: AdapterConfig, base: Base | None = None, budget: Budget | None = None
) -> Adapter:
    """Sorts the keys of an adapter file into matrices, refusals and the rest.

    Args:
        file: The weight file's header.
        config: Its configuration.
        base: The weights before training: DoRA needs them, and only with them saved modules have an update.
        budget: What matching the configuration's patterns may cost, with those of the run's other adapters.
    """
    parsed = {key: part for key in file.tensors if (part := parse_key(key)) is not None}
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    beside: dict[str, list[str]] = defaultdict(list)
    doubled: set[str] = set()
    for key in file.tensors:
        part = parsed.get(key)
        if part is None or part.leaf == "bias" or part.part in _BYSTANDERS:
            beside[_kind(key, part)].append(key)
        elif part.part in modules[part.stem]:
            doubled.add(part.stem)
        else:
            modules[part.stem][part.part] = key
    names = matrix_names(modules)
    faults = {stem: fault for stem, name in names.items() if (fault := name_fault(name)) is not None}
    refused = {shown(names[stem]): Refusal("OD104", fault, _RENAME) for stem, fault in faults.items()}
    modules = {stem: keys for stem, keys in modules.items() if stem not in faults}
    ranks = {names[stem]: rank for stem, keys in modules.items() if (rank := _rank(keys, file.tensors)) is not None}
    slow = config.slow_pattern([module_name(stem) for stem in modules], Budget() if budget is None else budget)
    whole = config.refusal or slow or _not_an_adapter(file, parsed, ranks, config)
    if whole is not None:
        return Adapter(refusal=whole, refused=dict.fromkeys(ranks, whole), ranks=ranks)
    products, unfit = _products(modules, doubled, names, config, file.tensors, base)
    if base is not None:
        saved = saved_modules(beside, file.tensors, taken=products)
        products |= saved.products
        beside = {kind: [key for key in keys if key not in saved.keys] for kind, keys in beside.items()}
    ordered = sorted(products, key=natural_order)
    products = {name: products[name] for name in ordered}
    sources = {name: source for name in products if (source := config.source_of(name)) != name}
    remarks = _remarks(modules, config)
    return Adapter(products, {**refused, **unfit}, _frozen(beside), None, ranks, remarks, sources, config.moved_start)


def _remarks(modules: Iterable[str], config: AdapterConfig) -> tuple[Remark, ...]:
    remarks = []
    if any(stem.endswith(".base_layer.out_proj") for stem in modules):
        text = (
            "nn.MultiheadAttention: PEFT adds the update of out_proj twice, in training as in merging; "
            "the update analysed includes the factor 2."
        )
        remarks.append(Remark("OD121", text))
    if config.layers:
        text = (
            "Layers of the base are repeated (layer_replication): each copy is compared with the layer it is made of."
        )
        remarks.append(Remark("OD121", text))
    ambiguous = {stem: alphas for stem in modules if (alphas := config.ambiguous_alphas(module_name(stem)))}
    if not ambiguous:
        return tuple(remarks)
    alphas = next(iter(ambiguous.values()))
    text = (
        f"Several keys of alpha_pattern match {some(map(module_name, ambiguous))} "
        f"(alpha {' or '.join(f'{alpha:g}' for alpha in alphas)} for the first). "
        "The first is used, as by PEFT when it loads; PEFT sorts them when it saves, so training may have used another."
    )
    return (*remarks, Remark("OD119", text))


def _frozen(lists: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(keys) for kind, keys in lists.items() if keys}


def _rank(keys: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> int | None:
    for a, _ in _PAIRS:
        if a in keys and tensors[keys[a]].shape:
            return tensors[keys[a]].shape[0]
    return None


def _kind(key: str, part: AdapterKey | None) -> str:
    """What a tensor is that belongs to no product."""
    if part is not None:
        return "lora_bias" if part.leaf == "bias" else "variant state"
    words = key.split(".")
    if "modules_to_save" in words or "original_module" in words:
        return SAVED[0]
    if any(word.startswith("trainable_tokens") for word in words):
        return TOKENS
    return "bias" if words[-1] == "bias" else SAVED[1]


def _not_an_adapter(
    file: Weights, parsed: Mapping[str, AdapterKey], ranks: Mapping[str, int], config: AdapterConfig
) -> Refusal | None:
    if ranks:
        return _several_inside(parsed.values())
    what = describe(file.tensors)
    if what is not None:
        reason = f"It is {what}, although its configuration says {config.peft_type}."
        return Refusal("OD103", reason, "Put the configuration and the weights of one adapter together.")
    if parsed:
        return None  # lone parts of pairs: each is refused by name
    held = f"{len(file.tensors)} other tensors" if file.tensors else "no tensors"
    reason = f"Expected lora_A and lora_B tensors, got {held}: target_modules may have matched nothing."
    return Refusal("OD106", reason, "Check target_modules, and save the adapter again.")


def _several_inside(keys: Iterable[AdapterKey]) -> Refusal | None:
    adapters = sorted({key.adapter for key in keys if key.part in ("A", "B", "embedding_A", "embedding_B")})
    if len(adapters) < 2:
        return None
    reason = f"It holds several adapters in one file ({some(map(repr, map(shown, adapters)))}) but one configuration."
    return Refusal("OD103", reason, "Save each adapter in a folder of its own (PEFT's save_pretrained).")


def _products(
    modules: Mapping[str, Mapping[str, str]],
    doubled: set[str],
    names: Mapping[str, str],
    config: AdapterConfig,
    tensors: Mapping[str, TensorInfo],
    base: Base | None,
) -> tuple[dict[str, Product], dict[str, Refusal]]:
    products: dict[str, Product] = {}
    refused: dict[str, Refusal] = {}
    wrapped: dict[str, list[Level]] = defaultdict(list)
    found = {} if base is None else base.find(_rescaling(modules, names, config, tensors))
    for stem, keys in modules.items():
        name = names[stem]
        if stem in doubled:
            refused[name] = Refusal("OD104", "One of its factors occurs twice.", _SAVE)
            continue
        fault = _fault(keys, tensors, config, has_base=base is not None)
        if fault is not None:
            refused[name] = fault
        elif (owner := _owner(stem)) != stem or targeted(config, module_name(owner)):
            depth = (len(stem) - len(owner)) // len(".base_layer")
            wrapped[owner].append(Level(depth, keys["A"], keys["B"]))
        else:
            name, module, times = _live_name(stem, name, modules)
            built = _product(keys, module, config, tensors, times)
            if "magnitude_vector" in keys and isinstance(built, Product) and base is not None:
                source = config.source_of(names[stem])
                _, before = found.get(source, ("", None))
                built = _rescaled(built, keys["magnitude_vector"], before, config, tensors)
                if before is None and (why := base.refused([source]).get(source)):
                    reason = f"It has a DoRA magnitude, and the base does not give its weight. {why}"
                    built = Refusal("OD105", reason, UNPACKED)
            (refused if isinstance(built, Refusal) else products)[name] = built  # type: ignore[assignment]
    for owner, levels in wrapped.items():
        name = matrix_names([owner])[owner]
        by_depth = sorted(levels, key=lambda level: level.depth)
        built = expert_products(module_name(owner), name, by_depth, config, tensors)
        if isinstance(built, Refusal):
            refused[name] = built
        else:
            products |= built
    return products, refused


def _owner(stem: str) -> str:
    """The module around which PEFT nested its wrappers: the stem without trailing ``.base_layer``."""
    while stem.endswith(".base_layer"):
        stem = stem.removesuffix(".base_layer")
    return stem


def _live_name(stem: str, name: str, modules: Mapping[str, Mapping[str, str]]) -> tuple[str, str, int]:
    """Name of the matrix, name of the module by which PEFT looks up rank and alpha, how often PEFT adds it.

    ``nn.MultiheadAttention`` is adapted as a whole: its own factors belong to ``in_proj_weight``, and
    those of ``base_layer.out_proj`` take rank and alpha from the attention module. PEFT adds the latter
    twice, in training as in merging (``MultiheadAttention.merge``, seen in 0.21).
    """
    outer, inside, _ = stem.partition(".base_layer.")
    if inside and outer in modules:
        return name, module_name(outer), 2
    if f"{stem}.base_layer.out_proj" in modules:
        return f"{name}.in_proj_weight", module_name(stem), 1
    return name, module_name(stem), 1


def _rescaling(
    modules: Mapping[str, Mapping[str, str]],
    names: Mapping[str, str],
    config: AdapterConfig,
    tensors: Mapping[str, TensorInfo],
) -> dict[str, MatrixShape]:
    """The base weights that DoRA's matrices need, by name."""
    shapes = {}
    for stem, keys in modules.items():
        if "magnitude_vector" in keys and {"A", "B"} <= keys.keys():
            shape_a, shape_b = tensors[keys["A"]].shape, tensors[keys["B"]].shape
            if shape_a and shape_b:
                in_ = tensors[keys["A"]].count // max(shape_a[0], 1)
                shapes[config.source_of(names[stem])] = MatrixShape(shape_b[0], in_, shape_a[0], "F32")
    return shapes


def _rescaled(
    product: Product, magnitude: str, base: Product | None, config: AdapterConfig, tensors: Mapping[str, TensorInfo]
) -> Product | Refusal:
    """DoRA's update, which rescales the base weight."""
    weight = None if base is None else fitted(base, product.shape, config.fan_in_fan_out)
    if weight is None:
        shape = (product.shape.out, product.shape.in_)
        lacks = "has no such weight" if base is None else f"has {(base.shape.out, base.shape.in_)} for its {shape}"
        return Refusal("OD105", f"It has a DoRA magnitude, and the base {lacks}.", "Pass the base of its training.")
    if tensors[magnitude].count != product.shape.out or tensors[magnitude].dtype not in FLOATS:
        reason = f"Its DoRA magnitude has shape {list(tensors[magnitude].shape)}, not one length for each row."
        return Refusal("OD104", reason, _SAVE)
    return dora(product, magnitude, weight)


def _fault(
    keys: Mapping[str, str], tensors: Mapping[str, TensorInfo], config: AdapterConfig, has_base: bool
) -> Refusal | None:
    """What keeps a module's tensors from being a pair of factors; the configuration's rank comes later."""
    pair = next((p for p in _PAIRS if p[0] in keys or p[1] in keys), None)
    if "magnitude_vector" in keys and (not has_base or pair != _PAIRS[0] or config.peft_type != "LORA"):
        return Refusal("OD105", "It has a DoRA magnitude: the update rescales the base weight.", _BASE)
    if pair is None:
        return Refusal("OD103", f"It has only lora_{', lora_'.join(sorted(keys))}: no LoRA factors.", _SAVE)
    for one, other in (pair, pair[::-1]):
        if other not in keys:
            return Refusal("OD104", f"lora_{one} is there without lora_{other}.", _SAVE)
    known = {*pair, "E"} if config.peft_type == "ADALORA" else {*pair, "magnitude_vector"}
    odd = sorted(set(keys) - known)
    if odd:
        return Refusal("OD103", f"Beside its factors it has lora_{', lora_'.join(odd)}: no plain product.", _SAVE)
    for part in (*pair, *(("E",) if "E" in keys else ())):
        info = tensors[keys[part]]
        if info.dtype not in FLOATS:
            reason = f"lora_{part} is stored as {info.dtype}: packed or quantised factors are not analysed."
            return Refusal("OD103", reason, "Save the adapter in float32, float16 or bfloat16.")
        if len(info.shape) < 2 or info.count == 0:
            reason = f"lora_{part} has shape {list(info.shape)}: not gathered before saving, or pruned away."
            return Refusal("OD104", reason, "Gather sharded parameters (ZeRO-3, FSDP) before saving.")
    return None


def _product(
    keys: Mapping[str, str], module: str, config: AdapterConfig, tensors: Mapping[str, TensorInfo], times: int
) -> Product | Refusal:
    a, b = next((keys[a], keys[b]) for a, b in _PAIRS if a in keys)
    shape_a: tuple[int, ...] = tensors[a].shape
    shape_b: tuple[int, ...] = tensors[b].shape
    rank, inner = shape_a[0], shape_b[1]
    if len(shape_a) > 2 and rank != inner and rank % inner == 0:
        reason = f"lora_A {list(shape_a)} and lora_B {list(shape_b)} are of a grouped convolution: no single product."
        return Refusal("OD103", reason, "Grouped convolutions are not analysed.")
    if rank != inner or any(size != 1 for size in shape_b[2:]):
        return Refusal("OD104", f"lora_A {list(shape_a)} and lora_B {list(shape_b)} do not multiply.", _SAVE)
    if config.peft_type == "ADALORA":
        return _adalora(keys, module, config, tensors)
    expected = config.rank_of(module, stored=rank)
    if rank != expected:
        reason = f"The configuration gives it rank {expected}, its factors have rank {rank}."
        return Refusal("OD104", reason, "Correct r or rank_pattern in adapter_config.json: the scale depends on it.")
    scale = times * config.scale_of(module, stored=rank)
    return plain(a, b, tensors, scale) if scale else Refusal("OD102", NO_SCALE.format("alpha_pattern"), SET_ALPHA)


def _adalora(
    keys: Mapping[str, str], module: str, config: AdapterConfig, tensors: Mapping[str, TensorInfo]
) -> Product | Refusal:
    rank = tensors[keys["A"]].shape[0]
    if "E" not in keys or tensors[keys["E"]].shape != (rank, 1):
        return Refusal("OD104", "AdaLoRA's lora_E is missing or does not fit its lora_A.", _SAVE)
    if rank > config.rank:
        reason = f"The configuration's init_r is {config.rank}, its factors have rank {rank}."
        return Refusal("OD104", reason, "Correct init_r in adapter_config.json: the scale depends on it.")
    return diagonal(keys["A"], keys["B"], keys["E"], tensors, config.scale_of(module))


#: Rows that are worked on at once; what is needed beside the result stays small.
_ROWS = 512


def dora_update(
    weight: Float[Tensor, "out in"], matrix: LowRankMatrix, magnitude: Float[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    """W' − W₀ in float64, without the cancellation of two almost equal weights.

    Args:
        weight: The base weight.
        matrix: s B A.
        magnitude: DoRA's m, one length a row.

    >>> update = dora_update(torch.eye(2), LowRankMatrix(torch.zeros(2, 1), torch.ones(1, 2)), torch.tensor([1.0, 3.0]))
    >>> update.tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    update = torch.empty(weight.shape, dtype=torch.float64)
    left, right = matrix.left, matrix.right
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        before, change = weight[rows].to(torch.float64), left[rows] @ right
        norm = torch.linalg.vector_norm(before + change, dim=1, keepdim=True)
        wanted = magnitude[rows, None].to(torch.float64)
        update[rows] = (wanted - norm) / norm * before + wanted / norm * change
    return update


def dora(product: Product, magnitude: str, base: Product) -> Product:
    """The update of one matrix from its factors, its magnitude and its base weight.

    Args:
        product: s B A.
        magnitude: Key of DoRA's magnitude.
        base: The base weight, of the same shape.
    """
    shape = product.shape
    full = MatrixShape(shape.out, shape.in_, 0, shape.dtype)
    return Product(full, partial(_load_dora, product, magnitude, base), uses_base=True)


def _load_dora(product: Product, magnitude: str, base: Product, load: Loader) -> Tensor:
    matrix = product.build(load)
    weight = base.build(lambda key: load(f"\0{key}"))
    assert isinstance(matrix, LowRankMatrix)
    assert isinstance(weight, Tensor)
    return dora_update(weight, matrix, load(magnitude).flatten())


#: Kinds of tensors beside the factors that are weights of the model.
SAVED = ("modules_to_save", "saved weights")
#: Kind of the trained rows of an embedding.
TOKENS = "trainable tokens"
_EMA = re.compile(r"(^|[-_.])ema([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class SavedModules:
    """Saved modules as matrices.

    Args:
        products: Name of the matrix to how it is read.
        keys: Keys of the tensors that they are read from.
    """

    products: Mapping[str, Product]
    keys: frozenset[str]


def saved_modules(
    beside: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorInfo], taken: Collection[str]
) -> SavedModules:
    """Of the tensors beside an adapter's factors, those that are trained weights of two or more dimensions.

    PEFT writes ``classifier.weight`` or ``classifier.modules_to_save.weight``, in whole states
    ``classifier.modules_to_save.default.weight``; what it calls ``original_module`` is the frozen original. A name that
    two tensors would get is left to neither.

    Args:
        beside: Kind of tensor to keys, as in ``Adapter.beside``.
        tensors: Header of the file.
        taken: Names of the adapter's own matrices: a weight saved beneath its adapter is the frozen one.
    """
    keys = [key for kind in SAVED for key in beside.get(kind, ()) if "original_module" not in key.split(".")]
    adapters = {part.adapter for key in tensors if (part := parse_key(key)) is not None and part.adapter}
    wrappers = [*(f".modules_to_save.{adapter}" for adapter in sorted(adapters)), ".modules_to_save"]
    stems = {key: _without(key.removesuffix(".weight"), wrappers) for key in keys}
    named = matrix_names(stems.values())
    names = {key: named[stem] for key, stem in stems.items()}
    # With save_embedding_layers PEFT writes a saved module a second time, under the module's plain name.
    saved = {names[key] for key, stem in stems.items() if stem != key.removesuffix(".weight")}
    twice = {key: name for key, name in names.items() if name in saved and stems[key] == key.removesuffix(".weight")}
    names = {key: name for key, name in names.items() if key not in twice}
    counted = Counter(names.values())
    free = {key: name for key, name in names.items() if counted[name] == 1 and name not in taken}
    sorted_ = {key: sort_tensors({name: (key, tensors[key])}).products for key, name in free.items()}
    products = {name: product for own in sorted_.values() for name, product in own.items()}
    read = {*(key for key, own in sorted_.items() if own), *(key for key, name in twice.items() if name in products)}
    return SavedModules(products, frozenset(read))


def _without(stem: str, wrappers: Sequence[str]) -> str:
    """A stem without what PEFT puts into the name of a saved module; the adapter's name where whole states have it."""
    words = f"{stem}."
    wrapper = next((wrapper for wrapper in wrappers if f"{wrapper}." in words), None)
    return stem if wrapper is None else words.replace(f"{wrapper}.", ".", 1)[:-1]


def of_trained(weights: Weights) -> Weights:
    """Return the weights without what an adapter leaves frozen, where a file holds the whole model with its adapter.

    DeepSpeed's ``zero_to_fp32.py`` and FSDP's full state write such files: ``q_proj.base_layer.weight`` beside
    ``q_proj.lora_A.default.weight``, for every adapted module. Of the other tensors only ``modules_to_save`` are
    trained.
    """
    stems = {part.stem for key in weights.tensors if (part := parse_key(key)) is not None and part.part == "A"}
    if not stems or not all(f"{stem}.base_layer.weight" in weights.tensors for stem in stems):
        return weights
    assert isinstance(weights, WeightFile | ShardedWeights | DistributedWeights)
    trained = {
        key: info
        for key, info in weights.tensors.items()
        if ".lora_" in key or ".modules_to_save." in key or ".token_adapter.trainable_tokens" in key
    }
    return replace(weights, tensors=trained)


def beside_kind(path: Path, tensors: Collection[str], analysed: Collection[str]) -> str | None:
    """What a file beside the analysed weights is, if it is a copy of them or another form; ``None`` if it was trained.

    Args:
        path: The file.
        tensors: Its keys.
        analysed: Names of the matrices that are analysed.
    """
    if is_adapter(tensors):
        return "an adapter (a further one, or the same in another format)"
    if _EMA.search(path.name):
        return "an average of weights (EMA)"
    stems = {stem.removesuffix(".weight") for stem in matrix_names(tensors)}
    names = set(matrix_names(stems).values())
    plain = {name.partition("@")[0] for name in analysed}
    return "a whole model (merged, in another format, or a further one)" if names & plain else None
