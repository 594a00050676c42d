"""Raw datasets: what is missing is NaN or counts 0, and steps are joined without a number changing its place."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.spectra import raw
from dynamics.spectra.raw import GradientSpectrum
from dynamics.spectra.walk import MatrixSpectra

A, B = MatrixShape(6, 5, 2, "F32"), MatrixShape(9, 4, 3, "BF16")


def spectra(total: list[float], increment: list[float] | None = None) -> MatrixSpectra:
    change = None if increment is None else torch.tensor(increment).double()
    ranks = (len(total), 0 if increment is None else len(increment))
    return MatrixSpectra(torch.tensor(total).double(), change, 0.25, 0.5, 7.0, ranks)


def update(step: int, from_step: int, **totals: list[float]) -> xr.Dataset:
    places = {"a": A, "layers.3.q_proj": B}
    names = {"a": "a", "b": "layers.3.q_proj"}
    chosen = {names[key] for key in totals}
    results = {(step, names[key]): spectra(values) for key, values in totals.items()}
    return raw.raw_update(
        {step: (0, from_step)}, {name: place for name, place in places.items() if name in chosen}, results
    )


def test_an_update_is_padded_with_nan_and_counted():
    dataset = raw.raw_update(
        {3: (0, 1)}, {"a": A, "b": B}, {(3, "a"): spectra([2.0, 0.0], [1.0]), (3, "b"): spectra([3.0, 2.0, 1.0])}
    )
    values = dataset["singular_value"].sel(step=3)
    np.testing.assert_array_equal(values.sel(matrix="a", kind="total"), [2.0, 0.0, math.nan])  # a measured zero stays
    np.testing.assert_array_equal(values.sel(matrix="a", kind="increment"), [1.0, math.nan, math.nan])
    assert values.sel(matrix="b", kind="increment").isnull().all()
    np.testing.assert_array_equal(dataset["count"].sel(step=3), [[2, 3], [1, 0]])
    np.testing.assert_array_equal(dataset["factor_rank"].sel(step=3), [[2, 3], [1, 0]])
    np.testing.assert_array_equal(dataset["noise_energy"].sel(step=3), [[0.25, 0.25], [0.5, math.nan]])
    np.testing.assert_array_equal(dataset["inner_product"].sel(step=3), [7.0, 7.0])
    assert dataset["singular_value"].dtype == np.float64


def test_a_matrix_without_a_result_is_missing():
    dataset = raw.raw_update({3: (0, -1)}, {"a": A, "b": B}, {(3, "a"): spectra([1.0])})
    missing = dataset.sel(step=3, matrix="b")
    assert int(missing["count"].sum()) == 0
    assert missing[["singular_value", "noise_energy", "inner_product"]].isnull().all().to_array().all()


def test_what_weights_that_are_not_finite_leave_is_missing():
    broken = MatrixSpectra(torch.tensor([math.nan]), torch.tensor([math.nan]), math.inf, math.nan, -math.inf, (1, 1))
    dataset = raw.raw_update({2: (0, 1)}, {"a": A}, {(2, "a"): broken})
    assert dataset[["singular_value", "noise_energy", "inner_product"]].isnull().all().to_array().all()
    assert dataset["count"].values.tolist() == [[[1], [1]]]


def test_every_variable_and_coordinate_says_what_it_is():
    for dataset in (update(1, 0, a=[1.0]), raw.raw_gradient(1, {"a": A}, {})):
        for name, variable in dataset.variables.items():
            assert {"units", "long_name"} <= variable.attrs.keys(), name


def test_matrices_are_described():
    dataset = update(1, 0, a=[1.0], b=[1.0])
    found = dataset.sel(matrix="layers.3.q_proj")
    described = {name: found[name].item() for name in ("layer", "role", "out", "in", "adapter_rank", "storage")}
    assert described == {"layer": 3, "role": "q_proj", "out": 9, "in": 4, "adapter_rank": 3, "storage": "BF16"}
    assert dataset["layer"].sel(matrix="a").item() == -1


def test_a_gradient_has_norms_and_where_they_were_wanted_values():
    gradients = {
        "a": GradientSpectrum(3.0, 1.0, torch.tensor([2.0, 1.0]).double(), 4),
        "b": GradientSpectrum(5.0, math.nan),
    }
    dataset = raw.raw_gradient(2, {"a": A, "b": B, "c": A}, gradients).sel(step=2)
    np.testing.assert_array_equal(dataset["norm_before_clip"], [3.0, 5.0, math.nan])
    np.testing.assert_array_equal(dataset["norm_after_clip"], [1.0, math.nan, math.nan])
    np.testing.assert_array_equal(dataset["singular_value"], [[2.0, 1.0], [math.nan, math.nan], [math.nan, math.nan]])
    np.testing.assert_array_equal(dataset["count"], [2, 0, 0])
    np.testing.assert_array_equal(dataset["factor_rank"], [4, 0, 0])


def test_steps_are_joined_in_their_order():
    parts = [update(9, 4, a=[9.0], b=[9.5, 1.0]), update(4, 0, a=[4.0, 2.0]), update(12, 9, b=[1.0, 0.5, 0.2])]
    joined = raw.concatenate(parts)
    assert joined["step"].values.tolist() == [4, 9, 12]
    assert joined["from_step"].values.tolist() == [0, 4, 9]
    assert joined.sizes["index"] == 3
    for part in parts:
        step = int(part["step"][0])
        for name in part["matrix"].values:
            there = joined.sel(step=step, matrix=name)
            xr.testing.assert_equal(
                there["singular_value"].isel(index=slice(part.sizes["index"])),
                part["singular_value"].sel(step=step, matrix=name),
            )
            assert int(there["count"].sel(kind="total")) == int(part["count"].sel(step=step, matrix=name, kind="total"))
    absent = joined.sel(step=4, matrix="layers.3.q_proj")
    assert int(absent["count"].sum()) == 0
    assert absent["singular_value"].isnull().all()


def test_joined_one_by_one_or_all_at_once_is_the_same():
    parts = [update(step, step - 1, a=[float(step), 0.5]) for step in range(1, 5)]
    stepwise = raw.concatenate([raw.concatenate(parts[:2]), raw.concatenate(parts[2:])])
    xr.testing.assert_identical(stepwise, raw.concatenate(parts))


def test_a_matrix_has_its_newest_shape_and_its_largest_rank():
    old = raw.raw_update({1: (0, 0)}, {"a": MatrixShape(6, 5, 8, "F32")}, {})
    new = raw.raw_update({2: (0, 1)}, {"a": MatrixShape(6, 5, 2, "BF16")}, {})
    for parts in ([old, new], [new, old]):
        joined = raw.concatenate(parts)
        assert (joined["adapter_rank"].item(), joined["storage"].item()) == (8, "BF16")


def test_gradients_are_joined_too():
    parts = [raw.raw_gradient(step, {"a": A}, {"a": GradientSpectrum(float(step), 1.0)}) for step in (5, 2)]
    joined = raw.concatenate(parts)
    assert joined["norm_before_clip"].values.tolist() == [[2.0], [5.0]]
    assert "from_step" not in joined.coords


def test_parts_without_steps_or_matrices_add_nothing():
    nothing = raw.raw_update({}, {}, {})
    xr.testing.assert_identical(raw.concatenate([nothing, update(1, 0, a=[1.0])]), update(1, 0, a=[1.0]))


def test_a_step_twice_is_refused():
    with pytest.raises(ValueError, match=re.escape("Expected each step once, got [3, 3].")):
        raw.concatenate([update(3, 0, a=[1.0]), update(3, 0, a=[1.0])])


def test_nothing_to_join_is_refused():
    with pytest.raises(ValueError, match=re.escape("Expected at least one raw dataset, got none.")):
        raw.concatenate([])
