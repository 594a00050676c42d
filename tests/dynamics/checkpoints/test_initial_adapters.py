"""Adapters that began with a part of the base weight: increments always, totals with the initial adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from tests.runs import NAMES, adapter_config, random_factors, write_adapter, write_state

METHODS = {"pissa_niter_16": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
SCALE = 2.0


def factors(step: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    start, noise = random_factors(seed=0), random_factors(seed=step + 1)
    change = 1e-3 * step
    return {name: tuple(s + change * n for s, n in zip(start[name], noise[name], strict=True)) for name in start}  # type: ignore[misc]


def write(run: Path, init: Any = "pissa", steps: tuple[int, ...] = (10, 20)) -> Path:
    for step in steps:
        folder = write_adapter(run / f"checkpoint-{step}", factors(step), adapter_config(init_lora_weights=init))
        write_state(folder, step)
    return run


def dense(step: int, name: str) -> torch.Tensor:
    left, right = factors(step)[name]
    return SCALE * left.double() @ right.double()


def spectra(run: Path) -> dict[tuple[int, str, str], torch.Tensor]:
    update, findings, _ = trajectory_spectra(open_trajectory(run))
    assert not findings
    values = update["singular_value"]
    return {
        (step, kind, name): torch.from_numpy(values.sel(step=step, kind=kind, matrix=name).dropna("index").values)
        for step in values["step"].values.tolist()
        for kind in ("total", "increment")
        for name in NAMES
    }


def assert_spectrum(values: torch.Tensor, matrix: torch.Tensor) -> None:
    truth = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(values, truth[: len(values)], rtol=1e-9, atol=1e-12 * float(truth[0]))
    assert float(truth[len(values) :].sum()) < 1e-9 * float(truth[0])


@pytest.mark.parametrize(("init", "name"), METHODS.items())
def test_increments_need_no_start(init: str, name: str, tmp_path: Path) -> None:
    sigma = spectra(write(tmp_path, init))
    for matrix in NAMES:
        assert len(sigma[20, "total", matrix]) == 0
        assert_spectrum(sigma[20, "increment", matrix], dense(20, matrix) - dense(10, matrix))
    (warning,) = [one for one in open_trajectory(tmp_path).findings if one.code == "OD138"]
    assert f"It was initialised by {name}" in warning.message
    assert "Increments between checkpoints are known, totals since the start are not" in warning.message


@pytest.mark.parametrize(
    ("folder", "init"), [("pissa_init", "pissa"), ("pissa_init", True), ("initial_adapter", "pissa")]
)
def test_totals_are_counted_from_the_initial_adapter(folder: str, init: Any, tmp_path: Path) -> None:
    """LLaMA-Factory keeps it as ``pissa_init/`` and writes ``init_lora_weights: true`` everywhere."""
    write_adapter(write(tmp_path, init) / folder, factors(0), adapter_config())
    write_adapter(tmp_path / "pissa_converted", random_factors(seed=9))
    sigma = spectra(tmp_path)
    for matrix in NAMES:
        assert_spectrum(sigma[20, "total", matrix], dense(20, matrix) - dense(0, matrix))
        assert_spectrum(sigma[20, "increment", matrix], dense(20, matrix) - dense(10, matrix))
    (note,) = [one for one in open_trajectory(tmp_path).findings if one.code == "OD121"]
    assert note.message == f"Updates are counted from the initial adapter '{folder}', which was not zero."


def test_the_start_itself_is_exactly_zero(tmp_path: Path) -> None:
    sigma = spectra(write(tmp_path, "olora", steps=(0, 10)))
    for matrix in NAMES:
        assert float(sigma[0, "total", matrix].max()) == 0.0
        assert_spectrum(sigma[10, "total", matrix], dense(10, matrix) - dense(0, matrix))


def test_an_initial_adapter_of_another_model_is_not_taken(tmp_path: Path) -> None:
    write_adapter(write(tmp_path) / "pissa_init", random_factors(out=14), adapter_config())
    assert "OD138" in [finding.code for finding in open_trajectory(tmp_path).findings]


def test_a_single_checkpoint_has_no_update_without_its_start(tmp_path: Path) -> None:
    write(tmp_path, steps=(10,))
    with pytest.raises(
        ValueError, match=r"OD105 checkpoint-10: It was initialised by PiSSA.*pissa_init/.*Or convert it"
    ):
        open_trajectory(tmp_path)
    write_adapter(tmp_path / "pissa_init", factors(0), adapter_config())
    assert_spectrum(spectra(tmp_path)[10, "total", NAMES[0]], dense(10, NAMES[0]) - dense(0, NAMES[0]))
