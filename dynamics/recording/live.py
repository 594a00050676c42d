"""Spectra of a model in training: the watched matrices as they are, against copies from the last captured step.

Factors of adapters are copied on their own device, dense weights to the host: a copy of all weights beside the model
is what an accelerator has no room for. Sharded parameters (DTensors, those under DeepSpeed ZeRO) are gathered one batch
of matrices at a time, by all ranks in the same order; one rank computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.recording.deepspeed import Zero, gathered_dtype, needs_all_ranks
from dynamics.recording.snapshots import (
    Snapshot,
    factors_of,
    keys_of,
    scaled_products,
    start_snapshot,
    start_tensors,
    terms_of,
)
from dynamics.spectra import walk
from dynamics.spectra.increments import Workspace, cores, difference, stack_sums
from dynamics.spectra.singular_values import core_singular_values, dense_singular_values
from dynamics.spectra.walk import BatchResult, MatrixSpectra, Previous
from probes.low_rank import LowRankMatrix
from probes.watched import AdapterProduct, Matrix, Reading, Watched, shape_of, whole

#: From parameters to a whole tensor of each, by identity; all ranks together.
Gather: TypeAlias = Callable[[Sequence[nn.Parameter]], dict[int, Tensor]]
_Result = TypeVar("_Result")
#: Storage dtypes as safetensors names them.
_STORAGE = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class LiveSpectra:
    """The watched matrices over the captured steps.

    Args:
        watched: The matrices.
        start: What :attr:`start` gave when training began, and :meth:`follow` later; ``None``: training begins now.
        step: The step that is resumed from.
        cosines: Whether inner products of consecutive increments are formed, which takes a second copy.
        leads: Whether this process computes and copies; the others only help to gather.
        zero: The model's ZeRO, if it is trained under it.

    Attributes:
        shapes: Matrix to its shape and storage format.
    """

    def __init__(
        self,
        watched: Sequence[Watched],
        *,
        start: Mapping[str, Tensor] | None = None,
        step: int = 0,
        cosines: bool = False,
        leads: bool = True,
        zero: Zero | None = None,
    ) -> None:
        self._cosines, self._leads, self._zero = cosines, leads, zero
        self._dense: set[int] = set()
        self._workspaces = [Workspace()]  # one a thread; kept, since a fresh one is mapped and zeroed anew at each step
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
            self._start = start_snapshot(start, step, watched, self._keys, self._home)
            self._nonzero = set(self._start.values)
        self._begun = {id(parameter): parameter for parameter in self._keys}
        self._batches = self._in_batches()
        self._results: dict[str, BatchResult] = {}
        self._results_before: dict[str, BatchResult] = {}
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
        """Go on with other matrices, before what is new among them has been trained; all ranks together.

        A matrix that is no longer watched is measured once more if it may have moved since the last record. An adapter
        or weight that was watched before keeps its start; the total of a new one counts from now.

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
        names = {matrix.name for matrix in watched}
        ending = [matrix for matrix in self._watched if matrix.name not in names] if copied_at != step else []
        anew = {id(p) for matrix in watched if matrix.name in rewritten for p in matrix.sources}
        scaled = {id(p) for matrix in watched if matrix.name in rescaled for p in matrix.sources}
        copied = {id(parameter) for parameter in self._keys}
        self._begun = {key: parameter for key, parameter in self._begun.items() if key not in anew}
        changed = []
        for matrix in watched:
            moves = [p for p in matrix.sources if id(p) not in copied or id(p) in anew | scaled]
            if not moves and all(id(parameter) in self._begun for parameter in matrix.sources):
                continue
            late = [p for p in moves if copied_at < 0 or (copied_at != step and id(p) in anew | scaled)]
            changed.append(matrix)
            self._fresh[matrix.name] = "late" if late else "new"
            now = Snapshot(self._gather([matrix]))
            self._begin(matrix, now)
            if self._leads:
                for parameter in moves:
                    self._before.values.pop(id(parameter), None)
                    if all(parameter is not late_one for late_one in late):
                        self._before.values[id(parameter)] = self._copied(parameter, now.values[id(parameter)])
                self._before.scales |= {factors_of(term): scale for term, scale in scaled_products(matrix)}
            del now  # before the next is gathered
        self._begun |= {id(parameter): parameter for matrix in watched for parameter in matrix.sources}
        self._forget_all_but({*present, *(id(p) for matrix in (*watched, *ending) for p in matrix.sources)})
        for matrix in changed:
            self._results_before.pop(matrix.name, None)
        self._lost.clear()
        self._ending = ending
        self._watch([*watched, *ending])
        self._batches = self._in_batches()
        return start_tensors(self._start, changed, self._keys, step) if self._leads else {}

    def lose(self, *, totals: Collection[str], increments: Collection[str]) -> None:
        """Leave matrices, or their increments, out of the next measurement: something else has changed them."""
        lost, changed = (
            {id(p) for matrix in self._watched if matrix.name in names for p in matrix.sources}
            for names in (totals, increments)
        )
        for matrix in self._watched:
            if any(id(parameter) in lost for parameter in matrix.sources):
                self._lost.add(matrix.name)
            if any(id(parameter) in changed for parameter in matrix.sources):
                self._fresh[matrix.name] = "late"
        for parameter in changed:
            self._before.values.pop(parameter, None)
        self._batches = self._in_batches()

    def previous(self) -> dict[str, LowRankMatrix]:
        """Return the watched products as they were at the last captured step, those of them that are known."""
        copies = {matrix.name: self._before.read(matrix) for matrix in self._watched if self._before.holds(matrix)}
        return {name: copy for name, copy in copies.items() if isinstance(copy, LowRankMatrix)}

    def measure(self) -> dict[str, MatrixSpectra]:
        """Return totals and increments of every matrix as it is now; all ranks must call it together.

        Returns:
            Matrix to spectra; nothing on ranks that do not compute, and nothing of matrices that were lost. Without an
            earlier step there is no increment, and no total of a dense weight whose start is not known.
        """
        self._results, self._gathered = {}, {}

        def solve(
            workspace: Workspace, batch: Sequence[Watched], values: dict[int, Tensor]
        ) -> tuple[dict[str, BatchResult], dict[int, Tensor]]:
            # On the host, so that no more than one batch is ever whole beside the model.
            sharded = [p for matrix in batch for p in matrix.sources if needs_all_ranks(p)]
            gathered = {id(p): values[id(p)].to("cpu", copy=True) for p in sharded}
            return self._solve(workspace, batch, Snapshot(values)), gathered

        for results, gathered in self._by_batch(solve):
            self._results |= results
            self._gathered |= gathered
        return {name: result.spectra for name, result in self._results.items() if name not in self._lost}

    def advance(self) -> None:
        """Make what was just measured the earlier step of the next measurement.

        Where that fails, as for want of memory, the next measurement has no earlier step, not a wrong one.
        """
        results, gathered = self._results, self._gathered
        self._results, self._gathered = {}, {}
        if self._leads:
            last, self._before, self._results_before = self._before, Snapshot(), {}
            if self._cosines:
                self._earlier, last = last, Snapshot()
            self._keep(last, gathered)
            self._results_before = results
        if self._ending or self._fresh:
            ended = {matrix.name for matrix in self._ending}
            self._ending, self._fresh = [], {}
            self._watch([matrix for matrix in self._watched if matrix.name not in ended])
            self._batches = self._in_batches()

    @property
    def gathered(self) -> Mapping[int, Tensor]:
        """Whole values of shards, by identity, between :meth:`measure` and :meth:`advance`."""
        return self._gathered

    def increments(self) -> dict[str, Matrix]:
        """Return the change of every matrix since the last captured step; of a sum, not of its parts; in float64.

        Only on the leading rank, between :meth:`measure` and :meth:`advance`, for parameters that are whole there.
        Dense weights take a float64 copy of the model.
        """
        changes: dict[str, Matrix] = {}
        for matrix in self._watched:
            if matrix.part_of or not self._before.holds(matrix) or matrix.name in self._lost:
                continue
            now, before = matrix.read(self._present), self._before.read(matrix)
            if isinstance(now, LowRankMatrix) and isinstance(before, LowRankMatrix):
                changes[matrix.name] = difference(now, before)
            elif isinstance(now, Tensor) and isinstance(before, Tensor):
                changes[matrix.name] = now.detach().to(torch.float64) - before.to(now.device, torch.float64)
        return changes

    def totals(self) -> dict[str, Matrix]:
        """Return the change of every matrix since training began, of those whose start is known, as :meth:`increments`.

        Of an adapter that was zero, a copy of the product as it is now.
        """
        changes: dict[str, Matrix] = {}
        for matrix in self._watched:
            start = self._start.part(matrix)
            if matrix.part_of or matrix.name in self._lost or (matrix.is_dense and start is None):
                continue
            now = matrix.read(self._present)
            if isinstance(now, LowRankMatrix):
                before = None if start is None else self._start.read(start)
                changes[matrix.name] = difference(now, before) if isinstance(before, LowRankMatrix) else _copied(now)
            else:
                assert start is not None
                before = self._start.read(start)
                assert isinstance(before, Tensor)
                changes[matrix.name] = now.detach().to(torch.float64) - before.to(now.device, torch.float64)
        return changes

    def start_values(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return parameters, with values that set the matrices back to the start, of those whose start is known.

        Of an adapter that was zero, the left factor alone: a zero product is zero whatever the other one is.
        """
        values: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for matrix in self._watched:
            for term in terms_of(matrix):
                known = all(id(parameter) in self._start.values for parameter in term.parameters)
                if known:
                    values |= {id(p): (p, self._start.values[id(p)].to(p.dtype)) for p in term.parameters}
                elif isinstance(term, AdapterProduct):
                    values[id(term.left)] = term.left, torch.zeros(term.left.shape, dtype=term.left.dtype)
        return list(values.values())

    def gradients(
        self, gradient: Reading | None = None, gather: Gather | None = None
    ) -> tuple[dict[str, tuple[Float[Tensor, " k"], int]], dict[str, str]]:
        """Return singular values of every matrix's gradient, and the columns of its factors; all ranks together.

        Args:
            gradient: From a parameter to its gradient as this rank has it, zeros if it has none.
            gather: Instead: what gives whole gradients of parameters, by identity.

        Returns:
            Spectra by matrix; and the matrices whose gradient could not be measured, with the reason.
        """
        spectra: dict[str, tuple[Tensor, int]] = {}
        failures: dict[str, str] = {}

        def solve(
            workspace: Workspace, batch: Sequence[Watched], values: dict[int, Tensor], changes: dict[int, Tensor]
        ) -> dict[str, tuple[Tensor, int] | str]:
            """Return spectra, or what went wrong."""
            try:
                gradient_values = _gradient_values(batch, _reading(changes), _reading(values), workspace)
                return dict(zip([matrix.name for matrix in batch], gradient_values, strict=True))
            except torch.OutOfMemoryError:  # what comes next will not fare better
                raise
            except Exception as error:
                if len(batch) == 1:
                    return {batch[0].name: f"{type(error).__name__}: {error}"}
                alone = [solve(workspace, [matrix], values, changes) for matrix in batch]
                return {name: result for results in alone for name, result in results.items()}

        def gathered(batch: Sequence[Watched]) -> dict[int, Tensor]:
            return self._gather(batch, gradient) if gather is None else gather(_sources(batch))

        for results in self._by_batch(solve, gathered):
            for name, result in results.items():
                if isinstance(result, str):
                    failures[name] = result
                else:
                    spectra[name] = result
        return spectra, failures

    def visit(self, gather: Gather) -> None:
        """Call it with the parameters of each batch; all ranks together."""
        for batch in self._batches:
            gather(_sources(batch))

    def _by_batch(self, function: Callable[..., _Result], *gathers: Callable[..., dict[int, Tensor]]) -> list[_Result]:
        """Return what it gives for each batch and its parameters' values (and what else is read); on the leading rank.

        Batches that fit a core's cache and need no other rank are solved side by side, by one thread each: where others
        want the cores, two that share a batch wait for each other. Results do not depend on how many threads there are.
        """
        small = [index for index, batch in enumerate(self._batches) if self._leads and self._is_small(batch)]
        results: dict[int, _Result] = {}
        failure: Exception | None = None
        try:
            results |= zip(
                small, self._side_by_side([self._batches[i] for i in small], function, *gathers), strict=True
            )
        except Exception as error:  # the other ranks wait for this one to gather the rest
            failure = error
        for index, batch in enumerate(self._batches):
            if index in small:
                continue
            gathered = [gather(batch) for gather in (self._gather, *gathers)]
            if self._leads and failure is None:
                try:
                    results[index] = function(self._workspaces[0], batch, *gathered)
                except Exception as error:
                    failure = error
            del gathered  # before the next batch is
        for workspace in self._workspaces:
            workspace.leave_accelerators()
        if failure is not None:
            raise failure
        return [results[index] for index in sorted(results)]

    def _side_by_side(
        self,
        batches: Sequence[Sequence[Watched]],
        function: Callable[..., _Result],
        *gathers: Callable[..., dict[int, Tensor]],
    ) -> list[_Result]:
        threads = max(1, min(torch.get_num_threads(), len(batches)))
        self._workspaces += [Workspace() for _ in range(threads - len(self._workspaces))]
        free = list(self._workspaces)

        @torch.no_grad()
        def solve(batch: Sequence[Watched]) -> _Result:
            workspace = free.pop()
            try:
                return function(workspace, batch, *(gather(batch) for gather in (self._gather, *gathers)))
            finally:
                free.append(workspace)

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            if threads == 1:
                return list(map(solve, batches))
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
                return list(executor.map(solve, batches))
        finally:
            torch.set_num_threads(before)

    def _is_small(self, batch: Sequence[Watched]) -> bool:
        """Return whether a batch of products is on the host, needs no other rank, and fits a core's cache."""
        shapes = [self.shapes[matrix.name] for matrix in batch]
        size = sum(16 * shape.rank * (shape.out + shape.in_) for shape in shapes)
        parameters = _sources(batch)
        return (
            0 < size <= walk.BATCH_BYTES["cpu"]
            and parameters[0].device.type == "cpu"
            and not any(map(needs_all_ranks, parameters))
        )

    def _watch(self, watched: Sequence[Watched]) -> None:
        self._watched = list(watched)
        self._keys = keys_of(watched)
        self.shapes = {matrix.name: _shape(matrix) for matrix in watched}
        self._dense |= {id(parameter) for matrix in watched if matrix.is_dense for parameter in matrix.sources}

    def _take_start(self, watched: Sequence[Watched]) -> None:
        """Let totals count from now."""
        for matrix in watched:
            now = Snapshot(self._gather([matrix]))
            self._begin(matrix, now)
            del now  # before the next is gathered

    def _begin(self, watched: Watched, now: Snapshot) -> None:
        """Let those parts of a matrix count from now whose start is not known; of products that are zero no copy."""
        for term in terms_of(watched):
            begins = [parameter for parameter in term.parameters if id(parameter) not in self._begun]
            if not begins:
                continue
            values = [now.values[id(parameter)] for parameter in term.parameters]
            zero = isinstance(term, AdapterProduct) and not all(bool(value.any()) for value in values)
            for parameter, value in zip(term.parameters, values, strict=True):
                self._begun[id(parameter)] = parameter
                self._start.values.pop(id(parameter), None)
                self._nonzero.discard(id(parameter))
                if not zero:
                    self._nonzero.add(id(parameter))
                    if self._leads:
                        self._start.values[id(parameter)] = self._copied(parameter, value)
            if isinstance(term, AdapterProduct) and not zero:
                self._start.scales[factors_of(term)] = term.scale()

    def _forget_all_but(self, parameters: Collection[int]) -> None:
        """Let go of copies of what is no longer in the model."""
        self._begun = {key: parameter for key, parameter in self._begun.items() if key in parameters}
        self._nonzero &= set(parameters)
        for snapshot in (self._start, self._before):
            snapshot.values = {key: value for key, value in snapshot.values.items() if key in parameters}

    def _keep(self, old: Snapshot, gathered: Mapping[int, Tensor] | None = None) -> None:
        """Copy every parameter, sharded ones as they were gathered (by default now, by all ranks together).

        Args:
            old: Copies of an earlier step, to be overwritten.
            gathered: Parameter to its value.
        """
        copies: dict[int, Tensor] = {}
        for parameter in self._keys:
            if gathered is not None:
                value = gathered.get(id(parameter), parameter.detach())
            else:
                value = whole(parameter) if self._zero is None else self._zero.values([parameter])[id(parameter)]
            if not self._leads:
                continue
            copy, start = old.values.get(id(parameter)), self._start.values.get(id(parameter))
            if gathered is None and start is not None:
                copies[id(parameter)] = start
            elif copy is None or copy is start:
                copies[id(parameter)] = self._copied(parameter, value)
            else:
                copies[id(parameter)] = copy.copy_(value)
        scales = {factors_of(term): scale for matrix in self._watched for term, scale in scaled_products(matrix)}
        self._before = Snapshot(copies, scales)

    def _copied(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        return value.detach().to(self._home(parameter), copy=True)

    def _in_batches(self) -> list[list[Watched]]:
        """Group matrices that are solved alike: with equal ranks at the start, and as much known of the step before."""
        matrices = {matrix.name: matrix for matrix in self._watched}

        def kind(name: str) -> tuple[int, bool, str | None]:
            terms = [t for t in terms_of(matrices[name]) if all(id(p) in self._nonzero for p in t.parameters)]
            ranks = [t.matrix(_shape_only, 1.0).rank if isinstance(t, AdapterProduct) else 0 for t in terms]
            return sum(ranks), bool(terms), self._fresh.get(name)

        batches = walk.batches(self.shapes, lambda name: matrices[name].sources[0].device, kind)
        return [[matrices[name] for name in names] for names in batches]

    def _gather(self, batch: Sequence[Watched], reading: Reading | None = None) -> dict[int, Tensor]:
        """Return the values of a batch's parameters, or what is read of each, whole."""
        parameters = _sources(batch)
        if reading is None and self._zero is not None:
            return self._zero.values(parameters)
        return {id(p): whole(p if reading is None else reading(p)) for p in parameters}

    def _present(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's value as it was measured."""
        gathered = self._gathered.get(id(parameter))
        return whole(parameter) if gathered is None else gathered.to(self._home(parameter))

    def _home(self, parameter: nn.Parameter) -> torch.device:
        return torch.device("cpu") if id(parameter) in self._dense else parameter.device

    def _solve(self, workspace: Workspace, batch: Sequence[Watched], now: Snapshot) -> dict[str, BatchResult]:
        parts = [part for matrix in batch if (part := self._start.part(matrix)) is not None]
        results = walk.solve_batch(
            [now.read(matrix) for matrix in batch],
            self._previous(batch),
            [self._start.read(part) for part in parts] or None,
            device=batch[0].sources[0].device,
            workspace=workspace,
            fast=True,
        )
        return {matrix.name: result for matrix, result in zip(batch, results, strict=True)}

    def _previous(self, batch: Sequence[Watched]) -> Previous | None:
        if not all(map(self._before.holds, batch)):
            return None
        if batch[0].is_dense:
            return Previous([self._before.read(matrix) for matrix in batch])
        results = [self._results_before.get(matrix.name) for matrix in batch]
        earlier = (lambda: _low_rank(self._earlier, batch)) if self._cosines else None
        return Previous.of_factors(_low_rank(self._before, batch), results, earlier)


def _sources(batch: Sequence[Watched]) -> list[nn.Parameter]:
    """Return the parameters of matrices, each once."""
    return list({id(parameter): parameter for matrix in batch for parameter in matrix.sources}.values())


def _copied(matrix: LowRankMatrix) -> LowRankMatrix:
    """Return a product that stays as it is when its parameters move."""
    left, right = (factor.detach().clone() for factor in (matrix.left_factor, matrix.right_factor))
    return LowRankMatrix(left, right, matrix.scale, column_scale=matrix.column_scale)


def _shape(watched: Watched) -> MatrixShape:
    matrix = watched.read(_shape_only)
    out, in_ = matrix.shape
    rank = matrix.rank if isinstance(matrix, LowRankMatrix) else 0
    return MatrixShape(out, in_, rank, _STORAGE.get(matrix.dtype, "F32"))


def _shape_only(parameter: nn.Parameter) -> Tensor:
    """Return a tensor of a parameter's shape, without gathering one that is sharded."""
    if not needs_all_ranks(parameter):
        return parameter.detach()
    return torch.zeros((), dtype=gathered_dtype(parameter), device=parameter.device).expand(shape_of(parameter))


def _reading(values: Mapping[int, Tensor]) -> Reading:
    return lambda parameter: values[id(parameter)]


def _low_rank(snapshot: Snapshot, batch: Sequence[Watched]) -> list[LowRankMatrix]:
    matrices = [snapshot.read(matrix) for matrix in batch]
    return [matrix for matrix in matrices if isinstance(matrix, LowRankMatrix)]


def _gradient_values(
    batch: Sequence[Watched], gradients: Reading, values: Reading, workspace: Workspace
) -> list[tuple[Float[Tensor, " k"], int]]:
    """Return the singular values of the gradients of matrices of one shape, on the host, and the columns of factors."""
    gradient_values: list[tuple[Tensor, int]] = [(torch.empty(0), 0)] * len(batch)
    groups: dict[tuple[int, ...], list[tuple[int, list[LowRankMatrix]]]] = defaultdict(list)
    for index, matrix in enumerate(batch):
        if matrix.is_dense:
            slope = matrix.gradient(gradients, values)
            assert isinstance(slope, Tensor)
            gradient_values[index] = dense_singular_values(slope.to(torch.float64)).cpu(), min(slope.shape)
        else:
            products = matrix.gradient_products(gradients, values)
            groups[tuple(product.rank for product in products)].append((index, products))
    for ranks, members in groups.items():
        sums = [products for _, products in members]
        reduced = cores(stack_sums(sums, sums[0][0].left_factor.device, workspace), fast=True)
        rows = core_singular_values(reduced.total())[:, : min(sum(ranks), *sums[0][0].shape)]
        for (index, _), row in zip(members, rows.unbind(), strict=True):
            gradient_values[index] = row, sum(ranks)
    return gradient_values
