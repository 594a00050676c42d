"""The gradients of a captured step, as the optimizer gets them: norms before and after clipping, spectra, noise.

They are read in ``.grad`` when the optimizer is about to step. Under DeepSpeed ZeRO they are put together when its
optimizer is called, before it clips; norms and spectra after clipping follow from the factor that it clipped with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xarray as xr
from torch import Tensor, nn

from dynamics.findings import Finding
from dynamics.recording.deepspeed import Zero
from dynamics.recording.live import LiveSpectra
from dynamics.spectra import raw
from dynamics.spectra.raw import GradientSpectrum
from dynamics.text import number
from probes.gradients import GradientNorms, loss_scale, norms_of
from probes.watched import WatchedModel, is_sharded

#: Clipping multiplies all gradients by one factor, at most 1; beyond this, something else was done to them.
_UNEVEN = 1.05


@dataclass(frozen=True)
class _Reading:
    """Gradients at one moment: norms by matrix, and spectra with ranks. Under ZeRO nothing is clipped yet."""

    before: Sequence[float]
    after: Sequence[float]
    spectra: Mapping[str, tuple[Tensor, int]]
    scale: float  # of the gradients of micro-batches


class StepGradients:
    """The gradients of the watched matrices at one captured step after the other.

    Args:
        watched: The matrices.
        live: Their spectra.
        zero: The model's ZeRO, if it is trained under it.
        spectra: Whether spectra are measured, too.
        leads: Whether this process makes the records; the others only help to gather.
        batch_size: Samples that the optimizer sees in one step; NaN: unknown.
    """

    def __init__(
        self,
        watched: WatchedModel,
        live: LiveSpectra,
        *,
        zero: Zero | None,
        spectra: bool,
        leads: bool,
        batch_size: float,
    ) -> None:
        self._live, self._zero, self._spectra, self._leads, self._batch_size = live, zero, spectra, leads, batch_size
        self._call_off: Callable[[], None] = lambda: None  # the reading under ZeRO
        self._scaler, self._scale, self._is_read, self._is_told = None, 1.0, False, False
        self._reading: _Reading | None = None  # on the rank that writes
        self.watch(watched)

    def watch(self, watched: WatchedModel) -> None:
        """Go on with other matrices."""
        self._parameters = list({id(p): p for matrix in watched.watched for p in matrix.parameters}.values())
        self._of_matrices = {matrix.name: matrix.parameters for matrix in watched.watched}
        self._norms = GradientNorms(self._parameters)

    def arm(self, scaler: Any, before_zero_steps: Callable[[], None]) -> None:
        """Have norms measured at the end of the backward passes of a step.

        Args:
            scaler: The ``torch.amp.GradScaler``, if the loss is scaled.
            before_zero_steps: What ZeRO's optimizer calls before it steps, to :meth:`read`.
        """
        self._scaler, self._scale, self._is_read, self._reading = scaler, loss_scale(scaler, None), False, None
        self._is_told = False
        if self._zero is not None:
            self._call_off = self._zero.before_step(before_zero_steps)
        if self._zero is None or not any(map(is_sharded, self._parameters)):  # gradients of micro-batches, too
            self._norms.arm()

    def disarm(self) -> None:
        """Remove all hooks; what was measured stays."""
        self._norms.disarm()
        self._call_off()

    def take_norms(self) -> None:
        """Take norms before clipping now, and not at the end of the backward pass; under ZeRO they are taken later."""
        if not self._is_read and self._zero is None:
            self._norms.measure()
            self._is_told = True

    def unreduced(self, step: int) -> Finding | None:
        """Return a finding if gradients seem to have been reduced over processes after the backward pass, untold."""
        processes = _processes()
        if processes < 2 or self._is_told or self._zero is not None or self._reading is None:
            return None
        pairs = zip(self._reading.before, self._reading.after, strict=True)
        factors = [after / before for before, after in pairs if 0 < before < math.inf and 0 < after < math.inf]
        if not factors or (max(factors) <= _UNEVEN and max(factors) <= _UNEVEN * min(factors)):
            return None
        return Finding(
            "OD325",
            f"Between the backward pass and the optimizer's step {step:,} norms of gradients changed by factors from "
            f"{number(min(factors))} to {number(max(factors))}, which clipping alone does not do. If the loop reduces "
            f"gradients over its {processes} processes itself, norms before clipping and the noise scale are wrong.",
            "Call recorder.before_clipping() after that, before gradients are clipped.",
            step=step,
            evidence={"smallest": min(factors), "largest": max(factors), "processes": processes},
        )

    def read(self, optimizer: Any) -> Mapping[str, str]:
        """Measure gradients as they are: after clipping, under ZeRO before it; only the first time in a step.

        Args:
            optimizer: The optimizer, which may have unscaled them.

        Returns:
            Matrices whose spectrum could not be measured, with the reason.
        """
        if self._is_read:
            return {}
        self._is_read = True
        self._norms.disarm()
        return self._read_plain(optimizer) if self._zero is None else self._read_zero(self._zero)

    def record(self, step: int) -> xr.Dataset | None:
        """Return the record of the gradients, after the optimizer's step; ``None`` where there is none to make."""
        reading, clipping = self._reading, 1.0
        if self._zero is not None:
            # No step was taken, or measuring failed: gradients are unknown.
            clipping = math.nan if reading is None else self._zero.clipping()
            unknown = self._by_matrix(None, 1.0)
            reading = _Reading(unknown, unknown, {}, 1.0) if reading is None else reading
        elif not self._is_read:  # nobody said when gradients were clipped, or no step was taken
            before = self._norms.before_clipping()
            if before is not None:
                unknown = self._by_matrix(None, 1.0)
                reading = _Reading(self._by_matrix(before, self._scale), unknown, {}, self._scale)
        return self._dataset(step, reading, clipping) if self._leads and reading is not None else None

    def _read_plain(self, optimizer: Any) -> Mapping[str, str]:
        scale = loss_scale(self._scaler, optimizer)
        before, after = self._norms.before_clipping(), self._norms.after_clipping()
        spectra, failures = self._live.gradients(_gradient) if self._spectra else ({}, {})
        if self._leads:
            self._reading = _Reading(
                self._by_matrix(before, self._scale),
                self._by_matrix(after, scale),
                {name: (values / scale, rank) for name, (values, rank) in spectra.items()},
                self._scale,
            )
        return failures

    def _read_zero(self, zero: Zero) -> Mapping[str, str]:
        squared: dict[int, Tensor] = {}

        def gather(parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
            gradients = zero.gradients(parameters)
            squared.update(
                {key: torch.linalg.vector_norm(one, dtype=torch.float64).square() for key, one in gradients.items()}
            )
            return gradients

        spectra, failures = {}, {}
        if self._spectra:
            spectra, failures = self._live.gradients(gather=gather)
        else:
            self._live.visit(gather)
        norms = self._by_matrix(torch.stack([squared[id(parameter)] for parameter in self._parameters]), 1.0)
        self._reading = _Reading(norms, norms, spectra, zero.loss_scale)
        return failures

    def _dataset(self, step: int, reading: _Reading, clipping: float) -> xr.Dataset:
        """Return the record of gradients that have been clipped by a factor since they were read."""
        gradients = {}
        micro_batches, micro_norms = self._micro_norms(reading.scale)
        for name, before, after, micro_norm in zip(
            self._of_matrices, reading.before, reading.after, micro_norms, strict=True
        ):
            values, rank = reading.spectra.get(name, (None, 0))
            if math.isnan(after * clipping):  # zeros that stand in for an unknown gradient are not a gradient of zero
                values, rank = None, 0
            spectrum = None if values is None else values * clipping
            gradients[name] = GradientSpectrum(before, after * clipping, spectrum, rank, micro_norm=micro_norm)
        shapes = {name: shape for name, shape in self._live.shapes.items() if name in gradients}
        return raw.raw_gradient(step, shapes, gradients, micro_batches=micro_batches, batch_size=self._batch_size)

    def _micro_norms(self, scale: float) -> tuple[float, list[float]]:
        """Return the number of micro-batches over all processes, and the norm of each matrix's gradient of one.

        NaN for gradients of a single micro-batch, and where processes hold shards of a parameter.
        """
        passes, sums = self._norms.of_micro_batches()
        processes = _processes()
        if passes * processes < 2 or any(map(is_sharded, self._parameters)):
            return math.nan, [math.nan] * len(self._of_matrices)
        norms = norms_of(sums, self._parameters, list(self._of_matrices.values()))
        # The sum of the parts is the whole: each is 1/n of the gradient of its micro-batch.
        return float(passes * processes), [norm * math.sqrt(passes) / scale for norm in norms]

    def _by_matrix(self, squared: Tensor | None, scale: float) -> list[float]:
        """Return the norm of each matrix's gradient, NaN where there is none to measure."""
        if squared is None:
            return [math.nan] * len(self._of_matrices)
        return [norm / scale for norm in norms_of(squared, self._parameters, list(self._of_matrices.values()))]


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, zeros where it has none; that of a sparse embedding is made dense for now."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad if parameter.grad.layout == torch.strided else parameter.grad.to_dense()
