"""Names under which a model's weights are saved, where saving renames them.

transformers writes some families' weights under other names than the live modules' (Llava: ``language_model…`` for
``model.language_model…``), cuts some apart (Mixtral: an expert's ``gate_up_proj`` into ``w1`` and ``w3``), and merges
others (Nomic BERT: queries, keys and values). Adapters are saved by PEFT under live names: this is about the base
model's weights, and so about dense training and what is compared with the base model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probes.watched import base_model, class_names, parents, plain_path, shape_of

#: From a model and its state dict to the one that is written.
Conversion: TypeAlias = Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]]


def disk_names(
    model: nn.Module, matrices: Iterable[str], *, state_dict_conversion: Conversion
) -> dict[str, str | list[str]]:
    """Return the name on disk of each matrix that is saved under a different name.

    The library's own conversion is run once, on a state dict of the right names and shapes in which each matrix is a
    single number, repeated without being stored; where the numbers come out is where the matrices go. No weight is
    read or copied.

    Args:
        model: The model that is trained, in its wrappers.
        matrices: Names of watched matrices, as :func:`probes.watched.find` gives them. Those that are no weight of
            the base model (``name@adapter``) are passed over.
        state_dict_conversion: What ``save_pretrained`` does to a state dict before writing it: of transformers 5
            ``lambda model, state: revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))``
            (``transformers.core_model_loading``, ``transformers.modeling_utils``). It is given the model without
            wrappers and a dict of its own. What it raises is passed on.

    Returns:
        Only what differs. A string where the matrix is one matrix on disk, up to transposition and the order of rows
        and columns. A list where it is not: several names that hold its parts, in their order, or one name of which it
        is a part, merged with others. Without ``.weight``, and ``name[e]`` for matrix e of a stack, on both sides. A
        matrix that is not written at all is left out.

    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.old, self.kept = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> def conversion(model, state):
    ...     return {name.replace("old", "new"): tensor for name, tensor in state.items()}
    >>> disk_names(Model(), ["old", "kept"], state_dict_conversion=conversion)
    {'old': 'new'}
    """
    number_of = {name: number for number, name in enumerate(matrices, 1)}
    base = base_model(model)
    with _Unstored() as unstored:
        written = state_dict_conversion(base, _numbered_state(base, number_of))
    names: dict[int, list[tuple[str, bool]]] = defaultdict(list)
    for key, tensor in written.items():
        for name, numbers in _matrices(key, tensor):
            for number in (several := unstored.taken_apart(numbers)):
                names[number].append((name, len(several) == 1))
    stored = {name: _stored_as(names[number]) for name, number in number_of.items() if number in names}
    return {name: on_disk for name, on_disk in stored.items() if on_disk != name}


class _Unstored(TorchFunctionMode):
    """While this is on, repeated numbers stay unstored: nothing is copied, what is joined becomes one number."""

    def __init__(self) -> None:
        super().__init__()
        self._joined: dict[int, set[int]] = {}  # numbers below zero

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        if func in (torch.cat, torch.stack):
            shapes = [tensor.to("meta") for tensor in args[0]]
            return self._join(args[0]).expand(func(shapes, *args[1:], **kwargs or {}).shape)
        return func(*args, **kwargs or {})

    def _join(self, tensors: Iterable[Tensor]) -> Tensor:
        number = -1 - len(self._joined)
        self._joined[number] = self.taken_apart(set().union(*map(_numbers, tensors)))
        return torch.tensor(number, device="cpu")

    def taken_apart(self, numbers: Iterable[int]) -> set[int]:
        """Return the numbers; one that stands for several is replaced by those."""
        return set().union(*(self._joined.get(number, {number}) for number in numbers))


def _numbered_state(base: nn.Module, number_of: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the base model's state dict with each matrix's number in place of its values, 0 where it has none."""
    numbered: dict[int, Tensor] = {}  # tied weights stay tied
    state = {}
    for path, tensor in base.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not _is_of_adapter(base, path):
            key = plain_path(base, path)
            state[key] = numbered.setdefault(id(tensor), _numbered(key, shape_of(tensor), number_of))
    return state


def _is_of_adapter(base: nn.Module, path: str) -> bool:
    """Return whether a parameter belongs to an adapter, or is a frozen original with its trained copy beside it."""
    return any(
        ("BaseTunerLayer" in (names := class_names(module)) and word != "base_layer")
        or ("AuxiliaryTrainingWrapper" in names and word == "original_module")
        for module, word in parents(base, path)
    )


def _numbered(key: str, shape: torch.Size, number_of: Mapping[str, int]) -> Tensor:
    name = key.removesuffix(".weight")
    stack = [number_of.get(f"{name}[{index}]", 0) for index in range(shape[0])] if len(shape) == 3 else []
    if any(stack):
        return torch.tensor(stack, device="cpu")[:, None, None].expand(shape)
    return torch.tensor(number_of.get(name, 0), device="cpu").expand(shape)


def _matrices(key: str, tensor: Tensor) -> Iterator[tuple[str, set[int]]]:
    """Yield the matrices of a saved tensor with the numbers in each: one, or those of a stack of different ones."""
    name, numbers = key.removesuffix(".weight"), _numbers(tensor)
    if tensor.ndim == 3 and len(numbers) > 1:
        yield from ((f"{name}[{index}]", _numbers(part)) for index, part in enumerate(tensor))
    else:
        yield name, numbers


def _numbers(tensor: Tensor) -> set[int]:
    """Return what a tensor holds; where it repeats one entry without storing it, that entry is read once."""
    stored = tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]
    return set(stored.flatten().tolist())


def _stored_as(parts: list[tuple[str, bool]]) -> str | list[str]:
    (name, is_whole), *others = parts
    return name if is_whole and not others else [name for name, _ in parts]
