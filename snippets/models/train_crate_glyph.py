"""Train the model crate-glyph: a white-box transformer, CRATE, on the glyph world.

    python snippets/models/train_crate_glyph.py

It starts from random weights and is told the labels of the pictures; its patch tokens, through linear layers that
are thrown away, also learn to say what those of the model glyph say half-way and at the end (distillation), which a
training this short needs. Crops around one creature, each in a random window of the grid of positions, come first,
then full scenes, half with one creature and half with two. A run that was interrupted goes on from its last minute.
Writes snippets/models/crate-glyph.safetensors, in half precision, and its model card with the metrics measured on
unseen scenes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import (  # pyright: ignore[reportMissingImports]
    CLASSES,
    GRID,
    HALF,
    UNSEEN,
    Settings,
    arguments_parser,
    class_shares,
    classifier,
    crops_then_scenes,
    fit,
    lessons,
    measure_evidence,
    plain_attention,
    publish,
    unlike,
    window,
)
from vitx import glyphs, load_module

CROPS, BATCH = 128, 64  # crops and scenes in a step
OPTIONS: dict[str, Any] = {
    "classes": CLASSES,
    "img_size": 112,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 6,
}

snippet = load_module("crate")


@torch.no_grad()
def layers(model: Any, count: int, seed: int) -> dict[str, float]:
    """What the layers do to unseen scenes with one creature, and how well the best head outlines it."""
    rates, unit, shares, inside, overlaps = [], [], [], [], []
    for start in range(0, count, 100):
        scenes = glyphs.scenes(min(100, count - start), seed, 1, start=start)
        images = glyphs.normalise(scenes.images)
        found = snippet.explain(model, images)
        rates.append(found.rate)
        shares.append(found.nonzero)
        unit.append(snippet.explain(model, images, unit=True).rate)
        share = glyphs.patch_fraction(scenes.object_masks[:, :1], (GRID, GRID))  # (B, 1, 14, 14)
        inside.append((found.heads * share).sum((2, 3)) / found.heads.sum((2, 3)))  # (B, K)
        truth = share > 0.5
        best = found.heads > found.heads.flatten(2).quantile(0.9, dim=2)[..., None, None]  # the tenth attended to most
        overlaps.append((best & truth).sum((2, 3)) / (best | truth).sum((2, 3)))
    rate, before_after = torch.cat(rates), torch.cat(unit)
    values = {
        "rate_falls_in_layers": (rate[..., 1] < rate[..., 0]).float().mean(),
        "rate_after_over_before": (rate[..., 1] / rate[..., 0]).mean(),
        "unit_rate_after_over_before": (before_after[..., 1] / before_after[..., 0]).mean(),
        "nonzero_first_layer": torch.cat(shares)[:, 0].mean(),
        "nonzero_last_layer": torch.cat(shares)[:, -1].mean(),
        "evidence_inside_best_head": torch.cat(inside).mean(0).max(),  # the same head for all scenes
        "outline_iou_best_head": torch.cat(overlaps).float().mean(0).max(),
    }
    return {key: round(float(value), 4) for key, value in values.items()}


def maps(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    """(B, 14, 14): mean over the heads of the last layer, the same for every class."""
    return snippet.explain(model, images, labels).heatmap()


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--crops", type=int, default=2000, help="steps on crops")
    parser.add_argument("--scenes", type=int, default=1200, help="steps on full scenes")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    steps = arguments.crops + arguments.scenes
    settings = Settings(arguments.seed, arguments.crops, steps, rate=2e-3, head_rate=2e-3)

    torch.manual_seed(settings.seed)
    model, glyph = snippet.CrateTransformer(**OPTIONS), plain_attention(classifier())
    pupils = nn.ModuleList([nn.Linear(OPTIONS["embed_dim"], glyph.embed_dim) for _ in range(2)])  # thrown away
    middle: list[Tensor] = []
    hook = model.blocks[HALF - 1].register_forward_hook(lambda block, args, tokens: middle.append(tokens))

    def loss(step: int) -> Tensor:
        images, labels = crops_then_scenes(step, settings, CROPS, BATCH)
        where = window(images, step)
        first, last = lessons(glyph, images, where)
        with torch.autocast("cpu", torch.bfloat16):
            end = model.norm(model.blocks(model.tokens(images, where)))
            logits = model.head(end[:, 0])
            taught = unlike(pupils[0](middle.pop()[:, 1:]), first) + unlike(pupils[1](end[:, 1:]), last)
        return cross_entropy(logits.float(), class_shares(labels)) + taught

    minutes = fit("crate-glyph", nn.ModuleDict({"model": model, "pupils": pupils}), pupils, loss, settings)
    hook.remove()

    def metrics(path: Path) -> dict[str, float]:
        model = snippet.load_pretrained(path)
        found = measure_evidence(model, maps, arguments.test, UNSEEN) | layers(model, arguments.test, UNSEEN)
        del found["evidence_on_the_named_of_two"]  # the maps are the same for every class
        return found

    publish(
        model.half(),
        {"options": OPTIONS},
        metrics,
        minutes,
        parser,
        arguments,
        id="crate-glyph",
        name="CRATE Glyph",
        method="crate",
        architecture="CrateTransformer of snippets/inherent/crate.py: 112 px, patch 8, dim 192, 6 layers of 6 "
        "subspaces, class token",
        training=f"From random weights on {settings.crops * CROPS:,} crops and then "
        f"{(settings.steps - settings.crops) * BATCH:,} scenes of the glyph world, all fresh, the scenes half with "
        "one creature and half with two: cross-entropy, and distillation of the patch tokens of the model glyph "
        "after its third and last block, by cosine.",
        limits="It knows the twelve creatures of the glyph world and nothing else. Its teacher, the model glyph, "
        "was trained to name creatures in their patches, so its maps do not show what labels alone bring about.",
    )


if __name__ == "__main__":
    main()
