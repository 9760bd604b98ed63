"""Trains the reduced vision encoder to say of each cell of a picture what lies there.

First the convolutions, on crops and with a classifier after each stage; then all the rest on the maps that those of
high resolution, now fixed, make of whole pictures. The classifiers are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma3n_onnx.graphs import ops
from gemma3n_onnx.graphs.vision import OUTPUT_SIDE, Grid, VisionConfig, VisionEncoder
from gemma3n_onnx.runtime.media.image import resize

from .optimizer import Optimizer, split
from .pictures import COLOURS, MAX_THINGS, SHAPES, Picture, random_picture
from .progress import Progress
from .questions import NUMBERS
from .words import Words
from .workers import in_processes

SIDE = 256
CROP = 8  # cells to a side
FINE = 4  # of the finest labels so many are to a side of a cell
CHUNK = 100
EARLY_STAGES = 2

CLASSES: Mapping[str, Sequence[str | None]] = {
    "shape": (None, *SHAPES),
    "colour": (None, *COLOURS),
    "rank": (None, *NUMBERS[1 : MAX_THINGS + 1]),
    "row": (None, "top", None, "bottom"),
    "column": (None, "left", None, "right"),
    "centre": (None, None),
}
"""What the output is trained to say of a cell, and the words for it. 0 is the ground; `rank` counts things from the
left; `centre` is 1 in the one cell of a thing that its centre lies in."""
GROUND_WEIGHT = 0.25
FIRST_WEIGHTS = {"centre": 1 / 3}
"""Of class 0 in the loss, where it is not `GROUND_WEIGHT`."""
WEIGHTS = {"rank": 2.5}
"""Of all the loss for what takes a look at the whole picture; others 1."""

FIRST_STEPS, EARLY_STEPS, EARLY_BATCH = 80, 900, 32
MUON_LR = 3e-2
LATE_STEPS, LATE_BATCH = 230, 24
ALL_BLOCKS_SHARE = 0.1
"""Of the late steps, the last so many are taken with all blocks. Before, of the pairs of attention and feed-forward
block that end the last two stages only the first `FIRST_PAIRS` are there: a pair begins by adding next to nothing."""
FIRST_PAIRS = (2, 3)
CONVOLUTIONS = (9, 1)  # blocks before the pairs
FIRST_GAMMA, LATER_GAMMA = 0.3, 0.03


@dataclass(frozen=True)
class PictureSet:
    """`pixels` [n, SIDE, SIDE, 3] uint8; `fine` [n, 64, 64], the colour of every fourth pixel from 1, or 0 for the
    ground; `cells`: [n, 16, 16] for each of `CLASSES`."""

    pictures: list[Picture]
    pixels: Tensor
    fine: Tensor
    cells: Mapping[str, Tensor]


def picture_set(seed: int, count: int) -> PictureSet:
    """`count` random pictures, rounded up to a multiple of `CHUNK`; equal arguments, equal pictures."""
    chunks = in_processes(_chunk, [(seed, number) for number in range(-(-count // CHUNK))])
    pictures = [picture for chunk in chunks for picture in chunk[0]]
    pixels, fine, cells = (torch.from_numpy(np.concatenate([chunk[i] for chunk in chunks])) for i in (1, 2, 3))
    return PictureSet(pictures, pixels, fine.long(), {name: cells[:, i].long() for i, name in enumerate(CLASSES)})


def _chunk(seed: tuple[int, int]) -> tuple[list[Picture], np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pictures = [random_picture(rng) for _ in range(CHUNK)]
    pixels = np.stack([np.asarray(resize(picture.draw(), SIDE)) for picture in pictures])
    fine = np.stack([_colours(picture)[picture.owners(SIDE // FINE)] for picture in pictures])
    return pictures, pixels, fine, np.stack([_cells(picture) for picture in pictures])


def _colours(picture: Picture) -> np.ndarray:
    return np.array([0, *(1 + list(COLOURS).index(thing.colour) for thing in picture.things)])


def _cells(picture: Picture) -> np.ndarray:
    """[classes, 16, 16]."""
    owners = picture.surrounds(OUTPUT_SIDE)
    centre = np.zeros_like(owners)
    for thing in picture.things:
        centre[int(thing.y * OUTPUT_SIDE), int(thing.x * OUTPUT_SIDE)] = 1
    of_things = (
        np.array([0, *(1 + SHAPES.index(thing.shape) for thing in picture.things)]),
        _colours(picture),
        np.arange(len(picture.things) + 1),
        np.array([0, *(1 + thing.row for thing in picture.things)]),
        np.array([0, *(1 + thing.column for thing in picture.things)]),
    )
    return np.stack([*(values[owners] for values in of_things), centre])


def train_vision(
    config: VisionConfig, pictures: PictureSet, words: Words, rng: torch.Generator, progress: Progress
) -> tuple[VisionEncoder, Tensor]:
    """An encoder of `config`, and the pictures' soft tokens [n, 256, H] fp16 by it.

    `words(names)` makes a classifier of soft tokens. The embedder's rows of hard tokens stay as they begin.
    """
    encoder = VisionEncoder(config)
    _initialize(encoder, rng)
    maps = _train_early(encoder, config, pictures, rng, progress)
    _train_late(encoder, maps, pictures.cells, words, rng, progress)
    encoder.requires_grad_(False)
    progress.stage("Encoding the pictures: all layers")
    features = [_late_features(encoder, some).unflatten(0, (len(some), -1)).half() for some in maps.split(16)]
    return encoder, torch.cat(features)


@torch.no_grad()
def _initialize(encoder: VisionEncoder, rng: torch.Generator) -> None:
    for name, parameter in encoder.named_parameters():
        if parameter.ndim > 1:
            rows = torch.randn(parameter.shape, generator=rng).flatten(1)
            parameter.copy_((rows / rows.norm(dim=1, keepdim=True)).view_as(parameter))
        elif name.endswith("gamma"):
            parameter.fill_(FIRST_GAMMA)
        else:
            parameter.fill_(1.0)
    # A third of the stem sees colour alone and a third edges alone; all see 0.5, mid-grey, as about nothing.
    stem = encoder.vision_tower.timm_model.conv_stem.conv
    third = len(stem.weight) // 3
    stem.weight[:third] = stem.weight[:third].mean((2, 3), keepdim=True)
    stem.weight[third : 2 * third] -= stem.weight[third : 2 * third].mean((2, 3), keepdim=True)
    stem.weight.div_(stem.weight.flatten(1).norm(dim=1)[:, None, None, None])
    stem.bias.copy_(-0.5 * stem.weight.sum((1, 2, 3)) + 0.3 * torch.randn(stem.bias.shape, generator=rng))


# --- the layers of high resolution -------------------------------------------------------------------------


def _train_early(
    encoder: VisionEncoder, config: VisionConfig, pictures: PictureSet, rng: torch.Generator, progress: Progress
) -> Tensor:
    """Trains the stem, the first two stages and the third's convolutions on crops, with a head after each stage;
    returns the maps [n, 32, 32, channels] fp16 that the first two make of the pictures.

    Stem and first stage, which cost most, learn little but colours and edges: after `FIRST_STEPS` they stay as they
    are, and the others go on with their maps.
    """
    tower = encoder.vision_tower.timm_model
    stages = [*map(list, tower.blocks[:EARLY_STAGES]), list(tower.blocks[EARLY_STAGES])[: CONVOLUTIONS[0]]]
    heads = [
        nn.Linear(config.width(of_full_tower), len(CLASSES["colour"]) + len(CLASSES["shape"]))
        for of_full_tower in (128, 256, 640)
    ]
    parts = list(zip(stages, heads))

    def train_on_crops(inputs: Tensor, enter: Enter, start: int, steps: int) -> None:
        modules = [module for blocks, head in parts[start:] for module in (*blocks, head)]
        learned = nn.ModuleList([tower.conv_stem, *modules] if start == 0 else modules)
        optimizer = Optimizer(*split(learned), steps, muon_lr=MUON_LR)
        for step in range(steps):
            values, fine, cells = _crops(inputs, pictures, rng)
            x, grid = enter(values)
            loss = torch.zeros(())
            for blocks, head in parts[start:]:
                for block in blocks:
                    x, grid = block(x, grid)
                loss = loss + _crop_loss(head(x), grid.height.number, fine, cells, colour_only=blocks is stages[0])
            progress.step(step + 1, steps, optimizer.step([loss]))

    def stem(pixels: Tensor) -> tuple[Tensor, Grid]:
        return tower.conv_stem(_normalized(pixels))

    progress.stage("Training the vision encoder: first layers")
    train_on_crops(pictures.pixels, stem, 0, FIRST_STEPS)
    progress.stage("Encoding the pictures: first layers")
    maps = _encoded(pictures.pixels, stem, stages[0])
    progress.stage("Training the vision encoder: other convolutions")
    train_on_crops(maps, _entered, 1, EARLY_STEPS)
    return _encoded(maps, _entered, stages[1])


Enter = Callable[[Tensor], tuple[Tensor, Grid]]


def _entered(maps: Tensor) -> tuple[Tensor, Grid]:
    """[n, height, width, channels] -> [n * height * width, channels], as blocks take it."""
    sizes = (ops.Size(size, torch.tensor([size])) for size in maps.shape[:3])
    return maps.float().flatten(0, 2), Grid(*sizes)


@torch.no_grad()
def _encoded(inputs: Tensor, enter: Enter, blocks: Sequence[nn.Module]) -> Tensor:
    """[n, height, width, channels] -> maps [n, height, width, channels] fp16, by `blocks`."""
    maps = []
    for some in inputs.split(16):
        x, grid = enter(some)
        for block in blocks:
            x, grid = block(x, grid)
        maps.append(x.view(len(some), grid.height.number, grid.width.number, -1).half())
    return torch.cat(maps)


def _crops(inputs: Tensor, pictures: PictureSet, rng: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A batch of squares of `CROP` cells, of `inputs`, the fine labels and those of the cells; mirrored at random."""
    parts = []
    for chosen in torch.randint(len(inputs), (EARLY_BATCH,), generator=rng).tolist():
        top, left, flips = torch.randint(OUTPUT_SIDE - CROP + 1, (3,), generator=rng).tolist()
        axes = [axis for axis in (0, 1) if flips >> axis & 1]

        def cut(x: Tensor) -> Tensor:
            scale = x.shape[1] // OUTPUT_SIDE
            rows, columns = (slice(first * scale, (first + CROP) * scale) for first in (top, left))  # noqa: B023
            return x[chosen, rows, columns].flip(axes)  # noqa: B023

        parts.append(tuple(map(cut, (inputs, pictures.fine, pictures.cells["colour"], pictures.cells["shape"]))))
    values, fine, colour, shape = (torch.stack(part) for part in zip(*parts))
    return values, fine, {"colour": colour, "shape": shape}


def _crop_loss(logits: Tensor, side: int, fine: Tensor, cells: Mapping[str, Tensor], *, colour_only: bool) -> Tensor:
    """Of a head after a stage whose map of a crop has `side` rows."""
    colour, shape = logits.split([len(CLASSES[name]) for name in ("colour", "shape")], dim=1)
    to_cells = FINE * CROP // side
    loss = _cross_entropy(colour, cells["colour"] if side == CROP else fine[:, ::to_cells, ::to_cells])
    return loss if colour_only else loss + _cross_entropy(shape, _repeated(cells["shape"], side))


def _repeated(labels: Tensor, side: int) -> Tensor:
    times = side // labels.shape[1]
    return labels.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _normalized(pixels: Tensor) -> Tensor:
    """[n, h, w, 3] uint8 -> [n, 3, h, w] from 0 to 1, as the runtime's front end has it."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def _cross_entropy(logits: Tensor, labels: Tensor, first_weight: float = GROUND_WEIGHT) -> Tensor:
    weights = torch.ones(logits.shape[1])
    weights[0] = first_weight
    return F.cross_entropy(logits, labels.flatten(), weight=weights)


# --- the rest ----------------------------------------------------------------------------------------------


def _late_features(encoder: VisionEncoder, maps: Tensor, pairs: tuple[int, int] | None = None) -> Tensor:
    """Maps [n, height, width, channels] -> [n * 256, H], by all pairs of blocks or by the first ones of each stage."""
    tower = encoder.vision_tower.timm_model
    x, grid = _entered(maps)
    outputs = []
    for i, stage in enumerate(tower.blocks[EARLY_STAGES:]):
        count = len(stage) if pairs is None else CONVOLUTIONS[i] + 2 * pairs[i]
        for block in list(stage)[:count]:
            x, grid = block(x, grid)
        outputs.append((x, grid))
    (fine, fine_grid), (coarse, coarse_grid) = outputs
    return encoder.embed_vision.soft(tower.msfa(fine, coarse, fine_grid, coarse_grid) * encoder.scale)


def _train_late(
    encoder: VisionEncoder,
    maps: Tensor,
    cells: Mapping[str, Tensor],
    words: Words,
    rng: torch.Generator,
    progress: Progress,
) -> None:
    progress.stage("Training the vision encoder: all layers")
    tower, embedder = encoder.vision_tower.timm_model, encoder.embed_vision
    classifiers = {name: words(names) for name, names in CLASSES.items()}
    late_stages: list[nn.Module] = list(tower.blocks[EARLY_STAGES:])  # type: ignore[arg-type]
    modules = nn.ModuleList([*late_stages, tower.msfa, embedder.soft_embedding_norm, embedder.embedding_projection])
    for first, kept, stage in zip(CONVOLUTIONS, FIRST_PAIRS, tower.blocks[EARLY_STAGES:]):
        for block in list(stage)[first + 2 * kept :]:
            nn.init.constant_(block.layer_scale.gamma, LATER_GAMMA)  # type: ignore[union-attr, arg-type]
    optimizer = Optimizer(*split(modules), LATE_STEPS, muon_lr=MUON_LR, max_norm=2.0)
    for step in range(LATE_STEPS):
        chosen = torch.randint(len(maps), (LATE_BATCH,), generator=rng)
        pairs = FIRST_PAIRS if step < LATE_STEPS * (1 - ALL_BLOCKS_SHARE) else None
        features = _late_features(encoder, maps[chosen], pairs)
        losses = (
            WEIGHTS.get(name, 1.0)
            * _cross_entropy(classifier(features), cells[name][chosen], FIRST_WEIGHTS.get(name, GROUND_WEIGHT))
            for name, classifier in classifiers.items()
        )
        progress.step(step + 1, LATE_STEPS, optimizer.step([torch.stack(list(losses)).sum()]))
