"""What a training should be told while it runs: told once, kept with the records, and not told without cause."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dynamics
from dynamics import Recorder
from tests.records import records_of
from tests.runs import Tokens, lora_llama

SIGNS = ("OD301", "OD302", "OD303", "OD304", "OD311", "OD201")


class TwoLayers(nn.Module):
    """Two matrices, of which the second may be left out."""

    def __init__(self, *, both: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.both = nn.Linear(5, 5, bias=False), nn.Linear(5, 4, bias=False), both

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return (self.second(hidden) if self.both else hidden).square().sum()


def rows(count: int = 16) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1))


def train(
    run: Path,
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    rate: float = 0.01,
    steps: range = range(1, 5),
    disturb: Callable[[int], None] = lambda step: None,
    **options,
) -> list[str]:
    """A plain training; the codes it is warned of, in their order."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(run, model, every=1, **options) as recorder:
            for step in steps:
                with recorder.step(step, optimizer):
                    loss().backward()
                    disturb(step)
                    optimizer.step()
                    optimizer.zero_grad()
    return [text.split()[0] for each in caught if (text := str(each.message)).startswith(SIGNS)]


def signs_of(run: Path) -> dict[str, dict]:
    findings = records_of(run).attributes["findings"]
    return {finding["code"]: finding for finding in findings if finding["code"] in SIGNS}


def test_a_healthy_training_is_told_nothing(tmp_path):
    model = lora_llama()
    data = torch.stack([Tokens()[index]["input_ids"] for index in range(8)])
    assert train(tmp_path, model, lambda: model(input_ids=data, labels=data).loss, rate=0.1) == []
    assert signs_of(tmp_path) == {}


def test_a_matrix_that_gets_no_gradient(tmp_path):
    model = TwoLayers(both=False)
    assert train(tmp_path, model, lambda: model(rows())) == ["OD301"]
    assert signs_of(tmp_path)["OD301"]["matrix"] == "second"
    assert signs_of(tmp_path)["OD301"]["message"].startswith(
        "This matrix had no gradient, or a gradient of zero, at each of the 4"
    )


@pytest.mark.parametrize("preset", ["economy", "full"])
def test_an_optimizer_that_steps_within_the_backward_pass(tmp_path, preset):
    """Its gradients are not zero, but gone; updates are all there."""
    model = TwoLayers()

    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        parameter -= 1e-3 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    assert train(tmp_path, model, lambda: model(rows()), preset=preset) == ["OD311"]
    assert signs_of(tmp_path)["OD311"]["message"].startswith("2 matrices had no gradient left to measure, first at")
    tree = dynamics.open_run(tmp_path)
    for name in ("norm_before_clip", "norm_after_clip", *(["singular_value"] if preset == "full" else [])):
        assert tree["gradient"][name].isnull().all(), name
    assert (tree["update"]["frobenius_norm"].sel(kind="increment") > 0).all()


def test_an_adapter_that_does_not_move(tmp_path):
    model = lora_llama()
    data = torch.stack([Tokens()[index]["input_ids"] for index in range(2)])
    codes = train(tmp_path, model, lambda: model(input_ids=data, labels=data).loss, rate=0.0, warmup_steps=2)
    assert codes == ["OD302"]
    found = signs_of(tmp_path)["OD302"]
    assert (found["step"], found["evidence"]["matrices"]) == (4, 7)  # as it stands at the last step


def test_an_update_that_collapses(tmp_path):
    model = TwoLayers()
    one_row = torch.ones(1, 5)  # every gradient is a product of two vectors, and the first of them stays
    assert train(tmp_path, model, lambda: model(one_row), rate=1e-4) == ["OD303"]
    assert signs_of(tmp_path)["OD303"]["evidence"]["names"] == ["first", "second"]


def test_a_gradient_that_is_not_finite(tmp_path):
    """Under loss scaling, where the scaler then skips the step."""
    model, poisoned = TwoLayers(), [2]
    handle = model.first.weight.register_hook(lambda gradient: gradient * (math.inf if step in poisoned else 1.0))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu", init_scale=4.0)
    with Recorder(tmp_path, model, every=1) as recorder:
        for step in (1, 2, 3):
            with warnings.catch_warnings(record=True) as caught, recorder.step(step, optimizer, scaler):
                warnings.simplefilter("always")
                scaler.scale(model(rows())).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            assert [str(each.message).split()[0] for each in caught] == (["OD304"] if step == 2 else [])
    handle.remove()
    found = signs_of(tmp_path)["OD304"]
    assert (found["matrix"], found["step"], found["evidence"]["steps"]) == ("first", 2, [2])
    tree = dynamics.open_run(tmp_path)
    norm = tree["gradient"]["norm_before_clip"].sel(matrix="first")
    assert np.isinf(norm).values.tolist() == [False, True, False]
    # Where there was no step, the next one begins at the same weights with another scale.
    other = tree["gradient"]["norm_before_clip"].sel(matrix="second")
    assert float(other.sel(step=2)) == pytest.approx(float(other.sel(step=3)), rel=1e-6)
    # And there is nothing that the optimizer took.
    assert tree["gradient"]["norm_after_clip"].isnull().any("matrix").values.tolist() == [False, True, False]
    assert tree["update"]["is_zero"].sel(kind="increment").all("matrix").values.tolist() == [False, True, False]


def test_weights_that_are_not_finite_cost_their_own_spectra_alone(tmp_path):
    """A training that diverges is the one that somebody will look at."""
    model = TwoLayers(both=False)

    def diverge(step: int) -> None:
        if step == 3:
            model.second.weight.data.fill_(math.nan)

    codes = train(tmp_path, model, lambda: model(rows()), disturb=diverge, gradients=False)
    assert codes == ["OD201"]
    assert (signs_of(tmp_path)["OD201"]["matrix"], signs_of(tmp_path)["OD201"]["step"]) == ("second", 3)
    norm = dynamics.open_run(tmp_path)["update"]["frobenius_norm"].sel(kind="total")
    assert norm["step"].values.tolist() == [1, 2, 3, 4]
    assert np.isfinite(norm.sel(matrix="first")).all()
    assert np.isnan(norm.sel(matrix="second")).values.tolist() == [False, False, True, True]


def test_a_resumed_training_knows_what_was_seen_before(tmp_path):
    model = TwoLayers(both=False)
    train(tmp_path, model, lambda: model(rows()))
    codes = train(tmp_path, model, lambda: model(rows()), steps=range(5, 7), resume_from=4)
    assert codes == ["OD301"]
    assert "at each of the 6 steps captured so far" in signs_of(tmp_path)["OD301"]["message"]


def test_what_was_seen_after_the_step_that_is_resumed_from_is_forgotten(tmp_path):
    run, model = tmp_path / "run", TwoLayers()

    def diverge(step: int) -> None:
        if step == 3:
            model.first.weight.data.fill_(math.nan)

    assert train(run, model, lambda: model(rows()), rate=1e-4, disturb=diverge, gradients=False) == ["OD201"]
    again = TwoLayers()
    train(tmp_path / "checkpoint", again, lambda: again(rows()), rate=1e-4, steps=range(1, 3))
    assert train(run, again, lambda: again(rows()), rate=1e-4, steps=range(3, 5), resume_from=2) == []
    assert signs_of(run) == {}


def test_a_sign_that_goes_away_was_told_and_is_not_kept(tmp_path):
    model = TwoLayers(both=False)

    def wake(step: int) -> None:
        model.both = step >= 2

    assert train(tmp_path, model, lambda: model(rows()), disturb=wake, rate=1e-3) == ["OD301"]
    assert signs_of(tmp_path) == {}
