"""A small image-to-text model of transformers' classes, its words, and its answers.

A vision transformer reads the image, a GPT-2 with cross-attention reads the question and writes the answer: one
training sequence is one entry, ``<start> question <answer> words of the answer <end>``, with labels on the answer only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

from examples.imax.data import Annotated
from examples.imax.phantom import SIZE, phantoms
from examples.imax.tasks import GRID, METRICS, TASKS, questions, sentences
from probes import Task
from probes.collation import pad_and_stack

PAD, START, ANSWER, END = range(4)
LONGEST = 64  # words of a question and its answer
IGNORED = -100  # label that no loss counts
WIDTH = 128


@cache
def words() -> tuple[str, ...]:
    """The vocabulary, in the order of the tokens.

    >>> words()[:5], len(words()) < 150
    (('<pad>', '<start>', '<answer>', '<end>', '.'), True)
    """
    _, truth = phantoms(256, seed=0)
    texts = [text for image in range(len(truth)) for text in sentences(truth, image)]
    for image in range(len(truth)):
        texts += [text for task in TASKS for pair in questions(task, truth, image) for text in pair]
    closed = {*map(str, range(10)), *(f"<{line}>" for line in range(GRID + 1))}
    found = closed.union(*(text.split() for text in texts))
    return "<pad>", "<start>", "<answer>", "<end>", *sorted(found - {"<pad>", "<start>", "<answer>", "<end>"})


def encode(text: str) -> list[int]:
    """Tokens of a text.

    Raises:
        ValueError: If a word is not in the vocabulary.

    >>> decode(encode("no oedema ."))
    'no oedema .'
    """
    table = _table()
    if missing := [word for word in text.split() if word not in table]:
        raise ValueError(f"Expected words of the vocabulary, got {missing[0]!r}.")
    return [table[word] for word in text.split()]


def decode(tokens: Sequence[int]) -> str:
    """Text of tokens, up to the end token."""
    tokens = list(tokens)
    end = tokens.index(END) if END in tokens else len(tokens)
    return " ".join(words()[token] for token in tokens[:end])


def sequence(question: str, answer: str) -> dict[str, Int[Tensor, " token"]]:
    """What the decoder reads, and at the same places the word that it shall say next."""
    asked, said = [START, *encode(question), ANSWER], [*encode(answer), END]
    labels = [IGNORED] * (len(asked) - 1) + said
    return {"decoder_input_ids": torch.tensor(asked + said[:-1]), "labels": torch.tensor(labels)}


def fits(question: str, answer: str) -> bool:
    """Whether the decoder reaches to the answer's end; an answer that it broke off itself may be a word too long."""
    return len(sequence(question, answer)["labels"]) <= LONGEST


def as_pixels(images: Float[np.ndarray, "image 64 64"]) -> Float[Tensor, "image 1 64 64"]:
    """Images as the vision transformer takes them: about mean 0 and variance 1."""
    return torch.from_numpy((images - 0.45) / 0.25)[:, None]


def samples(data: Annotated) -> list[dict[str, Any]]:
    """Entries as the model takes them; ``image`` names the image, and images are shared among their entries."""
    pixels = as_pixels(data.images)
    return [
        {
            "pixel_values": pixels[entry.image],
            **sequence(entry.question, entry.answer),
            "image": f"{data.name}/{entry.image}",
        }
        for entry in data.entries
    ]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of samples, sequences padded at the end."""
    return pad_and_stack([{key: value for key, value in row.items() if key != "image"} for row in rows])


def probe_tasks(data: Annotated, batch_size: int = 32, *, scored: bool = True) -> list[Task]:
    """Each task of the study as a :class:`probes.Task` whose score is the mean of its primary metric.

    Of micro-F1, which is no mean over entries, the mean is taken of each entry's own F1. Tasks that are not ``scored``
    are for the Fisher alone.
    """
    rows = samples(data)
    made = []
    for task in TASKS:
        mine = [row for row, entry in zip(rows, data.entries, strict=True) if entry.task == task]
        metric = METRICS[task][0]

        def score(model: nn.Module, batch: Any, of: Any = metric.of) -> Float[Tensor, " sample"]:
            said, true = answers(model, batch), references(batch)
            fractions = [of(one, other) for one, other in zip(said, true, strict=True)]
            return torch.tensor([above / below for above, below in fractions], dtype=torch.float64)

        made.append(
            Task(
                task,
                mine,
                group="image",
                score=score if scored else None,
                batch_size=batch_size,
                higher_is_better=metric.higher_is_better or not scored,
            )
        )
    return made


def references(batch: dict[str, Tensor]) -> list[str]:
    """The true answers of a batch.

    >>> references(collate([{**sequence("grade the oedema", "mild"), "pixel_values": torch.zeros(1, 64, 64)}]))
    ['mild']
    """
    return [decode([token for token in row if token != IGNORED]) for row in batch["labels"].tolist()]


def answers(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """The likeliest words after each question, one after the other (greedy)."""
    return [text for text, _ in confident_answers(model, batch)]


@torch.no_grad()
def confident_answers(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[str, float]]:
    """Greedy answers, and of each its words' probability, the geometric mean (with that of the answer's end).

    The image is read once. Sequences stand at the left; what is right of the last word does not reach it. Of the labels
    only the place of the first is read, where the answer begins. An answer ends by itself, or where the model's reach
    does.
    """
    labels, tokens = batch["labels"], batch["decoder_input_ids"]
    first = (labels != IGNORED).int().argmax(1)  # place at which the first word of the answer is said
    tokens = nn.functional.pad(tokens, (0, LONGEST - tokens.shape[1]), value=PAD)
    tokens = torch.where(torch.arange(LONGEST) <= first[:, None], tokens, PAD)
    rows = torch.arange(len(tokens))
    bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    seen = bare.encoder(pixel_values=batch["pixel_values"])
    going = torch.ones(len(tokens), dtype=torch.bool)
    likelihood, length, said = torch.zeros(len(tokens), dtype=torch.float64), torch.zeros(len(tokens)), []
    for place in (first + step for step in range(LONGEST - int(first.max()))):
        logits = bare(encoder_outputs=seen, decoder_input_ids=tokens[:, : int(place.max()) + 1], use_cache=False).logits
        best, word = logits[rows, place].double().log_softmax(-1).max(-1)
        said.append(torch.where(going, word, PAD))
        likelihood += best * going
        length += going
        going = going & (word != END)
        if not going.any():
            break
        tokens[rows, (place + 1).clamp(max=LONGEST - 1)] = word
    mean = (likelihood / length).exp().tolist()
    written = [row[: int(words)] for row, words in zip(torch.stack(said, 1).tolist(), length, strict=True)]
    return [(decode(row), value) for row, value in zip(written, mean, strict=True)]


def new_model(seed: int = 0, width: int = WIDTH) -> VisionEncoderDecoderModel:
    """An untaught model of about 1.5 million parameters."""
    torch.manual_seed(seed)
    vision = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=2 * width,
        initializer_range=width**-0.5,
    )
    text = GPT2Config(
        vocab_size=len(words()),
        n_positions=LONGEST,
        n_embd=width,
        n_layer=3,
        n_head=4,
        n_inner=2 * width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=width**-0.5,
        add_cross_attention=True,
        bos_token_id=START,
        eos_token_id=END,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = START, PAD, END
    return VisionEncoderDecoderModel(config=config)


@cache
def _table() -> dict[str, int]:
    return {word: token for token, word in enumerate(words())}
