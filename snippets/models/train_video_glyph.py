"""Train the model video-glyph: it tells clips of a moving creature from clips in which one part is false for a frame.

    python snippets/models/train_video_glyph.py

Frames go through the first blocks of the model glyph, and the blocks of space-time attention take their spatial
attention and MLPs from its next ones; temporal attention starts from nothing. It learns from the labels of clips alone,
first on crops in which the creatures move more and more, then on full scenes. A run that was interrupted goes on from
its last minute. Writes snippets/models/video-glyph.safetensors, in half precision, and its model card with the metrics
measured on unseen clips.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GRID,
    SCENES,
    UNSEEN,
    Settings,
    arguments_parser,
    fit,
    means,
    publish,
    with_glyph_weights,
)
from vitx import glyphs, load_module, metrics

BATCH, BATCH_FULL = 32, 8  # clips in a step, of crops and of full scenes
CROP = 56  # pixels
FRAMES, BELOW, DEPTH = 6, 2, 3  # blocks of glyph below space-time attention, and blocks of space-time attention
NAMES = ("genuine", "spliced")

snippet = load_module("istvt")


class Clips(NamedTuple):
    """Rendered clips with their truth."""

    images: Tensor  # (B, T, 3, S, S) in [0, 1]
    label: Tensor  # (B,)
    frame: Tensor  # (B,)
    evidence: Tensor | None  # (B, T, S, S) bool: pixels that the false part changes; None where not asked for


def clips(
    count: int, seed: int, size: int = glyphs.SIZE, start: int = 0, evidence: bool = False, motion: float = 1
) -> Clips:
    """Clips start to start + count of a seed, the same in whatever batch; with motion 0 the creatures stand still."""
    labels, parameters = glyphs.draw(count, seed, 1, size, start)
    numbers = np.stack([np.random.default_rng([seed, index]).random(12) for index in range(start, start + count)])
    numbers[:, :3] = 0.5 + motion * (numbers[:, :3] - 0.5)
    film = snippet.film(parameters, torch.from_numpy(numbers).float(), FRAMES)
    every = labels.repeat_interleave(FRAMES, 0)
    images = glyphs.render(film.shown, every).images.unflatten(0, (count, FRAMES))
    changed = None
    if evidence:
        whole = glyphs.render(film.whole, every).images.unflatten(0, (count, FRAMES))
        changed = (images != whole).any(2)
    return Clips(images, film.label, film.frame, changed)


def untrained() -> tuple[Any, nn.Module]:
    """The network with the weights of glyph where it can have them, and these weights."""
    glyph = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=CLASSES))
    model = snippet.VideoTransformer(NAMES, FRAMES, DEPTH, BACKBONE | {"depth": BELOW})
    model.frame.load_state_dict(
        {key: value for key, value in glyph.state_dict().items() if key in model.frame.state_dict()}
    )
    old = list(model.frame.parameters())
    pairs = {
        "norm_s": "norm1",
        "qkv": "attn.qkv",
        "proj_s": "attn.proj",
        "norm_m": "norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    for block, source in zip(model.blocks, glyph.blocks[BELOW:], strict=False):
        for own, its in pairs.items():
            getattr(block, own).load_state_dict(source.get_submodule(its).state_dict())
            old += getattr(block, own).parameters()
        # Temporal attention first hands on means over time.
        nn.init.normal_(block.qk.weight, std=0.1)
        nn.init.eye_(block.v.weight)
        nn.init.eye_(block.proj_t.weight)
        nn.init.zeros_(block.proj_t.bias)
    nn.init.normal_(model.time_embed, std=0.3)
    nn.init.normal_(model.temporal_token, std=0.3)
    return model, nn.ParameterList(old)


def tokens(model: Any, images: Tensor, seed: int) -> Tensor:
    """``features`` of clips that lie in a window of the position grid, the same for all frames, drawn from the seed."""
    frame, side = model.frame, images.shape[-1] // BACKBONE["patch_size"]
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, GRID - side + 1, (len(images), 2), generator=generator)
    rows, columns = corner[:, :1] + torch.arange(side), corner[:, 1:] + torch.arange(side)
    places = (rows[:, :, None] * GRID + columns[:, None]).flatten(1).repeat_interleave(FRAMES, 0)  # (B T, n)
    x = frame.patch_embed.proj(images.flatten(0, 1)).flatten(2).mT + frame.pos_embed[0, 1:][places]
    first = (frame.cls_token + frame.pos_embed[:, :1]).expand(len(x), -1, -1)
    return frame.blocks(torch.cat([first, x], 1)).unflatten(0, images.shape[:2])


def logits_of(model: Any, images: Tensor, seed: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        table = model.table(tokens(model, images, seed))
        for block in model.blocks:
            table = block(table).output
        return model.classify(table).float()


def measure(path: Path, count: int) -> dict[str, float]:
    """Metrics on count unseen clips, half of which have a false part: means of ``score``.

    "untrained" is what the maps show before training: temporal attention reads changes by construction.
    """
    torch.manual_seed(0)
    trained, before = snippet.load_pretrained(path), untrained()[0].eval()
    values: dict[str, list[Tensor]] = {}
    for start in range(0, count, 20):
        batch = clips(20, UNSEEN, start=start, evidence=True)
        found, first = score(trained, batch), score(before, batch)
        found |= {
            f"{key}_untrained": first[key] for key in first if key.endswith(("in_frame", "frame_found", "in_part"))
        }
        for key, value in found.items():
            values.setdefault(key, []).append(value)
    return means(values)


def score(model: Any, batch: Clips) -> dict[str, Tensor]:
    """Metrics of a batch: accuracy of all clips, and of those with a false part the truth of their maps.

    "in_frame": share of the relevance that lies in the false frame. "in_part": in the false frame, share on what the
    part changes; "pointing": is the largest value there? "chance" takes the maps of the next such clip.
    """
    assert batch.evidence is not None
    predicted = model(glyphs.normalise(batch.images)).argmax(1)
    false = batch.label == 1
    values = {"accuracy": predicted == batch.label}
    images, frame = glyphs.normalise(batch.images[false]), batch.frame[false]
    truth = glyphs.patch_fraction(batch.evidence[false], (GRID, GRID))  # (F, T, gh, gw)
    found, rows = snippet.explain(model, images, torch.ones(len(images), dtype=torch.long)), torch.arange(len(images))
    there = truth[rows, frame]
    values["area"] = there.mean((1, 2))
    for name, maps in (("temporal", found.temporal), ("spatial", found.spatial)):
        by_frame = maps.sum((2, 3))  # (F, T)
        values[f"{name}_in_frame"] = by_frame[rows, frame] / by_frame.sum(1)
        values[f"{name}_frame_found"] = by_frame.argmax(1) == frame
        for other, own in (("", maps), ("_chance", maps.roll(1, 0))):
            values[f"{name}_in_part{other}"] = metrics.mass_inside(own[rows, frame], there)
            values[f"{name}_pointing{other}"] = metrics.pointing_game(own[rows, frame], there)
    return values


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--crops", type=int, default=500, help="steps on crops")
    parser.add_argument("--steps", type=int, default=700, help="all steps")
    parser.add_argument("--test", type=int, default=300, help="unseen clips that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, arguments.crops, arguments.steps, rate=3e-4, head_rate=1e-3)

    torch.manual_seed(settings.seed)
    model, old = untrained()

    def loss(step: int) -> Tensor:
        seed, cropped = SCENES + 10 * settings.seed + 2, step < settings.crops
        size, count = (CROP, BATCH) if cropped else (glyphs.SIZE, BATCH_FULL)
        batch = clips(count, seed, size, step * count, motion=min(1, 2 * step / settings.crops))
        return nn.functional.cross_entropy(logits_of(model, glyphs.normalise(batch.images), step), batch.label)

    minutes = fit("video-glyph", model, old, loss, settings)
    crops, full = min(settings.crops, settings.steps) * BATCH, max(0, settings.steps - settings.crops) * BATCH_FULL
    publish(
        model.half(),
        {"class_names": NAMES, "frames": FRAMES, "depth": DEPTH, "extractor": BACKBONE | {"depth": BELOW}},
        lambda path: measure(path, arguments.test),
        minutes,
        parser,
        arguments,
        id="video-glyph",
        name="ISTVT Glyph video transformer",
        method="istvt",
        architecture=f"{FRAMES} frames of 112 px, patch 8, dim 128, 4 heads, MLP ratio 2: each frame through {BELOW} "
        f"blocks of a timm VisionTransformer, then {DEPTH} blocks of temporal attention with self-subtract and spatial "
        "attention",
        classes=len(NAMES),
        training=f"Blocks from the model glyph, temporal attention from nothing, on {crops:,} clips of crops and then "
        f"{full:,} clips of full scenes of the glyph world, all fresh. A creature of free part variants drifts and "
        "turns, in the first third less; in half of the clips one part has another variant in one frame. Cross-entropy "
        "of the two labels.",
        limits="It knows one kind of forgery, in clips of six frames of one creature of the glyph world. It has never "
        "seen a face or a film.",
    )


if __name__ == "__main__":
    main()
