"""Findings: what a reader of the numbers must know, with evidence and remedy.

A finding has a stable code. Its severity belongs to the code, so that the exit status of the command line never
depends on wording: an ``error`` means that an input was not analysed or a number is not finite.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dynamics.text import encodable, one_line, some, with_minus

Severity = Literal["note", "warning", "error"]

#: code -> (severity, what it means). The numbers of one hundred belong to one room.
CATALOGUE: Mapping[str, tuple[Severity, str]] = {
    # 1xx: reading a run
    "OD100": ("error", "nothing in a run can be analysed"),
    "OD101": ("error", "a weight file cannot be read"),
    "OD102": ("error", "a configuration cannot be read"),
    "OD103": ("error", "an adapter type that is not supported"),
    "OD104": ("error", "factors of a matrix do not fit each other"),
    "OD105": ("error", "a variant that needs files the run does not have"),
    "OD106": ("error", "a checkpoint folder without weights"),
    "OD107": ("error", "a file is only a Git-LFS pointer"),
    "OD108": ("warning", "the training state cannot be read"),
    "OD109": ("note", "stored tensors that are not analysed"),
    "OD110": ("note", "weights outside the numbered checkpoints"),
    "OD111": ("note", "two folders for one step"),
    "OD112": ("note", "several trainings in one folder"),
    "OD113": ("warning", "unclear whether a folder holds several trainings"),
    "OD114": ("note", "duplicate checkpoints"),
    "OD115": ("warning", "a matrix is missing from some checkpoints"),
    "OD116": ("warning", "the rank of a matrix changes between checkpoints"),
    "OD117": ("note", "matrix names are taken from the files"),
    "OD118": ("warning", "a checkpoint may still be being written"),
    "OD119": ("note", "configuration and weights disagree"),
    "OD120": ("warning", "some scores could not be placed"),
    "OD121": ("note", "how an update is to be read"),
    "OD122": ("note", "a weight file is a link out of the run"),
    "OD123": ("note", "what dense updates are measured from"),
    "OD124": ("warning", "a weight is missing from the base"),
    "OD125": ("note", "checkpoints or a configuration are not in their own folder"),
    "OD126": ("note", "weights left out in favour of others in the run"),
    "OD127": ("error", "an unsupported file format"),
    "OD128": ("warning", "trained weights that are not analysed"),
    "OD135": ("note", "tied weights"),
    "OD136": ("note", "a matrix has another name in some checkpoints"),
    "OD138": ("warning", "an adapter's initial weights are unknown"),
    "OD139": ("warning", "only part of a matrix was saved"),
    "OD140": ("warning", "a scale changes during training"),
    "OD141": ("warning", "an implausibly large update"),
    # 2xx: spectra
    "OD201": ("error", "a factor is not finite"),
    "OD202": ("note", "an update is exactly zero"),
    "OD203": ("note", "an update is below the resolution of its storage format"),
    "OD204": ("note", "increments that cannot be formed"),
    "OD205": ("note", "updates use fewer directions than chance"),
    "OD206": ("note", "unused rank, in results of earlier versions"),
    "OD207": ("error", "singular values did not converge"),
    "OD208": ("note", "an increment without a null model"),
    "OD209": ("error", "part of the result could not be made"),
    "OD210": ("note", "only leading singular values were computed"),
    "OD211": ("warning", "merging would lose an update"),
    "OD212": ("warning", "trained weights equal their base"),
    # 3xx: capturing a training
    "OD301": ("warning", "a matrix gets no gradient"),
    "OD302": ("warning", "an adapter has not moved after the warm-up"),
    "OD303": ("warning", "an update collapsed to one direction"),
    "OD304": ("warning", "a gradient is not finite"),
    "OD305": ("warning", "some steps were not recorded"),
    "OD306": ("note", "trainable parameters that are not watched"),
    "OD307": ("note", "records begin or resume at a step without a record"),
    "OD308": ("warning", "records and checkpoints disagree"),
    "OD309": ("warning", "a record cannot be read"),
    "OD310": ("warning", "an adapter cannot be watched"),
    "OD311": ("note", "gradients are not recorded"),
    "OD312": ("warning", "records probed different samples"),
    "OD313": ("warning", "the set of trained parameters changed"),
    "OD314": ("warning", "a base weight was rewritten under its adapter"),
    "OD315": ("warning", "an adapter's scale changed during training"),
    "OD316": ("warning", "an adapter is merged while training goes on"),
    "OD317": ("warning", "the spectrum of a gradient could not be measured"),
    "OD318": ("warning", "training may minimise a different loss than the one probed"),
    "OD319": ("note", "records in two formats"),
    "OD320": ("note", "a record of the Fisher is large"),
    "OD325": ("warning", "norms before clipping may be of one process alone"),
    "OD330": ("warning", "experts that get no token"),
    "OD331": ("note", "experts that get too many tokens"),
    "OD332": ("note", "a router whose choices are not known"),
    "OD333": ("note", "weights of several experts in one matrix"),
    "OD335": ("note", "an update is not compared with steps of its optimizer"),
    "OD336": ("note", "an update is more concentrated than steps of its optimizer"),
    # 4xx: the Fisher
    "OD401": ("note", "intervals rest on few groups"),
    "OD402": ("warning", "a Gram matrix is not finite"),
    "OD403": ("warning", "part of an update lies outside the space of the gradients"),
    "OD404": ("note", "task cosines are not resolved"),
    "OD405": ("note", "null gradients stand for more samples than were probed"),
    "OD406": ("note", "an update without its gradient null"),
    "OD407": ("note", "an update is more concentrated than a gradient of its batch"),
    "OD408": ("note", "probe samples are clustered"),
    "OD409": ("note", "tasks have unequal numbers of samples"),
    "OD410": ("warning", "an update product does not belong to its update"),
    "OD411": ("error", "a checkpoint could not be probed"),
    "OD412": ("warning", "a few samples carry the Fisher"),
    "OD413": ("note", "null gradients stand for too many samples to call an update concentrated"),
    "OD414": ("note", "the gradient null does not know the momentum"),
    "OD415": ("error", "an update could not be intervened on"),
    "OD416": ("error", "losses of probe samples could not be measured"),
    "OD417": ("note", "changes of losses are not predicted"),
    # 5xx: scores and statistics
    "OD501": ("warning", "scores of an unknown run"),
    "OD502": ("warning", "scores without a matching step"),
    "OD503": ("warning", "scores given more than once"),
    "OD504": ("warning", "scores that are not numbers"),
    "OD505": ("note", "unknown whether higher scores are better"),
    "OD506": ("error", "a score file cannot be read"),
    "OD507": ("note", "too few runs to decide"),
    "OD508": ("note", "runs or steps left out of an association"),
    "OD509": ("note", "runs that look like repeats of one another"),
    "OD510": ("warning", "a mixed model did not converge"),
    "OD511": ("warning", "runs that could not be paired"),
    "OD512": ("warning", "an unknown task"),
    "OD513": ("note", "fallback headline measure"),
    "OD514": ("warning", "a quantity that could not be held equal"),
    "OD515": ("error", "scores and groups could not be related"),
    "OD516": ("note", "shares of updates for different numbers of directions"),
    "OD520": ("warning", "an unknown retained task"),
    # 6xx: results on disk
    "OD601": ("warning", "an analysis was stopped while it put its result in place"),
    "OD602": ("note", "results of an earlier version beside this one"),
    "OD603": ("note", "an earlier result could not be removed"),
    # 7xx: interventions
    "OD701": ("note", "an update whose effect cannot be told from 0"),
    "OD702": ("note", "parts of an update that have no shares"),
    "OD703": ("note", "a concentrated part that does not lower the loss"),
    "OD704": ("warning", "equal passes over the samples give different losses"),
    "OD705": ("note", "parts of an update in half precision"),
    "OD706": ("note", "gradient descent at or beyond the edge of stability"),
}


#: Gravest first.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
#: Entries of a list in the evidence that are written out.
_LISTED = 8


@dataclass(frozen=True)
class Finding:
    """One thing a reader must know.

    Args:
        code: A key of ``CATALOGUE``, e.g. ``"OD101"``.
        message: What was expected and what came, or what is the case.
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
        """Return a JSON-compatible dictionary, with severity and title."""
        return {**asdict(self), "evidence": dict(self.evidence), "severity": self.severity, "title": self.title}

    def __str__(self) -> str:
        subject = ", ".join(part for part in (self.file, self.matrix) if part)
        text = f"{self.code} {subject + ': ' if subject else ''}{self.message}"
        return f"{text} {self.remedy}" if self.remedy else text


def to_json(findings: Iterable[Finding]) -> str:
    """Return findings as the root attribute ``findings`` of a result holds them."""
    return json.dumps(encodable([finding.to_dict() for finding in findings]), allow_nan=False)


def from_json(content: Any) -> list[Finding]:
    """Return findings from JSON text, or from the list in it; what is not a finding of this version is left out.

    >>> from_json(to_json([Finding("OD202", "It is zero.", step=3)]))[0].step
    3
    >>> from_json('[{"code": "OD999", "message": "from the future"}, 3]')
    []
    """
    entries = json.loads(content) if isinstance(content, str) else content
    findings = []
    for entry in entries if isinstance(entries, list) else []:
        if not (isinstance(entry, dict) and isinstance(entry.get("message"), str)):
            continue
        code, step, evidence = (entry.get(key) for key in ("code", "step", "evidence"))
        if isinstance(code, str) and code in CATALOGUE:
            texts = {key: value for key in ("remedy", "file", "matrix") if isinstance(value := entry.get(key), str)}
            findings.append(
                Finding(
                    code,
                    entry["message"],
                    **texts,
                    step=step if type(step) is int else None,
                    evidence=evidence if isinstance(evidence, dict) else {},
                )
            )
    return findings


def worst_severity(findings: Iterable[Finding]) -> Severity | None:
    """Return the gravest severity among findings, ``None`` if there are none.

    >>> worst_severity([Finding("OD202", "zero"), Finding("OD101", "unreadable")])
    'error'
    """
    present = {finding.severity for finding in findings}
    return next((severity for severity in SEVERITIES if severity in present), None)


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
    """Return findings by code, errors first.

    Args:
        findings: As ``Finding.to_dict`` gives them.
    """
    by_code: dict[str, list[Mapping[str, Any]]] = {}
    for finding in findings:
        by_code.setdefault(finding["code"], []).append(finding)
    groups = [
        FindingGroup(code, members[0]["severity"], members[0]["title"], tuple(members))
        for code, members in by_code.items()
    ]
    return sorted(groups, key=lambda group: (SEVERITIES.index(group.severity), group.code))


def severities(findings: Iterable[Mapping[str, Any]]) -> str:
    """Return how many findings of each severity there are, gravest first.

    >>> severities([{"severity": "note"}, {"severity": "error"}, {"severity": "note"}])
    '1 error, 2 notes'
    """
    present = [finding["severity"] for finding in findings]
    counts = ((severity, present.count(severity)) for severity in SEVERITIES)
    return ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts if count)


def location(finding: Mapping[str, Any]) -> str:
    """Return file, matrix and step of a finding; a step that its message names is left out."""
    step = "" if finding["step"] is None else f"step {finding['step']}"
    if f"{step} " in finding["message"].replace(",", " ").lower():
        step = ""
    return ", ".join(part for part in (finding["file"], finding["matrix"], step) if part)


def evidence_words(evidence: Mapping[str, Any]) -> str:
    """Return evidence in one line.

    >>> evidence_words({"threshold": 0.1, "largest_share": 0.25, "steps": [1, 2]})
    'threshold 0.1; largest share 0.25; steps 1, 2'
    """
    return "; ".join(f"{key.replace('_', ' ')} {_value_words(value)}" for key, value in evidence.items())


def _value_words(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return with_minus(f"{value:.4g}")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value_words(content)}" for key, content in value.items())
    if isinstance(value, list):
        return some(map(_value_words, value), _LISTED)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def finding_lines(summary: Mapping[str, Any], severities: Collection[str], most: int | None = None) -> Iterator[str]:
    """Yield a line for each finding of these severities, errors first.

    Args:
        summary: See ``summarise``; of several runs each line names its run.
        severities: Any of ``"error"``, ``"warning"``, ``"note"``.
        most: Lines of one code, after which one line counts the others; by default all have a line.
    """
    findings = [("", finding) for finding in summary["findings"]]
    for name, run in summary.get("runs", {}).items():
        findings += [(name, finding) for finding in run["findings"]]
    for severity in SEVERITIES:
        told = [(run, finding) for run, finding in findings if finding["severity"] == severity]
        for code in dict.fromkeys(finding["code"] for _, finding in told) if severity in severities else ():
            lines = [finding_line(finding, run) for run, finding in told if finding["code"] == code]
            yield from lines[:most]
            if most is not None and len(lines) > most:
                yield f"{code} {severity} {len(lines) - most:,} more; all are in summary.json."


def finding_line(finding: Mapping[str, Any], run: str = "") -> str:
    """Return one finding in one line.

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
    subject = ", ".join(filter(None, (run, finding["file"], finding["matrix"])))
    parts = (finding["code"], finding["severity"], subject and f"{subject}:", finding["message"], finding["remedy"])
    return one_line(" ".join(filter(None, parts)))
