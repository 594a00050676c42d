"""Errors of reading a run."""

from __future__ import annotations

from collections.abc import Iterable

from dynamics.findings import Finding


class NotARun(ValueError):
    """Nothing in the folder can be analysed.

    The message is one line: the path, what was expected, what to do. ``findings`` names the problem of each file that
    was there.

    >>> NotARun("No such folder: 'runs/a'.").findings
    ()
    """

    def __init__(self, message: str, findings: Iterable[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class UnreadableFile(OSError):
    """One file cannot be used; it becomes a finding.

    Args:
        code: Code of the finding.
        problem: One sentence: what was expected and what came.
        remedy: What to do.

    >>> str(UnreadableFile("OD101", "It is empty.", "Copy it again."))
    'It is empty. Copy it again.'
    """

    def __init__(self, code: str, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".rstrip())
        self.code = code
        self.problem = problem
        self.remedy = remedy

    def to_finding(self, file: str, step: int | None = None) -> Finding:
        """Return the finding about the file.

        Args:
            file: Its path relative to the run.
            step: The step of its checkpoint, if it is in one.

        >>> str(UnreadableFile("OD101", "It is empty.").to_finding("checkpoint-5/adapter_model.safetensors"))
        'OD101 checkpoint-5/adapter_model.safetensors: It is empty.'
        """
        return Finding(self.code, self.problem, self.remedy, file=file, step=step)
