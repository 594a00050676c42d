"""How a run is analysed: what a user can choose, checked before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dynamics.relate.run_measures import MEASURES

#: Called with a run's name, the matrices done (all steps counted) and the matrices in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How to analyse, as it is written into ``run.yaml`` and into the result.

    Args:
        matrices: Regular expression; only matrices whose name it finds are watched. ``None`` for all.
        device: ``"auto"``, ``"cpu"`` or ``"cuda[:i]"``: where the QR decompositions run.
        report: Whether figures and ``report.html`` are made.
        base: Folder of the model's weights before training.
        intruders: Whether directions of the newest update are compared with the base's, which takes seconds a matrix.
        weights: Whether spectra of the last checkpoint's weights themselves are wanted too.
        probe: ``module:function``; called with a checkpoint's folder, it returns the model there and its tasks.
        scores: Score files, beside those that lie in the runs.
        higher, lower: Tasks of which a higher, or a lower, score is better, where names do not tell.
        headline: The measure named before looking at associations and comparisons; a name in ``run_measures.MEASURES``.
        given: What associations over steps hold equal: ``"loss"`` or ``"trend"``; see :func:`dynamics.associate`.

    Raises:
        ValueError: If a task is in both, the headline is no measure, or ``given`` is none of these.
    """

    matrices: str | None = None
    device: str = "auto"
    report: bool = True
    base: str | None = None
    intruders: bool = False
    weights: bool = False
    probe: str | None = None
    scores: tuple[str, ...] = ()
    higher: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()
    headline: str | None = None
    given: str | None = None

    def __post_init__(self) -> None:
        if both := sorted(set(self.higher) & set(self.lower)):
            raise ValueError(f"Expected each task among higher or lower, got {both[0]!r} in both.")
        if self.headline is not None and self.headline not in MEASURES:
            raise ValueError(f"headline: expected one of the measures {', '.join(MEASURES)}, got {self.headline!r}.")
        if self.given not in (None, "loss", "trend"):
            raise ValueError(f"given: expected 'loss' or 'trend', got {self.given!r}.")


DEFAULTS = Options()
