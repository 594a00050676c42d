"""Spectra of a model in training: the watched matrices as they are, against copies from the last captured step.

Factors of adapters are copied on their own device, dense weights to the host: a copy of all weights beside the model
is what an accelerator has no room for. Sharded parameters (DTensors) are gathered one batch of matrices at a time, by
all ranks in the same order; one rank computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dynamics.recording.snapshots import (
    Snapshot,
    factors_of,
    keys_of,
    read_start,
    scaled_products,
    start_tensors,
    terms_of,
)
from dynamics.spectra import rounding, walk
from dynamics.spectra.increments import Workspace, difference
from dynamics.spectra.raw import Place
from dynamics.spectra.singular_values import dense_singular_values, singular_values
from dynamics.spectra.walk import Before, MatrixSpectra, Solved
from probes.low_rank import LowRankMatrix
from probes.watched import Matrix, Product, Reading, Watched, is_sharded, whole

#: Bytes of float64 stack that one batch works on: what stays in a CPU's cache, what fills an accelerator.
_BATCH_BYTES = {"cpu": 2**23}
_BATCH_BYTES_ELSEWHERE = 2**26
#: Storage dtypes as safetensors names them.
_STORAGE = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class LiveSpectra:
    """The watched matrices over the captured steps.

    Args:
        watched: The matrices.
        start: What :attr:`start` gave when training began, and :meth:`follow` later; ``None``: training begins now.
        step: The step that is resumed from.
        cosines: Whether inner products of consecutive increments are wanted, which takes a second copy.
        leads: Whether this process computes and copies; the others only help to gather.
    """

    def __init__(
        self,
        watched: Sequence[Watched],
        *,
        start: Mapping[str, Tensor] | None = None,
        step: int = 0,
        cosines: bool = False,
        leads: bool = True,
    ) -> None:
        self._cosines, self._leads = cosines, leads
        self._dense: set[int] = set()
        self._start, self._before, self._earlier = Snapshot(), Snapshot(), Snapshot()
        # The following is the same on all ranks, those without copies included.
        self._begun: dict[int, nn.Parameter] = {}  # by identity: a start is known, be it a product of zero
        self._nonzero: set[int] = set()  # identities: it has a value at the start
        self._ending: list[Watched] = []  # measured once more
        self._lost: set[str] = set()  # matrices that something else than training has changed since the last record
        self._fresh: dict[str, str] = {}  # what sets a matrix apart until the next record
        self._watch(watched)
        if start is None:
            self._take_start(watched)
        else:
            self._start = read_start(start, step, watched, self._keys, self._home)
            self._nonzero = set(self._start.values)
        self._begun = {id(parameter): parameter for parameter in self._keys}
        self._batches = self._in_batches()
        self._solved: dict[str, Solved] = {}
        self._solved_before: dict[str, Solved] = {}
        self._gathered: dict[int, Tensor] = {}
        if start is None:
            self._keep(Snapshot())

    @property
    def start(self) -> dict[str, Tensor]:
        """What training began with, where that was not a zero update: parameters and scales, by keys of our own."""
        return start_tensors(self._start, self._watched, self._keys)

    def follow(
        self,
        watched: Sequence[Watched],
        step: int,
        *,
        present: Collection[int],
        rewritten: Collection[str] = (),
        rescaled: Collection[str] = (),
        copied_at: int,
    ) -> dict[str, Tensor]:
        """Goes on with other matrices, before what is new among them has been trained; all ranks together.

        A matrix that is not watched any more is measured once more if it may have moved since the last record. An
        adapter or weight that was watched before keeps its start; the total of a new one counts from now.

        Args:
            watched: The matrices from now on.
            step: The last step that was done.
            present: All parameters of the model, by identity.
            rewritten: Matrices that begin anew.
            rescaled: Matrices whose adapters have another scale.
            copied_at: The step of the copies that increments count from, −1 if there are none.

        Returns:
            What new matrices began with, to be kept beside what was kept before.
        """
        names = {each.name for each in watched}
        ending = [each for each in self._watched if each.name not in names] if copied_at != step else []
        anew = {id(p) for each in watched if each.name in rewritten for p in each.sources}
        other = {id(p) for each in watched if each.name in rescaled for p in each.sources}
        copied = {id(parameter) for parameter in self._keys}
        self._begun = {key: parameter for key, parameter in self._begun.items() if key not in anew}
        changed = []
        for each in watched:
            moves = [p for p in each.sources if id(p) not in copied or id(p) in anew | other]
            if not moves and all(id(parameter) in self._begun for parameter in each.sources):
                continue
            late = [p for p in moves if copied_at < 0 or (copied_at != step and id(p) in anew | other)]
            changed.append(each)
            self._fresh[each.name] = "late" if late else "new"
            now = Snapshot(_gather([each]))
            self._begin(each, now)
            if self._leads:
                for parameter in moves:
                    self._before.values.pop(id(parameter), None)
                    if all(parameter is not one for one in late):
                        self._before.values[id(parameter)] = self._copied(parameter, now.values[id(parameter)])
                self._before.scales |= {factors_of(term): scale for term, scale in scaled_products(each)}
            del now  # before the next is gathered
        self._begun |= {id(parameter): parameter for each in watched for parameter in each.sources}
        self._forget_all_but({*present, *(id(p) for each in (*watched, *ending) for p in each.sources)})
        for each in changed:
            self._solved_before.pop(each.name, None)
        self._lost.clear()
        self._ending = ending
        self._watch([*watched, *ending])
        self._batches = self._in_batches()
        return start_tensors(self._start, changed, self._keys, step) if self._leads else {}

    def lose(self, *, totals: Collection[str], increments: Collection[str]) -> None:
        """Leaves matrices, or their increments, out of the next measurement: something else has changed them."""
        lost, changed = (
            {id(p) for each in self._watched if each.name in names for p in each.sources}
            for names in (totals, increments)
        )
        for each in self._watched:
            if any(id(parameter) in lost for parameter in each.sources):
                self._lost.add(each.name)
            if any(id(parameter) in changed for parameter in each.sources):
                self._fresh[each.name] = "late"
        for parameter in changed:
            self._before.values.pop(parameter, None)
        self._batches = self._in_batches()

    def previous(self) -> dict[str, LowRankMatrix]:
        """The watched products as they were at the last captured step, those of them that are known."""
        held = {each.name: self._before.read(each) for each in self._watched if self._before.holds(each)}
        return {name: matrix for name, matrix in held.items() if isinstance(matrix, LowRankMatrix)}

    def measure(self) -> dict[str, MatrixSpectra]:
        """Totals and increments of every matrix as it is now; all ranks must call it together.

        Returns:
            Matrix to spectra; nothing on ranks that do not compute, and nothing of matrices that were lost. Without an
            earlier step there is no increment, and no total of a dense weight whose start is not known.
        """
        self._solved, self._gathered = {}, {}
        workspace = Workspace()

        def solve(batch: Sequence[Watched], values: dict[int, Tensor]) -> None:
            # On the host, so that no more than one batch is ever whole beside the model.
            sharded = [p for each in batch for p in each.sources if is_sharded(p)]
            self._gathered |= {id(p): values[id(p)].to("cpu", copy=True) for p in sharded}
            self._solved |= self._solve(batch, Snapshot(values), workspace)

        self._for_each_batch(solve)
        return {name: solved.spectra for name, solved in self._solved.items() if name not in self._lost}

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
        if self._ending or self._fresh:
            ended = {each.name for each in self._ending}
            self._ending, self._fresh = [], {}
            self._watch([each for each in self._watched if each.name not in ended])
            self._batches = self._in_batches()

    def increments(self) -> dict[str, Matrix]:
        """Change of every matrix since the last captured step, itself; of those that are no part of a sum, in float64.

        Only on the leading rank, for parameters that are whole there. Dense weights take a float64 copy of the model.
        """
        found: dict[str, Matrix] = {}
        for each in self._watched:
            if each.part_of or not self._before.holds(each) or each.name in self._lost:
                continue
            now, before = each.read(), self._before.read(each)
            if isinstance(now, LowRankMatrix):
                assert isinstance(before, LowRankMatrix)
                found[each.name] = difference(now, before)
            else:
                found[each.name] = now.detach().to(torch.float64) - _dense(before).to(now.device, torch.float64)
        return found

    def gradients(self, gradient: Reading) -> tuple[dict[str, tuple[Float[Tensor, " k"], int]], dict[str, str]]:
        """Singular values of every matrix's gradient, and the columns of its factors; all ranks together.

        Args:
            gradient: From a parameter to its gradient as this rank has it, zeros if it has none.

        Returns:
            Of each matrix; and of those whose gradient could not be measured, why not.
        """
        found: dict[str, tuple[Tensor, int]] = {}
        failures: dict[str, str] = {}

        def solve(batch: Sequence[Watched], values: dict[int, Tensor], changes: dict[int, Tensor]) -> None:
            matrices = [each.gradient(_reading(changes), _reading(values)) for each in batch]
            for each, matrix, spectrum in zip(batch, matrices, _values_of(matrices), strict=True):
                rank = matrix.rank if isinstance(matrix, LowRankMatrix) else min(matrix.shape)
                found[each.name] = spectrum.cpu(), rank

        def solve_or_note(batch: Sequence[Watched], values: dict[int, Tensor], changes: dict[int, Tensor]) -> None:
            try:
                solve(batch, values, changes)
            except torch.OutOfMemoryError:  # what comes next will not fare better
                raise
            except Exception as error:
                if len(batch) == 1:
                    failures[batch[0].name] = f"{type(error).__name__}: {error}"
                else:
                    for each in batch:
                        solve_or_note([each], values, changes)

        self._for_each_batch(solve_or_note, gradient)
        return found, failures

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

    def _watch(self, watched: Sequence[Watched]) -> None:
        self._watched = list(watched)
        self._keys = keys_of(watched)
        self.places = {each.name: _place(each) for each in watched}
        self._dense |= {id(parameter) for each in watched if each.is_dense for parameter in each.sources}

    def _take_start(self, watched: Sequence[Watched]) -> None:
        """Lets totals count from now."""
        for each in watched:
            now = Snapshot(_gather([each]))
            self._begin(each, now)
            del now  # before the next is gathered

    def _begin(self, watched: Watched, now: Snapshot) -> None:
        """Lets those parts of a matrix count from now whose start is not known; of products that are zero no copy."""
        for term in terms_of(watched):
            begins = [parameter for parameter in term.parameters if id(parameter) not in self._begun]
            if not begins:
                continue
            values = [now.values[id(parameter)] for parameter in term.parameters]
            zero = isinstance(term, Product) and not all(bool(value.any()) for value in values)
            for parameter, value in zip(term.parameters, values, strict=True):
                self._begun[id(parameter)] = parameter
                self._start.values.pop(id(parameter), None)
                self._nonzero.discard(id(parameter))
                if not zero:
                    self._nonzero.add(id(parameter))
                    if self._leads:
                        self._start.values[id(parameter)] = self._copied(parameter, value)
            if isinstance(term, Product) and not zero:
                self._start.scales[factors_of(term)] = term.scale()

    def _forget_all_but(self, parameters: Collection[int]) -> None:
        """Lets go of copies of what is not in the model any more."""
        self._begun = {key: parameter for key, parameter in self._begun.items() if key in parameters}
        self._nonzero &= set(parameters)
        for snapshot in (self._start, self._before):
            snapshot.values = {key: value for key, value in snapshot.values.items() if key in parameters}

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
        self._before = Snapshot(
            copies, {factors_of(term): scale for each in self._watched for term, scale in scaled_products(each)}
        )

    def _copied(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        return value.detach().to(self._home(parameter), copy=True)

    def _in_batches(self) -> list[list[Watched]]:
        """Matrices that are solved alike: in places, ranks at the start, and what there is of the step before."""

        def kind(each: Watched) -> tuple[object, ...]:
            started = [t for t in terms_of(each) if all(id(p) in self._nonzero for p in t.parameters)]
            ranks = [t.matrix(_shape_only, 1.0).rank if isinstance(t, Product) else 0 for t in started]
            return sum(ranks), bool(started), self._fresh.get(each.name)

        return _batches(self._watched, self.places, kind)

    def _home(self, parameter: nn.Parameter) -> torch.device:
        return torch.device("cpu") if id(parameter) in self._dense else parameter.device

    def _solve(self, batch: Sequence[Watched], now: Snapshot, workspace: Workspace) -> dict[str, Solved]:
        if batch[0].is_dense:
            (each,) = batch
            before, start = (
                _dense(past.read(each)) if past.holds(each) else None for past in (self._before, self._start)
            )
            return {each.name: walk.solve_dense(_dense(now.read(each)), before, start)}
        matrices = _low_rank(now, batch)
        before = self._linked(batch) if all(map(self._before.holds, batch)) else None
        parts = [part for each in batch if (part := self._start.part(each)) is not None]
        start = _low_rank(self._start, parts) if parts else None
        device = matrices[0].left_factor.device
        solved = walk.solve(matrices, before, start, device=device, workspace=workspace)
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


def _place(watched: Watched) -> Place:
    matrix = watched.read(_shape_only)
    out, in_ = matrix.shape
    return Place(out, in_, matrix.rank if isinstance(matrix, LowRankMatrix) else 0, _STORAGE.get(matrix.dtype, "F32"))


def _shape_only(parameter: nn.Parameter) -> Tensor:
    """A sharded parameter's shape without gathering it."""
    if not is_sharded(parameter):
        return parameter.detach()
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def _batches(
    watched: Sequence[Watched], places: Mapping[str, Place], kind: Callable[[Watched], tuple[object, ...]]
) -> list[list[Watched]]:
    """Matrices of one shape, rank, device and kind; as many as one batch may hold."""
    groups: dict[tuple, list[Watched]] = defaultdict(list)
    for each in watched:
        groups[places[each.name], each.sources[0].device, each.is_dense, kind(each)].append(each)
    batches = []
    for (place, device, dense, _), members in groups.items():
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


def _values_of(matrices: Sequence[Matrix]) -> list[Tensor]:
    factored = [matrix for matrix in matrices if isinstance(matrix, LowRankMatrix)]
    dense = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    return singular_values(factored) if factored else [dense_singular_values(each.to(torch.float64)) for each in dense]
