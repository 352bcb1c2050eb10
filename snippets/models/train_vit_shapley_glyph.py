"""Train the model vit-shapley-glyph: a surrogate of the model glyph that bears hidden patches, and its explainer.

    python snippets/models/train_vit_shapley_glyph.py

First the surrogate, which starts as the model glyph, learns to say of a picture with hidden patches what glyph says of
the whole picture. Then the explainer, whose backbone starts as the surrogate, learns the Shapley values of the patches
for the surrogate's probabilities. All scenes are fresh, half with one creature and half with two. A run that was
interrupted goes on from its last minute. Writes snippets/models/vit-shapley-glyph.safetensors, in half precision, and
its model card with the metrics measured on unseen scenes.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GRID,
    SCENES,
    UNSEEN,
    Settings,
    arguments_parser,
    classifier,
    fit,
    gather,
    means,
    publish,
)
from vitx import glyphs, load_module
from vitx.vit import embed, keep_tokens, logits_of_tokens

BATCH = 64  # scenes in a step of the surrogate
PICTURES = 32  # scenes in a step of the explainer
PAIRS = 4  # coalitions of every picture in such a step, each with its complement
PATCHES = GRID * GRID  # of a scene
HIDDEN = 256  # width of the explainer's head

snippet = load_module("vit-shapley")


def untrained(surrogate: VisionTransformer) -> Any:
    """A ShapleyTransformer of this surrogate whose explainer starts from it and says zero everywhere."""
    backbone = VisionTransformer(**BACKBONE, num_classes=0)
    backbone.load_state_dict({key: value for key, value in surrogate.state_dict().items() if "head" not in key})
    model = snippet.ShapleyTransformer(surrogate, backbone, HIDDEN)
    nn.init.zeros_(model.head[-1].weight)
    nn.init.zeros_(model.head[-1].bias)
    return model


def pictures(count: int, seed: int, start: int) -> Tensor:
    """Normalised scenes (count, 3, S, S), the first half with one creature and the second with two."""
    parts = [glyphs.batch(count // 2, seed + creatures, creatures, start=start)[0] for creatures in (1, 2)]
    return glyphs.normalise(torch.cat(parts))


def subsets(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches of a random coalition of ``size`` (count, size), and of its complement (count, PATCHES - size)."""
    order = torch.rand(count, PATCHES, generator=generator).argsort(1)
    return order[:, :size], order[:, size:]


def shown(model: VisionTransformer, tokens: Tensor, patches: Tensor) -> Tensor:
    """Logits (B, classes), float32, when only these patches are shown."""
    with torch.autocast("cpu", torch.bfloat16):
        return logits_of_tokens(model, keep_tokens(model, tokens, patches)).float()


def surrogate_loss(teacher: VisionTransformer, model: VisionTransformer, step: int, seed: int) -> Tensor:
    """D_KL(f(x) || g(x_s)), the mean over a batch whose pictures all show equally many patches."""
    generator = torch.Generator().manual_seed(seed + step)
    images = pictures(BATCH, SCENES + 10 * seed, step * BATCH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = teacher(images).float().softmax(-1)
    size = int(torch.randint(PATCHES + 1, (1,), generator=generator))
    found = shown(model, embed(model, images), subsets(BATCH, size, generator)[0]).log_softmax(-1)
    return nn.functional.kl_div(found, wanted, reduction="batchmean")


def explainer_loss(model: Any, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The paper's objective, times the number of patches, and the same for equal shares instead of phi."""
    surrogate = model.surrogate
    size = torch.arange(1, PATCHES, dtype=torch.float64)
    sizes = 1 + torch.multinomial(1 / (size * (PATCHES - size)), PAIRS, replacement=True, generator=generator)
    with torch.no_grad():
        tokens = embed(surrogate, images)
        coalitions = [part for k in sizes.tolist() for part in subsets(len(images), k, generator)]
        worth = torch.stack([shown(surrogate, tokens, patches).softmax(-1) for patches in coalitions], 1)  # (B, S, K)
        everything = torch.arange(PATCHES).expand(len(images), -1)
        full = shown(surrogate, tokens, everything).softmax(-1)  # (B, K)
        empty = shown(surrogate, tokens[:1], everything[:1, :0]).softmax(-1)  # (1, K)
        s = torch.stack([torch.zeros(everything.shape).scatter_(1, patches, 1) for patches in coalitions], 1)
    with torch.autocast("cpu", torch.bfloat16):
        values = model.patch_values(images).float()  # (B, P, K)
    losses = []
    for phi in (values, torch.zeros_like(values)):
        missed = worth - empty[:, None] - s @ snippet.add_up(phi, full, empty)
        losses.append(PATCHES * missed.square().mean())
    return losses[0], losses[1]


def measure(teacher: VisionTransformer, model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature, and count with one or two for the losses."""
    values: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for start in range(0, count, 100):
            scenes = glyphs.scenes(100, UNSEEN, 1, start=start)
            images, labels = glyphs.normalise(scenes.images), scenes.labels[:, 0]
            whole = model.surrogate(images)
            tokens = embed(model.surrogate, images)
            hidden = shown(model.surrogate, tokens, subsets(100, 98, generator)[0])
            positive = snippet.explain(model, images, labels).clamp(min=0)
            mask = glyphs.patch_fraction(scenes.object_masks[:, 0], (GRID, GRID))
            learned, equal = explainer_loss(model, pictures(100, UNSEEN + 3, start), generator)
            gather(
                values,
                top1=whole.argmax(-1) == labels,
                agrees_with_glyph=whole.argmax(-1) == teacher(images).argmax(-1),
                top1_half_hidden=hidden.argmax(-1) == labels,
                explainer_loss=learned[None],
                explainer_loss_equal_shares=equal[None],
                relevance_inside=(positive * mask).sum((1, 2)) / positive.sum((1, 2)),
            )
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--surrogate", type=int, default=150, help="steps of the surrogate")
    parser.add_argument("--explainer", type=int, default=700, help="steps of the explainer")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    seed = arguments.seed

    torch.manual_seed(seed)
    teacher, surrogate = classifier(arguments.root), classifier(arguments.root)
    settings = Settings(seed, 0, arguments.surrogate, rate=2e-4, head_rate=2e-4)
    minutes = fit(
        "vit-shapley-glyph-surrogate",
        surrogate,
        surrogate,
        lambda step: surrogate_loss(teacher, surrogate, step, seed),
        settings,
    )
    model = untrained(surrogate.requires_grad_(False))
    explainer = nn.ModuleList([model.backbone, model.attention, model.head])

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_000 + seed + step)
        images = pictures(PICTURES, SCENES + 10 * seed + 5, step * PICTURES)
        return explainer_loss(model, images, generator)[0]

    settings = Settings(seed, arguments.surrogate, arguments.explainer, rate=3e-4, head_rate=1e-3)
    minutes += fit("vit-shapley-glyph-explainer", explainer, model.backbone, loss, settings)
    publish(
        model.half(),
        {"network": BACKBONE, "num_classes": CLASSES, "hidden": HIDDEN},
        lambda path: measure(teacher, snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="vit-shapley-glyph",
        name="ViT-Shapley Glyph",
        method="vit-shapley",
        architecture="two timm VisionTransformers, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2: the "
        "surrogate with its head of 12 classes, and the explainer's backbone under one more block and three linear "
        f"layers, {HIDDEN} wide",
        training=f"The surrogate: from glyph, on {arguments.surrogate * BATCH:,} fresh scenes with hidden patches, "
        "every number equally often, towards what glyph says of the whole scene. The explainer: from the "
        f"surrogate, on {arguments.explainer * PICTURES:,} fresh scenes with {2 * PAIRS} coalitions each, paired. "
        "AdamW, averaged weights, kept in half precision.",
        limits="It knows the twelve creatures of the glyph world and nothing else. It explains its own surrogate, "
        "which agrees with glyph on most scenes but is another network.",
    )


if __name__ == "__main__":
    main()
