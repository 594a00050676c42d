import numpy as np
import pytest
import xarray as xr

from dynamics.fisher import concentration, fisher_measures, measured, task_structure
from dynamics.fisher.concentration import effective_batches
from tests.dynamics.fisher.records import BLOCKS, record


@pytest.fixture(scope="module")
def raw():
    return record()


@pytest.fixture(scope="module")
def groups(raw):
    return measured(raw)


def at(raw, step):
    here = raw.sel(step=step)
    return here, {name: here["gram"].sel(block=name).values for name in BLOCKS}


def test_each_step_is_what_the_functions_say_of_it(raw, groups):
    here, grams = at(raw, 20)
    tasks, images = here["sample_task"].values, here["sample_group"].values
    dimension = dict(zip(BLOCKS, here["dimension"].values, strict=True))
    products = {name: here["update_product"].sel(block=name).values for name in BLOCKS}
    norms = {name: here["update_norm_squared"].sel(block=name).item() ** 0.5 for name in BLOCKS}
    alone = {
        "fisher": fisher_measures(grams, tasks, images, dimension=dimension),
        "concentration": concentration(grams, products, norms, groups=images, batch_size=80, dimension=dimension),
        "tasks": task_structure(grams, tasks, images, space="tangent"),
    }
    for name, expected in alone.items():
        own = groups[name].sel(step=20)[list(expected)]
        xr.testing.assert_allclose(own.drop_vars([*set(own.coords) - set(expected.coords)]), expected, rtol=1e-12)


def test_step_comes_first_and_what_was_recorded_is_kept(raw, groups):
    assert groups["fisher"]["spectral_entropy"].dims == ("step", "block", "task")
    assert groups["concentration"]["gain"].dims == ("step", "block", "k")
    assert groups["tasks"]["cosine"].dims == ("step", "block", "task", "task_")
    assert groups["fisher"]["gram"].identical(raw["gram"].assign_coords(groups["fisher"]["gram"].coords))
    assert groups["concentration"]["share_outside_space"].sel(step=10).values == pytest.approx(0.02)
    for group in groups.values():
        assert group["step"].values.tolist() == [0, 10, 20]
        assert group["evaluated_at_step"].values.tolist() == [0, 0, 10]
        assert group.attrs == raw.attrs


def test_null_batch_is_that_of_all_steps_of_the_increment(groups):
    assert groups["concentration"]["null_batch"].sel(step=[10, 20]).values.tolist() == [80, 80]


def test_null_batch_has_momentum_in_it(raw):
    with_momentum = raw.assign(momentum=("step", [0.9, 0.9, np.nan]))
    found = measured(with_momentum)
    expected = [round(8 * effective_batches(10, 0, 0.9)), 80]  # what is not known counts as none
    assert found["concentration"]["null_batch"].sel(step=[10, 20]).values.tolist() == expected
    assert found["fisher"]["momentum"].identical(
        with_momentum["momentum"].assign_coords(found["fisher"]["momentum"].coords)
    )


def test_a_step_without_predecessor_has_no_concentration_but_a_fisher(groups):
    first = groups["concentration"].sel(step=0)
    assert np.isnan(first["captured"]).all()
    assert not first["concentrated"].any()
    assert np.isfinite(groups["fisher"]["spectral_entropy"].sel(step=0)).all()


def test_a_sample_that_is_missing_at_a_step_is_left_out_there(raw):
    lacking = raw.copy(deep=True)
    lacking["gram"][1, :, 5, :] = np.nan
    lacking["gram"][1, :, :, 5] = np.nan
    found, whole = measured(lacking)["fisher"], measured(raw)["fisher"]
    assert found["samples"].sel(task="all").values.tolist() == [24, 23, 24]
    assert np.isfinite(found["spectral_entropy"]).all()
    assert found["spectral_entropy"].sel(step=20).equals(whole["spectral_entropy"].sel(step=20))


def test_a_block_or_step_that_is_broken_is_missing_there_alone(raw):
    broken = raw.copy(deep=True)
    broken["gram"][1, 0, 3, 4] = np.nan
    broken["gram"][2] = np.nan
    found = measured(broken)["fisher"]["spectral_entropy"].sel(task="all")
    assert np.isnan(found.values).tolist() == [[False] * 3, [True, False, False], [True] * 3]


def test_transfer_in_factor_space():
    found = measured(record(space="factor"))["tasks"]["transfer"]
    assert np.isfinite(found.sel(task="caption", task_="vqa")).all()


def test_no_step_is_refused(raw):
    with pytest.raises(ValueError, match=r"Expected at least one record of the Fisher, got none."):
        measured(raw.isel(step=[]))
