"""Train the model pose-glyph: it finds the middle of each part of a creature, by one heat map for each part.

    python snippets/models/train_pose_glyph.py

It starts from the model glyph, whose head is left out, and learns from scenes with one creature whose true keypoints
are the middles of the visible pixels of its five parts: mean squared error against a bell curve round each, first on
crops, then on full scenes. A run that was interrupted goes on from its last minute. Writes
snippets/models/pose-glyph.safetensors, in half precision, and its model card with the metrics measured on unseen
scenes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    GRID,
    SCENES,
    UNSEEN,
    Settings,
    arguments_parser,
    fit,
    means,
    publish,
    tokens,
    with_glyph_weights,
)
from vitx import glyphs, load_module, metrics

BATCH = 64  # scenes in a step
CROP = 56  # pixels
CELL = 4  # pixels: side of a cell of the heat maps
SIGMA = 1.5  # cells: width of the bell curve
REACH = 0.2  # of the creature's radius: a keypoint that is nearer to the truth counts as found

snippet = load_module("transpose")


def bells(places: Tensor, side: int) -> Tensor:
    """Heat maps (B, K, side, side) to learn, with height 1 at places (B, K, 2) in pixels."""
    axis = (torch.arange(side) + 0.5) * CELL
    x, y = ((axis - places[..., which, None]) / (SIGMA * CELL) for which in (0, 1))  # (B, K, side)
    return torch.exp(-(x[..., None, :] ** 2 + y[..., None] ** 2) / 2)


def measure(path: Path, count: int) -> dict[str, float]:
    """Metrics on count unseen scenes; means of ``score``."""
    model, values = snippet.load_pretrained(path), {}
    for start in range(0, count, 100):
        scenes = glyphs.scenes(100, UNSEEN, start=start)
        for key, value in score(model, scenes).items():
            values.setdefault(key, []).append(value)
    return means(values)


def score(model: Any, scenes: glyphs.Scenes) -> dict[str, Tensor]:
    """Each metric, flat (B K,), or (B,) for one part.

    In "chance" the next scene's keypoints or areas are taken, in "box" every keypoint lies in the middle of the
    creature's own box, in "other" the part is looked for in the mean area of the four other keypoints.
    """
    found = snippet.explain(model, glyphs.normalise(scenes.images))
    masks, radius = scenes.part_masks[:, 0], scenes.parameters.radii  # (B, K, S, S), (B, 1)
    truth = snippet.centres(masks)  # (B, K, 2)
    box = scenes.boxes[:, 0]
    middle = ((box[:, :2] + box[:, 2:]) / 2)[:, None].expand_as(truth)
    guesses = {"": found.places, "_box": middle, "_chance": found.places.roll(1, 0)}
    values = {}
    for name, places in guesses.items():
        error = (places - truth).norm(dim=-1)  # (B, K) pixels
        values |= {f"error{name}": error.flatten(), f"pck{name}": (error < REACH * radius).flatten()}
        if not name:
            values |= {f"error_{part}": error[:, k] for k, part in enumerate(glyphs.PARTS)}
    on_part = glyphs.patch_fraction(masks, (GRID, GRID)).flatten(0, 1)  # (B K, gh, gw)
    on_creature = glyphs.patch_fraction(scenes.object_masks[:, 0], (GRID, GRID))
    on_creature = on_creature.repeat_interleave(masks.shape[1], 0)
    areas = found.attention  # (B, K, gh, gw)
    others = (areas.sum(1, keepdim=True) - areas) / (areas.shape[1] - 1)
    kinds = {"": areas, "_other": others, "_uniform": torch.ones_like(areas), "_chance": areas.roll(1, 0)}
    for name, area in kinds.items():
        values[f"own_part{name}"] = metrics.mass_inside(area.flatten(0, 1), on_part)
        values[f"creature{name}"] = metrics.mass_inside(area.flatten(0, 1), on_creature)
    values["attended"] = areas.sum((2, 3)).flatten()
    return values


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--crops", type=int, default=500, help="steps on crops")
    parser.add_argument("--steps", type=int, default=1200, help="all steps")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, arguments.crops, arguments.steps, rate=4e-4, head_rate=3e-3)

    torch.manual_seed(settings.seed)
    model = with_glyph_weights(snippet.PoseTransformer(glyphs.PARTS, **BACKBONE))
    nn.init.normal_(model.keypoint_head.weight, std=0.001)
    nn.init.zeros_(model.keypoint_head.bias)
    old = nn.ParameterList([p for name, p in model.named_parameters() if not name.startswith("keypoint_head")])

    def loss(step: int) -> Tensor:
        size, seed = CROP if step < settings.crops else glyphs.SIZE, SCENES + 10 * settings.seed + 1
        scenes = glyphs.scenes(BATCH, seed, 1, size, start=step * BATCH)
        h = model.heatmaps(tokens(model, glyphs.normalise(scenes.images), step))
        wanted = bells(snippet.centres(scenes.part_masks[:, 0]), size // CELL)
        return (h - wanted).square().sum((2, 3)).mean()

    minutes = fit("pose-glyph", model, old, loss, settings)
    full = max(0, settings.steps - settings.crops)
    publish(
        model.half(),
        {"backbone": BACKBONE, "keypoints": glyphs.PARTS},
        lambda path: measure(path, arguments.test),
        minutes,
        parser,
        arguments,
        id="pose-glyph",
        name="TransPose Glyph ViT",
        method="transpose",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, whose patch "
        "tokens each predict 2 x 2 cells of five keypoint heat maps, in place of its head",
        classes=len(glyphs.PARTS),
        training="Fine-tuned from the model glyph, whose head was left out, on "
        f"{min(settings.crops, settings.steps) * BATCH:,} crops and then {full * BATCH:,} scenes of the glyph world, "
        "all fresh, with one creature: mean squared error of the heat maps against bell curves of width "
        f"{SIGMA * CELL:g} pixels round the middles of the visible pixels of the five parts.",
        limits="It finds the parts of one creature of the glyph world. With two creatures its maps have two tops, and "
        "it says nothing of people or photographs. A part that is not there is placed somewhere all the same.",
    )


if __name__ == "__main__":
    main()
