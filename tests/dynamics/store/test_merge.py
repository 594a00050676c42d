"""Records and checkpoints as one: each rule of the merge by its name."""

import numpy as np
import pytest
import xarray as xr

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.findings import Finding
from dynamics.spectra import raw
from dynamics.spectra.dataset import SAME_SPECTRA, measure_update
from dynamics.store.merge import merge, since_first_checkpoint, unmeasured, with_live_names
from tests.runs import NAMES, drifting, random_factors, records

TOTAL, INCREMENT = 0, 1


def raw_steps(steps, seed=0, names=NAMES, *, from_start=False, segment=0, **shape):
    """A raw update of one training; the same step of the same seed has the same factors, whatever the others are."""
    factors = {step: {name: own[name] for name in names} for step, own in drifting(steps, seed, **shape).items() if own}
    joined = raw.concatenate([record["update"] for record in records(factors, from_start=from_start).values()])
    return joined.assign_coords(segment=joined["segment"] + segment)


def captured(steps, seed=0, names=NAMES, **shape):
    """As a recorder knows it: from the start."""
    return raw_steps(steps, seed, names, from_start=True, **shape)


def several(*trainings):
    """Checkpoints of several trainings in one folder."""
    return raw.concatenate(trainings)


def column(dataset, name):
    return dict(zip(dataset["step"].values.tolist(), dataset[name].values.tolist(), strict=True))


def assert_same_at(found, expected, step):
    """All numbers of a step, whatever the padding."""
    width = expected.sizes["index"]
    names = expected["matrix"].values
    xr.testing.assert_equal(
        found.sel(step=step, matrix=names).isel(index=slice(width)).drop_vars("segment"),
        expected.sel(step=step).drop_vars("segment"),
    )
    assert np.isnan(found["singular_value"].sel(step=step).values[..., width:]).all()


# Rule 1: where both have a step, the record wins.


def test_where_both_have_a_step_the_record_wins_with_its_own_from_step():
    checkpoints, training = raw_steps([10, 20]), captured([5, 10, 15, 20])
    # Within what counts as agreement, but not the same: so it shows whose number stands there.
    checkpoints["singular_value"].values *= 1 + SAME_SPECTRA / 10
    merged, findings = merge(checkpoints, training)
    assert findings == []
    assert column(merged, "from_step") == {5: 0, 10: 5, 15: 10, 20: 15}
    for step in (5, 10, 15, 20):
        assert_same_at(merged, training, step)


@pytest.mark.parametrize("steps", [(10, 20), (10, 20, 30)], ids=["all steps are common", "one is not"])
def test_a_matrix_that_only_the_checkpoint_has_keeps_its_total_and_loses_its_increment(steps):
    checkpoints, training = raw_steps(steps), captured([10, 20], names=NAMES[:2])
    merged, findings = merge(checkpoints, training)
    assert findings == []
    assert merged["matrix"].values.tolist() == list(NAMES)
    found, expected = (each.sel(step=[10, 20], matrix=list(NAMES[2:])) for each in (merged, checkpoints))
    for name in ("singular_value", "count", "factor_rank", "noise_energy"):
        np.testing.assert_array_equal(found[name].sel(kind="total"), expected[name].sel(kind="total"))
    assert (found["count"].sel(kind="increment") == 0).all()
    assert np.isnan(found["singular_value"].sel(kind="increment")).all()
    assert np.isnan(found["inner_product"]).all()


def test_a_total_of_the_checkpoint_that_is_wider_than_every_record_fits():
    checkpoints, training = raw_steps([10], names=NAMES[:2]), captured([10], names=NAMES[:2])
    training = training.isel(index=slice(2))  # as if both were of rank two, and the second not captured here
    checkpoints["singular_value"].values[:, :, 0, 2:] = np.nan
    training["count"].values[:, :, 1] = 0
    training["singular_value"].values[:, :, 1] = np.nan
    merged, _ = merge(checkpoints, training)
    found, expected = (each["singular_value"].sel(kind="total", matrix=NAMES[1]) for each in (merged, checkpoints))
    np.testing.assert_array_equal(found, expected)


# Rule 2: a step that only a checkpoint has stays as it is.


def test_a_step_that_only_a_checkpoint_has_stays_as_it_is():
    checkpoints, training = raw_steps([10, 20, 30]), captured([5, 15])
    merged, findings = merge(checkpoints, training)
    assert findings == []
    assert column(merged, "from_step") == {5: 0, 10: -1, 15: 5, 20: 10, 30: 20}
    for step in (10, 20, 30):
        assert_same_at(merged, checkpoints, step)


def test_an_inner_product_goes_with_the_increment_that_it_was_formed_with():
    checkpoints = raw_steps([10, 20, 30, 40])
    assert np.isfinite(checkpoints["inner_product"].sel(step=[30, 40])).all()
    merged, _ = merge(checkpoints, captured([15, 20]))
    # 30 is still since 20, but the increment of 20 is since 15 now; that of 30 itself is the old one, since 20.
    assert np.isnan(merged["inner_product"].sel(step=30)).all()
    np.testing.assert_array_equal(merged["inner_product"].sel(step=40), checkpoints["inner_product"].sel(step=40))


# Rule 3: which training the records belong to.


def test_the_records_belong_to_the_training_whose_checkpoints_agree():
    checkpoints = several(raw_steps([10, 20], seed=0), raw_steps([15, 30], seed=7, segment=1))
    merged, findings = merge(checkpoints, captured([10, 20, 25], seed=0))
    assert findings == []
    assert column(merged, "segment") == {10: 0, 15: 1, 20: 0, 25: 0, 30: 1}
    assert column(merged, "from_step")[30] == 15


def test_the_majority_of_agreeing_steps_decides_and_the_others_are_told():
    checkpoints = several(raw_steps([10, 20], seed=0), raw_steps([30], seed=7, segment=1))
    merged, findings = merge(checkpoints, captured([10, 20, 30], seed=0))
    assert set(column(merged, "segment").values()) == {0}
    assert_same_at(merged, captured([10, 20, 30], seed=0), 30)
    (finding,) = findings
    assert (finding.code, finding.step, finding.evidence["steps"]) == ("OD308", 30, [30])
    assert finding.message.startswith("At step 30 the update captured during training is not the one in the checkpoint")
    assert "training of their own" not in finding.message


def test_without_a_common_step_they_go_with_the_newest_training():
    checkpoints = several(raw_steps([10], seed=0), raw_steps([20], seed=7, segment=1))
    merged, findings = merge(checkpoints, captured([5, 15, 25]))
    assert findings == []
    assert column(merged, "segment") == {5: 1, 10: 0, 15: 1, 20: 1, 25: 1}


def test_if_no_common_step_agrees_they_are_a_training_of_their_own():
    checkpoints, training = raw_steps([10, 20, 30], seed=0), captured([10, 20, 25], seed=7)
    merged, findings = merge(checkpoints, training)
    assert column(merged, "segment") == {10: 1, 20: 1, 25: 1, 30: 0}
    (finding,) = findings
    assert (finding.code, finding.severity, finding.step) == ("OD308", "warning", None)
    assert finding.evidence["steps"] == [10, 20]
    assert finding.evidence["largest_difference"] > SAME_SPECTRA
    assert "At steps 10, 20" in finding.message
    assert "No common step agrees, so the captured steps are numbered as a training of their own." in finding.message


def test_where_a_step_does_not_agree_nothing_of_the_checkpoint_is_kept():
    checkpoints, training = raw_steps([10, 20], seed=0), captured([10, 20], seed=7, names=NAMES[:2])
    merged, _ = merge(checkpoints, training)
    assert (merged["count"].sel(matrix=list(NAMES[2:])) == 0).all()
    assert np.isnan(merged["singular_value"].sel(matrix=list(NAMES[2:]))).all()


def test_a_difference_below_the_threshold_is_none_and_one_above_it_is_named():
    for factor, codes in ((0.9, []), (1.1, ["OD308"])):
        checkpoints = raw_steps([10])
        checkpoints["singular_value"].values[0, TOTAL, 1] *= 1 / (1 - factor * SAME_SPECTRA)
        _, findings = merge(checkpoints, captured([10]))
        assert [finding.code for finding in findings] == codes
        assert all(finding.matrix == NAMES[1] for finding in findings)


def test_updates_that_are_zero_in_both_agree_and_in_one_do_not():
    zero = {name: (0 * left, right) for name, (left, right) in random_factors().items()}
    nothing = raw.concatenate([each["update"] for each in records({10: zero}, from_start=False).values()])
    assert merge(nothing, nothing)[1] == []
    assert [each.code for each in merge(nothing, captured([10]))[1]] == ["OD308"]


def test_numbers_that_are_not_known_are_no_disagreement():
    checkpoints = raw_steps([10])
    checkpoints["singular_value"].values[:] = np.nan
    merged, findings = merge(checkpoints, captured([10]))
    assert findings == []
    assert column(merged, "segment") == {10: 0}


# Rule 4: an increment needs its predecessor.


def test_an_increment_whose_from_step_is_gone_is_left_out():
    training = captured([5, 10, 15]).isel(step=[0, 2])  # the record of 10 was damaged, say
    merged, _ = merge(None, training)
    assert column(merged, "from_step") == {5: 0, 15: -1}
    assert (merged["count"].sel(step=15, kind="increment") == 0).all()
    assert (merged["factor_rank"].sel(step=15, kind="increment") == 0).all()
    assert np.isnan(merged["singular_value"].sel(step=15, kind="increment")).all()
    assert np.isnan(merged["inner_product"].sel(step=15)).all()
    np.testing.assert_array_equal(
        merged["singular_value"].sel(kind="total"), training["singular_value"].sel(kind="total")
    )


def test_an_increment_whose_from_step_is_another_trainings_now_is_left_out():
    merged, _ = merge(raw_steps([10, 20, 30], seed=0), captured([10, 20], seed=7))
    assert column(merged, "from_step") == {10: 0, 20: 10, 30: -1}


def test_an_increment_of_a_record_whose_predecessor_only_a_checkpoint_has_stays():
    training = captured([5, 10, 15]).isel(step=[0, 2])
    merged, _ = merge(raw_steps([10]), training)
    assert column(merged, "from_step") == {5: 0, 10: -1, 15: 10}
    assert_same_at(merged, training, 15)


# Rule 5: a start that is none.


def unnumbered(step=10, segment=0):
    """What was saved without its step."""
    return raw_steps([step], segment=segment).assign_coords(step=[0])


def test_a_checkpoint_of_step_0_that_has_moved_is_not_the_start_that_the_records_know():
    merged, (finding,) = merge(unnumbered(), captured([5, 10]))
    assert column(merged, "from_step") == {5: 0, 10: 5}
    assert (finding.code, finding.step) == ("OD308", 0)
    assert "may be what was saved at the end" in finding.message


@pytest.mark.parametrize(
    ("checkpoints", "training"),
    [
        (unnumbered(), raw_steps([5, 10])),
        (several(unnumbered(), raw_steps([20], seed=7, segment=1)), captured([5, 10])),
        (unnumbered().map(lambda values: 0 * values, keep_attrs=True), captured([5, 10])),
    ],
    ids=["the records do not know it", "another training's", "it has not moved"],
)
def test_any_other_checkpoint_of_step_0_stays(checkpoints, training):
    merged, findings = merge(checkpoints, training)
    assert findings == []
    assert 0 in merged["step"].values


# All of them.


def slow_merge(checkpoints, training):
    """Cell by cell: (step, matrix) → spectrum of the total; step → from_step. For trainings that agree."""
    totals, origins = {}, {}
    for dataset in (checkpoints, training):  # the later one wins
        origins |= column(dataset, "from_step")
        spectra = dataset["singular_value"].values[:, TOTAL]
        for row, step in enumerate(dataset["step"].values.tolist()):
            for place, name in enumerate(dataset["matrix"].values.tolist()):
                if values := [each for each in spectra[row, place].tolist() if each == each]:
                    totals[step, name] = values
    return totals, {step: origin if origin <= 0 or origin in origins else -1 for step, origin in origins.items()}


@pytest.mark.parametrize(
    ("saved", "taken"),
    [
        ([10], [10]),
        ([10, 20], [5, 10]),
        ([5, 10], [10, 20]),
        ([10, 20, 30], [1, 2, 4, 8, 16, 32]),
        ([1, 2, 4, 8, 16, 32], [10, 20, 30]),
        ([10, 20, 30], [10, 20, 30]),
    ],
)
@pytest.mark.parametrize(("on_disk", "watched"), [(NAMES, NAMES), (NAMES, NAMES[1:3]), (NAMES[1:], NAMES[:3])])
def test_every_number_is_where_the_rules_put_it(saved, taken, on_disk, watched):
    checkpoints, training = raw_steps(saved, names=on_disk), captured(taken, names=watched)
    merged, findings = merge(checkpoints, training)
    totals, origins = slow_merge(checkpoints, training)
    assert findings == []
    assert slow_merge(merged, merged)[0] == totals
    assert column(merged, "from_step") == origins
    assert merged["step"].values.tolist() == sorted({*saved, *taken})
    assert set(merged["matrix"].values.tolist()) == {*on_disk, *watched}


def test_a_capture_of_another_model_under_the_same_names_is_measured_all_the_same():
    merged, findings = merge(raw_steps([10], out=12, rank=4), captured([10, 20], out=2, rank=8))
    assert [finding.code for finding in findings] == ["OD308"]
    assert np.isfinite(measure_update(merged)["update"]["stable_rank"].sel(kind="total")).all()
    merged, _ = merge(raw_steps([10], out=2, rank=8), captured([20], out=12, rank=4))
    assert np.isfinite(measure_update(merged)["update"]["stable_rank"].sel(kind="total")).all()


def test_merging_changes_neither():
    checkpoints, training = raw_steps([10, 20, 30]), captured([5, 10, 15], names=NAMES[:2])
    before = [each.copy(deep=True) for each in (checkpoints, training)]
    merge(checkpoints, training)
    merge(None, training.isel(step=[1, 2]))
    for each, copy in zip((checkpoints, training), before, strict=True):
        xr.testing.assert_identical(each, copy)


def test_neither_is_refused():
    with pytest.raises(ValueError, match=r"^Expected checkpoints or captured steps, got neither\.$"):
        merge(None, None)


# Names.


def test_names_on_disk_become_those_of_the_live_model_with_their_places():
    disk = raw_steps([10], names=NAMES[:2])
    live = with_live_names(disk, {NAMES[0]: "language_model.layers.3.mlp.fc1", "not there": "x"})
    assert live["matrix"].values.tolist() == ["language_model.layers.3.mlp.fc1", NAMES[1]]
    assert live["layer"].values.tolist() == [3, 0]
    assert live["role"].values.tolist() == ["mlp.fc1", "self_attn.v_proj"]
    assert live["stack"].values.tolist() == ["language_model.layers", "model.layers"]
    for name in raw.UPDATE:
        np.testing.assert_array_equal(live[name], disk[name])
    assert live["matrix"].attrs == disk["matrix"].attrs


def test_two_matrices_may_swap_their_names():
    swapped = with_live_names(raw_steps([10], names=NAMES[:2]), {NAMES[0]: NAMES[1], NAMES[1]: NAMES[0]})
    assert swapped["matrix"].values.tolist() == [NAMES[1], NAMES[0]]


@pytest.mark.parametrize(
    "names",
    [
        {NAMES[0]: NAMES[1]},
        {NAMES[0]: "x", NAMES[1]: "x"},
        # The second keeps its name since "x" is taken, and that is what the third was to be called.
        {NAMES[0]: "x", NAMES[1]: "x", NAMES[2]: NAMES[1]},
    ],
    ids=["another's", "twice", "what is kept is wanted"],
)
def test_two_matrices_never_get_one_name(names):
    disk = raw_steps([10])
    live = with_live_names(disk, names)
    assert len(set(live["matrix"].values.tolist())) == len(NAMES)
    assert live["matrix"].values.tolist()[:2] == list(NAMES[:2])


def test_nothing_to_translate():
    disk = raw_steps([10])
    assert with_live_names(disk, {}) is disk


# From the result back to the raw numbers.


def awkward():
    """A zero, a missing and a failed matrix; steps of two trainings; inner products."""
    update = several(captured([5, 10, 15]), raw_steps([20, 30], seed=7, segment=1))
    update["singular_value"].values[1, :, 0, :] = np.nan  # did not converge
    update["inner_product"].values[1:3, 0] = np.nan
    for name in ("count", "factor_rank"):
        update[name].values[2, :, 1] = 0
    for name in ("singular_value", "noise_energy"):
        update[name].values[2, :, 1] = np.nan
    update["inner_product"].values[2, 1] = np.nan
    for kind in (TOTAL, INCREMENT):
        values = update["singular_value"].values[3, kind, 2]
        values[np.isfinite(values)] = 0.0
    return update


def test_measures_of_the_raw_numbers_of_a_result_are_the_result():
    update = awkward()
    groups = measure_update(update)
    again = measure_update(unmeasured(groups["update"]))
    for name, group in groups.items():
        xr.testing.assert_allclose(again[name], group, rtol=1e-12)
        assert again[name].attrs == group.attrs


def test_the_raw_numbers_of_a_result_are_those_it_was_measured_from():
    update = captured([5, 10, 15])
    found = unmeasured(measure_update(update)["update"])
    xr.testing.assert_allclose(found, update, rtol=1e-12)
    assert {name: found[name].attrs for name in found.variables} == {n: update[n].attrs for n in update.variables}


def test_raw_numbers_of_no_matrix_at_all():
    update = raw.raw_update({1: (0, -1)}, {"a": MatrixShape(3, 3, 1, "F32")}, {})
    assert unmeasured(measure_update(update)["update"]).sizes == {"step": 1, "kind": 2, "matrix": 1, "index": 0}


def test_a_finding_of_a_merge_can_be_stored():
    (finding,) = merge(raw_steps([10], seed=0), captured([10], seed=7))[1]
    assert isinstance(finding, Finding)
    assert isinstance(finding.evidence["largest_difference"], float)


# Rule 6: totals of dense weights that are counted from the first checkpoint.


def without_base(steps, names=NAMES):
    """Checkpoints of dense weights: no total at the first, at the next one that since the first."""
    checkpoints = raw_steps(steps, names=names)
    spectra, counts = checkpoints["singular_value"].values, checkpoints["count"].values
    spectra[0, TOTAL], counts[0, TOTAL] = np.nan, 0
    spectra[1, TOTAL] = spectra[1, INCREMENT]
    spectra[2:, TOTAL] /= 2
    return checkpoints


def test_totals_since_the_first_checkpoint_are_left_out_where_the_records_know_the_start():
    checkpoints, training = without_base([10, 20, 30, 40]), captured([10, 20, 30], names=NAMES[:2])
    merged, findings = merge(checkpoints, training)
    assert findings == []
    assert set(merged["segment"].values.tolist()) == {0}
    for step in (10, 20, 30):
        assert_same_at(merged, training, step)
    assert (merged["count"].sel(kind="total", matrix=list(NAMES[2:])) == 0).all()
    assert (merged["count"].sel(kind="total", step=40) == 0).all()
    found, expected = (each["singular_value"].sel(kind="increment", step=40) for each in (merged, checkpoints))
    np.testing.assert_array_equal(found, expected)


def test_totals_since_the_first_checkpoint_stay_where_the_records_begin_there_too():
    checkpoints = without_base([10, 20, 30])
    _, findings = merge(checkpoints, raw_steps([10, 20, 30], names=NAMES[:2]))
    assert [finding.code for finding in findings] == ["OD308"]
    assert since_first_checkpoint(checkpoints).all()
    assert not since_first_checkpoint(raw_steps([10, 20, 30])).any()


def test_the_records_own_inner_products_stay_whatever_the_checkpoints_start_from():
    training = captured([10, 20])
    merged, _ = merge(raw_steps([10, 20]), training)
    np.testing.assert_array_equal(merged["inner_product"].sel(step=20), training["inner_product"].sel(step=20))
