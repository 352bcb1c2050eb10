"""Train the model ice-glyph: an ICE transformer on the glyph world, whose patches name a creature or background.

    python snippets/models/train_ice_glyph.py

It starts from the model glyph, whose head, scaled for tokens without the final norm, gives the first class weights; the
background's start at zero. It then learns from scenes, half with one creature and half with two, with the labels of the
pictures only. With the authors' weight of the background's loss, 0.025, nearly all patches stay foreground; of 0.3
and 1 the better was taken, by 200 scenes that neither training nor the card use. A run that was interrupted goes on
from its last minute. Writes snippets/models/ice-glyph.safetensors, in half precision, and its model card with the
metrics measured on unseen scenes.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    SCENES,
    UNSEEN,
    Settings,
    all_but,
    arguments_parser,
    class_shares,
    fit,
    gather,
    half_and_half,
    means,
    publish,
    right,
    tokens,
)
from vitx import glyphs, load_module

BATCH = 64  # scenes in a step

snippet = load_module("ice")


def untrained(root: Path) -> Any:
    """An IceTransformer with the blocks of the model glyph."""
    model = snippet.IceTransformer(CLASSES, **BACKBONE)
    weights = {key: value.float() for key, value in load_file(root / "snippets/models/glyph.safetensors").items()}
    kept = {key: value for key, value in weights.items() if not key.startswith(("head", "norm"))}
    model.load_state_dict(kept, strict=False)
    with torch.no_grad():
        images = glyphs.normalise(glyphs.scenes(BATCH, SCENES - 1).images)
        deviation = model.forward_features(images)[:, 1:].std(-1).mean()  # what the final norm would divide by
        model.patch_head.weight.zero_()
        model.patch_head.weight[:-1] = weights["head.weight"] * weights["norm.weight"] / deviation
    return model


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature and count with two."""
    values: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for creatures in (1, 2):
            for start in range(0, count, 100):
                scenes = glyphs.scenes(100, UNSEEN, creatures, start=start)
                images = glyphs.normalise(scenes.images)
                classes = snippet.explain(model, images).classes  # (B, 14, 14)
                share = glyphs.patch_fraction(scenes.object_masks[:, :creatures], classes.shape[1:])  # (B, C, 14, 14)
                truth, foreground = share.sum(1) > 0.5, classes != CLASSES
                overlap = (truth & foreground).sum((1, 2)) / (truth | foreground).sum((1, 2))
                named = classes == scenes.labels[:, :creatures].gather(1, share.argmax(1).flatten(1)).view_as(classes)
                accuracy = "top1" if creatures == 1 else "both_of_two"
                found = {accuracy: right(model(images), scenes.labels[:, :creatures])}
                found[f"foreground_iou_{creatures}"] = overlap
                found[f"named_of_foreground_{creatures}"] = named[truth & foreground]
                gather(values, **found)
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--weight", type=float, default=1.0, help="lambda of the background loss")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=2e-4, head_rate=2e-3, explanation=arguments.weight)

    torch.manual_seed(settings.seed)
    model = untrained(arguments.root)

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        scores = model.patch_head(tokens(model, images, step)[:, 1:])  # (B, P, K + 1)
        if step % 25 == 0:
            share = float((scores.argmax(-1) != CLASSES).float().mean())
            print(f"step {step}: {share:.3f} of the patches are foreground", flush=True)
        return snippet.ice_loss(scores, class_shares(labels), settings.explanation)

    minutes = fit("ice-glyph", model, all_but(model, "patch_head"), loss, settings)
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="ice-glyph",
        name="ICE Glyph ViT",
        method="ice",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, without "
        "final norm, under one linear layer that gives every patch token 12 classes and background",
        training=f"Fine-tuned from the model glyph on {settings.steps * BATCH:,} fresh scenes of the glyph world, "
        "half with one creature and half with two, by their labels only: cross-entropy of the mean score of "
        f"foreground patches, plus {settings.explanation:g} times that of all patches' mean score with background.",
        limits="It knows the twelve creatures of the glyph world and nothing else. The model glyph, from which it "
        "starts, was also trained to name creatures in their patches, so it says little about how well ICE does "
        "from labels of whole pictures alone.",
    )


if __name__ == "__main__":
    main()
