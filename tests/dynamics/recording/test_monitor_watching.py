import re

import pytest
from torch import nn

from dynamics.recording.monitor import findings_on_model, findings_on_resuming, watched_or_refused


def test_what_is_watched_and_what_is_left():
    found = watched_or_refused(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), None)
    (note,) = findings_on_model(found, gradients=True)
    assert (note.code, note.evidence["names"]) == ("OD306", ["0.bias", "1.weight", "1.bias"])
    assert note.evidence["covered_share"] == pytest.approx(6 / 12)


def test_a_model_without_trained_matrices_is_refused_with_the_remedy():
    model = nn.Linear(3, 2)
    model.requires_grad_(False)
    message = (
        "Expected at least one matrix to watch, found none among 0 trainable parameters. Give the recorder the model "
        "after adapters are added and before they are merged, or change the pattern."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        watched_or_refused(model, None)


def test_gradients_that_are_not_recorded_are_noted():
    found = watched_or_refused(nn.Linear(3, 2, bias=False), None)
    assert [note.code for note in findings_on_model(found, gradients=False)] == ["OD311"]


@pytest.mark.parametrize(("step", "goes_on", "codes"), [(None, False, []), (4, True, []), (4, False, ["OD307"])])
def test_resuming_without_a_record_is_noted(step, goes_on, codes):
    assert [note.code for note in findings_on_resuming(step, continues=goes_on)] == codes
