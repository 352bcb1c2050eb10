"""Train the model spvit-glyph: a Vision Transformer whose selectors pack the tokens that a picture does not need.

    python snippets/models/train_spvit_glyph.py

It starts from the model glyph, which is also the teacher, and learns from scenes, half with one creature and half with
two, with the labels of the pictures only. The share that each selector keeps is asked of a whole batch, so pictures may
differ. A run that was interrupted goes on from its last minute. Writes snippets/models/spvit-glyph.safetensors, in half
precision, and its model card with the metrics measured on unseen scenes.
"""

from functools import partial
from typing import Any

import torch
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    DISTILLATION,
    GLYPH,
    RATIO,
    Settings,
    all_but,
    arguments_parser,
    classifier,
    fit,
    measure_token_pruning,
    plain_attention,
    publish,
    token_pruning_loss,
    with_glyph_weights,
)
from vitx import load_module

BATCH = 32  # scenes in a step
# What the card tells of: the selectors' own choice, and given rates.
SETTINGS: dict[str, dict[str, Any]] = {"own": {"keep_rate": None}} | {
    str(rate): {"keep_rate": rate} for rate in (1.0, 0.9, 0.7, 0.5, 0.3)
}

snippet = load_module("spvit-soft-token-pruning")


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=0.6, help="share of the tokens that each stage keeps in a batch")
    parser.add_argument("--test", type=int, default=400, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=1e-4, head_rate=2e-3, explanation=arguments.rate)

    torch.manual_seed(settings.seed)
    model = with_glyph_weights(snippet.SoftPrunedTransformer(**GLYPH), arguments.root)
    teacher = plain_attention(classifier())
    loss = token_pruning_loss(model, teacher, snippet.ratio_loss, settings, BATCH)
    minutes = fit("spvit-glyph", model, all_but(model, "selectors"), loss, settings)
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure_token_pruning(
            partial(snippet.explain, snippet.load_pretrained(path)), SETTINGS, arguments.test
        ),
        minutes,
        parser,
        arguments,
        id="spvit-glyph",
        name="SPViT Glyph",
        method="spvit-soft-token-pruning",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with a "
        "token selector of four heads before its 2nd, 4th and 5th block",
        training=f"Fine-tuned from the model glyph, which is also the teacher, on {settings.steps * BATCH:,} fresh "
        "scenes of the glyph world, half with one creature and half with two, by their labels: cross-entropy, plus "
        f"{DISTILLATION:g} times the divergence from the teacher's output, plus {DISTILLATION:g} times the mean "
        f"squared distance of the kept tokens from the teacher's, plus {RATIO:g} times the squared distance of the "
        f"share kept in a batch from {settings.explanation:g} at each of three stages.",
        limits="It knows the twelve creatures of the glyph world and nothing else. Its rates are plain numbers and "
        "no latency of a device. Metrics that end in a number are of that keep rate; those in _own, of the "
        "selectors' own choice. Precision and recall count all of a creature as evidence, though three of its "
        "parts are enough to name it.",
    )


if __name__ == "__main__":
    main()
