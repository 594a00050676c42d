"""Errors of reading: what a user sees, and the findings that they carry."""

from __future__ import annotations

import pytest

from dynamics import NotARun as PublicNotARun
from dynamics.checkpoints.errors import NotARun, UnreadableFile
from dynamics.findings import Finding


def test_a_refused_run_keeps_its_findings() -> None:
    findings = [Finding("OD101", "It is empty."), Finding("OD107", "It is a pointer.")]
    error = NotARun("No checkpoints in 'a'.", iter(findings))
    assert str(error) == "No checkpoints in 'a'."
    assert error.findings == tuple(findings)


def test_a_refused_run_is_a_mistake_of_the_user() -> None:
    assert PublicNotARun is NotARun
    with pytest.raises(ValueError, match="No such folder"):
        raise NotARun("No such folder: 'a'.")


def test_an_unreadable_file_becomes_a_finding() -> None:
    error = UnreadableFile("OD101", "It is empty (zero bytes).", "Copy it again.")
    finding = error.to_finding("checkpoint-10/adapter_model.safetensors", 10)
    assert (finding.code, finding.message, finding.remedy) == ("OD101", "It is empty (zero bytes).", "Copy it again.")
    assert (finding.file, finding.step) == ("checkpoint-10/adapter_model.safetensors", 10)


@pytest.mark.parametrize(("remedy", "text"), [("Copy it again.", "It is empty. Copy it again."), ("", "It is empty.")])
def test_the_text_of_an_unreadable_file_is_problem_and_remedy(remedy: str, text: str) -> None:
    error = UnreadableFile("OD101", "It is empty.", remedy)
    assert isinstance(error, OSError)
    assert str(error) == text
