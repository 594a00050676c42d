import math

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.recording.monitor import TrainingMonitor
from dynamics.spectra import raw
from dynamics.spectra.raw import GradientSpectrum
from dynamics.spectra.walk import MatrixSpectra

PLACES = {"a": MatrixShape(6, 5, 2, "F32"), "b": MatrixShape(6, 5, 2, "F32")}


def update(step: int, **totals: list[float]) -> xr.Dataset:
    """Totals of the two matrices; healthy where nothing is said."""
    chosen = {"a": [2.0, 1.0], "b": [2.0, 1.0], **totals}
    spectra = {
        (step, name): MatrixSpectra(torch.tensor(values).double(), None, 0.0, 0.0, math.nan, (2, 0))
        for name, values in chosen.items()
    }
    return raw.raw_update({step: (0, -1)}, PLACES, spectra)


def gradient(step: int, **norms: float) -> xr.Dataset:
    chosen = {"a": 1.0, "b": 1.0, **norms}
    return raw.raw_gradient(
        step, PLACES, {name: GradientSpectrum(norm, norm, None, 0) for name, norm in chosen.items()}
    )


def codes(signs: TrainingMonitor) -> list[tuple[str, str]]:
    return [(finding.code, finding.matrix) for finding in signs.findings()]


def seen(*records: tuple[xr.Dataset, xr.Dataset], warmup: int = 0) -> TrainingMonitor:
    signs = TrainingMonitor(warmup)
    for record in records:
        signs.observe(*record)
    return signs


def test_a_healthy_training_gives_no_sign():
    assert codes(seen(*((update(step), gradient(step)) for step in (1, 2, 4)))) == []


def test_a_matrix_without_gradient():
    signs = seen(*((update(step), gradient(step, b=0.0)) for step in (1, 2)))
    assert codes(signs) == [("OD301", "b")]
    signs.observe(update(4), gradient(4))
    assert codes(signs) == []


def test_a_gradient_that_is_not_known_is_not_zero():
    signs = seen(*((update(step), gradient(step, b=math.nan)) for step in (1, 2)))
    assert codes(signs) == [("OD311", "b")]
    assert signs.findings()[0].step == 1
    assert codes(seen(*((update(step), gradient(step, a=math.nan, b=math.nan)) for step in (1, 2)))) == [("OD311", "")]


def test_one_record_in_the_warmup_is_no_sign():
    early, later = (update(1), gradient(1, b=0.0)), (update(5), gradient(5, b=0.0))
    assert codes(seen(early, warmup=3)) == []
    assert codes(seen(later, warmup=3)) == [("OD301", "b")]
    assert codes(seen(early, early, warmup=3)) == [("OD301", "b")]


def test_an_adapter_that_has_not_moved_after_the_warmup():
    at = [(update(step, a=[0.0, 0.0]), gradient(step)) for step in (2, 4, 6)]
    assert codes(seen(*at[:2], warmup=3)) == []
    assert codes(seen(*at, warmup=3)) == [("OD302", "a")]


def test_a_dense_weight_that_has_not_moved_is_no_adapter_that_has_not():
    dense = update(4, a=[0.0, 0.0]).assign_coords(adapter_rank=("matrix", [0, 2]))
    assert codes(seen((dense, gradient(4)))) == []


@pytest.mark.parametrize("narrow", [{"factor_rank": 1}, {"out": 1}])
def test_what_has_no_room_for_a_second_direction_has_not_collapsed(narrow):
    records = [(update(step, a=[1.0, 0.0]), gradient(step)) for step in (2, 4)]
    assert codes(seen(*records)) == [("OD303", "a")]
    for dataset, _ in records:
        for name, number in narrow.items():
            dataset[name][:] = number
    assert codes(seen(*records)) == []


def test_an_update_that_collapsed_must_stay_so():
    collapsed = [1.0, 1e-3]
    assert codes(seen((update(2, b=collapsed), gradient(2)))) == []
    assert codes(seen(*((update(step, b=collapsed), gradient(step)) for step in (2, 4)))) == [("OD303", "b")]
    recovered = seen(*((update(step, b=collapsed), gradient(step)) for step in (2, 4)), (update(6), gradient(6)))
    assert codes(recovered) == []


def test_a_gradient_that_is_not_finite_stays_on_record_with_its_step():
    signs = seen((update(1), gradient(1)), (update(2), gradient(2, a=math.inf)), (update(3), gradient(3)))
    (finding,) = signs.findings()
    assert (finding.code, finding.matrix, finding.step, finding.evidence["steps"]) == ("OD304", "a", 2, [2])
    signs.observe(update(4), gradient(4, a=math.inf))
    assert signs.findings() == [finding]  # the first time is what is looked for


def test_weights_that_are_not_finite():
    signs = seen((update(1), gradient(1)), (update(2, b=[math.nan, math.nan]), gradient(2)))
    (finding,) = signs.findings()
    assert (finding.code, finding.matrix, finding.step) == ("OD201", "b", 2)


def test_several_matrices_are_one_finding():
    signs = seen(*((update(step), gradient(step, a=0.0, b=0.0)) for step in (1, 2)))
    (finding,) = signs.findings()
    assert (finding.matrix, finding.evidence) == ("", {"matrices": 2, "names": ["a", "b"]})
    assert finding.message.startswith("2 matrices had no gradient, or a gradient of zero, at each of the 2 steps")


@pytest.mark.parametrize("length", [0, 1])
def test_short_spectra_do_no_harm(length):
    dataset = update(3).isel(index=slice(length))
    dataset["count"] = dataset["count"].clip(max=length)
    assert isinstance(codes(seen((dataset, gradient(3)))), list)
    assert np.isfinite(dataset["step"].values).all()
