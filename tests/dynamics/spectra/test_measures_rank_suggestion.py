import re

import pytest
import xarray as xr

from dynamics.spectra.measures import rank_pattern


def suggested(names, values):
    return xr.DataArray(values, {"matrix": names}, "matrix")


def test_matrices_that_a_pattern_cannot_name_are_left_out():
    names = ["layers.0.q", "layers.0.experts.w[3]", "layers.0.v@second", "layers.1.q"]
    assert rank_pattern(suggested(names, [2.0, 3.0, 4.0, float("nan")])) == {"layers.0.q": 2}


def test_a_name_that_another_ends_in_is_anchored():
    pattern = rank_pattern(suggested(["proj", "encoder.proj"], [2.0, 5.0]))
    assert pattern == {"^proj": 2, "encoder.proj": 5}
    assert [matched(pattern, name) for name in ("proj", "encoder.proj")] == [2, 5]


def matched(pattern, name):
    """PEFT's rule: the first key that the module's name ends in."""
    return next(rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", name))


def test_a_matrix_that_needs_no_rank_gets_the_least_that_peft_has():
    assert rank_pattern(suggested(["q", "v"], [0.0, 3.0])) == {"q": 1, "v": 3}


def test_peft_takes_it():
    peft = pytest.importorskip("peft")
    import torch

    base = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    pattern = rank_pattern(suggested(["0", "1"], [2.0, 5.0]))
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], rank_pattern=pattern)
    model = peft.get_peft_model(base, config)
    assert [model.base_model.model[i].lora_A["default"].weight.shape[0] for i in (0, 1)] == [2, 5]
