"""Pictures of the demo's world: a few coloured shapes on a plain or textured ground, and how they are drawn."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Hue in degrees: centre and the most that it strays.
COLOURS = {
    "red": (0, 8),
    "yellow": (56, 6),
    "green": (118, 18),
    "cyan": (181, 7),
    "blue": (228, 12),
    "purple": (283, 12),
}
THING_KINDS = tuple(itertools.product(COLOURS, SHAPES))
"""Every (colour, shape)."""
SIDES = (128, 1024)
MAX_THINGS = 3
ZONES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
_EDGES = (1 / 3, 2 / 3)
_ZONE_MARGIN = 0.07
_ORDER_MARGIN = 0.2
_SMALLEST_SIZE = 0.2
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """A shape. x, y: its centre in shares of the picture's width and height; size: its diameter in shares of the
    shorter side; turn: its angle in radians; rgb: from 0 to 255."""

    shape: str
    colour: str
    x: float
    y: float
    size: float
    turn: float
    rgb: tuple[int, int, int]

    @property
    def row(self) -> int:
        """The third of the picture's height, from the top, that the centre lies in."""
        return sum(self.y > edge for edge in _EDGES)

    @property
    def column(self) -> int:
        """The third of the picture's width, from the left, that the centre lies in."""
        return sum(self.x > edge for edge in _EDGES)

    @property
    def zone(self) -> str:
        return ZONES[self.row][self.column]


@dataclass(frozen=True)
class Picture:
    """Things from left to right, on a ground drawn by a random generator of `seed`."""

    width: int
    height: int
    things: tuple[Thing, ...]
    seed: int

    def draw(self) -> Image.Image:
        """The picture in RGB."""
        image = Image.fromarray(_ground(self.width, self.height, np.random.default_rng(self.seed)))
        for thing in self.things:
            mask, left, top = _mask(thing, self.width, self.height)
            image.paste(thing.rgb, (left, top), mask)
        return image

    def owners(self, side: int) -> np.ndarray:
        """[side, side] uint8: the number of the thing that covers the middle of each cell, from 1, or 0."""
        image = Image.new("L", (self.width, self.height))
        for number, thing in enumerate(self.things, start=1):
            mask, left, top = _mask(thing, self.width, self.height)
            image.paste(number, (left, top), mask.point(lambda value: 255 * (value > 127)))
        return np.asarray(image.resize((side, side), Image.Resampling.NEAREST))

    def surrounds(self, side: int) -> np.ndarray:
        """As `owners`, for the circle around each thing."""
        middle = (np.arange(side) + 0.5) / side
        numbers = np.zeros((side, side), np.uint8)
        for number, thing in enumerate(self.things, start=1):
            across = (middle[None] - thing.x) * self.width
            down = (middle[:, None] - thing.y) * self.height
            numbers[across**2 + down**2 < (thing.size * min(self.width, self.height) / 2) ** 2] = number
        return numbers


def random_picture(rng: np.random.Generator, count: int | None = None) -> Picture:
    """A picture of `count` things (of 1 to `MAX_THINGS` where None), no two alike, that do not touch; its sides lie
    within `SIDES`."""
    low, high = np.log(SIDES)
    width = round(float(np.exp(rng.uniform(low, high))))
    height = int(np.clip(round(width * np.exp(rng.uniform(-0.5, 0.5))), *SIDES))
    count = count or int(rng.integers(1, MAX_THINGS + 1))
    while True:
        places = _places(rng, count, width, height)
        if places is not None:
            break
    things = []
    kinds = rng.choice(len(THING_KINDS), count, replace=False)
    for (x, y, size), (colour, shape) in zip(places, (THING_KINDS[kind] for kind in kinds)):
        things.append(Thing(shape, colour, x, y, size, _turn(rng, shape), _rgb(rng, colour)))
    return Picture(width, height, tuple(sorted(things, key=lambda thing: thing.x)), int(rng.integers(1 << 31)))


def _places(rng: np.random.Generator, count: int, width: int, height: int) -> list[tuple[float, float, float]] | None:
    """Centre and size of each thing, or None where chance left no room."""
    shorter = min(width, height)
    largest = min(0.5, 0.75 / math.sqrt(count))
    places: list[tuple[float, float, float]] = []
    for _ in range(60):
        size = rng.uniform(_SMALLEST_SIZE, largest)
        half_x, half_y = 0.52 * size * shorter / width, 0.52 * size * shorter / height
        x, y = rng.uniform(half_x, 1 - half_x), rng.uniform(half_y, 1 - half_y)
        if any(abs(value - edge) < _ZONE_MARGIN for value in (x, y) for edge in _EDGES):
            continue
        if any(abs(x - other) < _ORDER_MARGIN for other, _, _ in places):
            continue
        near = (
            math.hypot((x - a) * width, (y - b) * height) < 0.54 * (size + other) * shorter for a, b, other in places
        )
        if any(near):
            continue
        places.append((x, y, size))
        if len(places) == count:
            return places
    return None


def _turn(rng: np.random.Generator, shape: str) -> float:
    return float(rng.uniform(-math.pi, math.pi) if shape == "star" else rng.uniform(-0.25, 0.25))


def _rgb(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    hue, spread = COLOURS[colour]
    value = rng.uniform(0.78, 1.0) if colour in ("yellow", "cyan") else rng.uniform(0.6, 1.0)
    rgb = colorsys.hsv_to_rgb((hue + rng.uniform(-spread, spread)) % 360 / 360, rng.uniform(0.75, 1.0), value)
    red, green, blue = (round(255 * channel) for channel in rgb)
    return red, green, blue


# --- grounds -----------------------------------------------------------------------------------------------


def _ground(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """[height, width, 3] uint8 of little saturation."""
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))](width, height, rng)  # [height, width] from 0 to 1
    dark, light = (np.array(_pale(rng)) for _ in range(2))
    light = dark + (light - dark) * rng.uniform(0.3, 1.0)
    values = dark + pattern[:, :, None].astype(np.float32) * (light - dark)
    return np.clip(values * 255, 0, 255).astype(np.uint8)


def _pale(rng: np.random.Generator) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.2), rng.uniform(0.05, 1.0))


def _plain(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((height, width), np.float32)


def _gradient(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    along = _project(width, height, rng)
    return (along - along.min()) / np.ptp(along)


def _stripes(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(_project(width, height, rng) * rng.uniform(15, 80))


def _checks(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    cells = rng.integers(4, 16)
    x, y = np.arange(width) * cells // width, np.arange(height) * cells // height
    return ((x[None] + y[:, None]) % 2).astype(np.float32)


def _grain(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random((height, width), dtype=np.float32)


def _clouds(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.random((8, 8), dtype=np.float32), mode="F")
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _project(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Position along a random direction, in shares of the shorter side."""
    angle = rng.uniform(0, math.pi)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    return (x[None] * math.cos(angle) + y[:, None] * math.sin(angle)) / min(width, height)


_PATTERNS: tuple[Callable[[int, int, np.random.Generator], np.ndarray], ...] = (
    _plain,
    _plain,
    _gradient,
    _stripes,
    _checks,
    _grain,
    _clouds,
)


# --- shapes ------------------------------------------------------------------------------------------------


def _mask(thing: Thing, width: int, height: int) -> tuple[Image.Image, int, int]:
    """Coverage of the thing's square from 0 to 255, and the square's left and top."""
    side = max(round(thing.size * min(width, height)), 4)
    large = side * _SUPERSAMPLING
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if thing.shape in ("circle", "ring"):
        draw.ellipse((0, 0, large - 1, large - 1), fill=255)
        if thing.shape == "ring":
            inner = large * 0.26
            draw.ellipse((inner, inner, large - inner, large - inner), fill=0)
    else:
        corners = [(0.5 + 0.5 * x, 0.5 + 0.5 * y) for x, y in _turned(_OUTLINES[thing.shape], thing.turn)]
        draw.polygon([(x * large, y * large) for x, y in corners], fill=255)
    mask = mask.reduce(_SUPERSAMPLING)
    return mask, round(thing.x * width - side / 2), round(thing.y * height - side / 2)


def _turned(outline: list[tuple[float, float]], turn: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in outline]


def _around(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """`count` corners around the centre, the first at the top, at radii that take turns."""
    angles = (2 * math.pi * i / count - math.pi / 2 for i in range(count))
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


_ARM = 0.33
_OUTLINES = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": _around(3, (1.0,)),
    "star": _around(10, (1.0, 0.42)),
    "cross": [
        (_ARM, -0.92), (_ARM, -_ARM), (0.92, -_ARM), (0.92, _ARM), (_ARM, _ARM), (_ARM, 0.92),
        (-_ARM, 0.92), (-_ARM, _ARM), (-0.92, _ARM), (-0.92, -_ARM), (-_ARM, -_ARM), (-_ARM, -0.92),
    ],
}  # fmt: skip
