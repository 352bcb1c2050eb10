"""The lesion world: invented eyes with painted lesions, whose place is known to the pixel.

Every picture is made from random numbers: a round field of view, an orange ground, a bright disc from which vessels
run, a dark spot opposite to it. Three kinds of lesion are painted on it, one kind to a picture, up to three of them:

    dark blots      irregular, dark red, sharp edge; vessels are as dark
    bright specks   groups of small yellow dots; the disc is as bright
    pale patches    irregular, pale, soft edge

It resembles photographs of the retina as far as colours and shapes go, so that methods from medical imaging can be run
and graded. No picture shows a person or a disease, and nothing about either follows from it.

Everything follows from integers, as in ``vitx.glyphs``: scene i of a seed is the same whatever the batch it is drawn
in. B is the batch, S = 112 the side in pixels.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitx import metrics
from vitx.glyphs import SIZE, _stretch, _uniform, patch_fraction

CLASS_NAMES = ("healthy", "dark blots", "bright specks", "pale patches")
MOST = 3  # lesions in a picture
_SPECKS, _VESSELS, _CANDIDATES = 7, 7, 8
_COLOURS = torch.tensor([[0.0, 0.0, 0.0], [0.30, 0.05, 0.04], [1.0, 0.92, 0.45], [0.95, 0.84, 0.66]])  # of the classes
_AXIS = torch.arange(SIZE) + 0.5  # middles of the pixels
_Draw = Callable[..., Tensor]


class Scenes(NamedTuple):
    """A batch of pictures with their ground truth."""

    images: Tensor  # (B, 3, S, S) float32 in [0, 1]
    labels: Tensor  # (B,) int64, index in CLASS_NAMES
    masks: Tensor  # (B, S, S) bool, inside the outline of a lesion; empty in a healthy picture


def scenes(count: int, seed: int, start: int = 0, labels: Tensor | None = None, scale: float = 1.0) -> Scenes:
    """Draw scenes start to start + count of a seed.

    Args:
        count: number of scenes, at least 1. seed: any integer from 0 on.
        labels: (B,) classes; None draws them. The eye is the same whatever its label, so zeros take the lesions away.
        scale: of the lesions' size; 1 is usual.

    Returns:
        Scenes, images not yet normalised (see ``vitx.glyphs.normalise``).

    Raises:
        ValueError: a number out of range, or labels that do not fit.
    """
    if count < 1 or seed < 0 or start < 0:
        raise ValueError("scenes need a count of at least 1, a seed and a start of at least 0")
    draw = _drawing(count, seed, start, 0)
    drawn = (draw(0, len(CLASS_NAMES))).floor().long()
    images, disc = _eyes(draw)
    return paint(images, drawn if labels is None else labels, seed, start, scale, disc)


def paint(
    images: Tensor, labels: Tensor, seed: int, start: int = 0, scale: float = 1.0, avoid: Tensor | None = None
) -> Scenes:
    """Paint lesions on pictures (B, 3, 112, 112) in [0, 1], such as a photograph whose own lesions nobody has drawn.

    Args:
        labels: (B,) classes; 0 leaves the picture as it is. seed, start: as in ``scenes``. scale: of the size.
        avoid: (B, 2) x and y of a place that lesions keep away from.

    Raises:
        ValueError: pictures or labels that do not fit.
    """
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"lesions are painted on pictures (B, 3, {SIZE}, {SIZE}), not {tuple(images.shape)}")
    if labels.shape != images.shape[:1] or not ((labels >= 0) & (labels < len(CLASS_NAMES))).all():
        raise ValueError(f"labels must hold one of 0 to {len(CLASS_NAMES) - 1} for each of {len(images)} pictures")
    draw = _drawing(len(images), seed, start, 100)
    centres = _places(draw, avoid)  # (B, MOST, 2)
    present = torch.arange(MOST) < (1 + draw(0, MOST).floor())[:, None]  # (B, MOST)
    radii, bumps, phases = scale * draw(6, 9, MOST), draw(0.05, 0.2, MOST, 2), draw(0, 2 * torch.pi, MOST, 2)
    offsets, sizes = scale * draw(-7, 7, MOST, _SPECKS, 2), scale * draw(1.3, 2.6, MOST, _SPECKS)
    strength = draw(0.45, 0.85)
    outside = torch.full((len(images), SIZE, SIZE), 1e3)  # distance in pixels from the nearest outline
    for which in range(MOST):
        x, y = _from(centres[:, which])
        angle = torch.atan2(y, x)
        wobble = sum(
            _wide(bumps[:, which, k]) * torch.cos((k + 2) * angle + _wide(phases[:, which, k])) for k in range(2)
        )
        blot = (x * x + y * y).sqrt() - _wide(radii[:, which]) * (1 + wobble)
        rows = (labels == 2).nonzero()[:, 0]
        for speck in range(_SPECKS):  # the first one replaces the blot
            place, size = offsets[rows, which, speck], _wide(sizes[rows, which, speck])
            dot = ((x[rows] - _wide(place[:, 0])) ** 2 + (y[rows] - _wide(place[:, 1])) ** 2).sqrt() - size
            blot[rows] = torch.minimum(blot[rows], dot) if speck else dot
        there = _wide(present[:, which] & (labels > 0))
        outside = torch.where(there, torch.minimum(outside, blot), outside)
    soft = _wide(torch.where(labels == 3, 4.0, 1.0))  # pixels from nothing to all
    cover = ((0.5 - outside / soft).clamp(0, 1) * _wide(strength))[:, None]  # (B, 1, S, S)
    painted = images * (1 - cover) + cover * _COLOURS[labels][:, :, None, None]
    return Scenes(painted, labels, outside <= 0)


class Grades(NamedTuple):
    """How well maps find the lesions, (B,) each, from 0 to 1; ``maps.roll(1, 0)``, of other pictures, show chance."""

    pointing: Tensor  # does the most relevant patch touch a lesion?
    mass: Tensor  # share of the positive relevance in patches that touch one
    iou: Tensor  # overlap of these patches with as many of the most relevant ones


def grade(maps: Tensor, masks: Tensor) -> Grades:
    """Grade maps (B, gh, gw), or of every pixel, by masks (B, S, S) that each hold a lesion."""
    touched = patch_fraction(masks, (maps.shape[1], maps.shape[2])) > 0
    flat = touched.flatten(1)
    count = flat.sum(1)
    place = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1)  # 0 is the most relevant patch
    chosen = place < count[:, None]
    both = (chosen & flat).sum(1)
    inside = touched.to(maps)
    return Grades(metrics.pointing_game(maps, inside), metrics.mass_inside(maps, inside), both / (2 * count - both))


def _eyes(draw: _Draw) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, S, S) without lesions, and x, y of the bright disc (B, 2)."""
    middle = SIZE / 2
    side = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)  # left or right eye
    disc = torch.stack([middle + side * draw(22, 34), middle + draw(-8, 8)], -1)
    spot = torch.stack([middle - side * draw(0, 10), middle + draw(-6, 6)], -1)
    x, y = _from(torch.full_like(disc, middle))
    from_middle = (x * x + y * y).sqrt()
    x, y = _from(spot)
    shade = 1 - 0.35 * torch.exp(-(x * x + y * y) / 100) - 0.3 * (from_middle / middle) ** 2
    shade = shade + _stretch(draw(-0.15, 0.15, 1, 6, 6), SIZE, SIZE / 5)[:, 0]
    shade = shade + _stretch(draw(-1, 1, 1, 57, 57), SIZE, 2.0)[:, 0] * _wide(draw(0, 0.06))
    ground = torch.stack([draw(0.65, 0.85), draw(0.28, 0.42), draw(0.08, 0.2)], -1)  # (B, 3)
    images = ground[:, :, None, None] * shade[:, None]

    x, y = _from(disc)
    distance, angle = (x * x + y * y).sqrt(), torch.atan2(y, x)
    cover = ((_wide(draw(7, 9.5)) - distance) / 2 + 0.5).clamp(0, 1)[:, None]
    images = images * (1 - cover) + cover * torch.tensor([1.0, 0.86, 0.56])[:, None, None]
    starts = 2 * torch.pi * (torch.arange(_VESSELS) + draw(-0.35, 0.35, _VESSELS)) / _VESSELS
    bends, sways = draw(-0.015, 0.015, _VESSELS), draw(0, 0.1, _VESSELS)  # radians per pixel, radians
    pace, phases, widths = draw(0.12, 0.35, _VESSELS), draw(0, 2 * torch.pi, _VESSELS), draw(0.7, 1.8, _VESSELS)
    outside = torch.full_like(distance, 1e3)
    for v in range(_VESSELS):
        towards = _wide(starts[:, v]) + _wide(bends[:, v]) * distance
        towards = towards + _wide(sways[:, v]) * torch.sin(_wide(pace[:, v]) * distance + _wide(phases[:, v]))
        turn = (angle - towards) / (2 * torch.pi)
        away = (turn - turn.round()).abs() * 2 * torch.pi * distance  # pixels along the circle
        outside = torch.minimum(outside, away - _wide(widths[:, v]) * (1 - distance / 150))
    cover = (0.5 - outside).clamp(0, 1)[:, None] * _wide(draw(0.6, 1))[:, None]
    images = images * (1 - cover * (1 - torch.tensor([0.55, 0.3, 0.3])[:, None, None]))
    field = (_wide(draw(50, 58)) - from_middle + 0.5).clamp(0, 1)[:, None]
    return (images * field * _wide(draw(0.85, 1.15))[:, None]).clamp(0, 1), disc


def _places(draw: _Draw, avoid: Tensor | None) -> Tensor:
    """x, y of the lesions (B, MOST, 2): the first of some candidates that is 18 pixels or more from ``avoid``."""
    reach, angle = 36 * draw(0, 1, MOST, _CANDIDATES).sqrt(), draw(0, 2 * torch.pi, MOST, _CANDIDATES)
    places = SIZE / 2 + reach[..., None] * torch.stack([angle.cos(), angle.sin()], -1)  # (B, MOST, candidates, 2)
    if avoid is None:
        return places[:, :, 0]
    free = (places - avoid[:, None, None]).norm(dim=-1) >= 18
    first = free.int().argmax(-1)  # of equal values the first
    return places.gather(2, first[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]


def _drawing(count: int, seed: int, start: int, first: int) -> _Draw:
    """draw(low, high, *shape) gives (B, *shape) float32, from a stream of its own at every call, the ``first`` on."""
    index, stream = np.arange(start, start + count, dtype=np.uint64), itertools.count(first)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        uniform = _uniform(seed, index, next(stream), shape)
        return torch.from_numpy(low + (high - low) * uniform).float()

    return draw


def _from(places: Tensor) -> tuple[Tensor, Tensor]:
    """x and y (B, S, S) of every pixel, seen from places (B, 2)."""
    x, y = _AXIS - places[:, :1], _AXIS - places[:, 1:]  # (B, S)
    return x[:, None].expand(-1, SIZE, -1), y[:, :, None].expand(-1, -1, SIZE)


def _wide(x: Tensor) -> Tensor:
    """(B,) to (B, 1, 1)."""
    return x[:, None, None]
