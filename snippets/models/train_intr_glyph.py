"""Train the model intr-glyph: a query for every class of the glyph world.

    python snippets/models/train_intr_glyph.py

It starts from the model glyph and learns from scenes, half with one creature and half with two, by their labels. A run
that was interrupted goes on from its last minute. Writes snippets/models/intr-glyph.safetensors, in half precision, and
its model card with the metrics measured on unseen scenes.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GRID,
    UNSEEN,
    Settings,
    arguments_parser,
    fit,
    gather,
    half_and_half,
    label_loss,
    means,
    publish,
    right,
    tokens,
    with_glyph_weights,
)
from vitx import glyphs, load_module

BATCH = 64  # scenes in a step
DECODER: dict[str, Any] = {"classes": CLASSES, "layers": 2, "heads": 4}

snippet = load_module("intr")


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature and count with two."""
    values: dict[str, list[Tensor]] = {}
    for start in range(0, count, 100):
        scenes = glyphs.scenes(100, UNSEEN, 1, start=start)
        found = snippet.explain(model, glyphs.normalise(scenes.images), scenes.labels[:, 0])
        inside = glyphs.patch_fraction(scenes.object_masks[:, 0], (GRID, GRID)) > 0  # (B, 14, 14)
        heads = torch.nn.functional.normalize(found.attention.flatten(2), dim=-1)
        alike = heads @ heads.transpose(1, 2)  # (B, h, h) cosines
        others = ~torch.eye(alike.shape[1], dtype=torch.bool)
        gather(
            values,
            top1=found.logits.argmax(-1) == scenes.labels[:, 0],
            attention_on_creature=(found.heatmap() * inside).sum((1, 2)),
            attention_on_creature_chance=inside.float().mean((1, 2)),
            cosine_between_heads=alike[:, others].mean(1),
        )
        scenes = glyphs.scenes(100, UNSEEN, 2, start=start)
        images = glyphs.normalise(scenes.images)
        share = glyphs.patch_fraction(scenes.object_masks, (GRID, GRID))  # (B, 2, 14, 14)
        for which in (0, 1):
            found = snippet.explain(model, images, scenes.labels[:, which])
            own, other = ((found.heatmap() * share[:, i]).sum((1, 2)) for i in (which, 1 - which))
            gather(values, query_on_its_own_of_two=own / (own + other))
        gather(values, both_of_two=right(found.logits, scenes.labels))
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--test", type=int, default=500, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=2e-4, head_rate=1e-3)

    torch.manual_seed(settings.seed)
    network = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=0), arguments.root)
    model = snippet.INTR(network, **DECODER)

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        logits, _ = model.decode(tokens(network, images, step)[:, 1:])
        return label_loss(logits, labels)

    minutes = fit("intr-glyph", model, network, loss, settings)
    publish(
        model.half(),
        {"backbone": BACKBONE, "decoder": DECODER},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="intr-glyph",
        name="INTR Glyph ViT",
        method="intr",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, under a "
        "decoder of two layers with four heads and one query for each class",
        training=f"Fine-tuned from the model glyph on {settings.steps * BATCH:,} fresh scenes of the glyph world, "
        "half with one creature and half with two, by their labels only: cross-entropy.",
        limits="It knows the twelve creatures of the glyph world and nothing else. The model glyph, from which it "
        "starts, was trained to name creatures in their patches, which makes the queries' search an easy one.",
    )


if __name__ == "__main__":
    main()
