"""What the names of runs say: which are repeats of one another, and which belong together in pairs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

#: A number at the end, as repeats are told apart: run_3, run-s3, run.seed42.
_SEED = re.compile(r"[-_.]?(?:s|seed|rep|run|r|v)?[-_.]?\d+$", re.IGNORECASE)


def without_seed(run: str) -> str:
    """A run's name without the number at its end that tells repeats apart.

    >>> without_seed("imax_seed42"), without_seed("llama-dmax")
    ('imax', 'llama-dmax')
    """
    return _SEED.sub("", run) or run


def look_like_repeats(runs: Iterable[str]) -> dict[str, list[str]]:
    """Sets of runs that seem to differ by a seed only, where there are several such sets.

    One set of all runs is what repeats are for, and is not returned.

    >>> look_like_repeats(["imax_s1", "imax_s2", "dmax_s1", "dmax_s2"])
    {'imax': ['imax_s1', 'imax_s2'], 'dmax': ['dmax_s1', 'dmax_s2']}
    >>> look_like_repeats(["run_1", "run_2"])
    {}
    """
    sets = defaultdict(list)
    for run in runs:
        sets[without_seed(run)].append(run)
    repeated = {stem: found for stem, found in sets.items() if len(found) > 1}
    return repeated if len(sets) > 1 else {}


def pair_labels(groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Label of each run by which runs of different groups belong together: its name without the group's own.

    Args:
        groups: Group → its runs.

    Returns:
        Run → label, only for labels that occur in at least two groups; empty where names say nothing, or where one
        group has two runs of a label.

    >>> pair_labels({"imax": ["imax_s1", "imax_s2"], "dmax": ["dmax_s1", "dmax_s2"]})
    {'imax_s1': 's1', 'imax_s2': 's2', 'dmax_s1': 's1', 'dmax_s2': 's2'}
    >>> pair_labels({"imax": ["a"], "dmax": ["b"]})
    {}
    """
    labels = {run: _label(run, group) for group, runs in groups.items() for run in runs}
    owners = defaultdict(list)
    for group, runs in groups.items():
        for run in runs:
            owners[labels[run]].append(group)
    if any(len(set(found)) < len(found) for found in owners.values()):
        return {}
    return {run: label for run, label in labels.items() if label and len(owners[label]) > 1}


def _label(run: str, group: str) -> str:
    parts = [part for part in re.split(r"[-_./]+", run) if part]
    own = [part for part in re.split(r"[-_./]+", group.lower()) if part]
    return "_".join(part for part in parts if part.lower() not in own) if set(own) & {p.lower() for p in parts} else ""
