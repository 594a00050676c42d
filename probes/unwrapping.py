"""From a model as it is trained to the model as it was built: what wraps it, and its names without the wrappers.

Wrappers are recognised by what they are, not by what they are called: a model may have a submodule ``module`` itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

#: Child under which a wrapper keeps what it wraps, by the name of the wrapper's class.
_AROUND = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
_INSIDE = {**_AROUND, "CheckpointWrapper": "_checkpoint_wrapped_module"}


def class_names(module: nn.Module) -> set[str]:
    """Names of a module's classes, base classes included."""
    return {parent.__name__ for parent in type(module).__mro__}


def base_model(model: nn.Module) -> nn.Module:
    """The model inside DDP, ``torch.compile`` and PEFT, whose names are the live base model's.

    Raises:
        ValueError: For FSDP 1, which keeps flattened pieces of parameters instead of matrices.

    >>> inner = nn.Linear(2, 2)
    >>> base_model(nn.DataParallel(inner)) is inner
    True
    """
    while True:
        names = class_names(model)
        if "FullyShardedDataParallel" in names:
            raise ValueError(
                "Expected a model whose parameters are matrices, got one wrapped by FullyShardedDataParallel (FSDP 1), "
                "which flattens them. Use FSDP 2 (torch.distributed.fsdp.fully_shard; accelerate: fsdp_version: 2)."
            )
        if "DeepSpeedEngine" in names:
            model = model.module  # pyright: ignore[reportAssignmentType]
        elif "PeftModel" in names or "PeftMixedModel" in names:
            model = model.base_model  # pyright: ignore[reportAssignmentType]
        elif "BaseTuner" in names:
            model = model.model  # pyright: ignore[reportAssignmentType]
        elif wrapper := names & _AROUND.keys():
            model = getattr(model, _AROUND[min(wrapper)])
        else:
            return model


def parents(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """Each module on the way to ``path``, with the next word of the path.

    >>> [word for _, word in parents(nn.Sequential(nn.Linear(1, 1)), "0.weight")]
    ['0', 'weight']
    """
    module: object = model
    for word in path.split("."):
        if not isinstance(module, nn.Module):
            return
        yield module, word
        module = getattr(module, word, None)


def plain_path(model: nn.Module, path: str) -> str:
    """A path inside the base model without the words that wrappers put there.

    Left out are ``_orig_mod`` (``torch.compile`` of a submodule), checkpoint wrappers, PEFT's ``base_layer``, and
    ``modules_to_save.<adapter>``.
    """
    words: list[str] = []
    skip = 0
    for module, word in parents(model, path):
        if skip:
            skip -= 1
            continue
        names = class_names(module)
        if any(word == child for wrapper, child in _INSIDE.items() if wrapper in names):
            continue
        if word == "base_layer" and "BaseTunerLayer" in names:
            continue
        if word == "modules_to_save" and "AuxiliaryTrainingWrapper" in names:
            skip = 1  # the adapter's name
            continue
        if word == "token_adapter" and "AuxiliaryTrainingWrapper" in names:
            continue
        words.append(word)
    return ".".join(words)


def unique_names(paths: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Name of each path; two paths whose names coincide keep their paths.

    >>> unique_names(["a.x", "b.x", "c"], {"a.x": "x", "b.x": "x", "c": "c"})
    {'a.x': 'a.x', 'b.x': 'b.x', 'c': 'c'}
    """
    paths = list(paths)
    taken = Counter(names[path] for path in paths)
    return {path: names[path] if taken[names[path]] == 1 else path for path in paths}
