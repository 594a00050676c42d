"""What reading a run can raise."""

from __future__ import annotations

import re
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


#: Torch's advice to load a pickle all the same that it does not load: it is not passed on.
_ADVICE = re.compile(
    r"Weights only load failed.*(WeightsUnpickler error: |trusted source\.\s+)| Please use .torch\.serialization.*",
    re.DOTALL,
)


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's text, shortened: foreign libraries write paragraphs.

    >>> one_line(ValueError("bad\\nvery bad"))
    'bad'
    """
    text = _ADVICE.sub("", str(error)).strip() or type(error).__name__
    line = text.splitlines()[0].strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"
