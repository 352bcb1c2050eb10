"""The glyph world: small pictures whose evidence is known exactly, so that explanations can be graded.

A scene is a textured background, distractors and one or two creatures. A creature has five parts, each in one
of three variants, and its class is a combination of variants:

    class   body        crest    tail    eyes        pattern
    bado    round       spiked   forked  one-eyed    spotted
    cobi    round       spiked   bushy   two-eyed    belted
    dalu    round       knobbed  bushy   one-eyed    striped
    femo    round       fanned   curled  three-eyed  striped
    gipo    square      knobbed  forked  two-eyed    striped
    hazu    square      knobbed  curled  three-eyed  spotted
    kiro    square      fanned   forked  one-eyed    belted
    lumi    square      fanned   bushy   two-eyed    spotted
    moki    triangular  spiked   forked  three-eyed  striped
    napu    triangular  spiked   curled  two-eyed    spotted
    rovi    triangular  knobbed  curled  one-eyed    belted
    tazo    triangular  fanned   bushy   three-eyed  belted

Any two classes differ in at least three parts, every variant occurs in four classes, any three parts decide the
class and no two do. Colours, size, place, tilt, mirroring, gaze, background and distractors are free and carry
no class information.

Everything follows from integers: scene i of a seed is the same whatever the batch it is drawn in. Shapes are
signed distances in pixels (negative inside), rendered in a window around each creature. B is the batch, C the
number of creatures, P the five parts, S the side in pixels.

The idea of a synthetic world with exact part importance: Hesse, Schaub-Meyer, Roth, "FunnyBirds" (ICCV 2023);
Arras, Osman, Samek, "CLEVR-XAI" (2022).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PARTS = ("body", "crest", "tail", "eyes", "pattern")
VARIANTS = {
    "body": ("round", "square", "triangular"),
    "crest": ("spiked", "knobbed", "fanned"),
    "tail": ("forked", "curled", "bushy"),
    "eyes": ("one-eyed", "two-eyed", "three-eyed"),
    "pattern": ("striped", "spotted", "belted"),
}
CLASS_NAMES = (
    "bado", "cobi", "dalu", "femo", "gipo", "hazu", "kiro", "lumi", "moki", "napu", "rovi", "tazo",
)  # fmt: skip
# Row: class; column: variant of each part, in the order of PARTS. A ternary code of distance 3.
CLASS_PARTS = (
    (0, 0, 0, 0, 1),
    (0, 0, 2, 1, 2),
    (0, 1, 2, 0, 0),
    (0, 2, 1, 2, 0),
    (1, 1, 0, 1, 0),
    (1, 1, 1, 2, 1),
    (1, 2, 0, 0, 2),
    (1, 2, 2, 1, 1),
    (2, 0, 0, 2, 0),
    (2, 0, 1, 1, 1),
    (2, 1, 1, 0, 2),
    (2, 2, 2, 2, 2),
)
CAPTION_WORDS = tuple(
    sorted({"a", "and", "creature", "crest", "tail", "with"} | set(itertools.chain(*VARIANTS.values())))
)
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
SIZE = 112  # pixels, the side of a full scene

# Back to front; the reverse is the order in which layers hide each other.
_LAYERS = ("tail", "crest", "body", "pattern", "eyes")
_DISTRACTORS = 7  # in a scene of 112 pixels; fewer in smaller ones
_DISTRACTOR_WINDOW = 24  # pixels


class Parameters(NamedTuple):
    """All that is drawn at random for a batch of scenes: enough to render it again, whole or without a part."""

    size: int  # S
    variants: Tensor  # (B, C, P) int64, variant of each part, in the order of PARTS
    centres: Tensor  # (B, C, 2) x, y in pixels
    radii: Tensor  # (B, C) pixels; the creature lies inside the circle of this radius
    turns: Tensor  # (B, C, 2) cosine and sine of the tilt
    flips: Tensor  # (B, C) 1, or -1 where the creature looks the other way
    colours: Tensor  # (B, C, 4, 3) of tail, crest, body, pattern
    gaze: Tensor  # (B, C, 2) where the pupils look, in shares of the eye's radius
    distractors: Tensor  # (B, D, 10) x, y, cosine, sine, a, b, c, d (half sides of two boxes), rounding, hollow
    distractor_colours: Tensor  # (B, D, 3)
    ground: Tensor  # (B, 3, 6, 6) coarse colours of the background
    grain: Tensor  # (B, 1, 29, 29) fine brightness of the background, -1 to 1
    waves: Tensor  # (B, 2, 4) texture: frequency along x and y (per pixel), phase, amplitude
    grain_strength: Tensor  # (B,)
    brightness: Tensor  # (B,)


class Scenes(NamedTuple):
    """A batch of rendered scenes with their ground truth; a missing second creature has empty masks."""

    images: Tensor  # (B, 3, S, S) float32 in [0, 1]
    labels: Tensor  # (B, 2) int64, -1 where there is no second creature
    object_masks: Tensor  # (B, 2, S, S) bool, visible pixels of each creature
    part_masks: Tensor  # (B, 2, P, S, S) bool, visible pixels of each part; they share anti-aliased edges
    boxes: Tensor  # (B, 2, 4) float32 x0, y0, x1, y1 in pixels, bounding object_masks; zeros where there is none
    parameters: Parameters


def scenes(n: int, seed: int, creatures: int = 1, size: int = SIZE, start: int = 0) -> Scenes:
    """Draw scenes start to start + n of a seed.

    Args:
        n: number of scenes, at least 1.
        seed: any integer from 0 on; other seeds give unrelated scenes.
        creatures: 1, or 2 creatures of different classes.
        size: side in pixels, at least 48 (one creature) or 96 (two).
        start: index of the first scene.

    Returns:
        Scenes, images not yet normalised (see `normalise`).

    Raises:
        ValueError: a number outside the ranges above.
    """
    labels, parameters = draw(n, seed, creatures, size, start)
    return render(parameters, labels)


def crops(n: int, seed: int, size: int = 56, start: int = 0) -> Scenes:
    """Tight pictures of one creature at the same scale as in full scenes, rendered directly at that size."""
    return scenes(n, seed, creatures=1, size=size, start=start)


def batch(n: int, seed: int, creatures: int = 1, size: int = SIZE, start: int = 0) -> tuple[Tensor, Tensor]:
    """The images and labels of `scenes` without the masks: the quick path for training.

    Returns:
        images (n, 3, S, S) float32 in [0, 1] and labels (n, 2).
    """
    labels, parameters = draw(n, seed, creatures, size, start)
    return _render(parameters)[0], labels


def without_part(scenes: Scenes, part: str, creature: int = 0) -> Tensor:
    """The same scenes without one part of one creature.

    What lies behind the part appears; what lies on it stays. Only pixels of that part's mask change.

    Args:
        scenes: from `scenes`, B of them.
        part: one of PARTS.
        creature: 0 or 1.

    Returns:
        images (B, 3, S, S) in [0, 1].

    Raises:
        ValueError: no such part or creature.
    """
    if part not in PARTS:
        raise ValueError(f"a creature has no part {part!r}; its parts are {', '.join(PARTS)}")
    if not 0 <= creature < scenes.parameters.variants.shape[1]:
        raise ValueError(f"there is no creature {creature} in these scenes")
    return _render(scenes.parameters, missing=(creature, part))[0]


def captions(scenes: Scenes) -> list[str]:
    """One caption for each scene; its words are in CAPTION_WORDS.

    For example "a striped round one-eyed creature with a knobbed crest and a bushy tail". Two creatures are joined
    with "and".
    """
    return [" and ".join(_caption(row) for row in rows) for rows in scenes.parameters.variants.tolist()]


def clip(scenes: Scenes, frames: int) -> Tensor:
    """A short film of each scene: every creature travels, bobbing, from its place to another one.

    Frame 0 is the scene itself; background and distractors stand still.

    Args:
        scenes: from `scenes`, B of them.
        frames: T, at least 1.

    Returns:
        (B, T, 3, S, S) in [0, 1].
    """
    start = scenes.parameters
    batch = len(start.radii)
    # The scene's own numbers serve as the seed of the path: gaze is uniform in a square and says nothing else.
    room = start.size - 2 * start.radii[..., None]
    end = start.radii[..., None] + room * (start.gaze / 0.7 + 0.5)  # (B, C, 2)
    time = torch.linspace(0, 1, frames)[:, None, None, None]  # (T, 1, 1, 1)
    bob = torch.stack([torch.zeros(frames), torch.sin(time.flatten() * 4 * torch.pi)], -1)[:, None, None]
    centres = start.centres * (1 - time) + end * time - 2 * bob  # (T, B, C, 2)
    centres = torch.minimum(centres, start.size - start.radii[..., None])
    centres = torch.maximum(centres, start.radii[..., None]).transpose(0, 1).flatten(0, 1)  # (B T, C, 2)
    rows = torch.arange(batch).repeat_interleave(frames)
    images = _render(_select(start, rows)._replace(centres=centres))[0]
    return images.unflatten(0, (batch, frames))


def select(scenes: Scenes, rows: Tensor) -> Scenes:
    """Some of the scenes: rows is (K,) indices or (B,) bool."""
    *fields, parameters = scenes
    return Scenes(*(field[rows] for field in fields), parameters=_select(parameters, rows))


def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] to what the models of the glyph world expect."""
    mean, std = (torch.tensor(x, dtype=images.dtype, device=images.device) for x in (MEAN, STD))
    return (images - mean[:, None, None]) / std[:, None, None]


def patch_fraction(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each patch that a mask covers.

    Args:
        masks: (..., H, W) bool or float.
        grid: (gh, gw), dividing H and W.

    Returns:
        (..., gh, gw) float32 in [0, 1].

    Raises:
        ValueError: the grid does not divide the picture.
    """
    height, width = masks.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not divide {height} x {width} pixels")
    return functional.avg_pool2d(
        masks.float().reshape(-1, 1, height, width), (height // grid[0], width // grid[1])
    ).reshape(*masks.shape[:-2], *grid)


def draw(n: int, seed: int, creatures: int = 1, size: int = SIZE, start: int = 0) -> tuple[Tensor, Parameters]:
    """Labels (n, 2) and parameters of scenes, before rendering. Arguments and errors as in `scenes`."""
    if n < 1 or seed < 0 or start < 0:
        raise ValueError("scenes need n of at least 1, a seed and a start of at least 0")
    if creatures not in (1, 2):
        raise ValueError(f"a scene has 1 or 2 creatures, not {creatures}")
    if size < (48 if creatures == 1 else 96):
        raise ValueError(f"{size} pixels are too few for {creatures} creature(s)")
    index = np.arange(start, start + n, dtype=np.uint64)
    stream = itertools.count()

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return low + (high - low) * _uniform(seed, index, next(stream), shape)

    # Two classes that differ.
    first = np.floor(uniform(0, 12)).astype(np.int64)
    second = (first + 1 + np.floor(uniform(0, 11)).astype(np.int64)) % 12
    labels = np.stack([first, second if creatures == 2 else np.full_like(first, -1)], 1)

    largest = min(33.0, 0.49 * size) if creatures == 1 else 27.0
    radii = uniform(22, largest, 2)
    # Candidate places of both creatures; the first pair far enough apart wins, else the farthest.
    places = uniform(0, 1, 32, 2, 2)
    places = radii[:, None, :, None] + places * (size - 2 * radii[:, None, :, None])
    distance = np.hypot(*np.moveaxis(places[:, :, 0] - places[:, :, 1], -1, 0))  # (n, 32)
    enough = distance > 0.85 * radii.sum(1, keepdims=True)
    winner = np.argmax(np.where(enough, 1e3 - np.arange(32), distance), 1)
    centres = places[np.arange(n), winner]  # (n, 2, 2)

    tilt = uniform(-0.35, 0.35, 2)  # radians, 20 degrees either way
    hue = uniform(0, 1, 2, 4)
    saturation, value = uniform(0.45, 0.95, 2, 4), uniform(0.65, 1, 2, 4)
    # The pattern is either darker or paler than the body.
    dark = uniform(0, 1, 2) < 0.5
    value[:, :, 3] = np.where(dark, 0.3 * value[:, :, 3], 1)
    saturation[:, :, 3] = np.where(dark, saturation[:, :, 3], 0.2 * saturation[:, :, 3])
    colours = _rgb(hue, saturation, value)  # (n, 2, 4, 3)

    # Distractors: bars, crosses, blobs and frames, half of them in a colour of the first creature.
    count = max(2, round(_DISTRACTORS * (size / SIZE) ** 2))
    half = uniform(3, 8, count)
    thin = half * uniform(0.3, 0.5, count)
    kind = np.floor(uniform(0, 5, count))  # bar, cross, disc, square, frame
    bar, cross, disc = kind == 0, kind == 1, kind == 2
    half = np.where(disc | (kind >= 3), 0.75 * half, half)
    short = np.where(bar | cross, thin, half)
    angle = uniform(0, np.pi, count)
    distractors = np.stack(
        [
            *np.moveaxis(uniform(0, size, count, 2), -1, 0),
            np.cos(angle),
            np.sin(angle),
            half,
            short,
            np.where(cross, short, half),
            np.where(cross, half, short),
            np.where(disc, half, np.minimum(short, 1.0)),
            kind == 4,
        ],
        -1,
    )
    own = np.take_along_axis(colours[:, 0], np.floor(uniform(0, 4, count)).astype(int)[..., None], 1)
    other = _rgb(uniform(0, 1, count), uniform(0.45, 0.95, count), uniform(0.3, 1, count))
    distractor_colours = np.where((uniform(0, 1, count) < 0.5)[..., None], own, other)

    # Background: muted colours that drift over the picture.
    base = _rgb(uniform(0, 1), uniform(0, 0.4), uniform(0.35, 0.85))
    ground = base[:, :, None, None] + uniform(-0.1, 0.1, 3, 6, 6)
    frequency, angle = uniform(0.03, 0.14, 2), uniform(0, np.pi, 2)
    waves = np.stack(
        [
            frequency * np.cos(angle),
            frequency * np.sin(angle),
            uniform(0, 1, 2),
            np.maximum(uniform(-0.12, 0.12, 2), 0),
        ],
        -1,
    )
    return torch.from_numpy(labels), Parameters(
        size,
        torch.tensor(CLASS_PARTS)[torch.from_numpy(labels[:, :creatures])],
        _tensor(centres[:, :creatures]),
        _tensor(radii[:, :creatures]),
        _tensor(np.stack([np.cos(tilt), np.sin(tilt)], -1)[:, :creatures]),
        _tensor(np.where(uniform(0, 1, 2) < 0.5, -1.0, 1.0)[:, :creatures]),
        _tensor(colours[:, :creatures]),
        _tensor(uniform(-0.35, 0.35, 2, 2)[:, :creatures]),
        _tensor(distractors),
        _tensor(distractor_colours),
        _tensor(ground),
        _tensor(uniform(-1, 1, 1, 29, 29)),
        _tensor(waves),
        _tensor(uniform(0, 0.12)),
        _tensor(uniform(0.8, 1.15)),
    )


def render(parameters: Parameters, labels: Tensor) -> Scenes:
    """Scenes with all their ground truth, from parameters; labels (B, 2) are passed through."""
    images, visible = _render(parameters, masks=True)
    batch, count = parameters.radii.shape
    part_masks = images.new_zeros(batch, 2, len(PARTS), *images.shape[-2:], dtype=torch.bool)
    part_masks[:, :count] = visible
    object_masks = part_masks.any(2)
    boxes = torch.stack([*_extent(object_masks.any(-2)), *_extent(object_masks.any(-1))], -1)
    boxes = boxes[..., [0, 2, 1, 3]] * object_masks.any(-1).any(-1)[..., None]
    return Scenes(images, labels, object_masks, part_masks, boxes, parameters)


def _render(
    parameters: Parameters, missing: tuple[int, str] | None = None, masks: bool = False
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and, if asked for, visible parts (B, C, P, S, S), else an empty tensor."""
    p = parameters
    canvas = _background(p)
    for which in range(p.distractors.shape[1]):
        _paint_distractor(canvas, p.distractors[:, which], p.distractor_colours[:, which])
    visible = torch.zeros(*p.radii.shape, len(PARTS) if masks else 0, p.size, p.size, dtype=torch.bool)
    for which in range(p.radii.shape[1]):
        window, x, y = _window(p.centres[:, which], min(p.size, 72), p.size)
        weights, colours, through = _creature(p, which, x, y, missing)
        _paint(canvas, window, colours, through)
        if masks:
            # What the later creature covers wholly is no longer visible.
            hidden = _spread(through[:, None] == 0, window, p.size)  # (B, 1, S, S)
            visible[:, :which] &= ~hidden[:, None]
            visible[:, which] = _spread(torch.stack([weights[part] > 0 for part in PARTS], 1), window, p.size)
    return (canvas * p.brightness[:, None, None, None]).clamp(0, 1), visible


def _creature(
    p: Parameters, which: int, x: Tensor, y: Tensor, missing: tuple[int, str] | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Visible share of each part (B, w, w), colour (B, 3, w, w) times cover, and what shines through (B, w, w).

    x and y (B, w, w) are pixels from the creature's centre.
    """
    radius, (cos, sin) = _wide(p.radii[:, which]), map(_wide, p.turns[:, which].unbind(-1))
    variants = dict(zip(PARTS, p.variants[:, which].unbind(-1), strict=True))
    # Own coordinates: the unit is the radius, x to the tail, y down, the origin near the middle of the creature.
    u = (x * cos + y * sin) / (radius * _wide(p.flips[:, which]))
    v = (y * cos - x * sin) / radius
    u, v = u + 0.2, v - 0.22  # the body's middle
    distances = {
        "body": _by_variant(_BODIES, variants["body"], u, v) * radius,
        "crest": _by_variant(_CRESTS, variants["crest"], u, v) * radius,
        "tail": _by_variant(_TAILS, variants["tail"], u, v) * radius,
        "pattern": _by_variant(_PATTERNS, variants["pattern"], u, v) * radius,
    }
    eye = _by_variant(_EYES, variants["eyes"], u, v)  # distance in radii
    # The pupils are the same eyes, smaller and shifted by the gaze.
    size = torch.tensor(_EYE_SIZES)[variants["eyes"]]
    look = p.gaze[:, which] * size[:, None]
    pupil = _by_variant(_EYES, variants["eyes"], u - _wide(look[:, 0]), v - _wide(look[:, 1]))
    pupil = _cover((pupil + 0.45 * _wide(size)) * radius)
    distances["eyes"] = eye * radius

    rim = (0.05 * radius).clamp(min=1)
    cover = {part: _cover(distance) for part, distance in distances.items()}
    cover["pattern"] = cover["pattern"] * _cover(distances["body"] + rim)
    if missing is not None and missing[0] == which:
        cover[missing[1]] = torch.zeros_like(x)
    # A thin dark outline, inside the part.
    shade = {part: 1 - 0.75 * (1 - _cover(distances[part] + rim)) for part in ("tail", "crest", "body")}
    shade["pattern"] = torch.ones_like(x)
    shade["eyes"] = (1 - 0.92 * pupil) * (1 - 0.75 * (1 - _cover(distances["eyes"] + 0.5 * rim)))

    through, weights, colours = torch.ones_like(x), {}, []
    for part in reversed(_LAYERS):
        weights[part] = cover[part] * through
        through = through * (1 - cover[part])
    shades = {part: weights[part] * shade[part] for part in _LAYERS}
    for channel in range(3):
        colour = shades["eyes"]
        for layer, part in enumerate(_LAYERS[:4]):
            colour = colour + shades[part] * _wide(p.colours[:, which, layer, channel])
        colours.append(colour)
    return weights, torch.stack(colours, 1), through


# Shapes: signed distance, roughly, in units of the creature's radius; u and v (K, w, w) from the body's middle.


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _box(x: Tensor, y: Tensor, a: float | Tensor, b: float | Tensor, rounding: float | Tensor) -> Tensor:
    """Rounded box of half sides a and b."""
    x, y = x.abs() - (a - rounding), y.abs() - (b - rounding)
    return _length(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp(max=0) - rounding


def _segment(x: Tensor, y: Tensor, start: tuple[float, float], end: tuple[float, float], width: float) -> Tensor:
    """Stroke of half the given width on either side."""
    (x0, y0), (x1, y1) = start, end
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return _length(x - x0 - along * dx, y - y0 - along * dy) - width


def _round_body(u: Tensor, v: Tensor) -> Tensor:
    return _length(u, v) - 0.49


def _square_body(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.46, 0.44, 0.08)


def _triangular_body(u: Tensor, v: Tensor) -> Tensor:
    side, k = 0.46, 3**0.5  # half a side before rounding
    x, y = u.abs() - side, side / k - (v - 0.10)
    beyond = x + k * y > 0
    x, y = torch.where(beyond, (x - k * y) / 2, x), torch.where(beyond, (-k * x - y) / 2, y)
    x = x - x.clamp(-2 * side, 0)
    return torch.where(y < 0, _length(x, y), -_length(x, y)) - 0.08


def _spiked_crest(u: Tensor, v: Tensor) -> Tensor:
    def spike(cos: float, sin: float, length: float, half: float) -> Tensor:
        along, across = u.abs() * sin - (v + 0.18) * cos, (u.abs() * cos + (v + 0.18) * sin).abs()
        slant = (across * length + along * half - half * length) / (length**2 + half**2) ** 0.5
        return torch.maximum(slant, -along)

    return torch.minimum(spike(1.0, 0.0, 0.85, 0.13), spike(0.80, 0.60, 0.80, 0.13))


def _knobbed_crest(u: Tensor, v: Tensor) -> Tensor:
    stalk = _segment(u.abs(), v, (0.08, -0.25), (0.25, -0.78), 0.05)
    return torch.minimum(stalk, _length(u.abs() - 0.25, v + 0.82) - 0.16)


def _fanned_crest(u: Tensor, v: Tensor) -> Tensor:
    v = v + 0.22
    # A sector of 55 degrees on either side.
    return torch.maximum(_length(u, v) - 0.74, u.abs() * 0.574 + v * 0.819)


def _forked_tail(u: Tensor, v: Tensor) -> Tensor:
    u, v = u - 0.3, (v - 0.02).abs()
    stem = _segment(u, v, (0, 0), (0.38, 0), 0.065)
    return torch.minimum(stem, _segment(u, v, (0.38, 0), (0.72, 0.32), 0.065))


def _curled_tail(u: Tensor, v: Tensor) -> Tensor:
    u, v = u - 0.3, v - 0.02
    stem = _segment(u, v, (0, 0), (0.28, 0.0), 0.065)
    return torch.minimum(stem, (_length(u - 0.53, v) - 0.22).abs() - 0.07)


def _bushy_tail(u: Tensor, v: Tensor) -> Tensor:
    # Intersection of two discs: a leaf of half length 0.46 and half width 0.25.
    u, v = u - 0.62, v - 0.02
    offset = (0.46**2 - 0.25**2) / 0.5
    return _length(u, v.abs() + offset) - (offset + 0.25)


def _one_eye(u: Tensor, v: Tensor) -> Tensor:
    return _length(u, v + 0.06) - _EYE_SIZES[0]


def _two_eyes(u: Tensor, v: Tensor) -> Tensor:
    return _length(u.abs() - 0.17, v + 0.04) - _EYE_SIZES[1]


def _three_eyes(u: Tensor, v: Tensor) -> Tensor:
    lower = _length(u.abs() - 0.16, v - 0.06)
    return torch.minimum(lower, _length(u, v + 0.20)) - _EYE_SIZES[2]


def _striped(u: Tensor, v: Tensor) -> Tensor:
    return (u / 0.30 + 0.5 - (u / 0.30 + 0.5).floor() - 0.5).abs() * 0.30 - 0.075


def _spotted(u: Tensor, v: Tensor) -> Tensor:
    # Two square lattices, one in the middle of the other's cells.
    def lattice(shift: float) -> Tensor:
        x, y = u / 0.44 + shift, v / 0.44 + shift
        return _length(x - x.floor() - 0.5, y - y.floor() - 0.5) * 0.44

    return torch.minimum(lattice(0.0), lattice(0.5)) - 0.095


def _belted(u: Tensor, v: Tensor) -> Tensor:
    return (v - 0.24).abs() - 0.11


_Shape = Callable[[Tensor, Tensor], Tensor]
_EYE_SIZES = (0.21, 0.145, 0.115)
# In the order of VARIANTS.
_BODIES = (_round_body, _square_body, _triangular_body)
_CRESTS = (_spiked_crest, _knobbed_crest, _fanned_crest)
_TAILS = (_forked_tail, _curled_tail, _bushy_tail)
_EYES = (_one_eye, _two_eyes, _three_eyes)
_PATTERNS = (_striped, _spotted, _belted)


def _by_variant(shapes: tuple[_Shape, ...], variant: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(B, w, w): each scene's own variant of a shape."""
    distance = torch.empty_like(u)
    for number, shape in enumerate(shapes):
        rows = (variant == number).nonzero()[:, 0]
        distance[rows] = shape(u[rows], v[rows])
    return distance


def _cover(distance: Tensor) -> Tensor:
    """Share of a pixel that lies inside, from the distance in pixels of its middle: exactly 0 and 1 beyond half."""
    return (0.5 - distance).clamp(0, 1)


def _background(p: Parameters) -> Tensor:
    """(B, 3, S, S)."""
    axis = torch.arange(p.size, dtype=torch.float32)
    texture = _stretch(p.grain, p.size, 4.0) * p.grain_strength[:, None, None, None]
    for wave in range(p.waves.shape[1]):
        fx, fy, phase, amplitude = (x[:, None, None, None] for x in p.waves[:, wave].unbind(-1))
        turn = axis * fx + (axis[:, None] * fy + phase)
        texture = texture + ((turn - turn.floor() - 0.5).abs() * 4 - 1) * amplitude
    return _stretch(p.ground, p.size, SIZE / 5) + texture


def _stretch(grid: Tensor, size: int, step: float) -> Tensor:
    """Bilinear: (B, K, g, g) of points `step` pixels apart to (B, K, size, size)."""
    # Written out, because library interpolation need not be the same to the bit for every batch size.
    place = torch.arange(size) / step
    low = place.floor().long().clamp(max=grid.shape[-1] - 2)
    share = place - low
    grid = grid[..., low, :] * (1 - share)[:, None] + grid[..., low + 1, :] * share[:, None]
    return grid[..., low] * (1 - share) + grid[..., low + 1] * share


def _paint_distractor(canvas: Tensor, shape: Tensor, colour: Tensor) -> None:
    """shape (B, 10) and colour (B, 3) as in Parameters; the canvas (B, 3, S, S) changes in place."""
    cos, sin, a, b, c, d, rounding, hollow = map(_wide, shape[:, 2:].unbind(-1))
    window, u, v = _window(shape[:, :2], _DISTRACTOR_WINDOW, canvas.shape[-1])
    u, v = u * cos + v * sin, v * cos - u * sin
    distance = torch.minimum(_box(u, v, a, b, rounding), _box(u, v, c, d, rounding))
    distance = torch.where(hollow > 0, (distance + 1.5).abs() - 1.5, distance)
    cover = _cover(distance)
    shade = cover * (1 - 0.75 * (1 - _cover(distance + 1)))
    _paint(canvas, window, shade[:, None] * colour[:, :, None, None], 1 - cover)


def _window(centres: Tensor, side: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat pixel indices (B, side side) of a square around each centre, moved to lie inside the picture.

    Also x and y (B, side, side): each pixel's middle, seen from the centre.
    """
    corner = (centres - side / 2).round().clamp(0, size - side)  # (B, 2)
    axis = torch.arange(side)
    x, y = corner.long()[:, :1] + axis, corner.long()[:, 1:] + axis  # (B, side)
    flat = (y[:, :, None] * size + x[:, None]).flatten(1)
    x, y = x + 0.5 - centres[:, :1], y + 0.5 - centres[:, 1:]
    shape = (-1, side, side)
    return flat, x[:, None].expand(shape).contiguous(), y[:, :, None].expand(shape).contiguous()


def _paint(canvas: Tensor, window: Tensor, colours: Tensor, through: Tensor) -> None:
    """Lay colours (B, 3, w, w), already times their cover, over a window of the canvas (B, 3, S, S), in place."""
    index = window[:, None].expand(-1, 3, -1)
    flat = canvas.flatten(2)
    flat.scatter_(2, index, flat.gather(2, index) * through.flatten(1)[:, None] + colours.flatten(2))


def _spread(masks: Tensor, window: Tensor, size: int) -> Tensor:
    """Masks (B, K, w, w) of a window to the whole picture, (B, K, size, size)."""
    full = torch.zeros(*masks.shape[:2], size * size, dtype=torch.bool)
    full.scatter_(2, window[:, None].expand(-1, masks.shape[1], -1), masks.flatten(2))
    return full.unflatten(2, (size, size))


def _extent(line: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of (..., S), as float."""
    size = line.shape[-1]
    line = line.float()
    return line.argmax(-1).float(), size - line.flip(-1).argmax(-1).float()


def _wide(x: Tensor) -> Tensor:
    """(B,) to (B, 1, 1)."""
    return x[:, None, None]


def _select(parameters: Parameters, rows: Tensor) -> Parameters:
    return Parameters(parameters.size, *(field[rows] for field in parameters[1:]))


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _caption(variants: list[int]) -> str:
    body, crest, tail, eyes, pattern = (VARIANTS[part][variant] for part, variant in zip(PARTS, variants, strict=True))
    return f"a {pattern} {body} {eyes} creature with a {crest} crest and a {tail} tail"


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colours (..., 3) in [0, 1] from hue, saturation and value in [0, 1]."""
    sector = (np.array([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6
    share = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * share)


def _uniform(seed: int, index: np.ndarray, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """(B, *shape) float64 in [0, 1), a function of seed, scene index (B,), stream and position only.

    A counter-based generator: the splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) applied in turn to seed,
    stream, scene and position, so that no scene depends on the others in its batch.
    """
    count = int(np.prod(shape, dtype=np.int64))
    state = _mix(np.array(seed, np.uint64) + np.uint64(1))
    state = _mix(state + np.array(stream, np.uint64))
    state = _mix(state + index)[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state) >> np.uint64(11)).reshape(len(index), *shape) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
