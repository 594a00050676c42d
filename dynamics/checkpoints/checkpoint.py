"""One checkpoint folder: its adapters, their matrices and sums, or the weights of a whole model, with findings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.checkpoints.base import Base
from dynamics.checkpoints.candidates import DEFAULT, AdapterFolder, CheckpointFolder, is_component
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Weights, read_json
from dynamics.checkpoints.folders import other_weights
from dynamics.checkpoints.formats import describe, is_adapter, kind_beside, read_adapter
from dynamics.checkpoints.formats.peft import SAVED, TOKENS, WEIGHTS, saved_modules
from dynamics.checkpoints.formats.peft_config import CONFIG, AdapterFile, Budget
from dynamics.checkpoints.formats.transformers import has_stacked_layers, read_dense, read_whole_model, ties_embeddings
from dynamics.checkpoints.formats.unread import MEGATRON, NESTED, remedy_for
from dynamics.checkpoints.initial_adapters import InitialAdapter, counted_from_start
from dynamics.checkpoints.matrices import FileContent, Refusal, StoredMatrix, open_matrices, total
from dynamics.checkpoints.names import natural_order, parse_key, shown, shown_path
from dynamics.checkpoints.ties import Tied, tied_matrices
from dynamics.checkpoints.trajectory import OpenCheckpoint
from dynamics.findings import Finding
from dynamics.text import counted, some

_GIVE_BASE = "Give the base (--base) to analyse those of them that are weight matrices."
_PUT_ELSEWHERE = "To analyse {}, put it into OTHER/checkpoint-{}, for each step; pass OTHER."
_MERGE = "To analyse trained tokens, merge the adapter (merge_and_unload) and analyse the merged model with its base."


@dataclass(frozen=True)
class CheckpointContent:
    """What one checkpoint folder holds.

    Args:
        matrices: Name to matrix, in the model's order; empty if nothing is analysed.
        files: Name of the adapter to its weights; of a whole model ``default`` to its weights.
        findings: What its reader noticed.
        ranks: Rank of each matrix with factors, refused ones included: evidence of which training it is.
        settings: Adapter name to what distinguishes its configuration.
        base: The base's weights, if some matrices are made with them (DoRA).
        is_empty: Whether a file's tensors have no elements: they were not gathered before saving.
        tied: Name of each dense matrix that repeats another one's numbers, to that other one.
        ties_head: Whether the output layer is the input embedding if it is not saved; ``None`` if unknown.
        sources: Name of the matrix to the base's name of it, if layers are repeated.
        moved: Name of each matrix whose start is unknown to the initialisation that moved a part of the base into it.
    """

    matrices: Mapping[str, StoredMatrix] = field(default_factory=dict)
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
        """Open the weight files; matrices can be read until the context closes.

        A file that has gone or changed since its header was read shows on access, as an
        ``UnreadableMatrix``: the other adapters of the checkpoint can still be read.
        """
        files = [*self.files.values(), *(() if self.base is None else (self.base,))]
        with open_matrices(self.matrices, files) as opened:
            yield opened


@dataclass(frozen=True)
class CheckpointReader:
    """Reads the checkpoints of one run.

    Args:
        run: The run's folder; files in findings are relative to it.
        adapters: Names of all adapters of the run; with several, matrices are ``matrix@adapter``.
        watch: Whether a matrix is analysed, by its name.
        base: The weights before training, if they were given.
        initial: Adapters that may be the start of this training.
        budget: What matching the patterns of all configurations may cost.
    """

    run: Path
    adapters: Sequence[str]
    watch: Callable[[str], bool]
    base: Base | None = None
    initial: Sequence[InitialAdapter] = ()
    budget: Budget = field(default_factory=Budget)

    def read(self, checkpoint: CheckpointFolder, latest: bool = False) -> CheckpointContent:
        """Read headers and configurations of one checkpoint folder.

        Args:
            checkpoint: The folder.
            latest: Whether it is the run's last checkpoint, which may still be being written.
        """
        content = self._read_adapters(checkpoint, latest)
        beside = list(checkpoint.beside)
        if content.is_empty:
            unread = other_weights(checkpoint.folder, self.run, checkpoint.step)
            content = replace(content, findings=(*content.findings, *unread))
        if checkpoint.whole is not None:
            weights = None if content.matrices else self._read_weights(checkpoint, checkpoint.whole)
            if weights is not None and _replaces(weights, content, checkpoint):
                content = self._instead(content, weights, checkpoint)
            else:
                beside.insert(0, checkpoint.whole)
        if not content.matrices:
            return content
        content = self._read_beside(checkpoint, content, beside)
        return replace(content, findings=(*content.findings, *self._others(checkpoint)))

    def _read_adapters(self, checkpoint: CheckpointFolder, latest: bool) -> CheckpointContent:
        """Read the adapters that PEFT's names say to be such."""
        findings = list(self._absences(checkpoint, latest)) if checkpoint.whole is None else []
        files: dict[str, Weights] = {}
        starts: dict[str, Weights] = {}
        contents: dict[str, FileContent] = {}
        is_empty = False
        tied: dict[str, str] = {}
        sources: dict[str, str] = {}
        moved: dict[str, str] = {}
        for adapter in checkpoint.adapters:
            if adapter.weights is None:
                continue
            try:
                file = read_whole_model(adapter.weights)
            except UnreadableFile as error:
                findings.append(error.to_finding(self._name(adapter.weights), checkpoint.step))
                continue
            if adapter.weights.name not in WEIGHTS and not is_adapter(file.tensors) and not describe(file.tensors):
                return self._read_dense(checkpoint, file)  # a numbered file of a whole model
            is_empty |= bool(file.tensors) and not any(info.count for info in file.tensors.values())
            for part in file.parts:
                findings += self._links(part.path, checkpoint.step)
            content = self._read_adapter(adapter, file, checkpoint.step, latest)
            if isinstance(content, Finding):
                findings.append(content)
                continue
            content, start, unknown = counted_from_start(content, self.initial)
            findings += self._remarks(content, adapter, checkpoint.step)
            if start is not None:
                message = f"Updates are counted from the initial adapter {shown(start.name)!r}, which was not zero."
                findings += [Finding("OD121", message), *self._links(start.file.path, checkpoint.step)]
            name_in_run = partial(self._matrix, adapter=adapter.name)
            moved |= {name_in_run(name): content.moved_start for name in unknown}
            contents[adapter.name] = content
            if content.readable:
                files[adapter.name] = file
                starts |= {start.file_name: start.file} if start is not None else {}
                pairs = tied_matrices(file, content.readable)
                tied |= {name_in_run(name): name_in_run(first) for name, first in pairs.items()}
                sources |= {name_in_run(name): source for name, source in content.sources.items()}
                sources |= content.sources
        matrices, notes = self._combined({name: contents[name] for name in files}, checkpoint)
        ranks = {
            self._matrix(name, adapter): rank
            for adapter, content in contents.items()
            for name, rank in content.ranks.items()
        }
        settings = {name: content.settings for name, content in contents.items() if content.settings}
        base = None if self.base is None else self.base.weights
        if base is not None and not any(matrix.reads(base.path) for matrix in matrices.values()):
            base = None
        findings, files = [*findings, *notes], files | starts
        return CheckpointContent(
            matrices, files, tuple(findings), ranks, settings, base, is_empty, tied=tied, sources=sources, moved=moved
        )

    def _read_adapter(self, adapter: AdapterFolder, file: Weights, step: int, latest: bool) -> FileContent | Finding:
        """Return the content of one adapter file, or why there is none."""
        try:
            config = None if adapter.config is None else read_json(adapter.config, "OD102")
            content = read_adapter(AdapterFile(file, config, self.base, self.budget))
        except UnreadableFile as error:
            return error.to_finding(self._name(adapter.config or file.path), step)
        if content is not None:
            return content
        name = self._name(file.path)
        if (title := describe(file.tensors)) is not None:
            message = f"It is {title}, which is not analysed, and there is no {CONFIG}."
            return Finding("OD103", message, "Pass a run of PEFT LoRA adapters.", file=name, step=step)
        if latest:
            message = f"There is no {CONFIG} beside it yet: the checkpoint may still be being written."
            return Finding("OD118", message, "Analyse the run again when it is saved.", file=name, step=step)
        message = f"There is no {CONFIG} beside it: rank and scale are unknown."
        remedy = f'Copy {CONFIG} of the same training, or write one with its r, its lora_alpha and "peft_type": "LORA".'
        return Finding("OD102", message, remedy, file=name, step=step)

    def _combined(
        self, contents: Mapping[str, FileContent], checkpoint: CheckpointFolder
    ) -> tuple[dict[str, StoredMatrix], list[Finding]]:
        """Return the matrices of one or several adapters under the names of the run, sums included."""
        if len(self.adapters) == 1:
            matrices = next((content.readable for content in contents.values()), {})
            return {name: matrix for name, matrix in matrices.items() if self.watch(name)}, []
        by_name: dict[str, dict[str, StoredMatrix]] = defaultdict(dict)
        for adapter, content in contents.items():
            for name, matrix in content.readable.items():
                by_name[name][adapter] = matrix
        are_components = any(map(is_component, self.adapters))
        is_complete = set(contents) == {adapter.name for adapter in checkpoint.adapters}
        is_complete &= not any(content.refused for content in contents.values())
        matrices = {}
        for name in sorted(by_name, key=natural_order):
            parts = by_name[name]
            shapes = [part.shape for part in parts.values()]
            has_sum = all(shape.rank and shape.holds == "update" for shape in shapes)
            has_sum &= len({(shape.out, shape.in_) for shape in shapes}) == 1
            if has_sum and is_complete and not are_components:
                matrices[name] = total(parts)
            matrices |= {self._matrix(name, adapter): part for adapter, part in parts.items()}
        adapters = ", ".join(map(shown, self.adapters))
        if are_components:
            message = f"`matrix@part` is a matrix of one part of the pipeline ({adapters})."
        elif is_complete:
            message = f"`matrix` is the sum of its adapters ({adapters}): right only if all of them are active."
        else:
            message = f"Adapters ({adapters}) are given one by one, without their sum: one of them was not read."
        note = Finding("OD121", message, step=checkpoint.step, evidence={"sum": is_complete})
        return {name: matrix for name, matrix in matrices.items() if self.watch(name)}, [note]

    def _read_weights(self, checkpoint: CheckpointFolder, path: Path) -> CheckpointContent:
        """Read a file whose name says nothing of adapters: its tensors decide what it is."""
        try:
            weights = read_whole_model(path)
        except UnreadableFile as error:
            finding = error.to_finding(self._name(path), checkpoint.step)
            if path.suffix in (".bin", ".pt", ".pth") and error.code == "OD101":
                finding = replace(finding, remedy=remedy_for(NESTED, path, self.run, checkpoint.step))
            unread = other_weights(checkpoint.folder, self.run, checkpoint.step)
            return CheckpointContent(findings=(finding, *unread))
        if not is_adapter(weights.tensors):
            return self._read_dense(checkpoint, weights)
        adapter = AdapterFolder(DEFAULT, path.parent, path, checkpoint.config)
        return self._read_adapters(replace(checkpoint, adapters=(adapter,), whole=None), latest=False)

    def _read_dense(self, checkpoint: CheckpointFolder, weights: Weights) -> CheckpointContent:
        """Sort the tensors of a whole model, or of a part of one."""
        path, step = weights.path, checkpoint.step
        name = self._name(path)
        findings = [finding for part in weights.parts for finding in self._links(part.path, step)]
        content = read_dense(weights)
        refusal = _not_a_model(weights, content)
        if refusal is not None:
            finding = Finding(refusal.code, refusal.reason, refusal.remedy, file=name, step=step)
            return CheckpointContent(findings=(*findings, finding))
        findings += self._refusals(content.refused, name, step)
        if content.beside:
            findings.append(_beside(content.beside, name, step))
        if checkpoint.config is not None:
            message = "It was not used: the weights beside it are a model, not an adapter."
            findings.append(Finding("OD125", message, file=self._name(checkpoint.config), step=step))
        matrices = {name: matrix for name, matrix in content.readable.items() if self.watch(name)}
        return CheckpointContent(
            matrices,
            {DEFAULT: weights} if matrices else {},
            tuple(findings),
            ranks=dict.fromkeys((*content.readable, *content.refused), 0),
            tied=tied_matrices(weights, matrices),
            ties_head=ties_embeddings(path.parent, checkpoint.folder),
        )

    def _instead(
        self, adapters: CheckpointContent, weights: CheckpointContent, checkpoint: CheckpointFolder
    ) -> CheckpointContent:
        """Return what was read in place of an adapter of which nothing can be analysed."""
        file = next((adapter.weights for adapter in checkpoint.adapters if adapter.weights is not None), None)
        if file is None or checkpoint.whole is None or not weights.matrices:
            return replace(weights, findings=(*adapters.findings, *weights.findings))
        problem = next((finding for finding in adapters.findings if finding.severity != "note"), None)
        reason = "it holds no matrix" if problem is None else problem.message.rstrip(".")
        message = (
            f"Nothing in it can be analysed ({reason}); {self._name(checkpoint.whole)} beside it was read instead."
        )
        note = Finding("OD126", message, file=self._name(file), step=checkpoint.step)
        return replace(weights, findings=(note, *weights.findings))

    def _read_beside(
        self, checkpoint: CheckpointFolder, content: CheckpointContent, paths: Sequence[Path]
    ) -> CheckpointContent:
        """Read further weights in the same folder if there is a base; otherwise name them."""
        matrices, files, findings = dict(content.matrices), dict(content.files), list(content.findings)
        needs_base = self.base is None and any(matrix.shape.holds == "update" for matrix in matrices.values())
        for path in paths:
            file, step = self._name(path), checkpoint.step
            try:
                weights = read_whole_model(path)
            except UnreadableFile as error:
                message = f"Further weights in this file may be trained; it is not read: {error.problem}"
                findings.append(Finding("OD128", message, error.remedy, file=file, step=step))
                continue
            kind = kind_beside(path, weights.tensors, content.matrices)
            if kind is not None:
                message = f"It is {kind} beside the analysed weights; it is left out."
                findings.append(Finding("OD126", message, _PUT_ELSEWHERE.format("it", step), file=file, step=step))
                continue
            saved, read = saved_modules(weights, {SAVED[1]: tuple(weights.tensors)}, taken=matrices)
            if needs_base:
                findings.append(_trained(len(weights.tensors), list(saved), file, step))
                continue
            findings += self._links(path, step)
            further = {name: matrix for name, matrix in saved.items() if self.watch(name)}
            matrices |= further
            files |= {path.name: weights} if further else {}
            rest = tuple(key for key in weights.tensors if key not in read)
            if rest:
                findings.append(_beside({SAVED[1]: rest}, file, step))
        return replace(content, matrices=matrices, files=files, findings=tuple(findings))

    def _others(self, checkpoint: CheckpointFolder) -> Iterator[Finding]:
        """Yield a note about folders below the checkpoint that hold further weights."""
        if checkpoint.others:
            names = [shown_path(path, checkpoint.folder) for path in checkpoint.others]
            message = f"It holds further weights in {some(names)}, which are left out."
            remedy = _PUT_ELSEWHERE.format("one of them", checkpoint.step)
            file, evidence = self._file_of(checkpoint), {"folders": names}
            yield Finding("OD126", message, remedy, file=file, step=checkpoint.step, evidence=evidence)

    def _name(self, path: Path) -> str:
        return shown_path(path, self.run)

    def _file_of(self, checkpoint: CheckpointFolder) -> str:
        return self._name(checkpoint.folder) if checkpoint.folder != self.run else ""

    def _matrix(self, name: str, adapter: str) -> str:
        """Return the name in the run of a matrix of one adapter."""
        return f"{name}@{shown(adapter)}" if len(self.adapters) > 1 else name

    def _absences(self, checkpoint: CheckpointFolder, latest: bool) -> Iterator[Finding]:
        """Yield findings about what a checkpoint should hold and does not."""
        step = checkpoint.step
        for adapter in checkpoint.adapters:
            if adapter.weights is None:
                if unread := other_weights(adapter.folder, self.run, step):
                    yield from unread
                    continue
                message = f"It has {CONFIG} but no weights (adapter_model.safetensors or .bin)."
                file = self._name(adapter.folder) if adapter.folder != self.run else CONFIG
                yield Finding("OD106", message, "Restore the weights, or remove the folder.", file=file, step=step)
        if checkpoint.adapters:
            return
        file = self._file_of(checkpoint)
        if unread := other_weights(checkpoint.folder, self.run, step):
            yield from unread
        elif latest:
            message = "It holds no weights and no trainer_state.json: it may still be being written."
            yield Finding("OD118", message, "Analyse the run again when it is saved.", file=file, step=step)
        else:
            message = "It holds no weights (adapter_model.safetensors or .bin)."
            yield Finding("OD106", message, "Restore the weights, or remove the folder.", file=file, step=step)

    def _links(self, path: Path, step: int) -> list[Finding]:
        target = path.resolve()
        # A checkpoint folder may itself be a link; what matters is whether the file leaves it.
        if target.is_relative_to(self.run.resolve()) or target.is_relative_to(path.parent.resolve()):
            return []
        message = f"It is a link to {str(target)!r}, outside the run; that file was read."
        return [Finding("OD122", message, file=self._name(path), step=step)]

    def _remarks(self, content: FileContent, adapter: AdapterFolder, step: int) -> Iterator[Finding]:
        assert adapter.weights is not None
        weights, config = self._name(adapter.weights), self._name(adapter.config or adapter.weights)
        if content.refusal is not None:
            yield _refused(content.refusal, list(content.refused), weights, step)
            return
        for remark in content.remarks:
            yield Finding(remark.code, remark.message, file=config, step=step)
        yield from self._refusals(content.refused, weights, step, adapter.name)
        if content.beside:
            needs_base = self.base is None and any(content.beside.get(kind) for kind in SAVED)
            remedies = [_GIVE_BASE if needs_base else "", _MERGE if content.beside.get(TOKENS) else ""]
            yield _beside(content.beside, weights, step, " ".join(filter(None, remedies)))

    def _refusals(
        self, refused: Mapping[str, Refusal], file: str, step: int, adapter: str = DEFAULT
    ) -> Iterator[Finding]:
        """Yield one finding for each reason, about the matrices that are watched."""
        grouped: dict[Refusal, list[str]] = defaultdict(list)
        for name, refusal in refused.items():
            if self.watch(self._matrix(name, adapter)):
                grouped[refusal].append(name)
        for refusal, names in grouped.items():
            yield _refused(refusal, names, file, step)


def _replaces(weights: CheckpointContent, adapters: CheckpointContent, checkpoint: CheckpointFolder) -> bool:
    """Return whether weights beside an adapter that cannot be analysed stand for it.

    A merged model in place of one damaged adapter would be weights among updates; an empty adapter has no other.
    """
    if all(adapter.weights is None for adapter in checkpoint.adapters) or adapters.is_empty:
        return True
    return any(matrix.shape.holds == "update" for matrix in weights.matrices.values())


def _not_a_model(weights: Weights, content: FileContent) -> Refusal | None:
    """Return why a file's tensors are not those of a whole model, if so."""
    if (title := describe(weights.tensors)) is not None:
        remedy = "Pass a run of PEFT LoRA adapters, or of whole models."
        return Refusal("OD103", f"It is {title}, which is not analysed.", remedy)
    if any(parse_key(key) for key in weights.tensors):
        reason = "It holds LoRA factors among the weights of a whole model, so its matrices are unknown."
        return Refusal("OD103", reason, "Save the adapter alone (PEFT's save_pretrained), or merge it before saving.")
    if has_stacked_layers(weights.tensors):
        return Refusal("OD127", f"It is {MEGATRON.title}; this format is not read.", MEGATRON.remedy)
    if not content.matrices:
        reason = f"Expected weight matrices, got {len(weights.tensors)} other tensors."
        return Refusal("OD106", reason, "Save the model again.")
    return None


def _refused(refusal: Refusal, names: Sequence[str], file: str, step: int) -> Finding:
    names = sorted(names, key=natural_order)
    matrix = names[0] if len(names) == 1 else ""
    message = f"{refusal.reason} {len(names)} matrices: {some(names)}." if len(names) > 1 else refusal.reason
    return Finding(refusal.code, message, refusal.remedy, file, matrix, step, evidence={"matrices": names})


def _trained(tensors: int, matrices: Sequence[str], file: str, step: int) -> Finding:
    """Return a warning about weights outside the adapter."""
    number = counted(len(matrices), "weight matrix", "weight matrices")
    listing = f" ({number}: {some(map(shown, matrices))})" if matrices else ""
    message = f"Weights beside the adapter are not analysed: {counted(tensors, 'tensor')}{listing}."
    remedy = "Give the base (--base) to analyse the matrices of this file with its checkpoint."
    evidence = {"matrices": list(matrices), "tensors": tensors}
    return Finding("OD128", message, remedy, file=file, step=step, evidence=evidence)


def _beside(beside: Mapping[str, Sequence[str]], file: str, step: int, remedy: str = "") -> Finding:
    counts = {kind: len(keys) for kind, keys in sorted(beside.items())}
    keys = [shown(key) for keys in beside.values() for key in keys]
    listing = ", ".join(f"{kind}: {count:,}" for kind, count in counts.items())
    message = f"Not analysed: {counted(len(keys), 'stored tensor')}, {some(keys)} ({listing})."
    evidence = {"counts": counts, "examples": keys[:6]}
    return Finding("OD109", message, remedy, file=file, step=step, evidence=evidence)
