"""Call forms before ProbeGram say the new one, and give the same numbers."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics.fisher import concentration, fisher_measures, task_structure
from probes import ProbeGram

ROWS = np.random.default_rng(0).standard_normal((12, 5))
K, B = ROWS @ ROWS.T, ROWS.sum(1)
TASKS, GROUPS = ["x", "y"] * 6, np.arange(12) // 2
LABELS = {"tasks": TASKS, "groups": GROUPS}
UPDATE = {"update_product": {"w": B}, "update_norm_squared": {"w": 5.0}, "dimension": {"w": 5}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda: fisher_measures({"w": K}), lambda: fisher_measures(ProbeGram({"w": K}))),
        (lambda: fisher_measures(K), lambda: fisher_measures(ProbeGram({"global": K}))),
        (
            lambda: fisher_measures({"w": torch.tensor(K)}, TASKS, GROUPS),
            lambda: fisher_measures(ProbeGram({"w": K}, **LABELS)),
        ),
        (
            lambda: fisher_measures(ProbeGram({"w": K}), tasks=TASKS, groups=GROUPS, seed=3),
            lambda: fisher_measures(ProbeGram({"w": K}, **LABELS), seed=3),
        ),
        (
            lambda: fisher_measures({"w": K}, dimension={"w": 5}),
            lambda: fisher_measures(ProbeGram({"w": K}, dimension={"w": 5})),
        ),
        (
            lambda: concentration({"w": K}, {"w": B}, {"w": 5**0.5}, groups=GROUPS, batch_size=8, dimension=5, k=[2]),
            lambda: concentration(ProbeGram({"w": K}, groups=GROUPS, batch_size=8, **UPDATE), k=[2]),
        ),
        (
            lambda: concentration({"w": K}, B, 5**0.5, dimension=5),
            lambda: concentration(ProbeGram({"w": K}, **UPDATE)),
        ),
        (
            lambda: concentration(SimpleNamespace(gram={"w": K}, **UPDATE), batch_size=8),
            lambda: concentration(ProbeGram({"w": K}, batch_size=8, **UPDATE)),
        ),
        (
            lambda: task_structure({"w": K}, TASKS, GROUPS, losses=[2.0] * 12, space="factor", permuted=["w"]),
            lambda: task_structure(
                ProbeGram({"w": K}, losses=np.full(12, 2.0), space="factor", **LABELS), permuted=["w"]
            ),
        ),
    ],
)
def test_the_old_form_gives_the_same_and_shows_the_new(old, new):
    with pytest.warns(DeprecationWarning, match=r"takes one ProbeGram") as caught:
        expected = old()
    assert len(caught) == 1
    xr.testing.assert_identical(new(), expected)


def test_the_warning_shows_what_to_write():
    message = (
        "concentration takes one ProbeGram; K and its labels one by one are deprecated. Call "
        "dynamics.concentration(gram) with gram = probes.gradient_gram(model, tasks, …), or with "
        "gram = probes.ProbeGram({'global': K}, update_product=…, update_norm_squared=…, groups=…)."
    )
    with pytest.warns(DeprecationWarning, match=re.escape(message)):
        concentration(K, B, 5**0.5, groups=GROUPS)


def test_the_new_form_is_silent(recwarn):
    fisher_measures(ProbeGram({"w": K}, **LABELS))
    fisher_measures(gram=ProbeGram({"w": K}))
    assert not recwarn.list


def test_one_number_cannot_stand_for_several_blocks():
    message = "Expected a mapping of 2 blocks to their dimension, got int."
    with (
        pytest.warns(DeprecationWarning, match="takes one ProbeGram"),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        fisher_measures({"a": K, "b": K}, dimension=5)
