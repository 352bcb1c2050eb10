"""Train the model captioner-glyph: it puts pictures of the glyph world into words.

    python snippets/models/train_captioner_glyph.py

The picture's transformer starts from the model glyph, without its head; the decoder starts from nothing. Creatures have
free combinations of the part variants here, 243 in all, so that every word of a caption has to be seen. The training
begins with crops around one creature and ends with full scenes of one creature, by the caption alone, each word given
the true words before it. A run that was interrupted goes on from its last minute. Writes
snippets/models/captioner-glyph.safetensors, in half precision, and its model card with the metrics measured on unseen
scenes.
"""

from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    GRID,
    SCENES,
    UNSEEN,
    Settings,
    arguments_parser,
    fit,
    means,
    publish,
    tokens,
    with_glyph_weights,
)
from vitx import glyphs, load_module

NAME = "captioner-glyph"
BATCH = 64  # pictures in a step
CROP = 56
DECODER: dict[str, Any] = {"words": glyphs.CAPTION_WORDS, "length": 15, "depth": 2, "heads": 4}
PART_OF = {variant: part for part, variants in glyphs.VARIANTS.items() for variant in variants}

snippet = load_module("captioning-transformer-explanation")


def scenes_of(variants: Tensor | None, count: int, seed: int, start: int, size: int = glyphs.SIZE) -> glyphs.Scenes:
    """Scenes of one creature with the given variants (B, 5), or with free ones."""
    labels, parameters = glyphs.draw(count, seed, 1, size, start)
    if variants is None:
        generator = torch.Generator().manual_seed(1_000_003 * seed + start)
        variants = torch.randint(3, (count, len(glyphs.PARTS)), generator=generator)
    return glyphs.render(parameters._replace(variants=variants[:, None]), labels)


def class_captions() -> tuple[str, ...]:
    """One caption for each class."""
    variants = torch.tensor(glyphs.CLASS_PARTS)
    return tuple(glyphs.captions(scenes_of(variants, len(variants), 0, 0, size=48)))


def on_evidence(found: Any, scenes: glyphs.Scenes) -> tuple[Tensor, Tensor]:
    """What lies on the part that a word names, of each map of such a word and of the picture: (n,) each.

    Attribution against the word counts as none; a map without any attribution for its word has none on the part.
    """
    inside = glyphs.patch_fraction(scenes.part_masks[:, 0], (GRID, GRID)) > 0  # (B, P, 14, 14)
    shares, chance = [], []
    for row, words in enumerate(found.words):
        for place, word in enumerate(words):
            if word in PART_OF:
                amount, there = found.maps[row, place].clamp(min=0), inside[row, glyphs.PARTS.index(PART_OF[word])]
                shares.append((amount * there).sum() / amount.sum().clamp(min=1e-12))
                chance.append(there.float().mean())
    return torch.stack(shares), torch.stack(chance)


def measure(path: Path, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: captions and words that are right, and the attribution of words on what they name."""
    model, values = snippet.load_pretrained(path), {}
    for start in range(0, count, 50):
        scenes = scenes_of(None, 50, UNSEEN, start)
        images, true = glyphs.normalise(scenes.images), glyphs.captions(scenes)
        written = model.write(images)
        wanted = model.tokenize(true)
        texts = [" ".join(model.vocabulary[t] for t in row if t > 1) for row in written.tolist()]
        same = written[:, : wanted.shape[1]] == wanted[:, : written.shape[1]]
        named = torch.tensor([[word in PART_OF for word in caption.split()] for caption in true])  # (B, 13)
        found = {
            "caption_right": torch.tensor([a == b for a, b in zip(texts, true, strict=True)]),
            "words_right": same[:, 1:14][named[:, : same.shape[1] - 1]],
        }
        for method in snippet.METHODS:
            shares, chance = on_evidence(snippet.explain(model, images, true, method=method), scenes)
            found |= {f"{method}_on_evidence": shares, "evidence_chance": chance}
        pictures, labels = glyphs.batch(50, UNSEEN + 1, 1, start=start)
        with torch.no_grad():
            found["top1"] = model(glyphs.normalise(pictures)).argmax(1) == labels[:, 0]
        for key, value in found.items():
            values.setdefault(key, []).append(value)
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--crops", type=int, default=700, help="the first steps see crops")
    parser.add_argument("--steps", type=int, default=950)
    parser.add_argument("--test", type=int, default=500, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, arguments.crops, arguments.steps, rate=4e-4, head_rate=1e-3)

    torch.manual_seed(settings.seed)
    network = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=0))
    captions = class_captions()
    model = snippet.Captioner(network, class_captions=captions, **DECODER)

    def loss(step: int) -> Tensor:
        size = CROP if step < settings.crops else glyphs.SIZE
        scenes = scenes_of(None, BATCH, SCENES + 10 * settings.seed + 8, step * BATCH, size)
        X = tokens(network, glyphs.normalise(scenes.images), step)[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            return -model.likelihood(X, model.tokenize(glyphs.captions(scenes))).mean()

    minutes = fit(NAME, model, network, loss, settings)
    publish(
        model.half(),
        {"image": BACKBONE, "decoder": DECODER, "class_captions": captions},
        lambda path: measure(path, arguments.test),
        minutes,
        parser,
        arguments,
        id=NAME,
        name="Glyph captioner",
        method="captioning-transformer-explanation",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, and two decoder "
        f"layers with cross-attention to its patches, over {len(glyphs.CAPTION_WORDS)} words",
        training=f"Picture transformer fine-tuned from the model glyph, without its head, the decoder from nothing, on "
        f"{settings.crops * BATCH:,} crops and then {(settings.steps - settings.crops) * BATCH:,} scenes of one "
        "creature with free part variants, all fresh, by their captions.",
        limits="It writes one form of sentence about one creature, from a closed vocabulary; two creatures, photos "
        "and other captions are outside what it has learned.",
    )


if __name__ == "__main__":
    main()
