"""Spectra of a model in training: the watched matrices as they are, against copies from the last captured step.

Factors of adapters are copied on their own device, dense weights to the host: a copy of all weights beside the model
is what an accelerator has no room for. Sharded parameters (DTensors) are gathered one batch of matrices at a time, by
all ranks in the same order; one rank computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dynamics.spectra import pairs, rounding
from dynamics.spectra.increments import Workspace, difference
from dynamics.spectra.pairs import Before, MatrixSpectra, Solved
from dynamics.spectra.raw import Place
from dynamics.spectra.singular_values import dense_singular_values, singular_values
from probes.low_rank import LowRankMatrix
from probes.watched import Matrix, Reading, Watched, is_sharded, whole

#: Bytes of float64 stack that one batch works on: what stays in a CPU's cache, what fills an accelerator.
_BATCH_BYTES = {"cpu": 2**23}
_BATCH_BYTES_ELSEWHERE = 2**26
#: Storage dtypes as safetensors names them.
_STORAGE = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass
class Snapshot:
    """Values of parameters (by identity) and scales of adapters (by matrix) at one step."""

    values: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def holds(self, watched: Watched) -> bool:
        """Whether the matrix can be read from it."""
        return all(id(parameter) in self.values for parameter in watched.sources)

    def read(self, watched: Watched) -> Matrix:
        """The matrix as it was."""
        return watched.read(lambda parameter: self.values[id(parameter)], self.scales.get(watched.name))


class LiveSpectra:
    """The watched matrices over the captured steps.

    Args:
        watched: The matrices.
        start: What :attr:`start` gave when training began; ``None``: training begins now.
        cosines: Whether inner products of consecutive increments are wanted, which takes a second copy.
        leads: Whether this process computes and copies; the others only help to gather.
    """

    def __init__(
        self,
        watched: Sequence[Watched],
        *,
        start: Mapping[str, Tensor] | None = None,
        cosines: bool = False,
        leads: bool = True,
    ) -> None:
        self._watched, self._cosines, self._leads = list(watched), cosines, leads
        self._keys = _keys(watched)
        self.places = {each.name: _place(each) for each in watched}
        self._dense = {id(parameter) for each in watched if each.is_dense for parameter in each.sources}
        self._start = self._what_is_not_zero() if start is None else self._from_tensors(start)
        self._batches = _batches(watched, self.places, self._start)
        self._before, self._earlier = Snapshot(), Snapshot()
        self._solved: dict[str, Solved] = {}
        self._solved_before: dict[str, Solved] = {}
        self._gathered: dict[int, Tensor] = {}
        if start is None:
            self._keep(Snapshot())

    @property
    def start(self) -> dict[str, Tensor]:
        """What training began with, where that was not a zero update: parameters and scales, by keys of our own."""
        values = {key: self._start.values[id(p)] for p, key in self._keys.items() if id(p) in self._start.values}
        scales = {
            f"{name}#scales": torch.tensor(scales, dtype=torch.float64)
            for name, scales in self._start.scales.items()
            if scales
        }
        return values | scales

    def measure(self) -> dict[str, MatrixSpectra]:
        """Totals and increments of every matrix as it is now; all ranks must call it together.

        Returns:
            Matrix to spectra; nothing on ranks that do not compute. Without an earlier step there is no increment,
            and no total of a dense weight whose start is not known.
        """
        self._solved, self._gathered = {}, {}
        workspace = Workspace()

        def solve(batch: Sequence[Watched], values: dict[int, Tensor]) -> None:
            # On the host, so that no more than one batch is ever whole beside the model.
            sharded = [p for each in batch for p in each.sources if is_sharded(p)]
            self._gathered |= {id(p): values[id(p)].to("cpu", copy=True) for p in sharded}
            self._solved |= self._solve(batch, Snapshot(values), workspace)

        self._for_each_batch(solve)
        return {name: solved.spectra for name, solved in self._solved.items()}

    def advance(self) -> None:
        """What was just measured becomes the earlier step of the next measurement.

        Where that fails, as for want of memory, the next measurement has no earlier step, not a wrong one.
        """
        solved, gathered = self._solved, self._gathered
        self._solved, self._gathered = {}, {}
        if self._leads:
            last, self._before, self._solved_before = self._before, Snapshot(), {}
            if self._cosines:
                self._earlier, last = last, Snapshot()
            self._keep(last, gathered)
            self._solved_before = solved

    def increments(self) -> dict[str, Matrix]:
        """Change of every matrix since the last captured step, itself; of those that are no part of a sum, in float64.

        Only on the leading rank, for parameters that are whole there. Dense weights take a float64 copy of the model.
        """
        found: dict[str, Matrix] = {}
        for each in self._watched:
            if each.part_of or not self._before.holds(each):
                continue
            now, before = each.read(), self._before.read(each)
            if isinstance(now, LowRankMatrix):
                assert isinstance(before, LowRankMatrix)
                found[each.name] = difference(now, before)
            else:
                found[each.name] = now.detach().to(torch.float64) - _dense(before).to(now.device, torch.float64)
        return found

    def gradients(self, gradient: Reading) -> dict[str, tuple[Float[Tensor, " k"], int]]:
        """Singular values of every matrix's gradient, and the columns of its factors; all ranks together.

        Args:
            gradient: From a parameter to its gradient as this rank has it, zeros if it has none.
        """
        found: dict[str, tuple[Tensor, int]] = {}

        def solve(batch: Sequence[Watched], values: dict[int, Tensor], changes: dict[int, Tensor]) -> None:
            matrices = [each.gradient(_reading(changes), _reading(values)) for each in batch]
            for each, matrix, spectrum in zip(batch, matrices, _values_of(matrices), strict=True):
                rank = matrix.rank if isinstance(matrix, LowRankMatrix) else min(matrix.shape)
                found[each.name] = spectrum.cpu(), rank

        self._for_each_batch(solve, gradient)
        return found

    def _for_each_batch(self, function: Callable[..., None], *readings: Reading) -> None:
        """Calls it with each batch and its parameters' values (and what else is read); on the leading rank alone."""
        failure: Exception | None = None
        for batch in self._batches:
            gathered = [_gather(batch, reading) for reading in (_value, *readings)]
            if self._leads and failure is None:
                try:
                    function(batch, *gathered)
                except Exception as error:  # the other ranks wait for this one to gather the rest
                    failure = error
            del gathered  # before the next batch is
        if failure is not None:
            raise failure

    def _what_is_not_zero(self) -> Snapshot:
        """Dense weights, and products that are not zero."""
        start = Snapshot()
        for each in self._watched:
            now = Snapshot(_gather([each]))
            if self._leads and (each.is_dense or not _is_zero(now.read(each))):
                start.scales[each.name] = each.scales()
                for parameter in each.sources:
                    if id(parameter) not in start.values:
                        start.values[id(parameter)] = self._copied(parameter, now.values[id(parameter)])
            del now  # before the next is gathered
        return start

    def _from_tensors(self, tensors: Mapping[str, Tensor]) -> Snapshot:
        values = {id(p): tensors[key].to(self._home(p)) for p, key in self._keys.items() if key in tensors}
        scales = {name: tensors[f"{name}#scales"] for name in self.places if f"{name}#scales" in tensors}
        return Snapshot(values, {name: tuple(scale.tolist()) for name, scale in scales.items()})

    def _keep(self, places: Snapshot, gathered: Mapping[int, Tensor] | None = None) -> None:
        """Copies every parameter, sharded ones as they were gathered (by default now, by all ranks together).

        Args:
            places: Copies of an earlier step, to be overwritten.
            gathered: Parameter to its value.
        """
        copies: dict[int, Tensor] = {}
        for parameter in self._keys:
            value = whole(parameter) if gathered is None else gathered.get(id(parameter), parameter.detach())
            if not self._leads:
                continue
            place, start = places.values.get(id(parameter)), self._start.values.get(id(parameter))
            if gathered is None and start is not None:
                copies[id(parameter)] = start
            elif place is None or place is start:
                copies[id(parameter)] = self._copied(parameter, value)
            else:
                copies[id(parameter)] = place.copy_(value)
        self._before = Snapshot(copies, {each.name: each.scales() for each in self._watched})

    def _copied(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        return value.detach().to(self._home(parameter), copy=True)

    def _home(self, parameter: nn.Parameter) -> torch.device:
        return torch.device("cpu") if id(parameter) in self._dense else parameter.device

    def _solve(self, batch: Sequence[Watched], now: Snapshot, workspace: Workspace) -> dict[str, Solved]:
        if batch[0].is_dense:
            (each,) = batch
            before, start = (
                _dense(past.read(each)) if past.holds(each) else None for past in (self._before, self._start)
            )
            return {each.name: pairs.solve_dense(_dense(now.read(each)), before, start)}
        matrices = _low_rank(now, batch)
        before = self._linked(batch) if all(map(self._before.holds, batch)) else None
        start = _low_rank(self._start, batch) if self._start.holds(batch[0]) else None
        device = matrices[0].left_factor.device
        solved = pairs.solve(matrices, before, start, device=device, workspace=workspace)
        return {each.name: one for each, one in zip(batch, solved, strict=True)}

    def _linked(self, batch: Sequence[Watched]) -> Before:
        matrices = _low_rank(self._before, batch)
        last = [self._solved_before.get(each.name) for each in batch]
        noise = [
            rounding.product_noise_energy(matrix) if solved is None else solved.noise
            for matrix, solved in zip(matrices, last, strict=True)
        ]
        cores = [solved.cores for solved in last if solved is not None and solved.cores is not None]
        if not self._cosines or len(cores) < len(batch):
            return Before(matrices, noise)
        return Before(matrices, noise, cores, _low_rank(self._earlier, batch))


def _keys(watched: Sequence[Watched]) -> dict[nn.Parameter, str]:
    """Each parameter once, with a name for it: its first matrix and its place there."""
    keys: dict[nn.Parameter, str] = {}
    for each in watched:
        for index, parameter in enumerate(each.sources):
            keys.setdefault(parameter, f"{each.name}#{index}")
    return keys


def _place(watched: Watched) -> Place:
    matrix = watched.read(_shape_only)
    out, in_ = matrix.shape
    return Place(out, in_, matrix.rank if isinstance(matrix, LowRankMatrix) else 0, _STORAGE.get(matrix.dtype, "F32"))


def _shape_only(parameter: nn.Parameter) -> Tensor:
    """A sharded parameter's shape without gathering it."""
    if not is_sharded(parameter):
        return parameter.detach()
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def _batches(watched: Sequence[Watched], places: Mapping[str, Place], start: Snapshot) -> list[list[Watched]]:
    """Matrices of one shape, rank, device and kind of start; as many as one batch may hold."""
    groups: dict[tuple, list[Watched]] = defaultdict(list)
    for each in watched:
        groups[places[each.name], each.sources[0].device, start.holds(each), each.is_dense].append(each)
    batches = []
    for (place, device, _, dense), members in groups.items():
        allowed = _BATCH_BYTES.get(device.type, _BATCH_BYTES_ELSEWHERE)
        length = 1 if dense else max(1, allowed // (16 * max(place.rank, 1) * (place.out + place.in_)))
        batches += [members[first : first + length] for first in range(0, len(members), length)]
    return batches


def _value(parameter: nn.Parameter) -> Tensor:
    return parameter


def _gather(batch: Sequence[Watched], reading: Reading = _value) -> dict[int, Tensor]:
    return {id(parameter): whole(reading(parameter)) for each in batch for parameter in each.sources}


def _reading(values: Mapping[int, Tensor]) -> Reading:
    return lambda parameter: values[id(parameter)]


def _low_rank(snapshot: Snapshot, batch: Sequence[Watched]) -> list[LowRankMatrix]:
    matrices = [snapshot.read(each) for each in batch]
    return [matrix for matrix in matrices if isinstance(matrix, LowRankMatrix)]


def _dense(matrix: Matrix) -> Tensor:
    assert isinstance(matrix, Tensor)
    return matrix


def _is_zero(matrix: Matrix) -> bool:
    """Whether a product is zero term by term, as a LoRA that begins with B = 0 is."""
    assert isinstance(matrix, LowRankMatrix)
    columns, rows = (matrix.left_factor != 0).any(0), (matrix.right_factor != 0).any(1)
    return not bool((columns & rows & (matrix.scales() != 0).to(columns.device)).any())


def _values_of(matrices: Sequence[Matrix]) -> list[Tensor]:
    factored = [matrix for matrix in matrices if isinstance(matrix, LowRankMatrix)]
    dense = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    return singular_values(factored) if factored else [dense_singular_values(each.to(torch.float64)) for each in dense]
