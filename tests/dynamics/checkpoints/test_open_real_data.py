"""Adapters made by others: each gives a right result or a clear finding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamics.checkpoints import NotARun, open_trajectory
from dynamics.checkpoints.formats.peft_config import parse_adapter_config
from tests.dynamics.checkpoints import foreign_twins as twins

RUNS: dict[str, tuple[tuple[int, ...], int, list[str]]] = {
    "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese/results": (
        (500, 1500, 2500, 3500, 4500, 5500, 6500, 7500, 8500, 8610),
        24,
        ["OD109"],
    ),
    "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese/roberta-portuguese-peft": ((0,), 24, ["OD109"]),
    "Little0o0__smoothquant/at_2a09ca8d/outputs": ((500, 1000, 1500, 2000, 2500, 3000), 24, []),
    "AguLeon__LoRA_RoBERTa_AGNews/results": ((500, 1000, 1200), 36, ["OD109"]),
    "vqdung71104__Day21-Track3-Finetuning-LLMs-LoRA-QLoRA/r8": ((23, 46, 69), 48, ["OD110"]),
    "parikshit-06__domain-skeleton-gpt2/adapters/legal": ((250,), 36, ["OD110"]),
    "parikshit-06__domain-skeleton-gpt2/adapters/medical": ((250,), 36, ["OD110"]),
    "parikshit-06__domain-skeleton-gpt2/adapters/sports": ((250,), 36, ["OD110"]),
    "tommyroar__is-the-mountain-out/checkpoints_v1_binary": ((0,), 36, []),
    "tommyroar__is-the-mountain-out/train/checkpoints": ((0,), 36, []),
    "johntnanney__gradience/examples/adapters/tiny_lora": ((0,), 12, ["OD119"]),
}


@pytest.mark.parametrize(("run", "expected"), RUNS.items(), ids=RUNS.keys())
def test_runs_that_are_analysed(run: str, expected: tuple[Any, ...], shared_data: Path, codes: Any) -> None:
    trajectory = open_trajectory(shared_data / run)
    assert (trajectory.steps, len(trajectory.matrices), codes(trajectory.findings)) == expected
    assert {checkpoint.segment for checkpoint in trajectory.checkpoints} == {0}


@pytest.mark.parametrize("run", RUNS)
def test_products_are_those_of_the_stored_tensors(run: str, shared_data: Path) -> None:
    checkpoint = open_trajectory(shared_data / run).checkpoints[-1]
    tensors = load_file(checkpoint.folder / "adapter_model.safetensors")
    config = json.loads((checkpoint.folder / "adapter_config.json").read_text())
    with checkpoint.open() as matrices:
        name = next(iter(matrices))
        left, right = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "BA")
        expected = left @ right * (config["lora_alpha"] / config["r"])
        torch.testing.assert_close(matrices[name].to_dense(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rank", ["r16", "r64"])
def test_runs_without_weights(rank: str, shared_data: Path) -> None:
    with pytest.raises(NotARun) as raised:
        open_trajectory(shared_data / "vqdung71104__Day21-Track3-Finetuning-LLMs-LoRA-QLoRA" / rank)
    missing = [finding.file for finding in raised.value.findings if finding.code == "OD106"]
    assert missing == ["adapter_config.json", "checkpoint-23", "checkpoint-46", "checkpoint-69"]


def test_other_formats_are_refused_by_name(shared_data: Path) -> None:
    with pytest.raises(NotARun) as raised:
        open_trajectory(shared_data / "invoke-ai__InvokeAI/tests/backend/model_manager/data/test_files")
    assert raised.value.findings
    assert all(finding.code == "OD103" and "textual-inv" in finding.message for finding in raised.value.findings)


@pytest.mark.parametrize(
    ("folder", "stems"),
    [
        (
            "KohakuBlueleaf__LyCORIS/at_3e64b457/result",
            "smart_falcon_4_lokr, smart_falcon_8_lokr, smart_falcon_16_lokr",
        ),
        ("cloneofsimo__lora/example_loras", "analog_svd_rank4, lora_disney"),
    ],
)
def test_folders_of_several_adapters_are_refused_by_name(folder: str, stems: str, shared_data: Path) -> None:
    with pytest.raises(NotARun, match=f"trainings, going by their names: {stems}. Put the files of each training"):
        open_trajectory(shared_data / folder)


FOREIGN = {
    "KohakuBlueleaf__LyCORIS/at_3e64b457/result/smart_falcon_4_lokr.safetensors": 350,
    "KohakuBlueleaf__LyCORIS/at_3e64b457/result/smart_falcon_16_lokr.safetensors": 350,
    "cloneofsimo__lora/example_loras/analog_svd_rank4.safetensors": 192,
    "cloneofsimo__lora/example_loras/lora_disney.safetensors": 192,
}


@pytest.mark.parametrize(("file", "count"), FOREIGN.items(), ids=FOREIGN.keys())
def test_foreign_adapters_have_the_updates_of_their_formulas(
    file: str, count: int, shared_data: Path, tmp_path: Path
) -> None:
    shutil.copy(shared_data / file, tmp_path)
    trajectory = open_trajectory(tmp_path)
    assert not [finding for finding in trajectory.findings if finding.severity != "note"]
    modules = twins.modules(load_file(shared_data / file))
    assert set(trajectory.matrices) == set(modules)
    assert len(modules) == count
    with trajectory.checkpoints[0].open() as matrices:
        small = [name for name, shape in matrices.shapes.items() if shape.out * shape.in_ < 10**6]
        for name in small[::20]:
            expected = twins.update(modules[name])
            torch.testing.assert_close(matrices[name].to_dense(), expected, rtol=1e-10, atol=1e-12)


def test_folders_of_broken_files(shared_data: Path) -> None:
    broken = shared_data / "invoke-ai__InvokeAI" / "tests" / "backend"
    for folder in {path.parent for path in broken.rglob("*.safetensors")}:
        with pytest.raises(NotARun) as raised:
            open_trajectory(folder)
        assert raised.value.findings


def shapes(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "invoke-ai__InvokeAI" / "keyshapes").glob("*.json"))


def test_key_styles_without_configuration(shared_data: Path, tmp_path: Path) -> None:
    """Each gives the update of its library's formula, matrix by matrix, or a finding that says why not."""
    for path in shapes(shared_data):
        folder = tmp_path / path.stem
        folder.mkdir()
        tensors = small_tensors(path)
        save_file(tensors, folder / "adapter_model.safetensors")
        if path.stem == "flux_lora_diffusers_base_model_format":  # PEFT's own, whose scale is in its configuration
            with pytest.raises(NotARun, match="rank and scale are unknown"):
                open_trajectory(folder)
            continue
        modules = twins.modules(tensors)
        plain = {name: parts for name, parts in modules.items() if "dora" not in parts}
        if not plain:
            with pytest.raises(NotARun, match="DoRA magnitude"):
                open_trajectory(folder)
            continue
        trajectory = open_trajectory(folder)
        assert set(trajectory.matrices) == set(plain), path.stem
        refused = {name for finding in trajectory.findings for name in finding.evidence.get("matrices", ())}
        assert refused == set(modules) - set(plain), path.stem
        with trajectory.checkpoints[0].open() as matrices:
            for name in trajectory.matrices[::5]:
                torch.testing.assert_close(matrices[name].to_dense(), twins.update(plain[name]), rtol=1e-10, atol=1e-12)


def test_key_styles_under_a_lora_configuration(shared_data: Path, tmp_path: Path) -> None:
    """Whatever is analysed is a pair of lora_A and lora_B; everything else is refused by name."""
    for path in shapes(shared_data):
        folder = tmp_path / path.stem
        folder.mkdir()
        tensors = small_tensors(path)
        save_file(tensors, folder / "adapter_model.safetensors")
        ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_A.weight")}
        config = {"peft_type": "LORA", "r": min(ranks, default=4), "lora_alpha": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        pairs = [key for key in tensors if key.endswith(".lora_A.weight") and tensors[key].shape[0] == config["r"]]
        if pairs:
            assert len(open_trajectory(folder).matrices) == len(pairs), path.stem
        else:
            with pytest.raises(NotARun) as raised:
                open_trajectory(folder)
            assert [finding.code for finding in raised.value.findings] == ["OD103"], path.stem


def small_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Random tensors under a file's keys, their large dimensions cut down."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn([min(size, 6) for size in shape], generator=generator).clone()
        for key, shape in json.loads(path.read_text()).items()
    }


def test_every_kind_of_configuration_is_known_or_refused(shared_data: Path) -> None:
    analysed: dict[str, int] = {}
    for path in (shared_data / "huggingface__peft" / "method_comparison").rglob("adapter_config.json"):
        config = parse_adapter_config(json.loads(path.read_text()))
        if config.refusal is None:
            assert config.peft_type in ("LORA", "ADALORA")
            analysed[config.peft_type] = analysed.get(config.peft_type, 0) + 1
        elif config.peft_type != "LORA":
            assert config.peft_type in config.refusal.reason
    assert analysed["LORA"] >= 9
    assert analysed["ADALORA"] == 2


def test_patterns_as_a_real_tool_writes_them(shared_data: Path) -> None:
    for path in (shared_data / "johntnanney__gradience").rglob("adapter_config.json"):
        content = json.loads(path.read_text())
        if content.get("rank_pattern"):
            config = parse_adapter_config(content)
            for name, rank in content["rank_pattern"].items():
                assert config.rank_of(name) == rank
                assert config.scale_of(name) == content["alpha_pattern"][name] / rank
