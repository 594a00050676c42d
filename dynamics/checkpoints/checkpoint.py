"""One checkpoint folder: its adapters, their matrices and sums, and what was found in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.folders import CONFIG, AdapterFolder, Candidate, other_weights
from dynamics.checkpoints.foreign import describe
from dynamics.checkpoints.names import natural_order, shown, shown_path, some
from dynamics.checkpoints.peft_adapter import Adapter, read_adapter
from dynamics.checkpoints.peft_config import AdapterConfig, read_adapter_config
from dynamics.checkpoints.products import Product, total, under
from dynamics.checkpoints.trajectory import OpenCheckpoint, UnreadableMatrix
from dynamics.checkpoints.variants import Refusal
from dynamics.checkpoints.weight_files import Loader, WeightFile, read_weight_file
from dynamics.findings import Finding
from probes.low_rank import LowRankMatrix

Watch = Callable[[str], bool]
_CHANGED = "Its file no longer holds what its header said when the run was opened. Analyse the run again."


@dataclass(frozen=True)
class Content:
    """What was read of one checkpoint folder.

    Args:
        products: Name of the matrix to its product, in the model's order; empty if nothing is analysed.
        files: Name of the adapter to its weight file.
        findings: What was found.
        ranks: Rank of each matrix with factors, refused ones included: evidence of which training it is.
        settings: Adapter name to what distinguishes its configuration.
    """

    products: Mapping[str, Product] = field(default_factory=dict)
    files: Mapping[str, WeightFile] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[OpenCheckpoint]:
        """Opens the weight files; matrices can be read until the context closes.

        A file that has gone or changed since its header was read shows on access, as an
        ``UnreadableMatrix``: the other adapters of the checkpoint can still be read.
        """
        with ExitStack() as stack:
            loaders = {adapter: _opened(stack, file) for adapter, file in self.files.items()}

            def load_tensor(key: str) -> Tensor:
                adapter, _, inner = key.partition("\0")
                return loaders[adapter](inner)

            def load(name: str) -> LowRankMatrix:
                if not loaders:
                    raise RuntimeError(f"The checkpoint is closed; read {name!r} inside its `with` block.")
                try:
                    matrix = self.products[name].build(load_tensor)
                except UnreadableFile as error:
                    raise UnreadableMatrix(str(error)) from error
                except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
                    raise UnreadableMatrix(_CHANGED) from error
                if matrix.shape != (shapes[name].out, shapes[name].in_) or matrix.rank != shapes[name].rank:
                    raise UnreadableMatrix(_CHANGED)
                return matrix

            shapes = {name: product.shape for name, product in self.products.items()}
            try:
                yield OpenCheckpoint(shapes, load)
            finally:
                loaders.clear()  # nothing may keep the mapping: memory must not grow with the checkpoints


def _opened(stack: ExitStack, file: WeightFile) -> Loader:
    try:
        return stack.enter_context(file.open())
    except UnreadableFile as error:
        failure = error

        def load(key: str) -> Tensor:
            raise failure

        return load


@dataclass(frozen=True)
class Reader:
    """Reads the checkpoints of one run.

    Args:
        run: The run's folder; files in findings are relative to it.
        adapters: Names of all adapters of the run; with several, matrices are ``matrix@adapter``.
        watch: Which matrices are wanted, by name.
    """

    run: Path
    adapters: Sequence[str]
    watch: Watch

    def read(self, candidate: Candidate, latest: bool = False) -> Content:
        """Reads headers and configurations of one checkpoint folder.

        Args:
            candidate: The folder.
            latest: Whether it is the run's last checkpoint, which may still be being written.
        """
        findings = list(self._absences(candidate, latest))
        files: dict[str, WeightFile] = {}
        read: dict[str, Adapter] = {}
        settings: dict[str, Any] = {}
        for place in candidate.adapters:
            if place.weights is None:
                continue
            try:
                file = read_weight_file(place.weights)
            except UnreadableFile as error:
                findings.append(error.to_finding(self._name(place.weights), candidate.step))
                continue
            findings += self._links(place.weights, candidate.step)
            config = self._config(place, file, candidate, latest)
            if isinstance(config, Finding):
                findings.append(config)
                continue
            adapter = read_adapter(file, config)
            findings += self._remarks(adapter, config, place, candidate.step)
            settings[place.name] = config.settings
            read[place.name] = adapter
            if adapter.products:
                files[place.name] = file
        products, notes = self._combined({name: read[name] for name in files}, candidate)
        ranks = {self._matrix(name, key): rank for key, one in read.items() for name, rank in one.ranks.items()}
        return Content(products, files, (*findings, *notes), ranks, settings)

    def _name(self, path: Path) -> str:
        return shown_path(path, self.run)

    def _matrix(self, name: str, adapter: str) -> str:
        return _at(name, adapter) if len(self.adapters) > 1 else name

    def _absences(self, candidate: Candidate, latest: bool) -> Iterator[Finding]:
        """Findings for what a checkpoint should hold and does not."""
        where, step = self._name(candidate.folder) if candidate.folder != self.run else "", candidate.step
        for place in candidate.adapters:
            if place.weights is None:
                message = f"It has {CONFIG} but no weights (adapter_model.safetensors or .bin)."
                remedy = "Restore the weights, or remove the folder."
                name = self._name(place.folder) if place.folder != self.run else CONFIG
                yield Finding("OD106", message, remedy, file=name, step=step)
        if candidate.adapters:
            return
        others = other_weights(candidate.folder, candidate.entries, self.run, step)
        if others:
            yield from others
        elif latest and candidate.state is None:
            message = "It holds no adapter and no trainer_state.json: it may still be being written."
            yield Finding("OD118", message, "Analyse the run again when it is saved.", file=where, step=step)
        else:
            message = "It holds no weights (adapter_model.safetensors or .bin)."
            yield Finding("OD106", message, "Restore the weights, or remove the folder.", file=where, step=step)

    def _config(
        self, place: AdapterFolder, file: WeightFile, candidate: Candidate, latest: bool
    ) -> AdapterConfig | Finding:
        if place.config is not None:
            try:
                return read_adapter_config(place.config)
            except UnreadableFile as error:
                return error.to_finding(self._name(place.config), candidate.step)
        name = self._name(file.path)
        what = describe(file.tensors)
        if what is not None:
            message = f"It is {what}, which is not analysed, and there is no {CONFIG}."
            return Finding("OD103", message, "Pass a run of PEFT LoRA adapters.", file=name, step=candidate.step)
        if latest and candidate.state is None and candidate.folder != self.run:
            message = f"There is no {CONFIG} beside it yet: the checkpoint may still be being written."
            return Finding("OD118", message, "Analyse the run again when it is saved.", file=name, step=candidate.step)
        message = f"There is no {CONFIG} beside it: rank and scale are unknown."
        remedy = f"Copy {CONFIG} from another checkpoint of the same training."
        return Finding("OD102", message, remedy, file=name, step=candidate.step)

    def _links(self, path: Path, step: int) -> list[Finding]:
        target = path.resolve()
        # A checkpoint folder may itself be a link; what matters is whether the file leaves it.
        if target.is_relative_to(self.run.resolve()) or target.is_relative_to(path.parent.resolve()):
            return []
        message = f"It is a link to {str(target)!r}, outside the run; that file was read."
        return [Finding("OD122", message, file=self._name(path), step=step)]

    def _remarks(self, adapter: Adapter, config: AdapterConfig, place: AdapterFolder, step: int) -> Iterator[Finding]:
        assert place.weights is not None
        weights, configuration = self._name(place.weights), self._name(place.config or place.weights)
        if adapter.refusal is not None:
            yield self._refused(adapter.refusal, list(adapter.refused), weights, step)
            return
        for remark in (*config.remarks, *adapter.remarks):
            yield Finding(remark.code, remark.message, file=configuration, step=step)
        grouped: dict[Refusal, list[str]] = defaultdict(list)
        for name, refusal in adapter.refused.items():
            if self.watch(self._matrix(name, place.name)):
                grouped[refusal].append(name)
        for refusal, names in grouped.items():
            yield self._refused(refusal, names, weights, step)
        if adapter.beside:
            yield _beside(adapter.beside, weights, step)

    @staticmethod
    def _refused(refusal: Refusal, names: list[str], file: str, step: int) -> Finding:
        names = sorted(names, key=natural_order)
        message = refusal.reason
        if len(names) > 1:
            message += f" {len(names)} matrices: {some(names)}."
        return Finding(
            refusal.code,
            message,
            refusal.remedy,
            file=file,
            matrix=names[0] if len(names) == 1 else "",
            step=step,
            evidence={"matrices": names},
        )

    def _combined(self, read: Mapping[str, Adapter], candidate: Candidate) -> tuple[dict[str, Product], list[Finding]]:
        """Products of one or several adapters under the names of the run, sums included."""
        located = {
            adapter: {name: under(adapter, product) for name, product in one.products.items()}
            for adapter, one in read.items()
        }
        if len(self.adapters) == 1:
            products = next(iter(located.values()), {})
            return {name: product for name, product in products.items() if self.watch(name)}, []
        by_matrix: dict[str, dict[str, Product]] = defaultdict(dict)
        for adapter, products in located.items():
            for name, product in products.items():
                by_matrix[name][adapter] = product
        complete = set(read) == {place.name for place in candidate.adapters} and not any(
            one.refused for one in read.values()
        )
        combined: dict[str, Product] = {}
        for name in sorted(by_matrix, key=natural_order):
            parts = by_matrix[name]
            if complete and len({(part.shape.out, part.shape.in_) for part in parts.values()}) == 1:
                combined[name] = total(parts)
            combined |= {_at(name, adapter): part for adapter, part in parts.items()}
        adapters = ", ".join(map(shown, self.adapters))
        if complete:
            message = f"`matrix` is the sum of its adapters ({adapters}): right only where all of them are active."
        else:
            message = f"Adapters ({adapters}) are given one by one; their sum is left out, as one of them was not read."
        note = Finding("OD121", message, step=candidate.step)
        return {name: product for name, product in combined.items() if self.watch(name)}, [note]


def _at(name: str, adapter: str) -> str:
    """Name of a matrix of one adapter among several."""
    return f"{name}@{shown(adapter)}"


def _beside(beside: Mapping[str, Sequence[str]], file: str, step: int) -> Finding:
    counts = {kind: len(keys) for kind, keys in sorted(beside.items())}
    listing = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    keys = [shown(key) for keys in beside.values() for key in keys]
    message = f"{sum(counts.values())} stored tensors are not low-rank updates and are not analysed: {listing}."
    evidence = {"counts": counts, "examples": keys[:6]}
    return Finding("OD109", f"{message} E.g. {some(keys)}.", file=file, step=step, evidence=evidence)
