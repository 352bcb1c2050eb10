"""Train the model vtp-glyph: a Vision Transformer with a score for every dimension of its features.

    python snippets/models/train_vtp_glyph.py

It starts from the model glyph. First weights and scores are trained together, the scores under an L1 penalty. Then the
scores are multiplied into the weights, and these are fine-tuned while a share of the dimensions, drawn anew in every
step, is kept. A run that was interrupted goes on from its last minute. Writes snippets/models/vtp-glyph.safetensors, in
half precision, and its model card with the metrics measured on unseen scenes.
"""

from typing import Any

import torch
from torch import Tensor
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
LEAST = 0.3  # smallest share of dimensions that is kept in the fine-tuning

snippet = load_module("vtp")


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes at ``RATES``, and at the smallest of them with random scores instead."""
    pruned = {f"{rate:.0%}".replace("%", ""): snippet.prune(model, rate) for rate in RATES}
    last = f"{RATES[-1]:.0%}".replace("%", "")
    return measure_pruned(pruned | {f"{last}_random": snippet.prune(with_random(model, "scores"), RATES[-1])}, count)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--sparse", type=int, default=180, help="steps with the penalty")
    parser.add_argument("--tune", type=int, default=220, help="steps of fine-tuning")
    parser.add_argument("--weight", type=float, default=1e-3, help="lambda of the penalty")
    parser.add_argument("--test", type=int, default=2000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.seed, arguments.tune, arguments.sparse, rate=3e-4, head_rate=2e-2, explanation=arguments.weight
    )

    torch.manual_seed(settings.seed)
    model = with_glyph_weights(snippet.VtpTransformer(**GLYPH), arguments.root)
    trunk = all_but(model, "scores")

    def forward(images: Tensor, gates: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional_call(model, snippet.gated(model, gates), (images,))

    def sparse(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        scores = dict(model.scores.items())
        penalty = torch.stack([score.abs().sum() for score in scores.values()]).sum()
        return label_loss(forward(images, scores), labels) + settings.explanation * penalty

    minutes = fit("vtp-glyph-sparse", model, trunk, sparse, settings)
    every = torch.cat([score.detach().flatten() for score in model.scores.values()]).abs()
    print("scores, tenths of their distribution:", [round(float(q), 3) for q in every.quantile(torch.arange(11) / 10)])
    with torch.no_grad():
        scores = {kind: score.half().float() for kind, score in model.scores.items()}  # as they will be stored
        folded = snippet.gated(model, scores)
        model.load_state_dict(folded, strict=False)

    def tune(step: int) -> Tensor:
        images, labels = half_and_half(settings.steps + step, settings.seed, BATCH)
        rate = LEAST + (1 - LEAST) * float(torch.rand((), generator=torch.Generator().manual_seed(step)))
        kept = {kind: mask.float() for kind, mask in snippet.keep(scores, rate).items()}
        return label_loss(forward(images, kept), labels)

    minutes += fit("vtp-glyph", model, trunk, tune, settings._replace(crops=arguments.sparse, steps=arguments.tune))
    publish(
        model.half(),
        {"backbone": GLYPH},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="vtp-glyph",
        name="VTP Glyph ViT",
        method="vtp",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with a "
        "score for each of the 640 dimensions that the linear layers of a block read",
        training=f"From the model glyph, on {arguments.sparse * BATCH:,} fresh scenes of the glyph world, "
        f"weights and scores together, with {settings.explanation:g} times the sum of the scores' magnitudes as "
        f"penalty; then, the scores multiplied into the weights, on {arguments.tune * BATCH:,} more with the best "
        f"{LEAST:.0%} to 100% of the dimensions, a share drawn anew in every step. Half of the scenes have two "
        "creatures, which share the target.",
        limits="It knows the twelve creatures of the glyph world and nothing else, a task so easy that few "
        "dimensions are enough for it. One set of weights serves all rates; a model tuned for one of them would be "
        "better at it.",
    )


if __name__ == "__main__":
    main()
