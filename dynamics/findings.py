"""Findings: what a reader of the numbers must know, with evidence and remedy.

A finding has a stable code. Its severity is part of the code's definition, so that the exit status
of the command line never depends on wording: an ``error`` means that some input was not analysed.

Findings of one code as one thing to read.

Findings as lines of text, one each: for stderr, where programs read along.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dynamics.text import one_line

Severity = Literal["note", "warning", "error"]

#: code -> (severity, what it means). One line each; the numbers of one hundred belong to one room.
CATALOGUE: Mapping[str, tuple[Severity, str]] = {
    # 1xx: reading a run
    "OD100": ("error", "a run in which nothing can be analysed"),
    "OD101": ("error", "a weight file could not be read"),
    "OD102": ("error", "a configuration could not be read"),
    "OD103": ("error", "an adapter of a kind that is not analysed"),
    "OD104": ("error", "a matrix whose factors do not fit"),
    "OD105": ("error", "a variant that needs what the run does not hold"),
    "OD106": ("error", "a checkpoint folder without weights"),
    "OD107": ("error", "a file that is a Git-LFS pointer"),
    "OD108": ("warning", "training state that could not be read"),
    "OD109": ("note", "trainable parameters that are not low-rank updates"),
    "OD110": ("note", "an adapter outside the numbered checkpoints"),
    "OD111": ("note", "two folders for one step"),
    "OD112": ("note", "several trainings in one folder"),
    "OD113": ("warning", "evidence of several trainings that does not decide"),
    "OD114": ("note", "duplicate checkpoints"),
    "OD115": ("warning", "a matrix that is not in every checkpoint"),
    "OD116": ("warning", "the rank of a matrix changes between checkpoints"),
    "OD117": ("note", "names are as on disk"),
    "OD118": ("warning", "a checkpoint that may still be being written"),
    "OD119": ("note", "configuration and weights do not say the same"),
    "OD120": ("warning", "scores that could not be placed"),
    "OD121": ("note", "how an analysed product is to be read"),
    "OD122": ("note", "a weight file that is a link out of the run"),
    "OD123": ("note", "what updates of dense weights are counted from"),
    "OD124": ("warning", "a weight that the base does not have"),
    "OD125": ("note", "checkpoints or a configuration found elsewhere than in their own folder"),
    "OD126": ("note", "weights that are left out since others of the same run are analysed"),
    "OD127": ("error", "a format that is not read"),
    "OD128": ("warning", "trained weights beside those that are analysed"),
    "OD135": ("note", "tied weights"),
    "OD136": ("note", "a matrix that is called differently in another checkpoint"),
    "OD138": ("warning", "an adapter whose start is not known"),
    "OD139": ("warning", "a matrix of which only a part was saved"),
    "OD140": ("warning", "a scale that changes within a training"),
    "OD141": ("warning", "an update of an absurd size"),
    # 2xx: spectra
    "OD201": ("error", "a non-finite factor"),
    "OD202": ("note", "an update that is exactly zero"),
    "OD203": ("note", "an update below the resolution of its storage"),
    "OD204": ("note", "an increment that cannot be formed"),
    "OD205": ("note", "an update more concentrated than its null"),
    "OD206": ("note", "rank that is not used"),
    "OD207": ("error", "singular values that did not converge"),
    "OD208": ("note", "an increment without a null model"),
    "OD209": ("error", "a part of the result that could not be made"),
    # 3xx: capturing a training
    "OD301": ("warning", "a matrix that gets no gradient"),
    "OD302": ("warning", "an adapter that has not moved after the warm-up"),
    "OD303": ("warning", "an update that collapsed to one direction"),
    "OD304": ("warning", "a gradient that is not finite"),
    "OD305": ("warning", "steps that could not be captured"),
    "OD306": ("note", "trainable parameters that are not watched"),
    "OD307": ("note", "a capture that begins or goes on at a step without a record"),
    "OD308": ("warning", "capture and checkpoint do not say the same"),
    "OD309": ("warning", "a record that cannot be read"),
    "OD310": ("warning", "an adapter that cannot be watched"),
    "OD311": ("note", "gradients that are not recorded"),
    "OD312": ("warning", "records that probed other samples"),
    "OD313": ("warning", "something else is trained than before"),
    "OD314": ("warning", "a base weight that was rewritten under its adapter"),
    "OD315": ("warning", "an adapter whose scale changed during training"),
    "OD316": ("warning", "an adapter that is merged while training goes on"),
    "OD317": ("warning", "a gradient whose spectrum could not be measured"),
    "OD318": ("warning", "a training that may minimise another loss than the one probed"),
    # 4xx: the Fisher
    "OD401": ("note", "intervals that rest on few groups"),
    "OD402": ("warning", "a Gram matrix that is not finite"),
    "OD403": ("warning", "an update that lies partly outside the space of the gradients"),
    "OD404": ("note", "cosines of tasks that are not resolved"),
    "OD405": ("note", "null gradients of more samples than were probed"),
    "OD406": ("note", "an update without its gradient null"),
    "OD407": ("note", "an update more concentrated than a gradient of its batch"),
    "OD408": ("note", "probe samples that come in groups"),
    "OD409": ("note", "tasks of unequal numbers of samples"),
    "OD410": ("warning", "an update product that does not belong to its update"),
    "OD411": ("error", "a checkpoint that could not be probed"),
    "OD412": ("warning", "a Fisher that few samples carry"),
    "OD413": ("note", "null gradients of too many samples to call an update concentrated"),
    "OD414": ("note", "a gradient null that does not know the momentum"),
    # 5xx: scores and statistics
    "OD501": ("warning", "scores of a run that is not there"),
    "OD502": ("warning", "scores without a matching step"),
    "OD503": ("warning", "scores that are given more than once"),
    "OD504": ("warning", "scores that are no numbers"),
    "OD505": ("note", "scores of which it is not known whether higher is better"),
    "OD506": ("error", "a score file that could not be read"),
    "OD507": ("note", "too few runs to decide"),
    "OD508": ("note", "runs or steps that an association leaves out"),
    "OD509": ("note", "runs that look like repeats of one another"),
    "OD510": ("warning", "a mixed model that did not converge"),
    "OD511": ("warning", "runs that could not be paired"),
    "OD512": ("warning", "a task that is not there"),
    "OD513": ("note", "another headline measure than the one that was to be"),
    "OD514": ("warning", "something that was to be held equal and could not be"),
    "OD515": ("error", "scores and groups that could not be related"),
    # 6xx: results on disk
    "OD601": ("error", "a result that another machine did not finish replacing"),
}


@dataclass(frozen=True)
class Finding:
    """One thing a reader must know.

    Args:
        code: A key of ``CATALOGUE``, e.g. ``"OD101"``.
        message: One sentence: what was expected, what came.
        remedy: What the user can do, or ``""``.
        file: Path relative to the run, or ``""``.
        matrix: Name of the matrix it is about, or ``""``.
        step: Optimizer step it is about, or ``None``.
        evidence: The numbers behind it, JSON-compatible (missing is ``None``).

    >>> Finding("OD202", "The update is zero.", matrix="layers.0", step=0).severity
    'note'
    """

    code: str
    message: str
    remedy: str = ""
    file: str = ""
    matrix: str = ""
    step: int | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.code in CATALOGUE, self.code

    @property
    def severity(self) -> Severity:
        """``note``, ``warning`` or ``error``, by the code."""
        return CATALOGUE[self.code][0]

    @property
    def title(self) -> str:
        """What the code means."""
        return CATALOGUE[self.code][1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-compatible dictionary, with severity and title."""
        return {**asdict(self), "evidence": dict(self.evidence), "severity": self.severity, "title": self.title}

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.file, self.matrix) if part)
        text = f"{self.code} {where + ': ' if where else ''}{self.message}"
        return f"{text} {self.remedy}" if self.remedy else text


def worst_severity(findings: Iterable[Finding]) -> Severity | None:
    """The gravest severity among findings, ``None`` if there are none.

    >>> worst_severity([Finding("OD202", "zero"), Finding("OD101", "unreadable")])
    'error'
    """
    found = {finding.severity for finding in findings}
    order: tuple[Severity, ...] = ("error", "warning", "note")
    return next((severity for severity in order if severity in found), None)


_GRAVEST_FIRST = ("error", "warning", "note")
#: A list in the evidence is told up to so many entries.
_LISTED = 8


@dataclass(frozen=True)
class FindingGroup:
    """All findings of one code.

    Args:
        code: E.g. ``"OD204"``.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        title: What the code means.
        findings: In the order in which they were made.
    """

    code: str
    severity: str
    title: str
    findings: tuple[Mapping[str, Any], ...]

    @property
    def remedies(self) -> list[str]:
        """What to do, each remedy once."""
        return list(dict.fromkeys(finding["remedy"] for finding in self.findings if finding["remedy"]))


def grouped(findings: Iterable[Mapping[str, Any]]) -> list[FindingGroup]:
    """Findings by code, errors first.

    Args:
        findings: As ``Finding.to_dict`` gives them.
    """
    by_code: dict[str, list[Mapping[str, Any]]] = {}
    for finding in findings:
        by_code.setdefault(finding["code"], []).append(finding)
    groups = [FindingGroup(code, own[0]["severity"], own[0]["title"], tuple(own)) for code, own in by_code.items()]
    return sorted(groups, key=lambda group: (_GRAVEST_FIRST.index(group.severity), group.code))


def severities(findings: Iterable[Mapping[str, Any]]) -> str:
    """How many of each severity, gravest first.

    >>> severities([{"severity": "note"}, {"severity": "error"}, {"severity": "note"}])
    '1 error, 2 notes'
    """
    found = [finding["severity"] for finding in findings]
    counts = ((severity, found.count(severity)) for severity in _GRAVEST_FIRST)
    return ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts if count)


def location(finding: Mapping[str, Any]) -> str:
    """Where a finding is: file, matrix, step, as far as known; a step that the message names is left out."""
    step = "" if finding["step"] is None else f"step {finding['step']}"
    if f"{step} " in finding["message"].replace(",", " ").lower():
        step = ""
    return ", ".join(part for part in (finding["file"], finding["matrix"], step) if part)


def evidence_words(evidence: Mapping[str, Any]) -> str:
    """Evidence in one line.

    >>> evidence_words({"threshold": 0.1, "largest_share": 0.25, "steps": [1, 2]})
    'threshold 0.1; largest share 0.25; steps 1, 2'
    """
    return "; ".join(f"{key.replace('_', ' ')} {_value_words(value)}" for key, value in evidence.items())


def _value_words(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        rest = f" and {len(value) - _LISTED} more" if len(value) > _LISTED else ""
        return ", ".join(_value_words(each) for each in value[:_LISTED]) + rest
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def finding_lines(summary: Mapping[str, Any], severities: Collection[str]) -> Iterator[str]:
    """A line for each finding of these severities, errors first.

    Args:
        summary: See ``summarise``; of several runs each line names its run.
        severities: ``"error"``, ``"warning"``, ``"note"``: which to tell.
    """
    found = [("", finding) for finding in summary["findings"]]
    for name, run in summary.get("runs", {}).items():
        found += [(name, finding) for finding in run["findings"]]
    for severity in ("error", "warning", "note"):
        if severity in severities:
            yield from (finding_line(finding, run) for run, finding in found if finding["severity"] == severity)


def finding_line(finding: Mapping[str, Any], run: str = "") -> str:
    """One finding in one line.

    >>> finding_line(
    ...     {
    ...         "code": "OD101",
    ...         "severity": "error",
    ...         "file": "checkpoint-2/x.bin",
    ...         "matrix": "",
    ...         "message": "It is empty.",
    ...         "remedy": "Copy it again.",
    ...     }
    ... )
    'OD101 error checkpoint-2/x.bin: It is empty. Copy it again.'
    """
    where = ", ".join(_parts(run, finding["file"], finding["matrix"]))
    head = " ".join(_parts(finding["code"], finding["severity"], f"{where}:" if where else ""))
    return one_line(" ".join(_parts(head, finding["message"], finding["remedy"])))


def _parts(*parts: str) -> Iterable[str]:
    return (part for part in parts if part)
