"""DoRA: with its base the change that PEFT merges, without it a refusal that says what is needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynamics.checkpoints import NotARun, open_trajectory
from dynamics.checkpoints.formats.peft import dora_update
from probes.low_rank import LowRankMatrix
from tests.whole_models import write_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 16)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 6, 3)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = transformers.pytorch_utils.Conv1D(8, 8)


def trained(make: type[nn.Module], folder: Path) -> tuple[Tensor, Path, Path]:
    """What merging a random DoRA adapter changes in the layer; the adapter's folder and the base's."""
    torch.manual_seed(0)
    model = make().double()
    base = write_model(folder / "base", {k: v.clone() for k, v in model.state_dict().items()})
    before = model.layer.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["layer"], use_dora=True)
    adapted = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.rand(parameter.shape).double() + 0.1)
    adapted.save_pretrained(folder / "run")
    after = adapted.merge_and_unload().layer.weight.detach()
    return after - before, folder / "run", base


@pytest.mark.parametrize("make", [Linear, Convolution, Transposed])
def test_the_change_that_peft_merges(make: type[nn.Module], tmp_path: Path) -> None:
    expected, run, base = trained(make, tmp_path)
    expected = expected.T if make is Transposed else expected.flatten(1)
    trajectory = open_trajectory(run, base=base)
    shape = trajectory.checkpoints[0].shapes["layer"]
    assert (shape.rank, shape.holds) == (0, "update")
    with trajectory.checkpoints[0].open() as matrices:
        torch.testing.assert_close(matrices["layer"], expected, rtol=1e-12, atol=1e-13)
    remarks = [finding.message for finding in trajectory.findings if finding.code == "OD121"]
    assert remarks == [
        "DoRA: the analysed update is the change of the whole weight, of full rank, formed with the base."
    ]


def test_a_small_update_keeps_its_digits() -> None:
    """A magnitude equal to the rows' norm rescales nothing, so that s B A is left."""
    torch.manual_seed(0)
    weight = torch.randn(700, 9, dtype=torch.float64)  # more rows than are worked on at once
    matrix = LowRankMatrix(1e-9 * torch.randn(700, 2).double(), torch.randn(2, 9).double())
    rows = weight + matrix.to_dense()
    update = dora_update(weight, matrix, rows.norm(dim=1))
    torch.testing.assert_close(update, matrix.to_dense(), rtol=1e-6, atol=1e-15)


def test_without_a_base_it_is_refused_with_the_remedy(tmp_path: Path) -> None:
    _, run, _ = trained(Linear, tmp_path)
    with pytest.raises(NotARun) as raised:
        open_trajectory(run)
    (error,) = raised.value.findings
    assert (error.code, error.remedy) == ("OD105", "Give the base weights (--base).")


@pytest.mark.parametrize(
    ("weight", "said"),
    [({"other.weight": torch.ones(16, 10)}, "has no such weight"), ({"layer.weight": torch.ones(3, 4)}, "has (3, 4)")],
)
def test_a_base_that_does_not_fit_is_refused_by_name(weight: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, run, _ = trained(Linear, tmp_path)
    with pytest.raises(NotARun) as raised:
        open_trajectory(run, base=write_model(tmp_path / "another", weight))
    (error,) = [finding for finding in raised.value.findings if finding.code == "OD105"]
    assert error.matrix == "layer"
    assert said in error.message


def test_a_magnitude_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    _, run, base = trained(Linear, tmp_path)
    tensors = load_file(run / "adapter_model.safetensors")
    tensors["base_model.model.layer.lora_magnitude_vector"] = torch.ones(3)
    save_file(tensors, run / "adapter_model.safetensors")
    with pytest.raises(NotARun) as raised:
        open_trajectory(run, base=base)
    (error,) = [finding for finding in raised.value.findings if finding.code == "OD104"]
    assert error.message == "Its DoRA magnitude has shape [3], not one length for each row."


def test_one_adapter_of_two(tmp_path: Path) -> None:
    """Each has its own update; there is no sum, as the rescaling of one would depend on the other."""
    expected, run, base = trained(Linear, tmp_path)
    shutil.copytree(run, run / "style")
    trajectory = open_trajectory(run, base=base)
    assert trajectory.matrices == ("layer@default", "layer@style")
    assert trajectory.base is not None
    assert set(trajectory.base.shapes) == set(trajectory.matrices)
    with trajectory.checkpoints[0].open() as matrices:
        torch.testing.assert_close(matrices["layer@style"], expected, rtol=1e-12, atol=1e-13)
