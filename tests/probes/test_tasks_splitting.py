"""Halves without a common group, each of which has samples of every task."""

from __future__ import annotations

import re

import pytest
import torch

from probes.tasks import split_by_group


def test_every_sample_once_and_no_group_in_both_halves() -> None:
    draw = torch.Generator().manual_seed(0)
    groups = {
        name: [str(group) for group in torch.randint(0, 12, (30,), generator=draw).tolist()] for name in ("a", "b", "c")
    }
    halves = split_by_group(groups)
    for first, second in halves.values():
        assert sorted(first + second) == list(range(30))
        assert abs(len(first) - len(second)) <= 6
        assert first == sorted(first)
    sides = [{groups[name][n] for name in groups for n in halves[name][half]} for half in (0, 1)]
    assert not sides[0] & sides[1]


def test_a_task_with_two_groups_of_which_others_have_many() -> None:
    groups = {"many": ["x"] * 3 + ["y"] * 3 + list("abcdefgh"), "two": ["x", "y"]}
    first, second = split_by_group(groups)["two"]
    assert len(first) == len(second) == 1


def test_one_group() -> None:
    message = (
        "Task 'b': expected samples in at least two groups, so that a step on one half can be measured on the other, "
        "got 1 ('x'), all in one half."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        split_by_group({"a": ["x", "y"], "b": ["x", "x"]})
