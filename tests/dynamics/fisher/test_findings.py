import numpy as np
import pytest

from dynamics.fisher import measure_fisher
from dynamics.fisher.findings import findings_of
from tests.dynamics.fisher.records import record
from tests.fishers import BLOCKS, fisher_record


def codes(raw):
    return {finding.code: finding for finding in findings_of(measure_fisher(raw))}


@pytest.fixture(scope="module")
def usual():
    return codes(record(samples=64))


def test_what_is_usual(usual):
    assert "OD408" in usual  # two samples an image
    assert usual["OD408"].evidence == {"samples": 64, "groups": 32}
    assert "OD405" in usual  # eight steps' batches against half the probe samples
    assert not {"OD401", "OD402", "OD403", "OD406", "OD407", "OD409", "OD410"} & set(usual)


def test_few_groups():
    assert codes(record(samples=8))["OD401"].evidence["groups"] == {"all": 4, "caption": 2, "vqa": 2}


def test_not_finite():
    raw = record()
    raw["gram"][1, 0, 2, 3] = np.nan
    finding = codes(raw)["OD402"]
    assert finding.message.startswith("The Gram matrix of 'layers.0' is not finite at 1 of 3 steps")


def test_outside_the_space():
    raw = record()
    raw["share_outside_space"][2, 1] = 0.4
    assert codes(raw)["OD403"].message.startswith("Up to 40.0 % of the update of 'layers.1' cannot be reached")


def test_unresolved_cosines():
    raw = record()
    raw["gram"].values[:] = np.eye(24)
    assert codes(raw)["OD404"].evidence["share"] == 1


def test_no_null_without_a_batch_size():
    finding = codes(record(batch_size=0))["OD406"]
    assert "the batch size of the training is unknown" in finding.message


def test_concentrated_only_where_most_cases_are():
    raw = record(samples=64, directions=40, batch_size=1, mean=0.0)
    for step in (1, 2):
        for block in range(3):  # the update is the first direction of K itself
            values, vectors = np.linalg.eigh(raw["gram"].values[step, block])
            raw["update_product"][step, block] = vectors[:, -1] * values[-1] ** 0.5
            raw["update_norm_squared"][step, block] = 1.0
    assert codes(raw)["OD407"].evidence["share"] > 0.3


def test_unequal_tasks():
    raw = record()
    raw = raw.assign_coords(sample_task=("sample", np.where(np.arange(24) < 6, "caption", "vqa")))
    assert codes(raw)["OD409"].evidence == {"fewest": 6, "most": 18}


def test_product_of_another_update():
    raw = record()
    raw["update_product"][2, 1] *= 100
    assert codes(raw)["OD410"].evidence["blocks"] == ["layers.1"]


def test_nothing_is_said_of_a_training_without_updates():
    raw = record(steps=1)
    assert not {"OD405", "OD406", "OD407"} & set(codes(raw))


def test_few_samples_that_carry_the_fisher():
    raw = record(samples=48)
    scale = np.ones(48)
    scale[30] = 30.0
    raw["gram"].values[1] *= scale[:, None] * scale
    finding = codes(raw)["OD412"]
    assert finding.message.startswith(
        "Few samples dominate the Fisher of 'all', 'vqa'. For 'all' at step 10 the 24 groups"
    )
    assert finding.evidence["tasks"] == ["all", "vqa"]
    assert finding.evidence["effective_groups"] < 2


def test_a_null_of_too_many_samples_says_that_it_decides_nothing():
    finding = codes(record(batch_size=40))["OD413"]
    assert finding.evidence == {"null_batch": 400, "most": 96, "steps": 2}
    assert "OD405" not in codes(record(batch_size=40))


def test_momentum_that_is_not_known():
    raw = record()
    assert "OD414" in codes(raw)
    raw["momentum"] = ("step", [0.9, np.nan, 0.9])
    assert "OD414" in codes(raw)
    raw["momentum"] = ("step", [np.nan, 0.9, 0.0])  # the first has no update
    assert "OD414" not in codes(raw)
    assert "OD414" not in codes(record(batch_size=0))


def beside_optimizer(**changes):
    return {f.code: f for f in findings_of(measure_fisher(fisher_record(optimizer=True, **changes)))}


def test_nothing_is_said_where_no_optimizer_could_be_asked():
    """Of checkpoints, whose optimizer is not read."""
    assert "OD335" not in codes(fisher_record())
    assert "OD335" not in beside_optimizer()


def test_the_reason_why_the_optimizers_null_is_missing():
    raw = fisher_record()
    raw.attrs["unpreconditioned"] = "the preconditioner of Lion (lion) is unknown"
    assert codes(raw)["OD335"].message.startswith(
        "At 3 of 3 steps the update is not compared with steps of its optimizer along fresh gradients: the "
        "preconditioner of Lion (lion) is unknown. "
    )
    assert "Compare other steps" in codes(raw)["OD335"].remedy
    raw.attrs["unpreconditioned"] = "the optimizer is unknown"
    assert codes(raw)["OD335"].remedy == "Pass the optimizer to recorder.step(step, optimizer)."
    without_null = fisher_record(batch_size=0)
    without_null.attrs["unpreconditioned"] = "some reason"
    assert "OD335" not in codes(without_null)


def test_young_second_moments_have_no_null():
    raw = fisher_record(optimizer=True)
    raw["optimizer_gradients"][0] = 3.0
    assert "OD335" not in codes(raw)  # other steps have one
    raw["optimizer_gradients"][:] = 3.0
    finding = codes(raw)["OD335"]
    assert finding.evidence["steps"] == 3
    assert "the optimizer's second moments rest on fewer than 10 gradients there." in finding.message


def test_a_block_without_the_optimizers_null_is_named():
    raw = fisher_record(optimizer=True)
    for name in ("preconditioned_product", "preconditioned_gram"):
        raw[name][:, 1] = np.nan
    raw.attrs["unpreconditioned"] = "some reason"
    assert codes(raw)["OD335"].message == (
        f"The update of {BLOCKS[1]!r} is not compared with steps of its optimizer along fresh gradients: some reason."
    )


def test_more_concentrated_than_steps_of_the_optimizer():
    assert beside_optimizer(update="leading")["OD336"].evidence["share"] > 0.5
    assert "OD336" not in beside_optimizer(update="step")


def test_plain_sgd_is_not_told_twice():
    raw = fisher_record(update="leading")
    raw["plain_optimizer"] = ("step", np.ones(3))
    found = codes(raw)
    assert "OD407" in found
    assert not {"OD335", "OD336"} & set(found)
