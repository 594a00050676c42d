"""One checkpoint folder: its adapters, their matrices and sums, or the weights of a whole model; and what was found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dynamics.checkpoints.base import Base
from dynamics.checkpoints.candidates import (
    CONFIG,
    DEFAULT,
    DIFFUSERS,
    MEGATRON,
    NESTED,
    WEIGHTS,
    AdapterFolder,
    Candidate,
    is_component,
    remedy_for,
)
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import TensorInfo, Weights, read_json
from dynamics.checkpoints.folders import other_weights
from dynamics.checkpoints.formats.foreign import describe, is_adapter, is_readable
from dynamics.checkpoints.formats.lycoris import read_foreign
from dynamics.checkpoints.formats.mlx import is_mlx_vlm
from dynamics.checkpoints.formats.peft import (
    SAVED,
    TOKENS,
    Adapter,
    SavedModules,
    beside_kind,
    of_trained,
    read_adapter,
    saved_modules,
)
from dynamics.checkpoints.formats.peft_config import AdapterConfig, Budget, read_adapter_config, trainer_scale
from dynamics.checkpoints.formats.transformers import has_stacked_layers, read_dense, read_whole_model, ties_embeddings
from dynamics.checkpoints.formats.variants import Refusal, Remark
from dynamics.checkpoints.initial_adapters import InitialAdapter, counted_from_start
from dynamics.checkpoints.matrices import Product, open_matrices, total, under
from dynamics.checkpoints.names import natural_order, parse_key, shown, shown_path
from dynamics.checkpoints.ties import Tied, tied_matrices
from dynamics.checkpoints.trajectory import OpenCheckpoint
from dynamics.findings import Finding
from dynamics.text import some

#: Suffixes of files of torch.save, which may hold weights inside something else.
_TORCH = (".bin", ".pt", ".pth")
_GIVE_BASE = "Give the base (--base) to analyse those of them that are weight matrices."
_MERGE = "To analyse trained tokens, merge the adapter (merge_and_unload) and analyse the merged model with its base."
_RANDOM_START = "MLX-VLM may start B at ones: totals include that start, where it did."

Watch = Callable[[str], bool]


@dataclass(frozen=True)
class Content:
    """What was read of one checkpoint folder.

    Args:
        products: Name of the matrix to its product, in the model's order; empty if nothing is analysed.
        files: Name of the adapter to its weight file; of a whole model ``default`` to its weights.
        findings: What was found.
        ranks: Rank of each matrix with factors, refused ones included: evidence of which training it is.
        settings: Adapter name to what distinguishes its configuration.
        base: The base's weights, which some products are made with (DoRA).
        is_empty: Whether a file's tensors have no elements: they were not gathered before saving.
        tied: Name of each dense matrix that repeats another one's numbers, to that other one.
        ties_head: Whether the output layer is the input embedding where it is not saved; ``None``: not said.
        sources: Name of the matrix to the base's name of it, where layers are repeated.
        moved: Name of each matrix whose start is not known to the initialisation that moved a part of the base into it.
    """

    products: Mapping[str, Product] = field(default_factory=dict)
    files: Mapping[str, Weights] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Weights | None = None
    is_empty: bool = False
    tied: Tied = field(default_factory=dict)
    ties_head: bool | None = False
    sources: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[OpenCheckpoint]:
        """Opens the weight files; matrices can be read until the context closes.

        A file that has gone or changed since its header was read shows on access, as an
        ``UnreadableMatrix``: the other adapters of the checkpoint can still be read.
        """
        files = self.files if self.base is None else {**self.files, "": self.base}
        with open_matrices(self.products, files) as opened:
            yield opened


@dataclass(frozen=True)
class Reader:
    """Reads the checkpoints of one run.

    Args:
        run: The run's folder; files in findings are relative to it.
        adapters: Names of all adapters of the run; with several, matrices are ``matrix@adapter``.
        watch: Which matrices are wanted, by name.
        base: The weights before training, if they are known.
        initial: Adapters that may be the start of this training.
        budget: What matching the patterns of all configurations may cost.
    """

    run: Path
    adapters: Sequence[str]
    watch: Watch
    base: Base | None = None
    initial: Sequence[InitialAdapter] = ()
    budget: Budget = field(default_factory=Budget)

    def read(self, candidate: Candidate, latest: bool = False) -> Content:
        """Reads headers and configurations of one checkpoint folder.

        Args:
            candidate: The folder.
            latest: Whether it is the run's last checkpoint, which may still be being written.
        """
        content = self._read_adapters(candidate, latest)
        beside = list(candidate.beside)
        if content.is_empty:
            unread = other_weights(candidate.folder, self.run, candidate.step)
            content = replace(content, findings=(*content.findings, *unread))
        if candidate.whole is not None:
            weights = None if content.products else self._read_weights(candidate, candidate.whole)
            if weights is not None and _replaces(weights, content, candidate):
                content = self._instead(content, weights, candidate)
            else:
                beside.insert(0, candidate.whole)
        if not content.products:
            return content
        content = self._read_beside(candidate, content, beside)
        return replace(content, findings=(*content.findings, *self._others(candidate)))

    def _read_adapters(self, candidate: Candidate, latest: bool) -> Content:
        """Reads the adapters that PEFT's names say to be such."""
        findings = list(self._absences(candidate, latest)) if candidate.whole is None else []
        files: dict[str, Weights] = {}
        read: dict[str, Adapter] = {}
        settings: dict[str, Any] = {}
        is_empty = False
        starts: dict[str, Weights] = {}
        tied: dict[str, str] = {}
        sources: dict[str, str] = {}
        moved: dict[str, str] = {}
        for place in candidate.adapters:
            if place.weights is None:
                continue
            try:
                file = read_whole_model(place.weights)
            except UnreadableFile as error:
                findings.append(error.to_finding(self._name(place.weights), candidate.step))
                continue
            if place.weights.name not in WEIGHTS and not is_adapter(file.tensors) and not describe(file.tensors):
                return self._read_dense(candidate, file)  # a numbered file of a whole model
            is_empty |= bool(file.tensors) and not any(info.count for info in file.tensors.values())
            for part in file.parts:
                findings += self._links(part.path, candidate.step)
            adapter, problems, config = self._adapter(place, file, candidate, latest)
            findings += problems
            if adapter is None:
                continue
            if config is not None:
                settings[place.name] = config.settings
            adapter, start, unknown = counted_from_start(adapter, self.initial)
            findings += self._remarks(adapter, place, candidate.step)
            if start is not None:
                message = f"Updates are counted from the initial adapter {shown(start.name)!r}, which was not zero."
                findings += [Finding("OD121", message), *self._links(start.file.path, candidate.step)]
            moved |= {self._matrix(name, place.name): adapter.moved_start for name in unknown}
            read[place.name] = adapter
            if adapter.products:
                files[place.name] = file
                starts |= {start.file_name: start.file} if start is not None else {}
                pairs = tied_matrices(file, adapter.products)
                tied |= {self._matrix(a, place.name): self._matrix(b, place.name) for a, b in pairs.items()}
                sources |= {self._matrix(name, place.name): one for name, one in adapter.sources.items()}
                sources |= adapter.sources
        products, notes = self._combined({name: read[name] for name in files}, candidate)
        ranks = {self._matrix(name, key): rank for key, one in read.items() for name, rank in one.ranks.items()}
        base = self.base.weights if self.base and any(product.uses_base for product in products.values()) else None
        findings += notes
        return Content(
            products,
            files | starts,
            tuple(findings),
            ranks,
            settings,
            base,
            is_empty,
            tied=tied,
            sources=sources,
            moved=moved,
        )

    def _adapter(
        self, place: AdapterFolder, file: Weights, candidate: Candidate, latest: bool
    ) -> tuple[Adapter | None, list[Finding], AdapterConfig | None]:
        """One adapter, what was found, and its configuration if it is PEFT's."""
        try:
            adapter = self._foreign(place, file)
        except UnreadableFile as error:
            return None, [error.to_finding(self._name(place.config or file.path), candidate.step)], None
        config = None
        if adapter is None:
            answer = self._config(place, file, candidate, latest)
            if isinstance(answer, Finding):
                return None, [answer], None
            config = answer
            trained = of_trained(file)
            adapter = read_adapter(trained, config, self.base, self.budget)
            adapter = replace(adapter, remarks=(*config.remarks, *adapter.remarks))
            if frozen := len(file.tensors) - len(trained.tensors):
                text = f"The file holds the whole model: {frozen} tensors beside the adapter are taken to be frozen."
                adapter = replace(adapter, remarks=(*adapter.remarks, Remark("OD121", text)))
        return adapter, [], config

    def _read_weights(self, candidate: Candidate, path: Path) -> Content:
        """Reads a file whose name says nothing of adapters: its tensors say what it is."""
        try:
            weights = read_whole_model(path)
        except UnreadableFile as error:
            finding = error.to_finding(self._name(path), candidate.step)
            if path.suffix in _TORCH and error.code == "OD101":
                finding = replace(finding, remedy=remedy_for(NESTED, path, self.run, candidate.step))
            return Content(findings=(finding, *other_weights(candidate.folder, self.run, candidate.step)))
        if not is_adapter(weights.tensors):
            return self._read_dense(candidate, weights)
        place = AdapterFolder(DEFAULT, path.parent, path, candidate.config)
        return self._read_adapters(replace(candidate, adapters=(place,), whole=None), latest=False)

    def _read_dense(self, candidate: Candidate, weights: Weights) -> Content:
        """Sorts the tensors of a whole model, or of a part of one."""
        path, step = weights.path, candidate.step
        name = self._name(path)
        findings = [finding for part in weights.parts for finding in self._links(part.path, step)]
        if (what := describe(weights.tensors)) is not None:
            remedy = "Pass a run of PEFT LoRA adapters, or of whole models."
            message = f"It is {what}, which is not analysed."
            return Content(findings=(*findings, Finding("OD103", message, remedy, file=name, step=step)))
        if any(parse_key(key) for key in weights.tensors):
            message = "It holds LoRA factors among the weights of a whole model: what its matrices are is not known."
            remedy = "Save the adapter alone (PEFT's save_pretrained), or merge it before saving."
            return Content(findings=(*findings, Finding("OD103", message, remedy, file=name, step=step)))
        if has_stacked_layers(weights.tensors):
            message = f"It is {MEGATRON.title}; this format is not read."
            return Content(findings=(*findings, Finding("OD127", message, MEGATRON.remedy, file=name, step=step)))
        held = read_dense(weights)
        if not held.products and not held.refused:
            message = f"Expected weight matrices, got {len(weights.tensors)} other tensors."
            return Content(
                findings=(*findings, Finding("OD106", message, "Save the model again.", file=name, step=step))
            )
        findings += self._refusals(held.refused, name, step)
        if held.beside:
            findings.append(_beside(held.beside, name, step))
        if candidate.config is not None:
            message = f"{CONFIG} belongs to no weights here: the file holds a model, no adapter. It was not used."
            findings.append(Finding("OD125", message, file=self._name(candidate.config), step=step))
        products = {matrix: under(DEFAULT, product) for matrix, product in held.products.items() if self.watch(matrix)}
        ranks = dict.fromkeys((*held.products, *held.refused), 0)
        tied = tied_matrices(weights, products)
        said = [ties_embeddings(folder) for folder in dict.fromkeys((path.parent, candidate.folder))]
        ties_head = next((one for one in said if one is not None), None)
        files: dict[str, Weights] = {DEFAULT: weights} if products else {}
        return Content(products, files, tuple(findings), ranks, tied=tied, ties_head=ties_head)

    def _instead(self, adapters: Content, weights: Content, candidate: Candidate) -> Content:
        """What was read in place of an adapter of which nothing can be analysed."""
        place = next((place for place in candidate.adapters if place.weights is not None), None)
        assert candidate.whole is not None
        if place is None or place.weights is None or not weights.products:
            return replace(weights, findings=(*adapters.findings, *weights.findings))
        message = (
            f"Nothing of it can be analysed ({_reason(adapters.findings)}); {self._name(candidate.whole)} beside it "
            "was read instead."
        )
        note = Finding("OD126", message, file=self._name(place.weights), step=candidate.step)
        return replace(weights, findings=(note, *weights.findings))

    def _read_beside(self, candidate: Candidate, content: Content, paths: Sequence[Path]) -> Content:
        """Reads further weights in the same folder, against the base; without it names them."""
        products, files, findings = dict(content.products), dict(content.files), list(content.findings)
        for path in paths:
            file, step = self._name(path), candidate.step
            try:
                weights = read_whole_model(path)
            except UnreadableFile as error:
                message = f"Further weights in this file may be trained; it is not read: {error.problem}"
                findings.append(Finding("OD128", message, error.remedy, file=file, step=step))
                continue
            kind = beside_kind(path, weights.tensors, content.products)
            if kind is not None:
                message = f"It is {kind} beside what was analysed; it is left out."
                remedy = f"To analyse it, put it into OTHER/checkpoint-{step}, for each step; pass OTHER."
                findings.append(Finding("OD126", message, remedy, file=file, step=step))
                continue
            saved = saved_modules({SAVED[1]: tuple(weights.tensors)}, weights.tensors, taken=products)
            if self.base is None and any(product.shape.holds == "update" for product in content.products.values()):
                findings.append(_trained(weights.tensors, saved, file, step))
                continue
            findings += self._links(path, step)
            further = {name: under(path.name, product) for name, product in saved.products.items() if self.watch(name)}
            products |= further
            if further:
                files[path.name] = weights
            rest = tuple(key for key in weights.tensors if key not in saved.keys)
            if rest:
                findings.append(_beside({SAVED[1]: rest}, file, step))
        return replace(content, products=products, files=files, findings=tuple(findings))

    def _others(self, candidate: Candidate) -> Iterator[Finding]:
        """A note for folders below the checkpoint that hold further weights."""
        if candidate.others:
            names = [shown_path(path, candidate.folder) for path in candidate.others]
            message = f"It holds further weights in {some(names)}, which are left out."
            remedy = (
                f"To analyse one of them, put it into OTHER/checkpoint-{candidate.step}, for each step; pass OTHER."
            )
            file = self._name(candidate.folder) if candidate.folder != self.run else ""
            yield Finding("OD126", message, remedy, file=file, step=candidate.step, evidence={"folders": names})

    def _name(self, path: Path) -> str:
        return shown_path(path, self.run)

    def _matrix(self, name: str, adapter: str) -> str:
        return _at(name, adapter) if len(self.adapters) > 1 else name

    def _absences(self, candidate: Candidate, latest: bool) -> Iterator[Finding]:
        """Findings for what a checkpoint should hold and does not."""
        where, step = self._name(candidate.folder) if candidate.folder != self.run else "", candidate.step
        for place in candidate.adapters:
            if place.weights is None:
                if unread := other_weights(place.folder, self.run, step):
                    yield from unread
                    continue
                message = f"It has {CONFIG} but no weights (adapter_model.safetensors or .bin)."
                remedy = "Restore the weights, or remove the folder."
                name = self._name(place.folder) if place.folder != self.run else CONFIG
                yield Finding("OD106", message, remedy, file=name, step=step)
        if candidate.adapters:
            return
        others = other_weights(candidate.folder, self.run, step)
        if others:
            yield from others
        elif latest:
            message = "It holds no weights and no trainer_state.json: it may still be being written."
            yield Finding("OD118", message, "Analyse the run again when it is saved.", file=where, step=step)
        else:
            message = "It holds no weights (adapter_model.safetensors or .bin)."
            yield Finding("OD106", message, "Restore the weights, or remove the folder.", file=where, step=step)

    def _foreign(self, place: AdapterFolder, file: Weights) -> Adapter | None:
        """An adapter that PEFT did not write; ``None`` if it did, or if it is of a kind that is not read."""
        content = None if place.config is None else read_json(place.config, "OD102")
        scale = trainer_scale(file.tensors, content, file.path.parent)
        if isinstance(scale, Refusal):
            return Adapter(refusal=scale)
        if scale is not None:
            adapter = read_foreign(file, scale, is_transposed=content is not None and is_mlx_vlm(content))
            if content is not None and is_mlx_vlm(content):
                adapter = replace(adapter, remarks=(*adapter.remarks, Remark("OD121", _RANDOM_START)))
            return adapter
        # A configuration beside PEFT's own names belongs to the file, beside a file of another name it may be stray.
        is_peft = file.path.name in WEIGHTS or any(parse_key(key) for key in file.tensors)
        is_peft &= file.path.name != DIFFUSERS
        return read_foreign(file) if is_readable(file.tensors) and not (is_peft and content is not None) else None

    def _config(
        self, place: AdapterFolder, file: Weights, candidate: Candidate, latest: bool
    ) -> AdapterConfig | Finding:
        if place.config is not None:
            try:
                return read_adapter_config(place.config, has_base=self.base is not None)
            except UnreadableFile as error:
                return error.to_finding(self._name(place.config), candidate.step)
        name = self._name(file.path)
        what = describe(file.tensors)
        if what is not None:
            message = f"It is {what}, which is not analysed, and there is no {CONFIG}."
            return Finding("OD103", message, "Pass a run of PEFT LoRA adapters.", file=name, step=candidate.step)
        if latest:
            message = f"There is no {CONFIG} beside it yet: the checkpoint may still be being written."
            return Finding("OD118", message, "Analyse the run again when it is saved.", file=name, step=candidate.step)
        message = f"There is no {CONFIG} beside it: rank and scale are unknown."
        remedy = (
            f"Copy {CONFIG} from another checkpoint of the same training, or write one with its r and lora_alpha and "
            '"peft_type": "LORA".'
        )
        return Finding("OD102", message, remedy, file=name, step=candidate.step)

    def _links(self, path: Path, step: int) -> list[Finding]:
        target = path.resolve()
        # A checkpoint folder may itself be a link; what matters is whether the file leaves it.
        if target.is_relative_to(self.run.resolve()) or target.is_relative_to(path.parent.resolve()):
            return []
        message = f"It is a link to {str(target)!r}, outside the run; that file was read."
        return [Finding("OD122", message, file=self._name(path), step=step)]

    def _remarks(self, adapter: Adapter, place: AdapterFolder, step: int) -> Iterator[Finding]:
        assert place.weights is not None
        weights, configuration = self._name(place.weights), self._name(place.config or place.weights)
        if adapter.refusal is not None:
            yield self._refused(adapter.refusal, list(adapter.refused), weights, step)
            return
        for remark in adapter.remarks:
            yield Finding(remark.code, remark.message, file=configuration, step=step)
        yield from self._refusals(adapter.refused, weights, step, place.name)
        if adapter.beside:
            needs_base = self.base is None and any(adapter.beside.get(kind) for kind in SAVED)
            remedies = [_GIVE_BASE if needs_base else "", _MERGE if adapter.beside.get(TOKENS) else ""]
            yield _beside(adapter.beside, weights, step, " ".join(filter(None, remedies)))

    def _refusals(
        self, refused: Mapping[str, Refusal], file: str, step: int, adapter: str = DEFAULT
    ) -> Iterator[Finding]:
        """One finding for each reason, of the matrices that are watched."""
        grouped: dict[Refusal, list[str]] = defaultdict(list)
        for name, refusal in refused.items():
            if self.watch(self._matrix(name, adapter)):
                grouped[refusal].append(name)
        for refusal, names in grouped.items():
            yield self._refused(refusal, names, file, step)

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
        are_parts = any(map(is_component, self.adapters))
        combined: dict[str, Product] = {}
        for name in sorted(by_matrix, key=natural_order):
            parts = by_matrix[name]
            factored = all(part.shape.rank and part.shape.holds == "update" for part in parts.values())
            if (
                complete
                and factored
                and not are_parts
                and len({(part.shape.out, part.shape.in_) for part in parts.values()}) == 1
            ):
                combined[name] = total(parts)
            combined |= {_at(name, adapter): part for adapter, part in parts.items()}
        adapters = ", ".join(map(shown, self.adapters))
        if are_parts:
            message = f"`matrix@part` is a matrix of one part of the pipeline ({adapters})."
        elif complete:
            message = f"`matrix` is the sum of its adapters ({adapters}): right only where all of them are active."
        else:
            message = f"Adapters ({adapters}) are given one by one; their sum is left out, as one of them was not read."
        note = Finding("OD121", message, step=candidate.step, evidence={"sum": complete})
        return {name: product for name, product in combined.items() if self.watch(name)}, [note]


def _replaces(weights: Content, adapters: Content, candidate: Candidate) -> bool:
    """Whether weights beside an adapter that cannot be analysed stand for it: adapters too, or whole since it is empty.

    A merged model in place of one damaged adapter would be weights among updates.
    """
    if all(place.weights is None for place in candidate.adapters) or adapters.is_empty:
        return True
    return any(product.shape.holds == "update" for product in weights.products.values())


def _reason(findings: Sequence[Finding]) -> str:
    problem = next((finding for finding in findings if finding.severity != "note"), None)
    return "nothing was found" if problem is None else problem.message.rstrip(".")


def _trained(tensors: Mapping[str, TensorInfo], saved: SavedModules, file: str, step: int) -> Finding:
    """A warning for weights outside the adapter."""
    names = list(saved.products)
    matrices = f" ({len(names)} weight matrices: {some([shown(name) for name in names])})" if names else ""
    message = f"Weights beside the adapter are not analysed: {len(tensors)} tensors{matrices}."
    remedy = "Give the base (--base): the matrices of this file are then analysed with its checkpoint."
    evidence = {"matrices": names, "tensors": len(tensors)}
    return Finding("OD128", message, remedy, file=file, step=step, evidence=evidence)


def _at(name: str, adapter: str) -> str:
    """Name of a matrix of one adapter among several."""
    return f"{name}@{shown(adapter)}"


def _beside(beside: Mapping[str, Sequence[str]], file: str, step: int, remedy: str = "") -> Finding:
    counts = {kind: len(keys) for kind, keys in sorted(beside.items())}
    listing = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    keys = [shown(key) for keys in beside.values() for key in keys]
    message = f"{sum(counts.values())} stored tensors are not low-rank updates and are not analysed: {listing}."
    evidence = {"counts": counts, "examples": keys[:6]}
    return Finding("OD109", f"{message} E.g. {some(keys)}.", remedy, file=file, step=step, evidence=evidence)
