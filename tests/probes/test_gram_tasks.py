"""K of tasks: batched, named and grouped by the tasks themselves."""

import re

import pytest
import torch
from torch import nn

import dynamics
import probes
from probes import ProbeGram, Task, gradient_gram, probe_batches, probe_loss

ROWS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
SAMPLES = [{"x": row, "image": f"{number // 2}.png"} for number, row in enumerate(ROWS)]
UPDATE = {"weight": torch.ones(3, 4)}


def squares(model, batch):
    return model(batch["x"]).square().sum(1)


def first_is_broken(model, batch):
    losses = squares(model, batch)
    return torch.cat([losses[:1] * torch.nan, losses[1:]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3, bias=False).double()


def tasks(loss=squares):
    def of(name, samples, how):
        rows = [{**sample, "x": sample["x"].double()} for sample in samples]
        return Task(name, rows, loss=how, group="image", batch_size=4)

    return [of("chart", SAMPLES[:2], squares), of("text", SAMPLES[2:], loss)]


def test_tasks_are_their_batches_with_labels(model):
    batches, sample_tasks, groups, sample_ids = probe_batches(tasks())
    expected = gradient_gram(model, batches, probe_loss, update=UPDATE)
    found = gradient_gram(model, tasks(), update=UPDATE, batch_size=32)
    assert torch.equal(found.gram["global"], expected.gram["global"])
    assert torch.equal(found.update_product["global"], expected.update_product["global"])
    assert (found.tasks, found.groups, found.sample_ids) == (tuple(sample_tasks), tuple(groups), tuple(sample_ids))
    assert found.tasks == ("chart",) * 2 + ("text",) * 4
    assert found.groups == ("0.png", "0.png", "1.png", "1.png", "2.png", "2.png")
    assert (found.batch_size, found.space, found.blocks) == (32, "tangent", ("weight", "global"))


def test_batches_have_no_labels(model):
    found = gradient_gram(model, probe_batches(tasks())[0], probe_loss)
    assert (found.tasks, found.groups, found.sample_ids, found.batch_size) == ((), (), (), 0)


def test_one_task_alone(model):
    found = gradient_gram(model, tasks()[1])
    assert found.sample_ids == ("text/0", "text/1", "text/2", "text/3")


def test_a_sample_that_is_left_out_takes_its_labels_along(model):
    found = gradient_gram(model, tasks(first_is_broken), skip_broken=True)
    assert found.left_out == (2,)
    assert found.sample_ids == ("chart/0", "chart/1", "text/1", "text/2", "text/3")
    assert found.groups == ("0.png", "0.png", "1.png", "2.png", "2.png")
    assert len(found.gram["global"]) == len(found.losses) == len(found.tasks) == 5


def test_the_fishers_numbers_take_it_as_it_is(model):
    gram = gradient_gram(model, tasks(), update=UPDATE, batch_size=4)
    assert dynamics.fisher_measures(gram)["task"].values.tolist() == ["all", "chart", "text"]
    assert dynamics.fisher_measures(gram)["groups"].values.tolist() == [3, 1, 2]
    assert dynamics.concentration(gram)["null_batch"] == 4
    assert dynamics.task_structure(gram)["task_"].values.tolist() == ["all", "chart", "text"]


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        (lambda: tasks(), squares, "Expected tasks without a loss beside them. Give each its own:"),
        (lambda: [tasks()[0], {"x": torch.ones(1, 4)}], None, "got tasks and dict in one list."),
        (lambda: [tasks()[0], tasks()[0]], None, "got several named 'chart'."),
        (list, None, "Expected at least one batch of probe samples, got none."),
    ],
)
def test_what_are_no_tasks_is_refused(model, data, loss, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gradient_gram(model, data(), loss)


def test_the_old_name_of_the_class_shows_the_new():
    with pytest.warns(DeprecationWarning, match=r"probes\.Gram is deprecated; it is called probes\.ProbeGram\."):
        assert probes.Gram is ProbeGram
    with pytest.raises(AttributeError, match="module 'probes' has no attribute 'Grams'"):
        probes.Grams  # noqa: B018
