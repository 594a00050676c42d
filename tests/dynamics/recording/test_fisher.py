"""The record of a step: made from a ProbeGram, and read back into one."""

import math
import re

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from dynamics import schema
from dynamics.fisher.dataset import gram_of
from dynamics.recording import fisher
from dynamics.recording.fisher import FisherProbe, Interventions, fisher_record, momentum_of, record_bytes, score_record
from dynamics.store.record_file import packed
from probes import ProbeGram, Score, Task, gradient_gram

LABELS = {
    "sample_task": ["a", "a", "b", "b"],
    "sample_group": ["0", "0", "1", "2"],
    "sample_id": ["a/0", "a/1", "b/0", "b/1"],
}
ROWS = np.random.default_rng(0).standard_normal((4, 3))


def probe_gram(present=(0, 1, 2, 3)):
    rows = ROWS[list(present)]
    return ProbeGram(
        gram={"w": rows @ rows.T, "global": 2 * rows @ rows.T},
        update_product={"w": rows.sum(1), "global": rows.sum(1)},
        update_norm_squared={"w": 3.0, "global": 3.5},
        share_outside_space={"w": 0.25, "global": math.nan},
        dimension={"w": 3, "global": 6},
        losses=np.arange(4.0)[list(present)],
        tasks=[LABELS["sample_task"][number] for number in present],
        groups=[LABELS["sample_group"][number] for number in present],
        sample_ids=[LABELS["sample_id"][number] for number in present],
        space="tangent",
        left_out=tuple(sorted({0, 1, 2, 3} - set(present))),
    )


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 2, 3)])
def test_a_record_gives_its_gram_back(present):
    gram = probe_gram(present)
    record = fisher_record(gram, 20, 10, LABELS, batch_size=8, momentum=0.0)
    found = gram_of(record.isel(step=0))
    for name in ("gram", "update_product", "update_norm_squared", "share_outside_space", "dimension"):
        for block, value in getattr(gram, name).items():
            np.testing.assert_array_equal(getattr(found, name)[block], value, err_msg=f"{name} of {block}")
    np.testing.assert_array_equal(found.losses, gram.losses)
    for name in ("tasks", "groups", "sample_ids"):
        assert list(getattr(found, name)) == list(getattr(gram, name)), name
    assert (found.left_out, found.space, found.fisher) == (gram.left_out, "tangent", "empirical")
    assert found.batch_size == 80  # of all ten steps


def test_a_record_has_every_variable_of_the_schema():
    record = fisher_record(probe_gram(), 20, 10, LABELS)
    assert set(record) == {*schema.FISHER_RECORD, "momentum"}
    for name, variable in schema.FISHER_RECORD.items():
        assert (record[name].dims, record[name].attrs) == (variable.dims, variable.attributes), name
    assert record["evaluated_at_step"].values.tolist() == [10]


def test_a_sample_that_was_left_out_is_missing():
    record = fisher_record(probe_gram((0, 2, 3)), 20, 10, LABELS).isel(step=0)
    assert record["sample_id"].values.tolist() == LABELS["sample_id"]
    assert np.isnan(record["gram"].values).any((0, 1)).tolist() == [True] * 4
    assert np.isnan(record["gram"].values[:, 1]).all()
    assert np.isnan(record["loss"].values).tolist() == [False, True, False, False]


def test_an_update_that_is_unknown_for_a_block_is_unknown_for_all():
    record = fisher_record(probe_gram(), 20, 10, LABELS, unknown=["w"]).isel(step=0)
    for name in ("update_product", "update_norm_squared", "share_outside_space"):
        assert np.isnan(record[name].values).all(), name
    assert np.isfinite(record["gram"].values).all()


def test_a_gram_without_an_update_has_no_product():
    gram = ProbeGram({"w": np.eye(4)}, dimension={"w": 3}, losses=np.ones(4))
    record = fisher_record(gram, 0, 0, LABELS).isel(step=0)
    assert np.isnan(record["update_product"].values).all()
    assert np.isnan(record["update_norm_squared"].values).all()


def test_a_probe_records_the_gram_of_its_tasks():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    rows = [{"x": torch.tensor(row), "image": str(number)} for number, row in enumerate(ROWS.astype(np.float32))]
    tasks = [Task("t", rows, loss=lambda model, batch: model(batch["x"]).square().sum(1), group="image")]
    probe = FisherProbe(model, tasks, batch_size=4)
    record = probe.record(probe.measure(None), 0, 0)
    expected = gradient_gram(model, tasks)
    found = gram_of(record.isel(step=0))
    assert (found.gram["global"] == expected.gram["global"].numpy()).all()
    assert (found.tasks, found.groups, found.sample_ids) == (expected.tasks, expected.groups, expected.sample_ids)
    assert record.attrs["batch_size"] == 4


def small_probe(blocks=None):
    """Two blocks of a model, four samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    rows = [{"x": torch.tensor(row)} for row in ROWS.astype(np.float32)]
    task = Task("t", rows, loss=lambda model, batch: model(batch["x"]).square().sum(1), batch_size=3)
    return FisherProbe(model, [task], blocks=blocks)


def recorded(probe, change=None):
    return probe.record(probe.measure(change), 2, 0)


def test_the_size_of_a_record_is_that_of_the_packed_gram():
    k = np.random.default_rng(1).standard_normal((1, 3, 17, 17))
    triangle, _ = packed(k + k.swapaxes(-1, -2))
    assert record_bytes(3, 17) == triangle.nbytes


def test_a_small_record_has_every_block_and_no_finding():
    probe = small_probe()
    assert recorded(probe)["block"].values.tolist() == ["0", "1", "global"]
    assert probe.findings() == []


def test_a_large_record_has_all_blocks_together_unless_they_are_chosen(monkeypatch):
    change = {"0": torch.ones(2, 3), "1": torch.ones(2, 2)}
    everything = recorded(small_probe(), change).sel(block=["global"])
    monkeypatch.setattr(fisher, "MOST_BYTES", record_bytes(3, 4) - 1)
    probe = small_probe()
    xr.testing.assert_identical(recorded(probe, change), everything)
    (finding,) = probe.findings()
    assert finding.code == "OD320"
    assert "with all 3 blocks of 4 probe samples" in finding.message
    assert "choose them: matrices='.'" in finding.remedy
    assert finding.evidence == {"bytes": record_bytes(3, 4), "blocks": 3, "samples": 4}

    probe.follow(blocks=None)
    assert recorded(probe, change)["block"].values.tolist() == ["global"]
    chosen = small_probe(["0", "1"])
    assert recorded(chosen, change)["block"].values.tolist() == ["0", "1", "global"]
    (finding,) = chosen.findings()
    assert finding.message.startswith("A record of the Fisher takes 0.0 MiB: 3 blocks of 4 probe samples.")


def test_progress_counts_the_samples_measured():
    told = []
    small_probe().measure(None, lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (3, 4), (4, 4)]


def test_an_increment_of_which_a_part_is_unknown_is_not_intervened_on():
    """A matrix that has been trained for an unknown number of steps when it is noticed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))
    rows = [{"x": torch.tensor(row)} for row in ROWS.astype(np.float32)]
    probe = FisherProbe(model, [Task("t", rows, loss=lambda model, batch: model(batch["x"]).square().sum(1))])
    model[1].requires_grad_(True)
    probe.follow(blocks=None, moved=True)
    model[0].bias.data += 1
    increment = probe.measure({"0": torch.zeros(2, 3)})
    assert set(increment.unknown) == {"1", "1.bias"}
    assert np.isnan(probe.record(increment, 2, 0)["update_product"].sel(block="global")).all()
    with pytest.raises(ValueError, match=re.escape("Expected the whole increment, got none of 1")):
        probe.intervene(increment, Interventions(), 2, 0)
    probe.advance()
    model[0].bias.data += 1
    effects = probe.intervene(probe.measure({"0": torch.zeros(2, 3), "1": torch.zeros(2, 2)}), Interventions(), 3, 2)
    assert effects["from_step"].values.tolist() == [2]
    assert np.isfinite(effects["effect"].sel(arm="full")).all()


def test_scores_and_their_direction():
    scores = [Score("a", 0.5, 4, 0.1, True), Score("b", 0.25, 2, 0.2, False), Score("c", 0.0, 1, 0.0, None)]
    record = score_record(7, scores, [False, True, False])
    assert record["task"].values.tolist() == ["a", "b", "c"]
    assert record["score"].values.tolist() == [[0.5, 0.25, 0.0]]
    assert record["direction"].values.tolist() == [[1.0, -1.0, 0.0]]
    assert record["retained"].values.tolist() == [False, True, False]


def test_momentum_is_the_largest_of_the_groups():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "momentum": 0.5}, {"params": parameters[1:], "momentum": 0.8}]
    assert momentum_of(torch.optim.SGD(groups, lr=0.1)) == 0.8
    assert momentum_of(torch.optim.AdamW(parameters, betas=(0.85, 0.99))) == 0.85
    assert math.isnan(momentum_of(object()))
