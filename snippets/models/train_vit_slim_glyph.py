"""Train the model vit-slim-glyph: a Vision Transformer with a soft mask for head dimensions, neurons and patches.

    python snippets/models/train_vit_slim_glyph.py

It starts from the model glyph. First weights and masks are trained together, the masks under L1 penalties. Then the
masks of heads and neurons are multiplied into the weights, and these are trained again while shares of the units, drawn
anew in every step, are kept. A run that was interrupted goes on from its last minute. Writes
snippets/models/vit-slim-glyph.safetensors, in half precision, and its model card with the metrics measured on unseen
scenes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from training import (  # pyright: ignore[reportMissingImports]
    GLYPH,
    Settings,
    all_but,
    arguments_parser,
    fit,
    half_and_half,
    label_loss,
    measure_pruned,
    publish,
    with_glyph_weights,
    with_random,
)
from vitx import load_module

BATCH = 64  # scenes in a step
RATES = (1.0, 0.8, 0.6, 0.4)  # that the card tells of
PENALTIES = {"head_dimensions": 2e-4, "neurons": 5e-5, "patches": 1e-4}  # w1, w2, w3 that the authors use for DeiT-S
START = 1.5  # of the patches' masks, before the tanh; the authors' 3 would need more steps than there are here
LEAST = 0.3  # smallest share of units that is kept when the weights are trained again

snippet = load_module("vit-slim")


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes at ``RATES``, at the smallest with all patches, and there with random masks instead."""
    names = {rate: f"{100 * rate:.0f}" for rate in RATES}
    last = RATES[-1]
    pruned = {name: snippet.prune(model, rate) for rate, name in names.items()}
    pruned[f"{names[last]}_all_patches"] = snippet.prune(model, last, 1.0)
    pruned[f"{names[last]}_random"] = snippet.prune(with_random(model, "masks"), last, 1.0)
    return measure_pruned(pruned, count)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--search", type=int, default=180, help="steps with the penalties")
    parser.add_argument("--again", type=int, default=220, help="steps with shares of the units")
    parser.add_argument("--weight", type=float, default=10.0, help="the penalties, in multiples of the authors'")
    parser.add_argument("--test", type=int, default=2000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.seed, arguments.again, arguments.search, rate=3e-4, head_rate=2e-2, explanation=arguments.weight
    )

    torch.manual_seed(settings.seed)
    model = with_glyph_weights(snippet.SlimTransformer(**GLYPH), arguments.root)
    nn.init.constant_(model.masks["patches"], START)
    trunk = all_but(model, "masks")

    def forward(images: Tensor, gates: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional_call(model, snippet.gated(model, gates), (images,))

    def search(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        scores = model.scores()
        handles = snippet.gate_patches(model, scores["patches"])
        logits = forward(images, scores)
        for handle in handles:
            handle.remove()
        penalty = torch.stack([PENALTIES[kind] * score.abs().sum() for kind, score in scores.items()]).sum()
        return label_loss(logits, labels) + settings.explanation * penalty

    minutes = fit("vit-slim-glyph-search", model, trunk, search, settings)
    with torch.no_grad():
        for mask in model.masks.values():
            mask.copy_(mask.half())  # as they will be stored
        scores = {kind: score.clone() for kind, score in model.scores().items()}
        for kind, score in scores.items():
            tenths = score.flatten().quantile(torch.arange(11) / 10)
            print(f"{kind}, tenths of the distribution:", [round(float(q), 3) for q in tenths])
        model.load_state_dict(snippet.gated(model, scores), strict=False)

    def again(step: int) -> Tensor:
        images, labels = half_and_half(settings.steps + step, settings.seed, BATCH)
        shares = torch.rand(2, generator=torch.Generator().manual_seed(step)) * (1 - LEAST) + LEAST
        kept = snippet.keep(scores, *shares.tolist())
        handles = snippet.drop_patches(model, kept["patches"])
        logits = forward(images, {kind: mask.float() for kind, mask in kept.items()})
        for handle in handles:
            handle.remove()
        return label_loss(logits, labels)

    minutes += fit(
        "vit-slim-glyph", model, trunk, again, settings._replace(crops=arguments.search, steps=arguments.again)
    )
    publish(
        model.half(),
        {"backbone": GLYPH},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="vit-slim-glyph",
        name="ViT-Slim Glyph",
        method="vit-slim",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with a soft "
        "mask for each of the 128 head dimensions, 256 neurons and 196 patches of a block",
        training=f"From the model glyph, on {arguments.search * BATCH:,} fresh scenes of the glyph world, weights "
        f"and masks together, with {settings.explanation:g} times the authors' penalties; then, the masks of heads "
        f"and neurons multiplied into the weights, on {arguments.again * BATCH:,} more with the best {LEAST:.0%} "
        "to 100% of units and patches, two shares drawn anew in every step. Half of the scenes have two creatures, "
        "which share the target.",
        limits="It knows the twelve creatures of the glyph world and nothing else, a task so easy that few units "
        "are enough for it. Creatures stand anywhere, so no place of the picture can be left out from the start. "
        "One set of weights serves all budgets; a model trained for one of them would be better at it.",
    )


if __name__ == "__main__":
    main()
