r"""One PEFT adapter file → its matrices, and what is refused by name.

**DoRA** needs the base and is no product of thin factors: PEFT's merged weight is \(D\,(W_0 + s B A)\) with
\(D = \mathrm{diag}(m / \lVert (W_0 + s B A)_{i\cdot} \rVert)\) (``DoraLinearVariant.merge_safe``; Liu et al. 2024), so

\[W' - W_0 = (D - I)\,W_0 + s\,D B A.\]

**Saved modules** are trained whole beside an adapter, in its own file (``modules_to_save``) or in another one (LLaVA's
``non_lora_trainables.bin``): dense matrices, whose update needs the base.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.files import TensorInfo, WeightFile, Weights
from dynamics.checkpoints.formats.distributed import DistributedWeights
from dynamics.checkpoints.formats.experts import Level, expert_matrices, targeted
from dynamics.checkpoints.formats.peft_config import (
    NO_SCALE,
    SET_ALPHA,
    AdapterConfig,
    AdapterFile,
    parse_adapter_config,
)
from dynamics.checkpoints.formats.transformers import ShardedWeights, sort_tensors
from dynamics.checkpoints.matrices import (
    FLOATS,
    FileContent,
    Refusal,
    Remark,
    StoredMatrix,
    TensorRef,
    low_rank,
    oriented,
    with_diagonal,
)
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

#: Names of PEFT's files in its own order of preference; the last two if an adapter was sharded.
WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin.index.json",
)
#: Kinds of tensors beside the factors that are weights of the model.
SAVED = ("modules_to_save", "saved weights")
#: Kind of the trained rows of an embedding.
TOKENS = "trainable tokens"
_PAIRS = (("A", "B"), ("embedding_A", "embedding_B"))
#: Parts beside the factors that leave the product as it is (VeLoRA's buffer, MonteCLoRA's sampler).
_BYSTANDERS = ("velora_embed", "monteclora_sampler")
_BASE = "Give the base weights (--base)."
_RENAME = "Save the adapter again from a model whose modules have plain names."
_SAVE = "Save the adapter again, or check that the file and adapter_config.json belong together."


def read_peft(file: AdapterFile) -> FileContent:
    """Return the matrices of an adapter that PEFT wrote, what is refused, and the other tensors.

    Raises:
        UnreadableFile: ``OD102`` if a value of the configuration is missing or not what PEFT accepts.
    """
    config = parse_adapter_config(file.config or {}, has_base=file.base is not None)
    trained = _trained(file.weights)
    content = _read(replace(file, weights=trained), config)
    remarks = (*config.remarks, *content.remarks)
    if frozen := len(file.weights.tensors) - len(trained.tensors):
        text = f"The file holds the whole model: {frozen} tensors beside the adapter are assumed to be frozen."
        remarks = (*remarks, Remark("OD121", text))
    return replace(content, remarks=remarks, settings=config.settings)


def _trained(weights: Weights) -> Weights:
    """Return the weights without what an adapter leaves frozen, if a file holds the whole model with its adapter.

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


def _read(file: AdapterFile, config: AdapterConfig) -> FileContent:
    """Sort the keys of an adapter file into matrices, refusals and the rest."""
    tensors = file.weights.tensors
    parsed = {key: part for key in tensors if (part := parse_key(key)) is not None}
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    beside: dict[str, list[str]] = defaultdict(list)
    doubled: set[str] = set()
    for key in tensors:
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
    ranks = {names[stem]: rank for stem, keys in modules.items() if (rank := _rank(keys, tensors)) is not None}
    slow = config.slow_pattern([module_name(stem) for stem in modules], file.budget)
    whole = config.refusal or slow or _not_an_adapter(tensors, parsed, ranks)
    if whole is not None:
        return FileContent(dict.fromkeys(ranks, whole), refusal=whole, ranks=ranks)
    matrices = {**refused, **_matrices(modules, doubled, names, config, file)}
    if file.base is not None:
        analysed = {name for name, matrix in matrices.items() if isinstance(matrix, StoredMatrix)}
        saved, read = saved_modules(file.weights, beside, taken=analysed)
        matrices |= saved
        beside = {kind: [key for key in keys if key not in read] for kind, keys in beside.items()}
    content = FileContent(
        matrices,
        {kind: tuple(keys) for kind, keys in beside.items() if keys},
        ranks=ranks,
        remarks=_remarks(modules, config),
        moved_start=config.moved_start,
    )
    ordered = sorted(content.readable, key=natural_order)
    sources = {name: source for name in ordered if (source := config.source_of(name)) != name}
    matrices = {**{name: matrices[name] for name in ordered}, **content.refused}
    return replace(content, matrices=matrices, sources=sources)


def _remarks(modules: Iterable[str], config: AdapterConfig) -> tuple[Remark, ...]:
    remarks = []
    if any(stem.endswith(".base_layer.out_proj") for stem in modules):
        text = (
            "nn.MultiheadAttention: PEFT adds the update of out_proj twice, in training as in merging; "
            "the analysed update includes the factor 2."
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
        "The first key is used, as by PEFT when it loads; PEFT sorts the keys when it saves, so training may have used "
        "another."
    )
    return (*remarks, Remark("OD119", text))


def _rank(keys: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> int | None:
    for a, _ in _PAIRS:
        if a in keys and tensors[keys[a]].shape:
            return tensors[keys[a]].shape[0]
    return None


def _kind(key: str, part: AdapterKey | None) -> str:
    """Return what a tensor is that belongs to no product."""
    if part is not None:
        return "lora_bias" if part.leaf == "bias" else "variant state"
    words = key.split(".")
    if "modules_to_save" in words or "original_module" in words:
        return SAVED[0]
    if any(word.startswith("trainable_tokens") for word in words):
        return TOKENS
    return "bias" if words[-1] == "bias" else SAVED[1]


def _not_an_adapter(
    tensors: Mapping[str, TensorInfo], parsed: Mapping[str, AdapterKey], ranks: Mapping[str, int]
) -> Refusal | None:
    if ranks:
        return _several_inside(parsed.values())
    if parsed:
        return None  # lone parts of pairs: each is refused by name
    content = f"{len(tensors)} other tensors" if tensors else "no tensors"
    reason = f"Expected lora_A and lora_B tensors, got {content}: target_modules may have matched nothing."
    return Refusal("OD106", reason, "Check target_modules, and save the adapter again.")


def _several_inside(keys: Iterable[AdapterKey]) -> Refusal | None:
    adapters = sorted({key.adapter for key in keys if key.part in ("A", "B", "embedding_A", "embedding_B")})
    if len(adapters) < 2:
        return None
    reason = f"It holds several adapters in one file ({some(map(repr, map(shown, adapters)))}) but one configuration."
    return Refusal("OD103", reason, "Save each adapter in a folder of its own (PEFT's save_pretrained).")


def _matrices(
    modules: Mapping[str, Mapping[str, str]],
    doubled: set[str],
    names: Mapping[str, str],
    config: AdapterConfig,
    file: AdapterFile,
) -> dict[str, StoredMatrix | Refusal]:
    matrices: dict[str, StoredMatrix | Refusal] = {}
    wrapped: dict[str, list[Level]] = defaultdict(list)
    in_base = {} if file.base is None else file.base.find(_rescaled_shapes(modules, names, config, file.weights))
    for stem, keys in modules.items():
        name = names[stem]
        if stem in doubled:
            matrices[name] = Refusal("OD104", "One of its factors occurs twice.", _SAVE)
            continue
        fault = _fault(keys, file.weights.tensors, config, has_base=file.base is not None)
        if fault is not None:
            matrices[name] = fault
        elif (owner := _owner(stem)) != stem or targeted(config, module_name(owner)):
            depth = (len(stem) - len(owner)) // len(".base_layer")
            wrapped[owner].append(Level(depth, keys["A"], keys["B"]))
        else:
            live_name, module, times = _live_name(stem, name, modules)
            matrix = _product(keys, module, config, file.weights, times)
            if "magnitude_vector" in keys and isinstance(matrix, StoredMatrix) and file.base is not None:
                source = config.source_of(name)
                _, weight = in_base.get(source, ("", None))
                matrix = _dora(matrix, keys["magnitude_vector"], weight, config, file.weights)
                if weight is None and (why := file.base.refused([source]).get(source)):
                    reason = f"It has a DoRA magnitude, and the base does not give its weight. {why.reason}"
                    matrix = Refusal("OD105", reason, why.remedy)
            matrices[live_name] = matrix
    for owner, levels in wrapped.items():
        name = matrix_names([owner])[owner]
        by_depth = sorted(levels, key=lambda level: level.depth)
        matrices |= expert_matrices(module_name(owner), name, by_depth, config, file.weights)
    return matrices


def _owner(stem: str) -> str:
    """Return the module around which PEFT nested its wrappers: the stem without trailing ``.base_layer``."""
    while stem.endswith(".base_layer"):
        stem = stem.removesuffix(".base_layer")
    return stem


def _live_name(stem: str, name: str, modules: Mapping[str, Mapping[str, str]]) -> tuple[str, str, int]:
    """Return the matrix' name, the module by which PEFT looks up rank and alpha, and how often PEFT adds it.

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


def _fault(
    keys: Mapping[str, str], tensors: Mapping[str, TensorInfo], config: AdapterConfig, has_base: bool
) -> Refusal | None:
    """Return what keeps a module's tensors from being a pair of factors; the rank is checked later."""
    pair = next((p for p in _PAIRS if p[0] in keys or p[1] in keys), None)
    if "magnitude_vector" in keys and (not has_base or pair != _PAIRS[0] or config.peft_type != "LORA"):
        return Refusal("OD105", "It has a DoRA magnitude: the update rescales the base weight.", _BASE)
    if pair is None:
        return Refusal("OD103", f"It has only lora_{', lora_'.join(sorted(keys))}: no LoRA factors.", _SAVE)
    for factor, partner in (pair, pair[::-1]):
        if partner not in keys:
            return Refusal("OD104", f"It has lora_{factor}, but no lora_{partner}.", _SAVE)
    plain = {*pair, "E"} if config.peft_type == "ADALORA" else {*pair, "magnitude_vector"}
    further = sorted(set(keys) - plain)
    if further:
        return Refusal("OD103", f"Beside its factors it has lora_{', lora_'.join(further)}: no plain product.", _SAVE)
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
    keys: Mapping[str, str], module: str, config: AdapterConfig, weights: Weights, times: int
) -> StoredMatrix | Refusal:
    a, b = next((keys[a], keys[b]) for a, b in _PAIRS if a in keys)
    shape_a, shape_b = weights.tensors[a].shape, weights.tensors[b].shape
    rank, inner = shape_a[0], shape_b[1]
    if len(shape_a) > 2 and rank != inner and rank % inner == 0:
        reason = (
            f"lora_A {list(shape_a)} and lora_B {list(shape_b)} belong to a grouped convolution: no single product."
        )
        return Refusal("OD103", reason, "Grouped convolutions are not analysed.")
    if rank != inner or any(size != 1 for size in shape_b[2:]):
        return Refusal("OD104", f"lora_A {list(shape_a)} and lora_B {list(shape_b)} do not multiply.", _SAVE)
    if config.peft_type == "ADALORA":
        return _adalora(keys, module, config, weights)
    expected = config.rank_of(module, stored=rank)
    if rank != expected:
        reason = f"The configuration gives it rank {expected}, its factors have rank {rank}."
        return Refusal("OD104", reason, "Correct r or rank_pattern in adapter_config.json: the scale depends on it.")
    scale = times * config.scale_of(module, stored=rank)
    return low_rank(weights, a, b, scale) if scale else Refusal("OD102", NO_SCALE.format("alpha_pattern"), SET_ALPHA)


def _adalora(keys: Mapping[str, str], module: str, config: AdapterConfig, weights: Weights) -> StoredMatrix | Refusal:
    tensors = weights.tensors
    rank = tensors[keys["A"]].shape[0]
    if "E" not in keys or tensors[keys["E"]].shape != (rank, 1):
        return Refusal("OD104", "AdaLoRA's lora_E is missing or does not fit its lora_A.", _SAVE)
    if rank > config.rank:
        reason = f"The configuration's init_r is {config.rank}, its factors have rank {rank}."
        return Refusal("OD104", reason, "Correct init_r in adapter_config.json: the scale depends on it.")
    return with_diagonal(weights, keys["A"], keys["B"], keys["E"], config.scale_of(module))


# --- DoRA -------------------------------------------------------------------------------------------------------------


def _rescaled_shapes(
    modules: Mapping[str, Mapping[str, str]], names: Mapping[str, str], config: AdapterConfig, weights: Weights
) -> dict[str, MatrixShape]:
    """Return the shapes of the base weights that DoRA's matrices need, by name."""
    shapes = {}
    for stem, keys in modules.items():
        if "magnitude_vector" in keys and {"A", "B"} <= keys.keys():
            a, b = weights.tensors[keys["A"]], weights.tensors[keys["B"]]
            if a.shape and b.shape:
                in_ = a.count // max(a.shape[0], 1)
                shapes[config.source_of(names[stem])] = MatrixShape(b.shape[0], in_, a.shape[0], "F32")
    return shapes


def _dora(
    product: StoredMatrix, key: str, base: StoredMatrix | None, config: AdapterConfig, weights: Weights
) -> StoredMatrix | Refusal:
    """Return DoRA's update, given s B A, the key of its magnitude, and the base weight, which it rescales."""
    shape, info = product.shape, weights.tensors[key]
    weight = None if base is None else oriented(base, shape, config.fan_in_fan_out)
    if weight is None:
        size = (shape.out, shape.in_)
        lacks = "has no such weight" if base is None else f"has {(base.shape.out, base.shape.in_)} for its {size}"
        return Refusal("OD105", f"It has a DoRA magnitude, and the base {lacks}.", "Pass the base of its training.")
    if info.count != shape.out or info.dtype not in FLOATS:
        reason = f"Its DoRA magnitude has shape {list(info.shape)}, not one length for each row."
        return Refusal("OD104", reason, _SAVE)
    sources = {"weight": weight, "matrix": product, "magnitude": TensorRef(weights.path, key)}
    return StoredMatrix(MatrixShape(shape.out, shape.in_, 0, shape.dtype), sources, _rescaled)


def _rescaled(weight: Tensor, matrix: LowRankMatrix, magnitude: Tensor) -> Tensor:
    return dora_update(weight, matrix, magnitude.flatten())


#: Rows that are worked on at once, so that little memory is needed beside the result.
_ROWS = 512


def dora_update(
    weight: Float[Tensor, "out in"], matrix: LowRankMatrix, magnitude: Float[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    """Return W' − W₀ in float64, without the cancellation of two almost equal weights.

    Args:
        weight: The base weight.
        matrix: s B A.
        magnitude: DoRA's m, one length for each row.

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
        length = magnitude[rows, None].to(torch.float64)
        update[rows] = (length - norm) / norm * before + length / norm * change
    return update


# --- saved modules ----------------------------------------------------------------------------------------------------


def saved_modules(
    weights: Weights, beside: Mapping[str, Sequence[str]], taken: Collection[str]
) -> tuple[dict[str, StoredMatrix], frozenset[str]]:
    """Return the trained weights of two or more dimensions beside an adapter's factors, and the keys they are made of.

    PEFT writes ``classifier.weight`` or ``classifier.modules_to_save.weight``, in whole states
    ``classifier.modules_to_save.default.weight``; what it calls ``original_module`` is the frozen original. If two
    tensors would get one name, both are left out.

    Args:
        weights: The file.
        beside: Kind of tensor to keys, as in ``FileContent.beside``.
        taken: Names of the adapter's own matrices: a weight saved beneath its adapter is the frozen one.
    """
    keys = [key for kind in SAVED for key in beside.get(kind, ()) if "original_module" not in key.split(".")]
    adapters = {part.adapter for key in weights.tensors if (part := parse_key(key)) is not None and part.adapter}
    wrappers = [*(f".modules_to_save.{adapter}" for adapter in sorted(adapters)), ".modules_to_save"]
    stems = {key: _without(key.removesuffix(".weight"), wrappers) for key in keys}
    matrix_of = matrix_names(stems.values())
    names = {key: matrix_of[stem] for key, stem in stems.items()}
    # With save_embedding_layers PEFT writes a saved module a second time, under the module's plain name.
    wrapped = {names[key] for key, stem in stems.items() if stem != key.removesuffix(".weight")}
    twice = {key: name for key, name in names.items() if name in wrapped and stems[key] == key.removesuffix(".weight")}
    names = {key: name for key, name in names.items() if key not in twice}
    counts = Counter(names.values())
    free = {key: name for key, name in names.items() if counts[name] == 1 and name not in taken}
    by_key = {key: sort_tensors(weights, {key: name}).readable for key, name in free.items()}
    matrices = {name: matrix for of_key in by_key.values() for name, matrix in of_key.items()}
    read = {
        *(key for key, of_key in by_key.items() if of_key),
        *(key for key, name in twice.items() if name in matrices),
    }
    return matrices, frozenset(read)


def _without(stem: str, wrappers: Sequence[str]) -> str:
    """Return a stem without what PEFT puts into the name of a saved module, the adapter's name included."""
    words = f"{stem}."
    wrapper = next((wrapper for wrapper in wrappers if f"{wrapper}." in words), None)
    return stem if wrapper is None else words.replace(f"{wrapper}.", ".", 1)[:-1]
