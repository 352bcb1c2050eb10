"""Train the model a-vit-glyph: an adaptive-token transformer on the glyph world, whose patches halt by themselves.

    python snippets/models/train_a_vit_glyph.py

It starts from the model glyph, which has all its weights already, and learns from scenes, half with one creature and
half with two, by their labels, the ponder loss and the prior over the blocks. Halted tokens leave the sequence in
training as they do later. A run that was interrupted goes on from its last minute. Writes
snippets/models/a-vit-glyph.safetensors, in half precision, and its model card with the metrics measured on unseen
scenes.
"""

from typing import Any

import torch
from torch import Tensor
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GLYPH,
    UNSEEN,
    Settings,
    all_but,
    arguments_parser,
    fit,
    gather,
    half_and_half,
    label_loss,
    publish,
    right,
    with_glyph_weights,
)
from vitx import glyphs, load_module
from vitx.vit import embed

BATCH = 64  # scenes in a step
SCALE, SHIFT = 5.0, -10.0  # gamma, beta
SHIFTS = (-14.0, -10.0, -8.0)  # beta at which the card states how much is kept
CENTRE = 3.0  # of the prior, in blocks from 0
PRIOR_WEIGHT = 0.1  # of the divergence from the prior

snippet = load_module("a-vit")


def measure(model: Any, plain: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature and count with two; plain is the model glyph."""
    values: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for creatures in (1, 2):
            for start in range(0, count, 100):
                scenes = glyphs.scenes(min(100, count - start), UNSEEN, creatures, start=start)
                images = glyphs.normalise(scenes.images)
                share = glyphs.patch_fraction(scenes.object_masks[:, :creatures], (14, 14)).sum(1)  # (B, 14, 14)
                truth, labels = share > 0.5, scenes.labels[:, :creatures]
                name = "top1" if creatures == 1 else "both_of_two"
                found = {f"{name}_plain_glyph": right(plain(images), labels), f"creature_area_{creatures}": truth}
                for shift in SHIFTS:
                    depths = snippet.explain(model, images, shift=shift)
                    at = "" if shift == SHIFT else f"_shift_{shift:g}"
                    alive, last = depths.alive, depths.alive[:, -1]
                    found[f"{name}{at}"] = right(depths.logits, labels)
                    found[f"kept_{creatures}{at}"] = alive
                    found[f"kept_on_creature_{creatures}{at}"] = truth[:, None].expand_as(alive)[alive]
                    if shift == SHIFT:
                        found[f"kept_to_the_end_{creatures}"] = last
                        found[f"kept_to_the_end_on_creature_{creatures}"] = truth[last]
                        found[f"creature_kept_to_the_end_{creatures}"] = last[truth]
                gather(values, **found)
    # A share of no patches at all is 0.
    return {key: round(float(torch.cat(value).float().mean().nan_to_num()), 4) for key, value in sorted(values.items())}


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--weight", type=float, default=0.02, help="of the ponder loss")
    parser.add_argument("--test", type=int, default=500, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=3e-4, head_rate=5e-4, explanation=arguments.weight)

    torch.manual_seed(settings.seed)
    plain, model = (
        with_glyph_weights(snippet.AdaptiveTokenTransformer(SCALE, SHIFT, **GLYPH), arguments.root) for _ in range(2)
    )
    plain.halting_shift = float("-inf")  # the model glyph
    target = snippet.prior(BACKBONE["depth"], CENTRE)

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            found = snippet.halt(model, embed(model, images))
        logits = model.forward_head(model.norm(found.output.float()))
        task = label_loss(logits, labels)
        ponder, distribution = snippet.halting_losses(found, target)
        if step % 25 == 0:
            kept = [round(float(share), 2) for share in found.alive.float().mean((0, 2))]
            print(f"step {step}: task {float(task.detach()):.3f}, in each block {kept}", flush=True)
        return task + settings.explanation * ponder + PRIOR_WEIGHT * distribution

    minutes = fit("a-vit-glyph", model, all_but(model, "head"), loss, settings)
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES, "halting": (SCALE, SHIFT)},
        lambda path: measure(snippet.load_pretrained(path), plain.eval(), arguments.test),
        minutes,
        parser,
        arguments,
        id="a-vit-glyph",
        name="A-ViT Glyph",
        method="a-vit",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, class "
        f"token, 12 classes; tokens halt by their first channel with gamma {SCALE:g} and beta {SHIFT:g}",
        training=f"Fine-tuned from the model glyph on {settings.steps * BATCH:,} fresh scenes of the glyph world, "
        "half with one creature and half with two: cross-entropy of the labels, plus "
        f"{settings.explanation:g} times the ponder loss, plus {PRIOR_WEIGHT:g} times the divergence from a prior "
        f"about block {CENTRE + 1:g} of {BACKBONE['depth']}.",
        limits="It knows the twelve creatures of the glyph world and nothing else. The model glyph, from which it "
        "starts, was also trained to name creatures in their patches, so background and creature differed in the "
        "first channel before the training began.",
    )


if __name__ == "__main__":
    main()
