"""Train the model patch-slimming-glyph: a Vision Transformer with fixed masks of patches on the glyph world.

    python snippets/models/train_patch_slimming_glyph.py

It starts from the model glyph. For every tolerance the masks are searched with the same calibration scenes; then all
weights are fine-tuned by the labels of the pictures, every step with another set of masks. A run that was interrupted
goes on from its last minute. Writes snippets/models/patch-slimming-glyph.safetensors, in half precision with the masks
in its metadata, and its model card with the metrics measured on unseen scenes.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GLYPH,
    SCENES,
    UNSEEN,
    Settings,
    arguments_parser,
    classifier,
    fit,
    gather,
    means,
    publish,
    with_glyph_weights,
)
from vitx import glyphs, load_module
from vitx.vit import embed

BATCH = 64  # scenes in a step
TOLERANCES = (0.02, 0.005, 0.1, 0.3)  # the first is the default of the snippet

snippet = load_module("patch-slimming")


def untrained(root: Path, calibration: int, seed: int) -> Any:
    """A SlimTransformer with the weights of the model glyph, and masks from scenes to train on."""
    model = with_glyph_weights(snippet.SlimTransformer(TOLERANCES, **GLYPH), root).eval()
    images = glyphs.normalise(glyphs.scenes(calibration, SCENES + 10 * seed + 9).images)
    for index, tolerance in enumerate(TOLERANCES):
        model.masks[index] = snippet.slim(model, images, tolerance)
        print(
            f"tolerance {tolerance:g} keeps {model.masks[index].sum(1).tolist()} patches after each block", flush=True
        )
    return model


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes with one creature: accuracy of glyph and of every set of masks, and what it keeps."""
    plain, values = classifier(), {}
    for start in range(0, count, 100):
        scenes = glyphs.scenes(min(100, count - start), UNSEEN, start=start)
        images, labels = glyphs.normalise(scenes.images), scenes.labels[:, 0]
        share = glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14))[:, None]  # (B, 1, 14, 14)
        found: dict[str, Tensor] = {"chance": share.flatten(1).mean(1)}
        with torch.inference_mode():
            found["top1_glyph"] = plain(images).argmax(1) == labels
        for tolerance in (0.0, *model.tolerances):
            result = snippet.explain(model, images, tolerance=tolerance)
            alive, name = result.alive.float(), f"{tolerance:g}"  # (B, L, 14, 14)
            found[f"top1_{name}"] = result.logits.argmax(1) == labels
            found[f"kept_{name}"] = alive.flatten(1).mean(1)
            if tolerance:
                found[f"on_creature_{name}"] = (alive * share).flatten(1).sum(1) / alive.flatten(1).sum(1).clamp(min=1)
        gather(values, **found)
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--calibration", type=int, default=128, help="scenes that the masks are searched with")
    parser.add_argument("--test", type=int, default=600, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=2e-4, head_rate=2e-4)

    torch.manual_seed(settings.seed)
    start = time.monotonic()
    model = untrained(arguments.root, arguments.calibration, arguments.seed)
    search = (time.monotonic() - start) / 60

    def loss(step: int) -> Tensor:
        images, labels = glyphs.batch(BATCH, SCENES + 10 * settings.seed + 1, start=step * BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            x = embed(model, glyphs.normalise(images))
            logits = snippet.slimmed(model, x, model.masks[step % len(TOLERANCES)])
        return nn.functional.cross_entropy(logits.float(), labels[:, 0])

    minutes = fit("patch-slimming-glyph", model, model, loss, settings) + search
    kept = [[mask.nonzero()[:, 0].tolist() for mask in masks] for masks in model.masks]
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES, "tolerances": TOLERANCES, "kept": kept},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="patch-slimming-glyph",
        name="Patch Slimming Glyph ViT",
        method="patch-slimming",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with "
        f"{len(TOLERANCES)} sets of fixed masks that say which patches each block computes",
        training=f"Masks searched with {arguments.calibration} scenes of the glyph world for each of the "
        f"tolerances {', '.join(f'{t:g}' for t in TOLERANCES)}; then fine-tuned from the model glyph on "
        f"{settings.steps * BATCH:,} fresh scenes with one creature, by cross-entropy with the sets by turns.",
        limits="It knows the twelve creatures of the glyph world and nothing else. Its masks are the same for all "
        "pictures, so they say where creatures tend to be and not where one is.",
    )


if __name__ == "__main__":
    main()
