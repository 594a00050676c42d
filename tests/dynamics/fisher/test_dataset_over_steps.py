import numpy as np
import pytest
import xarray as xr

from dynamics.fisher import concentration, fisher_measures, measure_fisher, samples, task_structure
from dynamics.fisher.concentration import effective_batches
from dynamics.fisher.dataset import gram_of
from dynamics.schema import FISHER_RECORD
from tests.dynamics.fisher.records import BLOCKS, record
from tests.dynamics.fisher.simulated import probe_gram


@pytest.fixture(scope="module")
def raw():
    return record()


@pytest.fixture(scope="module")
def groups(raw):
    return measure_fisher(raw)


def at(raw, step):
    here = raw.sel(step=step)
    return here, {name: here["gram"].sel(block=name).values for name in BLOCKS}


def test_each_step_is_what_the_functions_say_of_it(raw, groups):
    here, grams = at(raw, 20)
    tasks, images = here["sample_task"].values, here["sample_group"].values
    dimension = dict(zip(BLOCKS, here["dimension"].values, strict=True))
    products = {name: here["update_product"].sel(block=name).values for name in BLOCKS}
    norms = {name: here["update_norm_squared"].sel(block=name).item() ** 0.5 for name in BLOCKS}
    labels = {"tasks": tasks, "groups": images, "space": "tangent", "batch_size": 80}
    gram = probe_gram(grams, products, norms, dimension, **labels)
    alone = {
        "fisher": fisher_measures(gram),
        "concentration": concentration(gram),
        "tasks": task_structure(gram),
    }
    for name, expected in alone.items():
        own = groups[name].sel(step=20)[list(expected)]
        xr.testing.assert_allclose(own.drop_vars([*set(own.coords) - set(expected.coords)]), expected, rtol=1e-12)


def test_step_comes_first_and_what_was_recorded_is_kept(raw, groups):
    assert groups["fisher"]["spectral_entropy"].dims == ("step", "block", "task")
    assert groups["concentration"]["gain"].dims == ("step", "block", "k")
    assert groups["tasks"]["cosine"].dims == ("step", "block", "task", "task_")
    assert groups["fisher"]["gram"].equals(raw["gram"].assign_coords(groups["fisher"]["gram"].coords))
    assert groups["concentration"]["share_outside_space"].sel(step=10).values == pytest.approx(0.02)
    for group in groups.values():
        assert group["step"].values.tolist() == [0, 10, 20]
        assert group["evaluated_at_step"].values.tolist() == [0, 0, 10]
        assert group.attrs == raw.attrs


def test_null_batch_is_that_of_all_steps_of_the_increment(groups):
    assert groups["concentration"]["null_batch"].sel(step=[10, 20]).values.tolist() == [80, 80]


def test_null_batch_has_momentum_in_it(raw):
    with_momentum = raw.assign(momentum=("step", [0.9, 0.9, np.nan]))
    found = measure_fisher(with_momentum)
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
    found, whole = measure_fisher(lacking)["fisher"], measure_fisher(raw)["fisher"]
    assert found["samples"].sel(task="all").values.tolist() == [24, 23, 24]
    assert np.isfinite(found["spectral_entropy"]).all()
    assert found["spectral_entropy"].sel(step=20).equals(whole["spectral_entropy"].sel(step=20))


def test_a_block_or_step_that_is_broken_is_missing_there_alone(raw):
    broken = raw.copy(deep=True)
    broken["gram"][1, 0, 3, 4] = np.nan
    broken["gram"][2] = np.nan
    found = measure_fisher(broken)["fisher"]["spectral_entropy"].sel(task="all")
    assert np.isnan(found.values).tolist() == [[False] * 3, [True, False, False], [True] * 3]


def test_transfer_in_factor_space():
    found = measure_fisher(record(space="factor"))["tasks"]["transfer"]
    assert np.isfinite(found.sel(task="caption", task_="vqa")).all()


def test_no_step_is_refused(raw):
    with pytest.raises(ValueError, match=r"Expected at least one record of the Fisher, got none."):
        measure_fisher(raw.isel(step=[]))


def test_a_record_is_read_back_into_one_value(raw):
    lacking = raw.copy(deep=True)
    lacking["gram"][2, :, 5, :] = np.nan
    lacking["gram"][2, :, :, 5] = np.nan
    gram = gram_of(lacking.isel(step=2))
    kept = np.delete(np.arange(24), 5)
    assert (gram.blocks, gram.left_out, gram.space, gram.batch_size) == (BLOCKS, (5,), "tangent", 80)
    for name in FISHER_RECORD.keys() - {"gram", "update_product", "loss"}:
        assert list(getattr(gram, name).values()) == raw[name].isel(step=2).values.tolist(), name
    for block in BLOCKS:
        here = raw.isel(step=2).sel(block=block)
        assert (gram.gram[block] == here["gram"].values[np.ix_(kept, kept)]).all()
        assert (gram.update_product[block] == here["update_product"].values[kept]).all()
    assert (gram.losses == raw["loss"].values[2, kept]).all()
    assert list(gram.sample_ids) == raw["sample_id"].values[kept].tolist()
    assert list(gram.groups) == raw["sample_group"].values[kept].tolist()
    assert list(gram.tasks) == raw["sample_task"].values[kept].tolist()


def test_blocks_measured_one_at_a_time_are_those_measured_together(raw, groups, monkeypatch):
    monkeypatch.setattr(samples, "_PART", 1)
    for name, found in measure_fisher(raw).items():
        xr.testing.assert_allclose(found, groups[name], rtol=1e-12)
