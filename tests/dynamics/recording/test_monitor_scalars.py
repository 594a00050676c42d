import math

import pytest
import torch

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.recording.monitor import update_numbers
from dynamics.spectra import raw
from dynamics.spectra.raw import GradientSpectrum
from dynamics.spectra.walk import MatrixSpectra


def spectra(total: list[float], increment: list[float] | None) -> MatrixSpectra:
    change = None if increment is None else torch.tensor(increment).double()
    ranks = (len(total), 0 if increment is None else len(increment))
    return MatrixSpectra(torch.tensor(total).double(), change, 0.0, 0.0, math.nan, ranks)


PLACES = {"a": MatrixShape(6, 5, 2, "F32"), "b": MatrixShape(6, 5, 2, "F32")}


def test_norms_are_of_all_matrices_together_and_measures_medians():
    update = raw.raw_update(
        {2: (0, 1)}, PLACES, {(2, "a"): spectra([3.0, 3.0], [1.0]), (2, "b"): spectra([4.0, 0.0], [2.0, 2.0])}
    )
    gradient = raw.raw_gradient(
        2, PLACES, {"a": GradientSpectrum(3.0, 1.5, None, 0), "b": GradientSpectrum(4.0, 2.0, None, 0)}
    )
    found = update_numbers(update, gradient)
    assert found["total/frobenius_norm"] == pytest.approx((9 + 9 + 16) ** 0.5)
    assert found["total/effective_rank_energy"] == pytest.approx(1.5)  # of 2 and 1
    assert found["total/dominant_ratio"] == pytest.approx(0.75)
    assert found["increment/frobenius_norm"] == pytest.approx(3.0)
    assert found["gradient/norm_before_clip"] == pytest.approx(5.0)
    assert found["gradient/norm_after_clip"] == pytest.approx(2.5)
    assert "gradient/effective_rank_energy" not in found


def test_one_matrix_of_many_does_not_move_a_median():
    places = {name: MatrixShape(6, 5, 2, "F32") for name in "abc"}
    totals = {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 0.0]}
    update = raw.raw_update({1: (0, -1)}, places, {(1, name): spectra(values, None) for name, values in totals.items()})
    assert update_numbers(update)["total/effective_rank_energy"] == pytest.approx(2.0)


def test_what_is_not_known_is_left_out():
    update = raw.raw_update({1: (0, -1)}, PLACES, {(1, "a"): spectra([0.0, 0.0], None), (1, "b"): spectra([0.0], None)})
    assert update_numbers(update) == {"total/frobenius_norm": 0.0}


def test_a_broken_matrix_leaves_no_norm_of_all():
    broken = spectra([math.nan, math.nan], None)
    update = raw.raw_update({1: (0, -1)}, PLACES, {(1, "a"): broken, (1, "b"): spectra([2.0], None)})
    assert "total/frobenius_norm" not in update_numbers(update)
    assert update_numbers(update)["total/dominant_ratio"] == 1.0


def test_parts_of_a_sum_are_not_counted_twice():
    places = {name: MatrixShape(6, 5, 1, "F32") for name in ("m", "m@one", "m@two")}
    results = {(1, name): spectra([size], None) for name, size in (("m", 5.0), ("m@one", 3.0), ("m@two", 4.0))}
    assert update_numbers(raw.raw_update({1: (0, -1)}, places, results))["total/frobenius_norm"] == pytest.approx(5.0)
