"""Tasks read any data set, name their samples and groups, and join into one stream that keeps each of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from probes.tasks import ProbeBatch, Task, probe_batches, probe_loss, require_names
from tests.families import FAMILIES


def words(*lengths: int, first: int = 3) -> list[dict[str, Any]]:
    """Samples of these lengths, all of different words."""
    return [
        {"input_ids": list(range(first + n, first + n + length)), "labels": [first] * length, "image": f"{n // 2}.png"}
        for n, length in enumerate(lengths)
    ]


def first_words(model: nn.Module, batch: Any) -> Tensor:
    return batch["input_ids"][:, 0].double()


def stacked(samples: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    return {"x": torch.stack([sample[0] for sample in samples])}


def test_batches_in_order() -> None:
    task = Task("a", words(2, 4, 1), group="image", batch_size=2)
    assert [batch["input_ids"].tolist() for batch in task.batches()] == [[[3, 4, 0, 0], [4, 5, 6, 7]], [[5]]]
    assert [batch.samples for batch in task.batches()] == [2, 1]
    assert all("image" not in batch for batch in task.batches())


@pytest.mark.parametrize(
    "group",
    ["image", ["0.png", "0.png", "1.png"], lambda sample: sample["image"], np.array(["0.png", "0.png", "1.png"])],
    ids=["key", "list", "function", "array"],
)
def test_groups(group: Any) -> None:
    assert Task("a", words(1, 1, 1), group=group).groups() == ["0.png", "0.png", "1.png"]


@pytest.mark.parametrize(
    ("tasks", "kind"), [({"a": [1]}, "str"), ([{"input_ids": 1}], "dict"), (len, "builtin_function_or_method")]
)
def test_something_else_than_tasks_is_refused(tasks: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected tasks, each a probes\.Task, got {kind}\. Pass "):
        require_names(tasks)


def test_a_task_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Expected a list of tasks, got the task 'a' alone\. Pass \[task\]\.$"):
        require_names(Task("a", words(1)))


def test_names_are_text() -> None:
    samples = [{"x": [1.0], "image": torch.tensor(17)}, {"x": [1.0], "image": 17}]
    assert Task("a", samples, group="image").groups() == ["17", "17"]
    assert Task("a", samples, sample_id=[5, 6]).sample_ids() == ["5", "6"]
    assert Task("a", samples).groups() == Task("a", samples).sample_ids() == ["a/0", "a/1"]


def test_a_torch_data_set() -> None:
    task = Task("a", TensorDataset(torch.eye(3)), collate=stacked, batch_size=2)
    assert torch.cat([batch["x"] for batch in task.batches()]).tolist() == torch.eye(3).tolist()


def test_a_hugging_face_data_set() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    samples = datasets.Dataset.from_list(words(2, 4, 1))
    task = Task("a", samples, group="image", batch_size=3)
    expected = Task("b", words(2, 4, 1), group="image", batch_size=3)
    assert task.groups() == expected.groups()
    assert [batch["labels"].tolist() for batch in task.batches()] == [b["labels"].tolist() for b in expected.batches()]
    with pytest.raises(ValueError, match=re.escape("got 3 of 3 that are also in the training set")):
        task.refuse_overlap(samples.to_iterable_dataset())


@pytest.mark.parametrize("loss", [None, "sum", "mean"])
def test_losses(loss: str | None) -> None:
    model, batch = FAMILIES["llama"].model_and_batch()
    own = model.eval()(**batch).loss.item()
    samples = [{key: value[n] for key, value in batch.items()} for n in (0, 1)]
    losses = [Task("a", samples, loss=loss).losses(model, each) for each in Task("a", samples).batches()]
    tokens = 1 if loss == "mean" else batch["labels"].shape[1] - 1
    assert losses[0].mean().item() == pytest.approx(own * tokens, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda model, batch: torch.zeros(()), "a tensor of shape ()"),
        (lambda model, batch: torch.zeros(2, 3), "a tensor of shape (2, 3)"),
        (lambda model, batch: torch.zeros(1), "a tensor of shape (1,)"),
        (lambda model, batch: 0.5, "float"),
    ],
    ids=["scalar", "by token", "mean", "number"],
)
def test_losses_that_are_not_one_a_sample(loss: Any, got: str) -> None:
    task = Task("a", words(2, 2), group="image", loss=loss)
    message = (
        f"Expected Task 'a': loss(model, batch) to return one number for each of 2 samples, got {got}. "
        "Do not average over the batch."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        task.losses(nn.Identity(), next(iter(task.batches())))


def test_joined_tasks_share_batches_and_one_length() -> None:
    tasks = [Task("a", words(2, 4, 1), group="image", batch_size=2), Task("b", words(3, first=20), group="image")]
    batches, sample_task, sample_group, sample_id = probe_batches(tasks)
    assert [batch["input_ids"].tolist() for batch in batches] == [
        [[3, 4, 0, 0], [4, 5, 6, 7]],
        [[5, 0, 0, 0], [20, 21, 22, 0]],
    ]
    assert sample_task == ["a", "a", "a", "b"]
    assert sample_group == ["0.png", "0.png", "1.png", "0.png"]
    assert sample_id == ["a/0", "a/1", "a/2", "b/0"]


def test_the_stream_can_be_read_again() -> None:
    batches = probe_batches([Task("a", words(2, 2), group="image", batch_size=1)])[0]
    assert [batch["input_ids"].tolist() for batch in batches] == [batch["input_ids"].tolist() for batch in batches]
    assert len(list(batches)) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"loss": "mean"},
        {"loss": first_words},
        {"collate": lambda samples: {"input_ids": torch.tensor([sample["input_ids"] for sample in samples])}},
        {"samples": [{**sample, "extra": [1]} for sample in words(2, 2)]},
    ],
    ids=["loss", "function", "collate", "keys"],
)
def test_tasks_of_another_kind_have_batches_of_their_own(other: dict[str, Any]) -> None:
    second = Task(**{"name": "b", "samples": words(2, 2), "group": "image", **other})
    batches, sample_task, *_ = probe_batches([Task("a", words(2), group="image"), second])
    assert [batch.samples for batch in batches] == [1, 2]
    assert sample_task == ["a", "b", "b"]


def test_images_of_two_sizes() -> None:
    tasks = [Task(f"{size}", [{"pixel_values": torch.ones(3, size, size)}]) for size in (4, 8)]
    assert [batch["pixel_values"].shape[-1] for batch in probe_batches(tasks)[0]] == [4, 8]


def test_each_sample_has_the_loss_of_its_task() -> None:
    tasks = [
        Task("a", words(1, 1), group="image", loss=first_words),
        Task("b", words(1, 1, 1), group="image", loss=lambda model, batch: -first_words(model, batch), batch_size=2),
    ]
    batches = probe_batches(tasks)[0]
    assert torch.cat([probe_loss(nn.Identity(), batch.to("cpu")) for batch in batches]).tolist() == [3, 4, -3, -4, -5]


def test_losses_do_not_depend_on_how_tasks_are_joined() -> None:
    model, _ = FAMILIES["llama"].model_and_batch()
    model = model.double().eval()
    tasks = [Task("a", words(5, 2, 7), group="image"), Task("b", words(3, 9, first=20), group="image", batch_size=1)]
    joined = torch.cat([probe_loss(model, batch) for batch in probe_batches(tasks)[0]])
    apart = torch.cat([task.losses(model, batch) for task in tasks for batch in task.batches()])
    torch.testing.assert_close(joined, apart, rtol=1e-12, atol=0)


def test_overlap_is_refused() -> None:
    task = Task("vqa", words(2, 3, 4), group="image", sample_id=["x", "y", "z"])
    training = [{**sample, "image": "renamed.png"} for sample in [*words(7), *words(2, 3, 4)[1:]]]
    message = (
        "Task 'vqa': expected held-out samples, got 2 of 3 that are also in the training set, first 'y' (training "
        "sample 1). Probe samples that are not trained on."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        task.refuse_overlap(training)
    assert task.refuse_overlap(training[:1]) == 1
    assert task.refuse_overlap([{"text": "other"}]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "Expected a name for the task, got '' ('all' stands for all tasks together)."),
        ({"name": "all"}, "Expected a name for the task, got 'all' ('all' stands for all tasks together)."),
        ({"samples": []}, "Task 'a': expected at least one sample, got none."),
        (
            {"samples": iter([1])},
            "Task 'a': expected samples that can be read by number, got list_iterator. Take some of a stream first: "
            "list(itertools.islice(stream, 64)).",
        ),
        ({"samples": {"x": [1]}}, "Task 'a': expected a data set or list of samples, got one dict."),
        ({"loss": "max"}, "Task 'a': expected loss 'sum', 'mean' or a function, got 'max'."),
        ({"batch_size": 0}, "Task 'a': expected batch_size of at least 1, got 0."),
        ({"group": ["x"]}, "Task 'a': expected one group for each of 2 samples, got 1."),
        ({"sample_id": ["x"] * 3}, "Task 'a': expected one sample_id for each of 2 samples, got 3."),
        (
            {"higher_is_better": False},
            "Task 'a': the default score is better when higher. Leave higher_is_better out.",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Task(**{"name": "a", "samples": words(1, 1), **arguments})


def test_a_sample_without_its_group() -> None:
    samples = words(1, 1)
    del samples[1]["image"]
    message = "Task 'a': expected 'image' in each sample for group, sample 1 has 'input_ids', 'labels' only."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Task("a", samples, group="image").groups()


def test_samples_that_do_not_fit_together() -> None:
    samples = words(1, 1)
    del samples[1]["labels"]
    message = (
        "Batch from Task 'a', sample 0, to Task 'a', sample 1: expected the same keys in all samples, but sample 1 of "
        "the batch lacks 'labels'. Pass collate=, which makes a dict of tensors from a list of samples, or make a task "
        "of the samples that have it and one of the others."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(Task("a", samples, group="image").batches())


def test_a_sample_that_is_no_dict() -> None:
    with pytest.raises(
        ValueError, match=r"^Task 'a', sample 0: expected samples that are dicts, .* got tuple\. Pass collate="
    ):
        list(Task("a", TensorDataset(torch.eye(2))).batches())


def test_a_collation_that_returns_no_dict() -> None:
    task = Task("a", TensorDataset(torch.eye(2)), collate=list)
    with pytest.raises(ValueError, match=r"^Task 'a': expected collate to return a dict .*, got list\.$"):
        list(task.batches())


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "Expected at least one task, got none."),
        ([Task("a", words(1))] * 2, "Expected tasks with different names, got several named 'a'."),
    ],
    ids=["none", "one name"],
)
def test_tasks_that_cannot_be_joined(tasks: list[Task], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        probe_batches(tasks)


def test_a_batch_keeps_what_is_no_tensor() -> None:
    batch = ProbeBatch({"x": torch.ones(1), "names": ["a"]}, 1, first_words).to("cpu")
    assert batch["names"] == ["a"]
    assert batch.loss is first_words
