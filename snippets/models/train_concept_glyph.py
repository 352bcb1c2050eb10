"""Train the model concept-glyph: a ConceptTransformer on the glyph world, whose part variants are the concepts.

    python snippets/models/train_concept_glyph.py

The backbone starts from the model glyph and is trained further, together with the new head: first on crops around one
creature, then on full scenes, half with one creature and half with two. A run that was interrupted goes on from its
last minute. Writes snippets/models/concept-glyph.safetensors and its model card with the metrics measured on unseen
scenes.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    CONCEPTS,
    CROP,
    GRID,
    SCENES,
    UNSEEN,
    Settings,
    arguments_parser,
    fit,
    gather,
    label_scores,
    means,
    publish,
    right,
    tokens,
    with_glyph_weights,
)
from vitx import glyphs, load_module

BATCH = 128  # pictures in a step
PATCHES = GRID * GRID  # of a full scene


def concept_targets(scenes: glyphs.Scenes) -> Tensor:
    """H (B, P, K + 1): share of every patch that each part variant covers and, last, that no part covers."""
    creatures = scenes.parameters.variants.shape[1]
    side = scenes.images.shape[-1] // BACKBONE["patch_size"]
    cover = glyphs.patch_fraction(scenes.part_masks[:, :creatures], (side, side))  # (B, C, 5, gh, gw)
    variants = nn.functional.one_hot(scenes.parameters.variants, 3).float()  # (B, C, 5, 3)
    cover = torch.einsum("bcpyx,bcpv->byxpv", cover, variants).flatten(3).flatten(1, 2)  # (B, P, K)
    rest = (1 - cover.sum(-1, keepdim=True)).clamp(min=0)
    cover = torch.cat([cover, rest], -1)
    return cover / cover.sum(-1, keepdim=True)  # parts share anti-aliased edges, so the sum may exceed one


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature and count with two."""
    values: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for start in range(0, count, 100):
            scenes = glyphs.scenes(100, UNSEEN, 1, start=start)
            images = glyphs.normalise(scenes.images)
            attention = model.concept_attention(images)[..., :-1]  # (B, P, K)
            target = concept_targets(scenes)[..., :-1]
            present = target.sum(1) > 0  # (B, K)
            inside = (attention * (target > 0)).sum(1) / attention.sum(1)
            of_part = attention.sum(1).unflatten(1, (5, 3))  # (B, 5, 3): attention to each variant of each part
            pairs = glyphs.scenes(100, UNSEEN, 2, start=start)
            gather(
                values,
                top1=model(images).argmax(-1) == scenes.labels[:, 0],
                both_of_two=right(model(glyphs.normalise(pairs.images)), pairs.labels),
                concepts_named=of_part.argmax(-1) == scenes.parameters.variants[:, 0],
                attention_inside_part=inside[present],
                attention_inside_part_chance=(target > 0).float().mean(1)[present],
            )
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--crops", type=int, default=400, help="steps on crops")
    parser.add_argument("--scenes", type=int, default=350, help="steps on full scenes")
    parser.add_argument("--test", type=int, default=2000, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    steps = arguments.crops + arguments.scenes
    settings = Settings(arguments.seed, arguments.crops, steps, rate=5e-4, head_rate=1e-3, explanation=10)

    torch.manual_seed(settings.seed)
    network = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=0), arguments.root)
    model = load_module("concept-transformer").ConceptTransformer(network, CONCEPTS, CLASSES)
    with torch.no_grad():
        model.output.weight *= PATCHES  # a part covers few patches, and the mean over all of them dilutes it

    def loss(step: int) -> Tensor:
        seed = SCENES + 10 * settings.seed
        if step < settings.crops:
            batch = [glyphs.crops(BATCH, seed, CROP, start=step * BATCH)]
        else:
            half = BATCH // 2
            batch = [glyphs.scenes(half, seed + creatures, creatures, start=step * half) for creatures in (1, 2)]
        images = glyphs.normalise(torch.cat([scenes.images for scenes in batch]))
        attention = model.attend(tokens(network, images, step)[:, 1:])  # (B, P, K + 1)
        # Patches beyond a crop count as patches without a part.
        logits = attention[..., :-1].sum(1) / PATCHES @ model.concept_values() + model.output.bias
        classification = -label_scores(logits, torch.cat([scenes.labels for scenes in batch])).mean()
        targets = torch.cat([concept_targets(scenes) for scenes in batch])
        explanation = (attention - targets).square().sum(-1).mean()  # squared norm for each patch
        return classification + settings.explanation * explanation

    minutes = fit("concept-glyph", model, network, loss, settings)
    publish(
        model,
        {"backbone": BACKBONE, "concepts": CONCEPTS, "num_classes": CLASSES},
        lambda path: measure(load_module("concept-transformer").load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="concept-glyph",
        name="Concept Glyph ViT",
        method="concept-transformer",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, under a "
        "ConceptTransformer head of one attention head, 15 part variants and one embedding for no part",
        training=f"Fine-tuned from the model glyph on {settings.crops * BATCH:,} crops and then "
        f"{(settings.steps - settings.crops) * BATCH:,} scenes of the glyph world, all fresh, the scenes half with "
        f"one creature and half with two: cross-entropy plus {settings.explanation:g} times the mean squared "
        "distance of each patch's attention from the shares of its area that the part variants cover.",
        limits="It knows the twelve creatures of the glyph world and nothing else. Its concepts were drawn by the "
        "generator that drew its classes, so it says nothing about how well people's concepts fit photographs.",
    )


if __name__ == "__main__":
    main()
