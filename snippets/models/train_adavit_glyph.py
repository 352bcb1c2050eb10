"""Train the model adavit-glyph: a Vision Transformer whose blocks decide what they use for each picture, on glyphs.

    python snippets/models/train_adavit_glyph.py

It starts from the model glyph and learns from scenes, half with one creature and half with two, by the labels of the
pictures and the budgets of patches, heads and sublayers. A run that was interrupted goes on from its last minute.
Writes snippets/models/adavit-glyph.safetensors, in half precision, and its model card with the metrics measured on
unseen scenes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GLYPH,
    UNSEEN,
    Settings,
    all_but,
    arguments_parser,
    classifier,
    fit,
    gather,
    half_and_half,
    label_loss,
    publish,
    right,
    with_glyph_weights,
)
from vitx import glyphs, load_module

BATCH = 32  # scenes in a step
HEADS, SUBLAYERS = 0.75, 0.8  # budgets; that of patches is an argument
START = 2.0  # log-odds of every decision before the training: 88 % are used
USAGE = 2.0  # weight of the usage loss, of the authors' code
# At which the card tells of the model: everything used, patches alone chosen, and all three kinds of decisions.
THRESHOLDS: dict[str, dict[str, float]] = {
    "all": {"threshold": 0.0, "head_threshold": 0.0, "sublayer_threshold": 0.0},
    "patches_only": {"head_threshold": 0.0, "sublayer_threshold": 0.0},
    "0.3": {"threshold": 0.3},
    "0.5": {},
    "0.7": {"threshold": 0.7},
}

snippet = load_module("adavit")


def untrained(root: Path) -> Any:
    """The model with the trained weights of glyph, and decisions that are nearly all for using."""
    model = with_glyph_weights(snippet.AdaptiveTransformer(**GLYPH), root)
    for layer in model.decisions.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.constant_(layer.bias, START)
    return model


def measure(run: Callable[..., Any], settings: dict[str, dict[str, float]], count: int) -> dict[str, float]:
    """Metrics on unseen scenes, count with one creature and count with two, for each of the named settings of ``run``.

    top1 and both_of_two: accuracy. Of scenes with one creature: patches, heads and sublayers, the shares used over all
    blocks; precision, the share of the creature in the patches, counted as often as they are used; recall, the share of
    the creature that a block uses, mean of the blocks; unusual_heads and unusual_sublayers, the share of scenes in
    which a head or a sublayer is not used as it is in most.
    """
    plain = classifier()
    values: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for creatures in (1, 2):
            accuracy = "top1" if creatures == 1 else "both_of_two"
            for start in range(0, count, 50):
                scenes = glyphs.scenes(min(50, count - start), UNSEEN, creatures, start=start)
                images, labels = glyphs.normalise(scenes.images), scenes.labels[:, :creatures]
                inside = glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14))  # (B, 14, 14)
                gather(values, **{f"{accuracy}_plain_glyph": right(plain(images), labels).float()})
                for name, options in settings.items():
                    found = run(images, **options)
                    gather(values, **{f"{accuracy}_{name}": right(found.logits, labels).float()})
                    if creatures == 1:
                        used = found.heatmap()  # (B, 14, 14)
                        shared = (used * inside).sum((1, 2))
                        shares = {
                            "patches": used.mean((1, 2)),
                            "precision": shared / used.sum((1, 2)).clamp(min=1e-6),
                            "recall": shared / inside.sum((1, 2)),
                            "heads": found.heads.float(),
                            "sublayers": found.sublayers.float(),
                        }
                        gather(values, **{f"{key}_{name}": value for key, value in shares.items()})
    metrics = {}
    for key, parts in values.items():
        whole = torch.cat(parts)
        metrics[key] = whole.mean()
        if whole.ndim == 3:  # (scenes, L, units)
            usual = whole.mean(0)
            metrics[f"unusual_{key}"] = torch.minimum(usual, 1 - usual).mean()
    return {key: round(float(value), 4) for key, value in metrics.items()}


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--patches", type=float, default=0.4, help="budget of patches, a share of them")
    parser.add_argument("--test", type=int, default=400, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=3e-4, head_rate=1e-3, explanation=arguments.patches)

    torch.manual_seed(settings.seed)
    model = untrained(arguments.root)
    budgets = (settings.explanation, HEADS, SUBLAYERS)

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_000 + step)

        def decide(log_odds: Tensor) -> Tensor:
            uniform = torch.rand(log_odds.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            return snippet.gumbel_decisions(log_odds.float(), uniform)

        with torch.autocast("cpu", torch.bfloat16):
            tokens, decisions = model.masked_forward(images, decide)
            logits = model.forward_head(tokens).float()
        task = label_loss(logits, labels)
        if step % 25 == 0:
            used = " ".join(f"{float(kind.detach().mean()):.3f}" for kind in decisions)
            print(f"step {step}: task {float(task.detach()):.3f}, patches, heads, sublayers {used}", flush=True)
        return task + USAGE * snippet.usage_loss(decisions, budgets)

    minutes = fit("adavit-glyph", model, all_but(model, "decisions"), loss, settings)
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure(partial(snippet.explain, snippet.load_pretrained(path)), THRESHOLDS, arguments.test),
        minutes,
        parser,
        arguments,
        id="adavit-glyph",
        name="AdaViT Glyph",
        method="adavit",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with a "
        "linear layer before each block that chooses patches, and from the second block on one for heads and one "
        "for attention and MLP",
        training=f"Fine-tuned from the model glyph on {settings.steps * BATCH:,} fresh scenes of the glyph world, "
        "half with one creature and half with two, by their labels: cross-entropy, plus "
        f"{USAGE:g} times the usage loss for budgets of {settings.explanation:g} of the patches, {HEADS:g} of the "
        f"heads and {SUBLAYERS:g} of the sublayers.",
        limits="It knows the twelve creatures of the glyph world and nothing else. It was trained for one set of "
        "budgets; other thresholds ask the same decisions to be bolder or shyer. Precision and recall count all of "
        "a creature as evidence, though three of its parts are enough to name it.",
    )


if __name__ == "__main__":
    main()
