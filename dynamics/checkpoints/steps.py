"""Steps in the names of folders and files, as trainers write them.

``checkpoint-100`` (transformers), ``step_100`` (accelerate), ``step-100`` (torchtitan, litgpt), ``epoch_3``
(torchtune), ``iter_0000100`` (Megatron), ``global_step_100`` (verl, DeepSpeed), ``epoch=0-step=100`` (Lightning),
``ep0-ba100`` (Composer), ``checkpoint-1250step``, ``epoch200``, ….
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Words beside a number and their rank: optimizer steps, checkpoints, epochs. Plurals (``epochs_3``) give the length of
#: a training, not its progress.
_COUNTERS = {
    **dict.fromkeys(("step", "globalstep", "iter", "iteration", "update", "ba", "batch"), 0),
    **dict.fromkeys(("checkpoint", "ckpt", "chkpt"), 1),
    **dict.fromkeys(("epoch", "ep", "epochstep"), 2),
}
#: Words beside a counter that do not name a training.
_PLAIN = frozenset(_COUNTERS) | {
    *("global", "model", "adapter", "lora", "hf", "weights", "state", "save", "last", "latest", "best", "final"),
    *("train", "training", "consumed", "samples", "val", "eval", "loss", "unsharded", "consolidated", "finetrainers"),
}
#: Names of folders in which a bare number is a step.
_OF_NUMBERS = re.compile(r"checkpoints?|ckpts?|steps?|epochs?|saves?|(lora_)?weights", re.IGNORECASE)
_TOKEN = re.compile(r"[^\W\d_]+|[0-9]+|[\W_]+")
_METRIC = re.compile(r"(?<==)[0-9]+(\.[0-9]+)?(e-?[0-9]+)?")
#: Words about the step, not about the training: ``step=100-last`` is another name of step 100.
_MARK = re.compile(r"[-_](last|latest|best|final)$", re.IGNORECASE)
#: Steps are stored as 64-bit integers; no larger number is a step.
LARGEST_STEP = 2**63 - 1


@dataclass(frozen=True)
class NamedStep:
    """A step read from a name.

    Args:
        number: The step; it may exceed :data:`LARGEST_STEP`.
        template: The name with ``N`` for its numbers; one training uses one template.
        is_plain: Whether the name holds only the step, and no name of a training.
        is_epoch: Whether the number counts epochs.
    """

    number: int
    template: str
    is_plain: bool
    is_epoch: bool = False


def named_step(name: str, parent: str = "") -> NamedStep | None:
    """Return the step in a name, or ``None`` if there is none.

    Args:
        name: The name of a folder, or of a file without its suffix.
        parent: The name of the folder around it: in ``checkpoints/`` a bare number is a step.

    >>> (
    ...     named_step("global_step_100").number,
    ...     named_step("epoch=1-step=300").number,
    ...     named_step("checkpoint-50step").number,
    ... )
    (100, 300, 50)
    >>> named_step("imax_step_100").is_plain, named_step("checkpoint-0100").template
    (False, 'checkpoint-N')
    >>> named_step("qwen2.5-7b") is None, named_step("epochs_3") is None, named_step("0100", "checkpoints").number
    (True, True, 100)
    """
    if name.isascii() and name.isdigit() and _OF_NUMBERS.fullmatch(parent):
        return NamedStep(int(name), "N", is_plain=True)
    tokens = _TOKEN.findall(name)
    counters = _numbers_by_word(tokens)
    if not counters:
        return None
    rank, position = min((rank, -position) for position, rank in counters.items())
    template = "".join("N" if index in counters else token for index, token in enumerate(tokens))
    return NamedStep(
        int(tokens[-position]),
        _MARK.sub("", _METRIC.sub("N", template)),
        is_plain=is_plain_name(name),
        is_epoch=rank == 2,
    )


def is_plain_name(name: str) -> bool:
    """Return whether no word of a name can be the name of a training.

    >>> is_plain_name("final_model"), is_plain_name("style")
    (True, False)
    """
    return all(token.lower() in _PLAIN for token in _TOKEN.findall(name) if token.isalpha())


def is_plain_step(name: str) -> bool:
    """Return whether a name holds a step and nothing else.

    >>> is_plain_step("checkpoint-100"), is_plain_step("imax-step-100")
    (True, False)
    """
    step = named_step(name)
    return step is not None and step.is_plain


def _numbers_by_word(tokens: list[str]) -> dict[int, int]:
    """Return the position of each number beside a counter → the counter's rank; a word before the number goes first."""
    numbers: dict[int, int] = {}
    used: set[int] = set()
    for direction in (-1, 1):
        for position in range(len(tokens)):
            if not _is_number(tokens, position) or position in numbers:
                continue
            neighbour = position + direction
            if 0 <= neighbour < len(tokens) and tokens[neighbour] in ("-", "_", "=", " "):
                neighbour += direction
            word = tokens[neighbour].lower() if 0 <= neighbour < len(tokens) else ""
            if word in _COUNTERS and neighbour not in used:
                numbers[position] = _COUNTERS[word]
                used.add(neighbour)
    return numbers


def _is_number(tokens: list[str], position: int) -> bool:
    """Return whether a token is a whole number and not part of a decimal one."""
    if not tokens[position].isascii() or not tokens[position].isdigit():
        return False
    before, after = "".join(tokens[max(position - 2, 0) : position]), "".join(tokens[position + 1 : position + 3])
    return not re.search(r"[0-9]\.$", before) and not re.match(r"\.[0-9]", after)
