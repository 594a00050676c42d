"""Names and numbers that no model has: refused by name, and the rest is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dynamics.checkpoints import NotARun, open_trajectory
from dynamics.checkpoints.names import module_name, name_fault, natural_order, shown
from dynamics.findings import Finding
from tests.runs import NAMES, adapter_config, adapter_tensors, random_factors, write_adapter


def assert_can_be_told(finding: Finding) -> None:
    text = str(finding) + finding.matrix + finding.file
    assert text.isprintable()
    assert len(text) < 1000
    json.dumps(finding.to_dict(), ensure_ascii=False).encode()


STRANGE = {
    "layer number": ("m.layers.99999999999999999999.q", "Its name holds a number that does not fit into 64 bits."),
    "expert number": ("m.experts.w[99999999999999999999]", "Its name holds a number that does not fit into 64 bits."),
    "many digits": ("m.layers." + "9" * 900 + ".q", "Its name holds a number that does not fit into 64 bits."),
    "long": ("m." * 600 + "q", "Its name has 1201 characters; expected at most 1000."),
    "very long": ("9" * 10_000, "Its name has 10000 characters; expected at most 1000."),
    "surrogate": ("m.\ud800.q", "Its name holds characters that cannot be shown or stored."),
    "line": ("m.\n.q", "Its name holds characters that cannot be shown or stored."),
    "nul": ("m.q\0", "Its name holds characters that cannot be shown or stored."),
}


@pytest.mark.parametrize(("name", "fault"), STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_name_costs_one_matrix(name: str, fault: str, tmp_path: Path) -> None:
    tensors = adapter_tensors(random_factors((*NAMES, name)))
    write_adapter(tmp_path, tensors=tensors, binary=True)  # safetensors itself refuses lone surrogates

    trajectory = open_trajectory(tmp_path)

    assert trajectory.matrices == tuple(sorted(NAMES))
    (finding,) = [finding for finding in trajectory.findings if finding.code != "OD117"]
    assert finding.code == "OD104"
    assert finding.message == fault
    assert finding.matrix == shown(name)
    assert finding.remedy
    assert_can_be_told(finding)


def test_nothing_but_strange_names(tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors=adapter_tensors(random_factors(["a\ud800", "b\ud800"])), binary=True)
    with pytest.raises(NotARun) as raised:
        open_trajectory(tmp_path)
    (finding,) = raised.value.findings
    assert finding.evidence["matrices"] == ["a\\ud800", "b\\ud800"]
    assert_can_be_told(finding)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["model.layers.9223372036854775807.q", "ä.ß.層", "a b", "x" * 1000, "h.007.q"])
def test_unusual_names_are_read(name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, random_factors([name]))
    assert name_fault(name) is None
    assert open_trajectory(tmp_path).matrices == (name,)


def test_header_that_is_not_unicode(tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint-10")
    write_adapter(tmp_path / "checkpoint-20", random_factors(["surrogate"]))
    path = tmp_path / "checkpoint-20" / "adapter_model.safetensors"
    content = path.read_bytes().replace(b"surrogate", b"sur\\ud800")
    path.write_bytes(content)

    trajectory = open_trajectory(tmp_path)

    assert trajectory.steps == (10,)
    finding = next(finding for finding in trajectory.findings if finding.code == "OD101")
    assert "a tensor 'base_model.model.sur\\ud800.lora_A.weight', which is not valid Unicode" in finding.message
    assert_can_be_told(finding)


def test_other_tensors_with_strange_names(tmp_path: Path) -> None:
    write_adapter(tmp_path, extra={"a\ud800\n": torch.ones(2), "b" * 5000: torch.ones(2)}, binary=True)
    (finding,) = [finding for finding in open_trajectory(tmp_path).findings if finding.code == "OD109"]
    assert_can_be_told(finding)


def test_adapter_folder_that_is_not_unicode(tmp_path: Path) -> None:
    write_adapter(tmp_path, random_factors(["q"]))
    try:
        write_adapter(tmp_path / "style\udcff", random_factors(["q"]))
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes Unicode names only")
    (tmp_path / "broken\udcff").mkdir()
    (tmp_path / "broken\udcff" / "adapter_model.safetensors").write_bytes(b"")

    trajectory = open_trajectory(tmp_path)

    assert trajectory.matrices == ("q@default", "q@style\\udcff")
    assert trajectory.checkpoints[0].inputs[1]["path"] == "style\\udcff/adapter_model.safetensors"
    for finding in trajectory.findings:
        assert_can_be_told(finding)


@pytest.mark.parametrize(
    "change",
    [{"peft_type": "NEW\ud800\n"}, {"use_\ud800\n": True}, {"target_parameters": ["experts.\ud800"]}],
)
def test_strange_configurations(change: dict[str, object], tmp_path: Path) -> None:
    write_adapter(tmp_path, config=adapter_config(**change))
    with pytest.raises(NotARun) as raised:
        open_trajectory(tmp_path)
    for finding in raised.value.findings:
        assert_can_be_told(finding)


RANGE = "expected 0, or a number that float32 holds (1e-37 to 3e+38 in size)."


@pytest.mark.parametrize(
    ("alpha", "text"),
    [
        ("1e200", "1e+200"), ("-1e39", "-1e+39"), ("1e-200", "1e-200"), ("-0.0", "-0.0"), ("NaN", "nan"),
        ("Infinity", "inf"), ("-Infinity", "-inf"), ("true", "True"), ('"8"', "'8'"), ("null", "None"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pattern", [False, True])
def test_alpha_that_no_training_can_have(alpha: str, text: str, pattern: bool, tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint-10")
    folder = write_adapter(tmp_path / "checkpoint-20", random_factors(seed=1))
    entry = f'"alpha_pattern": {{"q_proj": {alpha}}}, "lora_alpha": 8' if pattern else f'"lora_alpha": {alpha}'
    (folder / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 4, {entry}}}')

    trajectory = open_trajectory(tmp_path)

    assert trajectory.steps == (10,)
    (finding,) = [finding for finding in trajectory.findings if finding.code == "OD102"]
    name = "alpha_pattern['q_proj']" if pattern else "lora_alpha"
    assert finding.message == f"Its {name} is {text}; {RANGE}"
    assert finding.file == "checkpoint-20/adapter_config.json"


@pytest.mark.parametrize("rank", [2**31, 10**400])
def test_rank_that_no_adapter_has(rank: int, tmp_path: Path) -> None:
    write_adapter(tmp_path, config=adapter_config(rank=rank))
    with pytest.raises(NotARun) as raised:
        open_trajectory(tmp_path)
    assert "expected a positive integer below 2**31." in raised.value.findings[0].message


def test_endless_wrappers_are_not_taken_off() -> None:
    stem = "module." * 200_000 + "base_model.model.q"
    assert module_name(stem) == stem


def test_natural_order_of_numbers_of_any_length() -> None:
    names = ["h.10.q", "h." + "9" * 10_000, "h.2.q", "h.02.k", "h.0.q"]
    assert sorted(names, key=natural_order) == ["h.0.q", "h.02.k", "h.2.q", "h.10.q", "h." + "9" * 10_000]
