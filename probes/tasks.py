"""Tasks: held-out samples whose gradients, losses and scores are measured, each with its group.

A group is what clusters samples: several questions about one image are not independent samples. Equal group names in
two tasks mean the same group: the same image may carry both tasks' annotations.

Batches know how the losses of their samples are measured; halves of the samples share no group, so that a choice on one
can be measured on the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils.data import Subset

from probes.collation import kind, longest, pad_and_stack, tensors
from probes.losses import IGNORED, predicts_next, token_losses
from probes.overlap import overlapping

#: What names a sample, or its group: a key of the sample, one name for each sample, or a function of the sample.
Naming = str | Collection[Any] | Callable[[Any], Any] | None


@dataclass(frozen=True, eq=False)
class Task:
    """Held-out samples of one task, and how to measure a model on them.

    Args:
        name: Of the task.
        samples: Any map-style data set: a list of dicts, a Hugging Face data set, a torch data set. Reading a sample
            twice must give the same sample.
        loss: ``"sum"`` (default) or ``"mean"`` of the model's own cross-entropy over a sample's tokens, padding and
            labels of −100 left out, or a function (model, batch) → losses ``[samples in the batch]``. The sum is
            nearest to what the Trainer minimises, the mean over all tokens of a step.
        score: A function (model, batch) → values ``[samples in the batch]`` whose mean is the score; by default the
            negative mean loss per token.
        group: What each sample belongs to (its image, patient, document): a key of the samples, one name a sample, or
            a function of the sample. By default each sample is a group of its own.
        sample_id: What each sample is called, likewise; by default ``name/number``.
        collate: Makes a batch, a dict as the model takes it, from a list of samples. By default sequences are padded,
            everything else is stacked (:func:`probes.collation.pad_and_stack`), and text and the keys named by
            ``group`` and ``sample_id`` are left out.
        batch_size: Samples a batch.
        higher_is_better: Which way ``score`` points; ``None`` if unknown. The default score is better when higher.
        retained: Whether these are samples of what the base model could do (general text, old tasks): training is not
            meant to improve them, and a rise of their loss is what it forgot.

    Raises:
        ValueError: If one of these is not as described.

    >>> task = Task(
    ...     "vqa", [{"input_ids": [1, 2], "image": "a.png"}, {"input_ids": [3], "image": "a.png"}], group="image"
    ... )
    >>> task.sample_ids(), task.groups()
    (['vqa/0', 'vqa/1'], ['a.png', 'a.png'])
    >>> next(iter(task.batches()))["attention_mask"].tolist()
    [[1, 1], [1, 0]]
    """

    name: str
    samples: Any = field(repr=False)
    loss: str | PerSample | None = None
    score: PerSample | None = None
    group: Naming = field(default=None, repr=False)
    sample_id: Naming = field(default=None, repr=False)
    collate: Callable[[list[Any]], Any] | None = None
    batch_size: int = 8
    higher_is_better: bool | None = None
    retained: bool = False

    def __post_init__(self) -> None:
        if not self.name or self.name == "all":
            raise ValueError(f"Expected a name for the task, got {self.name!r} ('all' stands for all tasks together).")
        if not (hasattr(self.samples, "__len__") and hasattr(self.samples, "__getitem__")):
            raise ValueError(
                f"{self}: expected samples that can be read by number, got {type(self.samples).__name__}. "
                "Take some of a stream first: list(itertools.islice(stream, 64))."
            )
        if isinstance(self.samples, Mapping):
            raise ValueError(f"{self}: expected a data set or list of samples, got one {type(self.samples).__name__}.")
        if len(self.samples) == 0:
            raise ValueError(f"{self}: expected at least one sample, got none.")
        if isinstance(self.loss, str) and self.loss not in ("sum", "mean"):
            raise ValueError(f"{self}: expected loss 'sum', 'mean' or a function, got {self.loss!r}.")
        if self.batch_size < 1:
            raise ValueError(f"{self}: expected batch_size of at least 1, got {self.batch_size}.")
        for what, naming in (("group", self.group), ("sample_id", self.sample_id)):
            if not (naming is None or isinstance(naming, str) or callable(naming)) and len(naming) != len(self):
                raise ValueError(f"{self}: expected one {what} for each of {len(self)} samples, got {len(naming)}.")
        if self.score is None and self.higher_is_better is False:
            raise ValueError(f"{self}: the default score is better when higher. Leave higher_is_better out.")
        if not isinstance(self.retained, bool):
            raise ValueError(f"{self}: expected retained to be True or False, got {self.retained!r}.")

    def __str__(self) -> str:
        return f"Task {self.name!r}"

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def sample_ids(self) -> list[str]:
        """Return the name of each sample."""
        return self._names("sample_id", self.sample_id, [f"{self.name}/{number}" for number in range(len(self))])

    def groups(self) -> list[str]:
        """Return the name of each sample's group."""
        return self._names("group", self.group, None)

    def batches(self) -> Iterator[ProbeBatch]:
        """Yield the samples in order, on the host.

        Raises:
            ValueError: If samples cannot be put into a batch.
        """
        return _batches((self,), None)

    def losses(self, model: nn.Module, batch: Any) -> Shaped[Tensor, " sample"]:
        """Return the loss of each sample in a batch.

        Raises:
            ValueError: If the task's own function returns anything but one number a sample.
        """
        if callable(self.loss):
            return one_each(self.loss(model, batch), getattr(batch, "samples", None), f"{self}: loss(model, batch)")
        return token_losses(model, batch, reduction=self.loss or "sum")

    def refuse_overlap(self, training: Any) -> int:
        """Raise if probe samples are also in the training set, as far as their content tells.

        Samples are compared under the keys that both sides have. Gradients of samples that were trained on are not
        those of the population: an update lies along them by construction.

        Args:
            training: The training set, map-style or a stream, which is read once.

        Returns:
            How many training samples were compared; 0 if there was nothing in common by which to compare them.

        Raises:
            ValueError: How many samples overlap, and which is the first.
        """
        matches, compared = overlapping(self.samples, training, leave_out=self._keys_not_for_the_model())
        if matches:
            first = next(iter(matches))
            raise ValueError(
                f"{self}: expected held-out samples, got {len(matches)} of {len(self)} that are also in the "
                f"training set, first {self.sample_ids()[first]!r} "
                f"(training sample {matches[first]}). Probe samples that are not trained on."
            )
        return compared

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return one sample as the default collation takes it.

        Raises:
            ValueError: If the sample is no dict of numbers and text.
        """
        try:
            return tensors(self.samples[number], self._keys_not_for_the_model())
        except ValueError as error:
            raise ValueError(f"{self}, sample {number}: {error}") from error

    def _keys_not_for_the_model(self) -> list[str]:
        return [naming for naming in (self.group, self.sample_id) if isinstance(naming, str)]

    def _names(self, what: str, naming: Naming, default: list[str] | None) -> list[str]:
        if naming is None:
            return self.sample_ids() if default is None else default
        if not (isinstance(naming, str) or callable(naming)):
            return [_text(value) for value in naming]
        return [_text(self._named(what, naming, number)) for number in range(len(self))]

    def _named(self, what: str, naming: str | Callable[[Any], Any], number: int) -> Any:
        sample = self.samples[number]
        if callable(naming):
            return naming(sample)
        if not isinstance(sample, Mapping) or sample.get(naming) is None:
            keys = ", ".join(map(repr, sample)) if isinstance(sample, Mapping) else type(sample).__name__
            raise ValueError(f"{self}: expected {naming!r} in each sample for {what}, sample {number} has {keys} only.")
        return sample[naming]


@dataclass(frozen=True)
class ProbeBatches:
    """The samples of several tasks in batches; each iteration reads them anew.

    Args:
        parts: Tasks whose samples may share a batch, and the lengths to which their sequences are padded.
    """

    parts: tuple[tuple[tuple[Task, ...], dict[str, int] | None], ...]

    def __iter__(self) -> Iterator[ProbeBatch]:
        """Yield the batches, on the host."""
        return chain.from_iterable(_batches(tasks, lengths) for tasks, lengths in self.parts)


def probe_batches(tasks: Sequence[Task]) -> tuple[ProbeBatches, list[str], list[str], list[str]]:
    """Return the samples of all tasks as one stream of batches, and what each sample is.

    Neighbouring tasks share batches where they have the default collation, the same loss and samples of the same kind
    (keys, formats, shapes; sequences of any length); their sequences are padded to one length. All other tasks have
    batches of their own. Measure the losses with :func:`probe_loss`.

    Returns:
        The batches, and by sample, in their order: its task, its group, its name.

    Raises:
        ValueError: If there are no tasks, two have one name, or samples cannot be put into batches.

    >>> tasks = [Task("a", [{"input_ids": [1]}]), Task("b", [{"input_ids": [2, 3]}])]
    >>> batches, sample_task, sample_group, sample_id = probe_batches(tasks)
    >>> [batch["input_ids"].tolist() for batch in batches]
    [[[1, 0], [2, 3]]]
    >>> sample_task, sample_id
    (['a', 'b'], ['a/0', 'b/0'])
    """
    require_names(tasks)
    runs = [tuple(run) for _, run in groupby(tasks, key=_kind)]
    parts = tuple((run, _lengths(run) if run[0].collate is None else None) for run in runs)
    return (
        ProbeBatches(parts),
        [task.name for task in tasks for _ in range(len(task))],
        [group for task in tasks for group in task.groups()],
        [name for task in tasks for name in task.sample_ids()],
    )


def probe_loss(model: nn.Module, batch: ProbeBatch) -> Shaped[Tensor, " sample"]:
    """Return the loss of each sample in a batch of :func:`probe_batches`, as its task measures it.

    >>> task = Task("x", [{"x": 2.0}], loss=lambda model, batch: model(batch["x"]))
    >>> [probe_loss(nn.Identity(), batch) for batch in probe_batches([task])[0]]
    [tensor([2.])]
    """
    return batch.loss(model, batch)


def subset(task: Task, numbers: Sequence[int]) -> Task:
    """Return a task with some of its samples, in their order.

    Args:
        task: The task.
        numbers: Of the samples, ascending.

    >>> subset(Task("a", [{"x": 1}, {"x": 2}], sample_id=["one", "two"]), [1]).sample_ids()
    ['two']
    """

    def part(naming: Naming, default: list[str] | None) -> Naming:
        if naming is None and default is not None:
            return [default[number] for number in numbers]
        if naming is None or isinstance(naming, str) or callable(naming):
            return naming
        labels = list(naming)
        return [labels[number] for number in numbers]

    names = task.sample_ids() if task.sample_id is None else None
    sample_id = part(task.sample_id, names)
    return replace(task, samples=Subset(task.samples, numbers), group=part(task.group, None), sample_id=sample_id)


def require_names(tasks: Any) -> None:
    """Raise ``ValueError`` if there are no tasks, something else is among them, or two of them have one name.

    >>> require_names([])
    Traceback (most recent call last):
    ValueError: Expected at least one task, got none.
    """
    if not tasks:
        raise ValueError("Expected at least one task, got none.")
    if isinstance(tasks, Task):
        raise ValueError(f"Expected a list of tasks, got the task {tasks.name!r} alone. Pass [task].")
    members = tasks if isinstance(tasks, Iterable) else (tasks,)
    other = next((task for task in members if not isinstance(task, Task)), None)
    if other is not None:
        raise ValueError(
            f"Expected tasks, each a probes.Task, got {type(other).__name__}. Pass [probes.Task(name, samples), …]."
        )
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Expected tasks with different names, got several named {', '.join(map(repr, twice))}.")


def _kind(task: Task) -> object:
    """Return a value that is equal for tasks whose samples may share a batch."""
    if task.collate is not None:
        return id(task)
    return task.loss or "sum", kind(task.tensors(0))


def _lengths(tasks: Sequence[Task]) -> dict[str, int]:
    return longest(task.tensors(number) for task in tasks for number in range(len(task)))


def _batches(tasks: Sequence[Task], lengths: Mapping[str, int] | None) -> Iterator[ProbeBatch]:
    members = [(task, number) for task in tasks for number in range(len(task))]
    size = min(task.batch_size for task in tasks)
    for start in range(0, len(members), size):
        chunk = members[start : start + size]
        yield ProbeBatch(_collated(chunk, lengths), len(chunk), tasks[0].losses)


def _collated(members: Sequence[tuple[Task, int]], lengths: Mapping[str, int] | None) -> Mapping[str, Any]:
    (first, start), (last, end) = members[0], members[-1]
    if first.collate is None:
        samples = [task.tensors(number) for task, number in members]
        try:
            return pad_and_stack(samples, lengths)
        except ValueError as error:
            raise ValueError(f"Batch from {first}, sample {start}, to {last}, sample {end}: {error}") from error
    batch = first.collate([task.samples[number] for task, number in members])
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{first}: expected collate to return a dict as the model takes it, got {type(batch).__name__}."
        )
    return batch


def _text(value: Any) -> str:
    return str(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)


#: Loss, or score, of each sample in a batch.
PerSample = Callable[[nn.Module, Any], Tensor]


class ProbeBatch(dict[str, Any]):
    """A batch as the model takes it, which also knows how its samples' losses are measured.

    Args:
        values: The batch.
        samples: How many samples it holds.
        loss: Their losses, a function (model, batch) → ``[samples]``.
    """

    def __init__(self, values: Mapping[str, Any], samples: int, loss: PerSample) -> None:
        super().__init__(values)
        self.samples = samples
        self.loss = loss

    def to(self, device: torch.device | str) -> ProbeBatch:
        """The batch with its tensors on a device.

        >>> ProbeBatch({"x": torch.ones(2)}, 2, lambda model, batch: batch["x"]).to("meta")["x"].device.type
        'meta'
        """
        moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in self.items()}
        return ProbeBatch(moved, self.samples, self.loss)


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device.

    Raises:
        ValueError: If it is no dict.
    """
    if isinstance(batch, ProbeBatch):
        return batch.to(device)
    if not isinstance(batch, Mapping):
        raise ValueError(f"Expected a batch to be a dict as the model takes it, got {type(batch).__name__}.")
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def some_samples(batch: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """Return some samples of a batch whose tensors all have a row for each.

    >>> some_samples({"input_ids": torch.tensor([[1], [2], [3]])}, [0, 2])["input_ids"].tolist()
    [[1], [3]]
    """
    chosen = {key: value[list(numbers)] for key, value in batch.items()}
    return ProbeBatch(chosen, len(numbers), batch.loss) if isinstance(batch, ProbeBatch) else chosen


def is_text(batch: Mapping[str, Any], samples: int) -> bool:
    """Return whether all that the model is given is one row of tokens, or one number, a sample.

    >>> is_text({"input_ids": torch.ones(2, 3)}, 2), is_text({"pixel_values": torch.ones(2, 3, 4, 4)}, 2)
    (True, False)
    """
    given = [value for value in batch.values() if isinstance(value, Tensor)]
    return all(value.ndim in (1, 2) and value.shape[0] == samples for value in given)


def one_each(values: Any, samples: int | None, what: str) -> Shaped[Tensor, " sample"]:
    """Return the values, if they are one number a sample.

    Args:
        values: What a user's function returned.
        samples: How many samples it was given, ``None`` if unknown.
        what: The function, for the error.

    Raises:
        ValueError: If they are anything else: a mean over the batch would go unnoticed.

    >>> one_each(torch.tensor(3.0), 2, "loss(model, batch)")
    Traceback (most recent call last):
    ValueError: Expected loss(model, batch) to return one number for each of 2 samples, got a tensor of shape (). \
Do not average over the batch.
    """
    if isinstance(values, Tensor) and values.ndim == 1 and (samples is None or len(values) == samples):
        return values
    count = "sample" if samples is None else f"of {samples} samples"
    got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise ValueError(
        f"Expected {what} to return one number for each {count}, got {got}. Do not average over the batch."
    )


def split_by_group(groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[list[int], list[int]]]:
    """Return two halves of each task's samples, about equal in size, such that no group is in both, also across tasks.

    Groups are dealt one by one, those with most samples first, to the half in which their tasks have fewer samples.

    Args:
        groups: By task, the group of each of its samples.

    Returns:
        By task, the numbers of the samples in each half.

    Raises:
        ValueError: If a half of a task would be empty.

    >>> split_by_group({"a": ["x", "y", "y"], "b": ["y", "x"]})
    {'a': ([1, 2], [0]), 'b': ([0], [1])}
    """
    sizes = {task: Counter(names) for task, names in groups.items()}
    total = sum(sizes.values(), Counter())
    half_of: dict[str, int] = {}
    filled = {task: [0.0, 0.0] for task in groups}
    for group, _ in total.most_common():
        # A task with few groups has little choice: it counts for more.
        weight = {task: 1 / (len(names) * names.total()) for task, names in sizes.items() if group in names}
        load = [sum(share * filled[task][half] for task, share in weight.items()) for half in (0, 1)]
        half_of[group] = int(load[1] < load[0])
        for task in weight:
            filled[task][half_of[group]] += sizes[task][group]
    halves = {
        task: tuple([number for number, group in enumerate(names) if half_of[group] == half] for half in (0, 1))
        for task, names in groups.items()
    }
    for task, (first, second) in halves.items():
        if not first or not second:
            raise ValueError(
                f"Task {task!r}: expected samples in at least two groups, so that a step on one half can be "
                f"measured on the other, got {len(sizes[task])} "
                f"({', '.join(map(repr, list(sizes[task])[:3]))}), all in one half."
            )
    return {task: (first, second) for task, (first, second) in halves.items()}


@torch.no_grad()
def with_sampled_labels(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
    """Return the batch with each label that counts replaced by a draw from the model's softmax at its position.

    Inputs stay as they are: every token is drawn given the data's own prefix, so with losses summed over tokens the
    mean over draws is the token-level Fisher (Kunstner, Balles & Hennig 2019).

    Args:
        model: In evaluation mode.
        batch: With integer ``labels``.
        generator: On the host; the same seed gives the same labels on every device.

    Raises:
        ValueError: If the batch has no labels, or a task's own loss, for which nothing can be drawn.
    """
    loss = getattr(batch, "loss", None)
    task = getattr(loss, "__self__", None)
    labels = batch.get("labels")
    if callable(getattr(task, "loss", None)) or not isinstance(labels, Tensor) or labels.is_floating_point():
        raise ValueError(
            "Expected integer 'labels' and the model's own loss for fisher='sampled', got a batch without. "
            "Use fisher='empirical'."
        )
    outputs = model(**batch)
    shift = predicts_next(model, outputs, labels.to(outputs.logits.device))
    logits = outputs.logits.detach().float()
    probabilities = torch.softmax(logits[:, :-1] if shift else logits, -1).to("cpu")
    drawn = (
        torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        .view(probabilities.shape[:-1])
        .to(labels.device)
    )
    sampled = labels.clone()
    target = sampled[:, 1:] if shift else sampled
    target[target != IGNORED] = drawn[target != IGNORED]
    values = {**batch, "labels": sampled}
    return ProbeBatch(values, batch.samples, loss) if isinstance(batch, ProbeBatch) and loss is not None else values
