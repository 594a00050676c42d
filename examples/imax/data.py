"""The arms of the study: the same annotations, on few images or on many.

IMAX: each image carries several tasks, 4.1 on average, and 7.5 entries. DMAX: each (image, task) of IMAX gets an image
of its own, with as many entries; so every task has the same number of entries in all arms, while DMAX has 4.1 times
as many images. That is part of the treatment: what is compared is one budget of *annotations*, spent in two ways.
DMAX-plain draws hospitals uniformly, as IMAX does; in DMAX-style each task comes from one hospital.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from examples.imax.phantom import STYLES, Truth, phantoms
from examples.imax.tasks import MOST, TASKS, questions

ARMS = ("imax", "dmax-plain", "dmax-style")
TASKS_AN_IMAGE, ENTRIES_AN_IMAGE = 4.1, 7.5
HELD_OUT = 1_000_000  # first word of the seeds of images that no arm trains on
#: Parts of what is held out, which share no image: for the Fisher, for the scores, for the pilot's scores.
PROBED, SCORED, PILOTED = range(3)


@dataclass(frozen=True)
class Entry:
    """One annotation: what is asked of which image, and the answer."""

    image: int
    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Annotated:
    """Images, what is true of them, and entries in random order."""

    name: str
    images: Float[np.ndarray, "image 64 64"]
    truth: Truth
    entries: list[Entry]


def plan(images: int, seed: int) -> Int[np.ndarray, "image task"]:
    """How many entries of each task each image of IMAX carries.

    Three, four or five tasks an image, and entries dealt at random to the tasks that can ask more than once; the totals
    are exact: 4.1 tasks and 7.5 entries an image.

    Raises:
        ValueError: If the images are not a positive multiple of 10, so that these totals are whole.

    >>> counts = plan(10, seed=0)
    >>> int((counts > 0).sum()), int(counts.sum())
    (41, 75)
    """
    if images < 10 or images % 10:
        raise ValueError(f"Expected a positive multiple of 10 images, got {images}.")
    random = np.random.default_rng([seed, 3])
    sizes = random.permutation(np.repeat([3, 4, 5], [images // 10 * part for part in (2, 5, 3)]))
    order = random.random((images, len(TASKS))).argsort(axis=1).argsort(axis=1)
    counts = (order < sizes[:, None]).astype(np.int64)
    room = np.argwhere(counts > 0)
    room = np.repeat(room, [MOST[TASKS[task]] - 1 for _, task in room], axis=0)
    extra = round(ENTRIES_AN_IMAGE * images) - int(counts.sum())
    if extra > len(room):
        raise ValueError(f"Expected room for {extra} more entries, found {len(room)}: take more images.")
    np.add.at(counts, tuple(random.permutation(room)[:extra].T), 1)
    return counts


def arm(name: str, images: int, seed: int) -> Annotated:
    """The training data of an arm.

    Args:
        name: ``"imax"``, ``"dmax-plain"`` or ``"dmax-style"``. The two DMAX arms of a seed have the same patients.
        images: Number of images of IMAX; DMAX has 4.1 times as many.
        seed: From 0. Arms of one seed share one plan.

    Raises:
        ValueError: If there is no such arm, or images are no multiple of 10.
    """
    if name not in ARMS:
        raise ValueError(f"Expected one of {', '.join(ARMS)}, got {name!r}.")
    counts = plan(images, seed)
    if name == "imax":
        pixels, truth = phantoms(images, [seed, 1])
        slots = [(image, image, task) for image, task in np.argwhere(counts > 0).tolist()]
    else:
        source = np.argwhere(counts > 0).tolist()
        styles = np.array([task % STYLES for _, task in source]) if name == "dmax-style" else None
        pixels, truth = phantoms(len(source), [seed, 2], styles)
        slots = [(number, image, task) for number, (image, task) in enumerate(source)]
    random = np.random.default_rng([seed, 4])
    entries = []
    for shown, image, task in slots:
        asked = questions(TASKS[task], truth, shown)
        for number in random.permutation(len(asked))[: counts[image, task]]:
            entries.append(Entry(shown, TASKS[task], *asked[number]))
    return Annotated(name, pixels, truth, [entries[place] for place in random.permutation(len(entries))])


def held_out(each: int, part: int = PROBED) -> Annotated:
    """Entries that no arm trains on: ``each`` of every task, one an image, over all hospitals alike.

    Args:
        each: Entries of each task; a multiple of 7, so that each task sees each hospital equally often.
        part: Parts share no image.

    Raises:
        ValueError: If ``each`` is not a positive multiple of 7.
    """
    if each < STYLES or each % STYLES:
        raise ValueError(f"Expected a positive multiple of {STYLES} entries a task, got {each}.")
    count = each * len(TASKS)
    pixels, truth = phantoms(count, [HELD_OUT, part], np.arange(count) % STYLES)
    random = np.random.default_rng([HELD_OUT, part])
    entries = []
    for image in range(count):
        asked = questions(TASKS[image // each], truth, image)
        entries.append(Entry(image, TASKS[image // each], *asked[random.integers(len(asked))]))
    return Annotated("held-out", pixels, truth, entries)


def card(data: Annotated) -> dict[str, Any]:
    """The data set in numbers: images, entries, tasks and entries an image, entries of each task, hospitals of each.

    >>> card(held_out(7))["entries"]
    49
    """
    carried = {(entry.image, entry.task) for entry in data.entries}
    images = len({entry.image for entry in data.entries})
    styles = {
        task: Counter(int(data.truth.style[entry.image]) for entry in data.entries if entry.task == task)
        for task in TASKS
    }
    return {
        "name": data.name,
        "images": images,
        "entries": len(data.entries),
        "tasks_an_image": len(carried) / images,
        "entries_an_image": len(data.entries) / images,
        "entries_of_task": {task: sum(styles[task].values()) for task in TASKS},
        "images_of_task": dict(Counter(task for _, task in sorted(carried))),
        "hospitals_of_task": {task: [styles[task][style] for style in range(STYLES)] for task in TASKS},
        "synthetic": True,
    }
