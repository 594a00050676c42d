"""Spectra of weights are those of the stored matrices; of an adapter's, those of the merged ones."""

import numpy as np
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.spectra.measures import stable_rank
from dynamics.spectra.weights import weights
from tests.runs import write_run
from tests.whole_models import MATRICES, model_tensors, write_dense_run, write_model


def test_dense_weights_of_the_last_checkpoint(tmp_path):
    found = weights(open_trajectory(write_dense_run(tmp_path)))
    assert found["matrix"].values.tolist() == list(MATRICES)
    for name in MATRICES:
        values = torch.linalg.svdvals(model_tensors(20)[f"{name}.weight"].double())
        here = found.sel(matrix=name)
        np.testing.assert_allclose(here["singular_value"].values[: len(values)], values, rtol=1e-6)
        np.testing.assert_allclose(here["stable_rank"], stable_rank(values), rtol=1e-6)
    assert found.attrs["at_step"] == 20
    assert "of the weight" in found["frobenius_norm"].attrs["long_name"]


def test_an_adapters_weight_is_that_of_the_base_and_the_update(tmp_path):
    run = write_run(tmp_path / "run")
    shapes = open_trajectory(run).checkpoints[-1].shapes
    first, *others = shapes
    generator = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(shapes[name].out, shapes[name].in_, generator=generator) for name in others}
    trajectory = open_trajectory(run, base=write_model(tmp_path / "base", base))
    found = weights(trajectory)
    assert first not in found["matrix"].values
    with trajectory.checkpoints[-1].open() as matrices:
        merged = base[f"{others[0]}.weight"].double() + matrices[others[0]].to_dense()
    values = torch.linalg.svdvals(merged)
    np.testing.assert_allclose(found["singular_value"].sel(matrix=others[0]).values[: len(values)], values, rtol=1e-6)


def test_adapters_without_their_base_have_none(tmp_path):
    assert weights(open_trajectory(write_run(tmp_path / "run"))) is None
