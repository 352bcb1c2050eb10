"""Train the model two-tower-glyph: a small CLIP on pictures and captions of the glyph world.

    python snippets/models/train_two_tower_glyph.py

The image tower starts from the model glyph and is trained further; the text tower starts from nothing. Creatures have
free combinations of the part variants here, 243 in all, so that every word of a caption matters, not only enough of
them to tell twelve classes apart. The training begins with crops around one creature and ends with full scenes, half
with one creature and half with two; then either caption is right. A run that was interrupted goes on from its last
minute. Writes snippets/models/two-tower-glyph.safetensors and its model card with the metrics measured on unseen
scenes.
"""

import itertools
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CROP,
    SCENES,
    UNSEEN,
    Settings,
    arguments_parser,
    fit,
    gather,
    means,
    publish,
    tokens,
    with_glyph_weights,
)
from vitx import glyphs, load_module

BATCH = 128  # pictures in a step
COMBINATIONS = torch.tensor(list(itertools.product(range(3), repeat=5)))  # (243, 5), variants in the order of PARTS
POWERS = torch.tensor([81, 27, 9, 3, 1])  # variants @ POWERS is the row of COMBINATIONS
TEXT: dict[str, Any] = {"words": glyphs.CAPTION_WORDS, "length": 15, "width": 64, "depth": 2, "heads": 4, "outputs": 64}


def captions_of(variants: Tensor) -> list[str]:
    """One caption for each row of variants (N, 5), in the words of glyphs.captions."""
    labels, parameters = glyphs.draw(len(variants), 0, size=48)
    return glyphs.captions(glyphs.render(parameters._replace(variants=variants[:, None]), labels))


def pictures(count: int, seed: int, creatures: int, start: int, size: int = glyphs.SIZE) -> tuple[Tensor, Tensor]:
    """Normalised pictures (B, 3, S, S) of creatures with free variants, and the row of COMBINATIONS of each, (B, C)."""
    labels, parameters = glyphs.draw(count, seed, creatures, size, start)
    generator = torch.Generator().manual_seed(1_000_003 * seed + start)
    variants = torch.randint(3, (count, creatures, len(glyphs.PARTS)), generator=generator)
    scenes = glyphs.render(parameters._replace(variants=variants), labels)
    return glyphs.normalise(scenes.images), variants @ POWERS


def contrast(similarity: Tensor, described: Tensor) -> Tensor:
    """CLIP's symmetric loss for pictures (rows) and captions (columns), where ``described`` marks all true pairs."""
    share = described / described.sum(1, keepdim=True)
    to_text = -(share * similarity.log_softmax(1)).sum(1).mean()
    seen = described.any(0)  # captions without a picture in this batch only serve as contrast
    similarity, described = similarity[:, seen], described[:, seen]
    to_image = -((described / described.sum(0)) * similarity.log_softmax(0)).sum(0).mean()
    return (to_text + to_image) / 2


def measure(model: Any, captions: Tensor, count: int) -> dict[str, float]:
    """Metrics on unseen scenes of each kind; captions (243, L) are the token ids of all COMBINATIONS."""
    values: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for start in range(0, count, 100):
            images, true = pictures(100, UNSEEN, 1, start)
            best = model.similarity(images, captions).argmax(1)
            pairs, either = pictures(100, UNSEEN + 1, 2, start)
            named = model.similarity(pairs, captions).argmax(1, keepdim=True)
            plain, labels = glyphs.batch(100, UNSEEN, 1, start=start)
            gather(
                values,
                caption_of_243=best == true[:, 0],
                words_right=COMBINATIONS[best] == COMBINATIONS[true[:, 0]],
                caption_of_243_either_of_two=(named == either).any(1),
                top1=model(glyphs.normalise(plain)).argmax(1) == labels[:, 0],
            )
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--crops", type=int, default=600, help="steps on crops")
    parser.add_argument("--scenes", type=int, default=250, help="steps on full scenes")
    parser.add_argument("--test", type=int, default=2000, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    steps = arguments.crops + arguments.scenes
    settings = Settings(arguments.seed, arguments.crops, steps, rate=5e-4, head_rate=2e-3)

    torch.manual_seed(settings.seed)
    snippet = load_module("generic-attention-two-tower")
    image = BACKBONE | {"num_classes": TEXT["outputs"]}
    network = with_glyph_weights(VisionTransformer(**image), arguments.root)
    nn.init.normal_(network.get_parameter("head.weight"), std=BACKBONE["embed_dim"] ** -0.5)
    class_captions = tuple(captions_of(torch.tensor(glyphs.CLASS_PARTS)))
    model = snippet.TwoTower(network, snippet.TextTower(**TEXT), class_captions)
    captions = model.text.tokenize(captions_of(COMBINATIONS))  # (243, L)

    def loss(step: int) -> Tensor:
        seed = SCENES + 10 * settings.seed + 5
        if step < settings.crops:
            batch = [pictures(BATCH, seed, 1, step * BATCH, CROP)]
        else:
            batch = [pictures(BATCH // 2, seed + creatures, creatures, step * BATCH // 2) for creatures in (1, 2)]
        vectors = network.head(tokens(network, torch.cat([images for images, _ in batch]), step)[:, 0])
        described = [torch.zeros(len(true), len(captions)).scatter(1, true, 1.0) for _, true in batch]
        return contrast(model.compare(vectors, model.text(captions)), torch.cat(described))

    minutes = fit("two-tower-glyph", model, network, loss, settings)
    publish(
        model,
        {"image": image, "text": TEXT, "class_captions": class_captions},
        lambda path: measure(snippet.load_pretrained(path), captions, arguments.test),
        minutes,
        parser,
        arguments,
        id="two-tower-glyph",
        name="Two-tower Glyph CLIP",
        method="generic-attention-two-tower",
        architecture="image: timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2; "
        f"text: two causal timm Blocks, dim 64, 4 heads, {len(TEXT['words'])} words; both project to 64 channels",
        training="Image tower fine-tuned from the model glyph, text tower from nothing, on "
        f"{settings.crops * BATCH:,} crops and then {(settings.steps - settings.crops) * BATCH:,} scenes of the "
        "glyph world, all fresh, with free part variants, the scenes half with one creature and half with two, "
        "against all 243 captions of one creature: CLIP's symmetric loss in which every true pair is a positive.",
        limits="It knows one form of sentence and a closed vocabulary, so word order and grammar mean nothing to "
        "it. Photographs and other captions are outside what it has learned.",
    )


if __name__ == "__main__":
    main()
