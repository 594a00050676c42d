"""Synthetic chest radiographs with exact truth: seeded, vectorised, more than 2,000 a second on one core.

Nothing here is anatomy for a physician. It is a thorax that a lay reader takes for one, every quantity of which is
known: the image is drawn from the truth, never measured from the pixels. As usual the patient faces the reader, so the
patient's left is on the right of the image.

Coordinates run from −1 to 1, x to the right and y downwards. Almost every structure is a function of x alone and one
of y alone, combined once over the pixels, which is why it is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

SIZE = 64  # pixels a side
STYLES = 7  # hospitals
CHUNK = 64  # images drawn at once: small enough for the cache, and each chunk has random numbers of its own
OPACITIES = 2  # at most so many opacities in an image, one a lung at most
GRADES = ("none", "mild", "moderate", "severe")  # of oedema
SIDES = ("right", "left")  # of the patient; index 0 is on the left of the image
ZONES = ("upper", "middle", "lower")
ENLARGED = 0.5  # a cardiothoracic ratio above this is cardiomegaly

_AXIS = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1).astype(np.float32)
_X, _Y = _AXIS[None, None, :], _AXIS[None, :, None]
#: Hospital by hospital: contrast, brightness, darkening of corners, noise, width of the blur's weight.
_LOOKS = np.array(
    [
        [1.00, 0.00, 0.10, 0.015, 0.0],
        [1.30, -0.05, 0.30, 0.010, 0.0],
        [0.80, 0.08, 0.00, 0.020, 0.5],
        [1.15, 0.06, 0.20, 0.030, 0.0],
        [0.90, -0.06, 0.40, 0.012, 0.3],
        [1.20, 0.02, 0.05, 0.025, 0.2],
        [0.75, 0.00, 0.25, 0.010, 0.0],
    ],
    dtype=np.float32,
)


@dataclass(frozen=True)
class Truth:
    """What is known of each image; every field has one row an image.

    Boxes are (left, top, right, bottom) as fractions of the image, from 0 to 1. Sides are the patient's, right first.

    Args:
        style: Hospital, from 0 to 6.
        cardiothoracic_ratio: Width of the heart over the greatest inner width of the thorax.
        cardiopulmonary_area_ratio: Area of the heart's ellipse over the area of both lung fields, without the heart.
        heart_box: Of the ellipse.
        lung_box: Of each side's lung field.
        opacity: Whether the lung has an opacity.
        opacity_zone: 0 upper, 1 middle, 2 lower; −1 without an opacity.
        opacity_box: At two standard deviations of the blob; NaN without an opacity.
        effusion: Whether there is fluid on that side.
        effusion_box: From the meniscus's highest point to the bottom of the lung field; NaN without an effusion.
        oedema: Grade, from 0 (none) to 3 (severe).
    """

    style: Int[np.ndarray, " image"]
    cardiothoracic_ratio: Float[np.ndarray, " image"]
    cardiopulmonary_area_ratio: Float[np.ndarray, " image"]
    heart_box: Float[np.ndarray, "image 4"]
    lung_box: Float[np.ndarray, "image 2 4"]
    opacity: Bool[np.ndarray, "image 2"]
    opacity_zone: Int[np.ndarray, "image 2"]
    opacity_box: Float[np.ndarray, "image 2 4"]
    effusion: Bool[np.ndarray, "image 2"]
    effusion_box: Float[np.ndarray, "image 2 4"]
    oedema: Int[np.ndarray, " image"]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.style)

    @property
    def cardiomegaly(self) -> Bool[np.ndarray, " image"]:
        """Whether the cardiothoracic ratio is above one half."""
        return self.cardiothoracic_ratio > ENLARGED


def phantoms(
    count: int, seed: int | Sequence[int], styles: Int[np.ndarray, " image"] | None = None
) -> tuple[Float[np.ndarray, "image 64 64"], Truth]:
    """Draw radiographs and what is true of them.

    Args:
        count: Number of images.
        seed: Images of one seed are the same whenever they are drawn, and the first ones do not depend on ``count``.
        styles: Hospital of each image; by default uniform. The anatomy does not depend on it.

    Returns:
        Images in float32 from 0 (black: air) to 1, and their truth.

    Raises:
        ValueError: If there is not one style an image, or a style is not from 0 to 6.

    >>> images, truth = phantoms(3, seed=0)
    >>> images.shape, truth.heart_box.shape
    ((3, 64, 64), (3, 4))
    """
    if styles is not None and (len(styles) != count or (count and not 0 <= min(styles) <= max(styles) < STYLES)):
        raise ValueError(f"Expected {count} styles from 0 to {STYLES - 1}, got {len(styles)}: {styles!r}.")
    words = [seed] if isinstance(seed, int) else list(seed)
    images, parts = [np.zeros((0, SIZE, SIZE), np.float32)], []
    for number in range(max(1, -(-count // CHUNK))):
        random = np.random.default_rng([*words, number])
        drawn = _anatomy(random)
        here = slice(number * CHUNK, min(count, (number + 1) * CHUNK))
        if styles is not None:
            drawn["style"][: here.stop - here.start] = styles[here]
        image, truth = _draw(drawn, random)
        images.append(image[: here.stop - here.start])
        parts.append({name: value[: here.stop - here.start] for name, value in truth.items()})
    joined = {each.name: np.concatenate([part[each.name] for part in parts]) for each in fields(Truth)}
    return np.concatenate(images), Truth(**joined)


def _anatomy(random: np.random.Generator) -> dict[str, Any]:
    """Parameters of one chunk of patients; the number of random draws does not depend on what is drawn."""

    def between(low: float, high: float, *more: int) -> Any:
        return random.uniform(low, high, (CHUNK, *more)).astype(np.float32)

    half_width = between(0.62, 0.78)  # of the thorax, inside
    ratio = between(0.36, 0.66)
    return {
        "style": random.integers(STYLES, size=CHUNK),
        "half_width": half_width,
        "center": between(-0.06, 0.06),
        "apex": between(-0.86, -0.74),
        "dome": between(0.42, 0.62, 1) + np.array([-0.04, 0.04], np.float32) + between(-0.03, 0.03, 2),
        "heart_half": ratio * half_width,
        "heart_offset": between(0.10, 0.17),  # to the patient's left
        "heart_height": between(0.24, 0.34),
        "tilt": between(0.25, 0.55),
        "opacity": random.random((CHUNK, 2)) < 0.4,
        "opacity_zone": random.integers(3, size=(CHUNK, 2)),
        "opacity_size": between(0.09, 0.15, 2, 2),
        "opacity_density": between(0.30, 0.50, 2),
        "opacity_shift": between(-1, 1, 2, 2),
        "effusion": random.random((CHUNK, 2)) < 0.3,
        "effusion_depth": between(0.16, 0.42, 2),
        "oedema": random.integers(4, size=CHUNK),
        "rib_phase": between(0, 2 * np.pi),
        "rib_pitch": between(18, 22),
        "exposure": between(0.94, 1.06),
        "texture": random.integers(len(_textures()), size=CHUNK),
    }


def _draw(p: dict[str, Any], random: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """Images of a chunk, and their truth."""

    def each(name: str, part: int | None = None) -> Any:
        value = p[name] if part is None else p[name][:, part]
        return value[:, None, None]

    x = _X - each("center")  # from the midline: [image, 1, x]
    away = np.abs(x)
    left = x > 0
    # Lung fields: between mediastinum and chest wall, below the apex, above the diaphragm's dome.
    rise = np.clip((_Y - each("apex")) / (0.55 - each("apex")), 0, 1.4)
    wall = each("half_width") * np.sqrt(np.clip(1 - (1 - np.minimum(rise, 1)) ** 2.6, 0, 1))  # [image, y, 1]
    medial = 0.13 + 0.05 * np.clip(_Y + 0.2, 0, 1)
    middle = (each("half_width") + 0.13) / 2
    dome = np.where(left, each("dome", 1), each("dome", 0))
    floor = dome + 0.95 * (away - middle + 0.06) ** 2 + 0.9 * np.clip(away - middle - 0.12, 0, 1) ** 2  # [image, 1, x]
    lung = np.clip((wall - away) * 18 + 0.5, 0, 1)
    lung *= np.clip((away - medial) * 18 + 0.5, 0, 1)
    lung *= np.clip((floor - _Y) * 18 + 0.5, 0, 1)

    # The heart: a tilted ellipse, whose widest points follow from its quadratic form.
    heart_x, heart_y = x - each("heart_offset"), _Y - (each("dome", 1) - 0.20)
    height, tilt = each("heart_height"), each("tilt")
    squared = ((heart_x - tilt * heart_y) / _narrow(each("heart_half"), height, tilt)) ** 2 + (heart_y / height) ** 2
    heart = np.clip((1 - squared) * 3 + 0.5, 0, 1)

    # Disease.
    aerated = lung * (1 - 0.92 * heart)
    haze = np.zeros_like(lung)
    blobs = []
    for side, sign in enumerate((-1, 1)):
        zone, shift, size = p["opacity_zone"][:, side], p["opacity_shift"][:, side], p["opacity_size"][:, side]
        at_x = p["center"] + sign * (0.40 + 0.07 * shift[:, 0]) * p["half_width"] / 0.66
        at_y = np.array([-0.50, -0.12, 0.20], np.float32)[zone] + 0.05 * shift[:, 1]
        across = np.exp(-0.5 * ((_X - at_x[:, None, None]) / size[:, 0, None, None]) ** 2)
        down = np.exp(-0.5 * ((_Y - at_y[:, None, None]) / size[:, 1, None, None]) ** 2)
        haze += across * (down * each("opacity", side) * each("opacity_density", side))
        blobs.append((at_x - 2 * size[:, 0], at_y - 2 * size[:, 1], at_x + 2 * size[:, 0], at_y + 2 * size[:, 1]))
    texture = _textures()[p["texture"]]
    grade = each("oedema")
    hilar = np.exp(-(((away - 0.30) / 0.30) ** 2)) * np.exp(-(((_Y - 0.0) / 0.42) ** 2))
    haze += hilar * (0.13 * grade) * (0.75 + 0.5 * texture)
    level = np.where(left, each("effusion_depth", 1), each("effusion_depth", 0))
    lateral = np.clip((away - 0.13) / (each("half_width") - 0.13), 0, 1)
    surface = dome + 0.06 - level * (0.55 + 0.75 * lateral**2)  # a meniscus, highest at the chest wall
    wet = np.where(left, each("effusion", 1), each("effusion", 0))
    fluid = np.clip((_Y - surface) * 14 + 0.5, 0, 1) * wet

    # Attenuation: air is dark, and what lies behind it shows through.
    body = np.clip((wall + 0.10 + 0.16 * np.clip(-_Y - 0.25, 0, 1) * 2 + 0.10 - away) * 7, 0, 1)
    depth = 0.50 + 0.13 * np.clip(_Y, -1, 1)
    image = body * (depth + 0.10 * np.clip(1 - away, 0, 1))
    image -= aerated * (0.42 + 0.025 * texture) * (1 - 0.9 * np.minimum(fluid, 1))
    image += aerated * haze * 0.85
    image += heart * (0.16 * np.clip((floor - _Y) * 8 + 0.7, 0.35, 1) - 0.04)  # it fades into the abdomen
    # Ribs slope down at the back and up in front; a cosine's tops, squared.
    curve = _Y * each("rib_pitch") + each("rib_phase")
    wave = np.cos(curve - 8.0 * away)
    inside = np.clip((wall + 0.05 - away) * 10, 0, 1) * np.clip((each("dome", 0) + 0.25 - _Y) * 6, 0, 1)
    image += inside * (0.10 * np.maximum(wave, 0.05) * np.clip(away * 4, 0, 1))
    # Spine with vertebrae, and clavicles.
    image += np.exp(-((x / 0.085) ** 2)) * (0.13 + 0.035 * np.cos(24 * _Y) - 0.04 * _Y)
    image -= np.exp(-(((x + 0.01) / 0.045) ** 2)) * (0.13 * np.clip((-0.25 - _Y) * 4, 0, 1))  # trachea
    bone = (_Y - each("apex") - 0.17 + 0.20 * (away - 0.1)) / 0.045
    ends = np.clip((away - 0.08) * 8, 0, 1) * np.clip((0.85 - away) * 6, 0, 1)
    image += np.clip(1 - bone * bone, 0, 1) * (0.17 * ends)
    image += 0.05 * np.clip(1 - ((away - 0.12) ** 2 + (_Y + 0.35) ** 2) * 90, 0, 1) * left  # aortic knob
    return _developed(image, p, random), _truth(p, lung, heart, blobs)


def _narrow(half: Any, height: Any, tilt: Any) -> Any:
    """Half width of the sheared ellipse's own axis, so that its widest point is at ``half``: half² = a² + (tilt·h)²."""
    return np.sqrt(np.maximum(half**2 - (tilt * height) ** 2, 0.02))


def _developed(image: Any, p: dict[str, Any], random: np.random.Generator) -> Any:
    """What the hospital's machine makes of it: exposure, contrast, dark corners, noise, a marker."""
    contrast, brightness, corners, noise, blur = (column[:, None, None] for column in _LOOKS[p["style"]].T)
    soft = image[:, :, :].copy()
    soft[:, 1:-1] += 0.5 * (image[:, :-2] + image[:, 2:])
    soft[:, 1:-1] *= 0.5
    image = image + blur * (soft - image)
    image = (image - 0.45) * (contrast * p["exposure"][:, None, None] * 1.25) + (0.47 + brightness)
    image *= 1 - corners * (_X**2 * _Y**2 + 0.15 * (_X**2 + _Y**2))
    image += noise * random.standard_normal(image.shape, dtype=np.float32)
    np.maximum(image, _markers()[p["style"]], out=image)
    return np.clip(image, 0, 1, out=image)


def _truth(p: dict[str, Any], lung: Any, heart: Any, blobs: list[Any]) -> dict[str, Any]:
    def fractions(*sides: Any) -> Any:
        return np.clip((np.stack(sides, axis=-1) + 1) / 2, 0, 1).astype(np.float64)

    center, half, offset, height = p["center"], p["half_width"], p["heart_offset"], p["heart_height"]
    narrow = _narrow(p["heart_half"], height, p["tilt"])
    width = np.sqrt(narrow**2 + (p["tilt"] * height) ** 2)
    heart_x, heart_y = center + offset, p["dome"][:, 1] - 0.20
    pixel = (2 / SIZE) ** 2
    lungs = (lung * (heart < 0.5)).sum(axis=(1, 2), dtype=np.float64) * pixel
    inner, outer = center[:, None] + np.array([-0.13, 0.13]), center[:, None] + half[:, None] * np.array([-1, 1])
    lung_left, lung_right = np.minimum(inner, outer), np.maximum(inner, outer)
    apex = np.repeat(p["apex"][:, None], 2, axis=1)
    # The costophrenic angle: the diaphragm where it meets the chest wall.
    middle = (half[:, None] + 0.13) / 2
    reach = half[:, None] - middle
    bottom = np.minimum(p["dome"] + 0.95 * (reach + 0.06) ** 2 + 0.9 * np.clip(reach - 0.12, 0, 1) ** 2, 0.95)
    top = p["dome"] + 0.06 - 1.30 * p["effusion_depth"]
    opacity, effusion = p["opacity"], p["effusion"]
    return {
        "style": p["style"],
        "cardiothoracic_ratio": (width / half).astype(np.float64),
        "cardiopulmonary_area_ratio": (np.pi * narrow * height) / lungs,
        "heart_box": fractions(heart_x - width, heart_y - height, heart_x + width, heart_y + height),
        "lung_box": fractions(lung_left, apex, lung_right, bottom),
        "opacity": opacity,
        "opacity_zone": np.where(opacity, p["opacity_zone"], -1),
        "opacity_box": np.where(opacity[..., None], np.stack([fractions(*blob) for blob in blobs], axis=1), np.nan),
        "effusion": effusion,
        "effusion_box": np.where(effusion[..., None], fractions(lung_left, top, lung_right, bottom), np.nan),
        "oedema": p["oedema"],
    }


@cache
def _textures() -> Any:
    """Smooth random fields of mean 0, for vessels that cannot be told one by one."""
    random = np.random.default_rng(0)
    spectrum = np.fft.fft2(random.standard_normal((32, SIZE, SIZE)))
    wave = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
    fields_ = np.fft.ifft2(spectrum * np.exp(-(((wave - 0.10) / 0.06) ** 2))).real
    return (fields_ / fields_.std(axis=(1, 2), keepdims=True)).astype(np.float32)


@cache
def _markers() -> Any:
    """The letter L that each hospital puts into a corner of its own, at a brightness of its own."""
    marks = np.zeros((STYLES, SIZE, SIZE), np.float32)
    places = [(4, 55), (4, 4), (55, 55), (6, 50), (54, 4), (10, 56), (4, 30)]
    for style, (row, column) in enumerate(places):
        size = 4 + style % 3
        marks[style, row : row + size, column] = 0.75 + 0.04 * style
        marks[style, row + size - 1, column : column + 3] = 0.75 + 0.04 * style
    return marks
