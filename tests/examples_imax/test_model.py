"""The small model: its words, its answers, its probe tasks."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from examples.imax.data import arm, held_out
from examples.imax.model import (
    ANSWER,
    END,
    IGNORED,
    LONGEST,
    START,
    answers,
    collate,
    confident_answers,
    decode,
    encode,
    fits,
    new_model,
    probe_tasks,
    references,
    samples,
    sequence,
)
from examples.imax.tasks import TASKS
from probes import evaluate


@pytest.fixture(scope="module")
def model():
    made = new_model(seed=0, width=32).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # a new model repeats the word that it read last
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


@pytest.fixture(scope="module")
def batch():
    rows = samples(held_out(7))
    return collate([rows[place] for place in (0, 8, 15, 22, 29, 36, 43)])


def slow_answer(model, pixels, asked, longest):
    """One entry, no padding, the whole model run again for every word: its answer and the words' mean probability."""
    read, said, probability = asked, [], []
    while len(said) < longest and END not in said:
        logits = model(pixel_values=pixels[None], decoder_input_ids=torch.tensor([read]), use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
        probability.append(float(logits[0, -1].double().softmax(-1).max()))
        read = [*read, said[-1]]
    return decode(said), float(np.exp(np.log(probability).mean()))


def test_every_text_of_an_arm_is_in_the_vocabulary():
    for entry in arm("imax", 200, seed=5).entries:
        assert decode(encode(f"{entry.question} {entry.answer}")) == f"{entry.question} {entry.answer}"


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match=re.escape("Expected words of the vocabulary, got 'tibia'.")):
        encode("the tibia")


def test_labels_are_the_answer_and_its_end_one_place_early():
    row = sequence("grade the oedema", "mild")
    assert row["decoder_input_ids"].tolist() == [START, *encode("grade the oedema"), ANSWER, *encode("mild")]
    assert row["labels"].tolist() == [*[IGNORED] * 4, *encode("mild"), END]


def test_an_answer_that_never_ends_may_not_fit():
    row = samples(arm("dmax-plain", 10, 0))[0]
    asked = int((row["labels"] != IGNORED).int().argmax())
    question = decode(row["decoder_input_ids"][1:asked].tolist())
    (answer,) = answers(new_model(), collate([row]))  # a new model says one word for ever
    assert len(sequence(question, answer)["decoder_input_ids"]) == LONGEST + 1
    assert not fits(question, answer)
    assert fits(question, answer.rsplit(" ", 1)[0])


def test_references_are_the_answers_of_the_entries(batch):
    entries = held_out(7).entries
    assert references(batch) == [entries[place].answer for place in (0, 8, 15, 22, 29, 36, 43)]


def test_answers_in_a_batch_are_those_of_entries_alone(model, batch):
    asked = [row[: row.index(ANSWER) + 1] for row in batch["decoder_input_ids"].tolist()]
    longest = LONGEST - max(map(len, asked)) + 1
    with torch.no_grad():
        one_by_one = [
            slow_answer(model, pixels, read, longest) for pixels, read in zip(batch["pixel_values"], asked, strict=True)
        ]
    found = confident_answers(model, batch)
    assert [text for text, _ in found] == [text for text, _ in one_by_one] == answers(model, batch)
    np.testing.assert_allclose([value for _, value in found], [value for _, value in one_by_one], rtol=1e-5)
    assert len({text for text, _ in found}) > 1


def test_answers_do_not_see_the_truth(model, batch):
    spoiled = batch["decoder_input_ids"].clone()
    after = torch.arange(spoiled.shape[1]) > (batch["labels"] != IGNORED).int().argmax(1)[:, None]
    spoiled[after] = 7
    assert answers(model, batch | {"decoder_input_ids": spoiled}) == answers(model, batch)


def test_probe_tasks_have_as_many_entries_each_and_one_an_image():
    tasks = probe_tasks(held_out(7))
    assert [task.name for task in tasks] == list(TASKS)
    assert [len(task) for task in tasks] == [7] * 7
    groups = [group for task in tasks for group in task.groups()]
    assert len(set(groups)) == len(groups)


def test_probe_tasks_are_scored(model):
    found = {score.task: score for score in evaluate(model, probe_tasks(held_out(7)))}
    assert all(0 <= score.score <= 1 for score in found.values())
    assert not found["calculation"].higher_is_better


def test_probe_tasks_are_not_in_an_arm():
    assert probe_tasks(held_out(7))[0].refuse_overlap(samples(arm("imax", 10, 0))) == 75
