"""What reading a run can raise."""

from __future__ import annotations

from collections.abc import Iterable

from dynamics.findings import Finding


class NotARun(ValueError):
    """Nothing at all could be read.

    The message is one line: the path, what was looked for, what to do. ``findings`` says what was
    wrong with each input that was there.

    >>> NotARun("No such folder: 'runs/a'.").findings
    ()
    """

    def __init__(self, message: str, findings: Iterable[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class UnreadableFile(OSError):
    """One file that cannot be used; becomes a finding.

    Args:
        code: Code of the finding.
        problem: One sentence: what was expected, what came.
        remedy: What the user can do.

    >>> str(UnreadableFile("OD101", "It is empty.", "Copy it again."))
    'It is empty. Copy it again.'
    """

    def __init__(self, code: str, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".rstrip())
        self.code = code
        self.problem = problem
        self.remedy = remedy

    def to_finding(self, file: str, step: int | None = None) -> Finding:
        """The finding it becomes, for a file given relative to the run."""
        return Finding(self.code, self.problem, self.remedy, file=file, step=step)
