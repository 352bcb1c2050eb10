"""Train the model ia-vit-glyph: predictor and interpreter together on the glyph world.

    python snippets/models/train_ia_vit_glyph.py

Extractor and predictor start from the model glyph, the interpreter from nothing. They learn from scenes, half with one
creature and half with two, by their labels. A run that was interrupted goes on from its last minute. Writes
snippets/models/ia-vit-glyph.safetensors, in half precision, and its model card with metrics measured on unseen scenes.
"""

from typing import Any

import torch
from torch import Tensor
from training import (  # pyright: ignore[reportMissingImports]
    GLYPH,
    GRID,
    UNSEEN,
    Settings,
    arguments_parser,
    classifier,
    fit,
    gather,
    half_and_half,
    label_loss,
    means,
    publish,
    right,
)
from vitx import glyphs, load_module
from vitx.vit import capture

BATCH = 64  # scenes in a step

snippet = load_module("ia-vit")


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature and count with two."""
    values: dict[str, list[Tensor]] = {}
    for start in range(0, count, 100):
        scenes = glyphs.scenes(100, UNSEEN, 1, start=start)
        images, label = glyphs.normalise(scenes.images), scenes.labels[:, 0]
        found = snippet.explain(model, images)
        with torch.inference_mode(), capture(model.backbone, "attention") as record:
            model(images)
        inside = glyphs.patch_fraction(scenes.object_masks[:, 0], (GRID, GRID)) > 0  # (B, 14, 14)
        positive = found.contributions.clamp(min=0)
        answer = found.interpreter_logits.argmax(-1)
        within = snippet.received(record["attention"], model.backbone.num_prefix_tokens)
        gather(
            values,
            top1=found.logits.argmax(-1) == label,
            interpreter_top1=answer == label,
            interpreter_agrees=answer == found.logits.argmax(-1),
            attention_on_creature=(found.attention * inside).sum((1, 2)),
            attention_on_creature_chance=inside.float().mean((1, 2)),
            contributions_on_creature=(positive * inside).sum((1, 2)) / positive.sum((1, 2)).clamp(min=1e-12),
            cosine_with_extractor=torch.cosine_similarity(found.attention.flatten(1), within),
        )
        scenes = glyphs.scenes(100, UNSEEN, 2, start=start)
        with torch.inference_mode():
            gather(values, both_of_two=right(model(glyphs.normalise(scenes.images)), scenes.labels))
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--test", type=int, default=500, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=3e-4, head_rate=3e-3)

    torch.manual_seed(settings.seed)
    network = classifier(arguments.root)
    model = snippet.IAViT(network)

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        with torch.autocast("cpu", torch.bfloat16), capture(network, "attention") as record:
            tokens = network.forward_features(images)
        tokens = tokens.float()
        logits = network.forward_head(tokens)
        answer, attention = model.interpret(tokens)
        prediction = label_loss(logits, labels)
        imitation = snippet.imitation(answer, logits)
        within = snippet.received([weights.float() for weights in record["attention"]], network.num_prefix_tokens)
        discrepancy = snippet.mmd(within, attention.mean(1))
        if step % 25 == 0:
            print(f"step {step}: CE {prediction:.3f}, KD {imitation:.3f}, MMD {discrepancy:.3f}", flush=True)
        return prediction + imitation + discrepancy

    minutes = fit("ia-vit-glyph", model, network, loss, settings)
    publish(
        model.half(),
        {"backbone": GLYPH},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="ia-vit-glyph",
        name="IA-ViT Glyph ViT",
        method="ia-vit",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with a "
        "linear head on the class token and an interpreter of one single-head attention on the patch tokens",
        training=f"Extractor and predictor fine-tuned from the model glyph, with a new interpreter, on "
        f"{settings.steps * BATCH:,} fresh scenes of the glyph world, half with one creature and half with two, by "
        "their labels only: cross-entropy of the predictor, imitation by the interpreter at temperature 3, and the "
        "squared maximum mean discrepancy of the two attentions.",
        limits="It knows the twelve creatures of the glyph world and nothing else. The model glyph, from which it "
        "starts, was trained to name creatures in their patches, which the interpreter finds there.",
    )


if __name__ == "__main__":
    main()
