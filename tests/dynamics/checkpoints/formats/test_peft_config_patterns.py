"""Patterns come from strangers: none of them may keep the reader busy."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from dynamics.checkpoints import NotARun, open_trajectory
from dynamics.checkpoints.formats.peft_config import paths
from tests.runs import NAMES, adapter_config, random_factors, write_adapter


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 1),
        (r"model\.layers\.0\.q_proj", 1),
        ("q_proj|k_proj|v_proj", 3),
        ("(q|k)_(a|b|c)", 6),
        (".*", 11),
        (r"layers\.\d+\..*", 10 * 11),
        ("x?", 2),
        ("x*?", 11),
        ("x{3}", 1),
        ("x{2,4}", 3),
        ("x{,2}", 3),
        ("x{8,}", 3),
        ("(a|b){3}", 8),
        (r"(.*\.)?", 12),
        ("[*+|(]", 1),
        ("[^]*]", 1),
        (r"\(\*\|", 1),
        ("(?:a|b)", 2),
        ("(?P<name>a)(?=b*)", 11),
        ("{a}", 1),
    ],
)
def test_number_of_paths_on_ten_characters(pattern: str, count: int) -> None:
    re.compile(pattern)
    assert paths(pattern, 10) == count


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*", "(.*)*", "((a?){9}){9}", "(a*)*?", "a?" * 40, "(a|a)" * 40])
def test_explosive_patterns_have_too_many_paths(pattern: str) -> None:
    assert paths(pattern, 40) > 1e7


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", ["(a+)+", "(a|aa)+", "(.*)*", "a?" * 40 + "a" * 40, ".*" * 9 + "x"])
def test_explosive_keys_are_refused_by_name(table: str, key: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, random_factors(["a" * 40 + "!"]), adapter_config(**{table: {key: 4}}))
    start = time.perf_counter()

    with pytest.raises(NotARun) as raised:
        open_trajectory(tmp_path)

    assert time.perf_counter() - start < 5
    (finding,) = raised.value.findings
    assert finding.code == "OD102"
    assert f"Its {table} has the key {key!r}, which may match in more than 10 million ways" in finding.message
    assert finding.remedy == "Write the key without nested repeats, or as the name of the module."


@pytest.mark.parametrize("key", ["(" * 20_000 + ")" * 20_000, "a" * 1001, "a{99999999999}", "(?x:a)", "(?i:a)"])
def test_keys_that_are_no_patterns_of_names(key: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, config=adapter_config(alpha_pattern={key: 4}))
    with pytest.raises(NotARun) as raised:
        open_trajectory(tmp_path)
    assert [finding.code for finding in raised.value.findings] == ["OD102"]
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("key", [r".*layers\.\d+\..*\.q_proj", r"(.*\.)?layers\.([0-9]|1[0-9])\.self_attn\.(q|k)_proj"])
def test_patterns_as_people_write_them_are_matched(key: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, config=adapter_config(alpha_pattern={key: 20}))
    with open_trajectory(tmp_path).checkpoints[0].open() as matrices:
        assert {name: matrices[name].scale for name in NAMES} == {
            name: 5.0 if name.endswith("q_proj") else 2.0 for name in NAMES
        }


def test_many_patterns_that_are_each_harmless_are_refused_together(tmp_path: Path) -> None:
    """600 keys of 10⁶ ways on 50 modules take minutes; the same checkpoints again cost nothing more."""
    names = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(50))
    slow = {f".*.*.*q{index}": 4 for index in range(600)}
    write_adapter(tmp_path / "slow", random_factors(names), adapter_config(rank_pattern=slow))
    before = time.monotonic()
    with pytest.raises(
        NotARun, match="have 600 keys for 50 modules, which together may match in more than 100 million"
    ):
        open_trajectory(tmp_path / "slow")
    assert time.monotonic() - before < 20
    plain = dict.fromkeys(names, 4)
    for step in range(1, 6):
        write_adapter(tmp_path / f"plain/checkpoint-{step}", random_factors(names), adapter_config(rank_pattern=plain))
    assert len(open_trajectory(tmp_path / "plain").steps) == 5
