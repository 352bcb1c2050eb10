"""Measure the statistics of the model savit-glyph: what the loss of the model glyph says of its units.

    python snippets/models/train_savit_glyph.py

Nothing is trained. Squared gradients of all gates, and the second derivatives between the kinds of units, are averaged
over scenes of one creature. Writes snippets/models/savit-glyph.safetensors, which holds the statistics only, and its
model card with the metrics measured on unseen scenes.
"""

import time
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GLYPH,
    SCENES,
    UNSEEN,
    accuracies,
    arguments_parser,
    publish,
    with_glyph_weights,
)
from vitx import glyphs, load_module

BATCH = 32  # scenes at a time
RATES = (0.9, 0.8, 0.7, 0.5)

snippet = load_module("savit")


def statistics_of(model: Any, count: int, seed: int) -> Any:
    """Means over ``count`` scenes of one creature."""
    total: list[Tensor] = []
    for start in track(range(0, count, BATCH), description="savit-glyph"):
        images, labels = glyphs.batch(min(BATCH, count - start), seed, 1, start=start)
        found = snippet.taylor(model, glyphs.normalise(images), labels[:, 0])
        parts = [part.double().sum(0) for part in (*found.scores.values(), found.interaction)]
        total = parts if not total else [before + part for before, part in zip(total, parts, strict=True)]
    *scores, interaction = ((part / count).float() for part in total)
    return snippet.Statistics(dict(zip(snippet.KINDS, scores, strict=True)), interaction)


def shuffled(statistics: Any, seed: int) -> Any:
    """The same statistics for other units of the same kind: a control that prunes as many of each kind."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        kind: score.flatten()[torch.randperm(score.numel(), generator=generator)].view_as(score)
        for kind, score in statistics.scores.items()
    }
    return statistics._replace(scores=scores)


def measure(model: Any, count: int) -> dict[str, float]:
    """Accuracy on unseen scenes of one creature: of the plain model, at all rates, and with units chosen by chance."""
    models = {"top1_plain": model}
    models |= {f"top1_at_{rate:g}": snippet.prune(model, rate) for rate in RATES}
    chance = shuffled(model.statistics, 0)
    models |= {f"top1_by_chance_at_{rate:g}": snippet.prune(model, rate, chance) for rate in RATES[1:3]}
    values = accuracies(models, UNSEEN, count)
    for rate in RATES:
        kept = snippet.chosen(model, snippet.batched(model.statistics), rate)
        values |= {f"{kind}_kept_at_{rate:g}": float(mask.float().mean()) for kind, mask in kept.items()}
    return {name: round(value, 4) for name, value in values.items()}


class Stored(nn.Module):
    """The statistics alone, as tensors of a file."""

    def __init__(self, statistics: Any):
        super().__init__()
        for kind, score in (*statistics.scores.items(), ("interaction", statistics.interaction)):
            self.register_buffer(kind, score)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=256, help="scenes that the statistics are means over")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()

    start = time.monotonic()
    model = with_glyph_weights(snippet.SavitTransformer(**GLYPH), arguments.root).eval()
    statistics = statistics_of(model, arguments.scenes, SCENES + 10 * arguments.seed)
    minutes = (time.monotonic() - start) / 60
    publish(
        Stored(statistics),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="savit-glyph",
        name="SAViT Glyph ViT",
        method="savit",
        architecture="The model glyph (timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP "
        "ratio 2) with the importance of its 24 heads, 1,536 neurons and 128 channels, and their interactions",
        training="None: squared gradients and second derivatives of the cross-entropy by gates on the units, means "
        f"over {arguments.scenes:,} fresh scenes of one creature. The weights are those of the model glyph.",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        limits="It knows the twelve creatures of the glyph world and nothing else. Nothing is trained after "
        "pruning, so at low rates it is less accurate than the method, whose authors fine-tune, would make it.",
        source="Statistics measured here, of snippets/models/glyph.safetensors on scenes of vitx.glyphs.",
    )


if __name__ == "__main__":
    main()
