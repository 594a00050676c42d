"""Two halves of probe samples that have nothing to do with each other: to choose on one, to measure on the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


def split_by_group(groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[list[int], list[int]]]:
    """Two halves of each task's samples, about equal in size, such that no group is in both, also across tasks.

    Groups are dealt one by one, those with most samples first, to the half in which their tasks have fewer samples.

    Args:
        groups: By task, the group of each of its samples.

    Returns:
        By task, the numbers of the samples in each half.

    Raises:
        ValueError: If a half of a task would be empty.

    >>> split_by_group({"a": ["x", "y", "y"], "b": ["y", "x"]})
    {'a': ([1, 2], [0]), 'b': ([0], [1])}
    """
    sizes = {task: Counter(own) for task, own in groups.items()}
    total = sum(sizes.values(), Counter())
    half_of: dict[str, int] = {}
    filled = {task: [0.0, 0.0] for task in groups}
    for group, _ in total.most_common():
        # A task with few groups has little choice: it counts for more.
        weight = {task: 1 / (len(own) * own.total()) for task, own in sizes.items() if group in own}
        load = [sum(share * filled[task][half] for task, share in weight.items()) for half in (0, 1)]
        half_of[group] = int(load[1] < load[0])
        for task in weight:
            filled[task][half_of[group]] += sizes[task][group]
    halves = {
        task: tuple([number for number, group in enumerate(own) if half_of[group] == half] for half in (0, 1))
        for task, own in groups.items()
    }
    for task, (first, second) in halves.items():
        if not first or not second:
            raise ValueError(
                f"Task {task!r}: expected samples in at least two groups, so that a step on one half can be "
                f"measured on the other, got {len(sizes[task])} "
                f"({', '.join(map(repr, list(sizes[task])[:3]))}), all in one half."
            )
    return {task: (first, second) for task, (first, second) in halves.items()}
