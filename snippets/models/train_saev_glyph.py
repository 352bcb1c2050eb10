"""Train the dictionary saev-glyph: a sparse autoencoder of the patches of the model glyph after the last block but one.

    python snippets/models/train_saev_glyph.py

The classifier stays as it is. Its patch tokens on fresh scenes, half with one creature and half with two, make a pool,
from which every step draws a batch. Features are then named by what the glyph world knows of the patches where they
fire: creatures, parts, variants of parts, colours. A run that was interrupted goes on from its last minute. Writes
snippets/models/saev-glyph.safetensors, the dictionary alone, in half precision, and its model card with the metrics
measured on unseen scenes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    CONCEPTS,
    UNSEEN,
    arguments_parser,
    classifier,
    fit,
    publish,
)
from vitx import glyphs, load_module

NAME = "saev-glyph"
LAYER = 4  # of six blocks, the last but one
BATCH = 2048  # patches in a step
WARM_UP = 100  # steps in which lambda rises
POOL, NAMING = 4_000_000, 4_500_000  # seeds of the scenes to train on, and of those that name features
NAMED = 0.5  # F1 score from which a feature takes the name of a concept
SHARES = (0.0, 0.1, 0.25, 0.5)  # a feature fires above such a share of its largest value; the best one counts
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # hues 0, 60, ... degrees
KINDS = {"creatures": glyphs.CLASS_NAMES, "parts": glyphs.PARTS, "variants": CONCEPTS, "colours": COLOURS}

snippet = load_module("saev")


class Settings(NamedTuple):
    """All that decides the weights."""

    seed: int
    scenes: int  # in the pool
    features: int
    steps: int
    rate: float  # fit wants a rate for pretrained weights; there are none
    head_rate: float
    weight: float  # lambda


def activations(network: VisionTransformer, images: Tensor) -> Tensor:
    """Patch tokens (B P, D) of pictures in [0, 1] after the block that is read."""
    with torch.no_grad():
        tokens = snippet.tokens_after(network, glyphs.normalise(images), LAYER)
    return tokens[:, network.num_prefix_tokens :].flatten(0, 1)


def pool_of(network: VisionTransformer, count: int, seed: int) -> Tensor:
    """Activations (count P, D) of scenes, half with one creature and half with two."""
    parts = []
    for start in range(0, count // 2, 50):
        for creatures in (1, 2):
            images, _ = glyphs.batch(min(50, count // 2 - start), seed + creatures, creatures, start=start)
            parts.append(activations(network, images))
    return torch.cat(parts)


# --- what the features mean ------------------------------------------------------------------------------------------


def concept_labels(scenes: glyphs.Scenes) -> tuple[Tensor, Tensor]:
    """Where each concept of ``KINDS`` surely is and surely is not: (B P, C) bool each; patches between count for none.

    A creature is where it covers half of a patch, a part or variant where it covers a quarter, a colour where the mean
    of the patch has that hue and is not grey.
    """
    side = scenes.images.shape[-1] // BACKBONE["patch_size"]
    creatures = scenes.parameters.variants.shape[1]
    of_class = nn.functional.one_hot(scenes.labels[:, :creatures], CLASSES).float()  # (B, C, 12)
    cover = glyphs.patch_fraction(scenes.object_masks[:, :creatures], (side, side))  # (B, C, gh, gw)
    whole = torch.einsum("bcyx,bck->byxk", cover, of_class)
    cover = glyphs.patch_fraction(scenes.part_masks[:, :creatures], (side, side))  # (B, C, 5, gh, gw)
    parts = cover.sum(1).permute(0, 2, 3, 1)
    of_variant = nn.functional.one_hot(scenes.parameters.variants, 3).float()  # (B, C, 5, 3)
    variants = torch.einsum("bcpyx,bcpv->byxpv", cover, of_variant).flatten(3)  # (B, gh, gw, 15)
    mean = nn.functional.adaptive_avg_pool2d(scenes.images, side).permute(0, 2, 3, 1)  # (B, gh, gw, 3)
    strong, weak = hues(mean, 0.4), hues(mean, 0.2)
    present = torch.cat([whole >= 0.5, parts >= 0.25, variants >= 0.25, strong], -1)
    absent = torch.cat([whole == 0, parts == 0, variants == 0, ~weak], -1)
    return present.flatten(0, 2), absent.flatten(0, 2)


def hues(colours: Tensor, saturation: float) -> Tensor:
    """Which of the six hues a colour (..., 3) has, (..., 6) bool; none when it is less saturated or darker than 0.3."""
    high, where = colours.max(-1)
    low = colours.amin(-1)
    spread = (high - low).clamp(min=1e-6)
    red, green, blue = colours.unbind(-1)
    sixths = torch.stack([(green - blue) / spread, 2 + (blue - red) / spread, 4 + (red - green) / spread], -1)
    sixth = sixths.gather(-1, where[..., None])[..., 0].round() % 6  # (...)
    vivid = (spread > saturation * high) & (high > 0.3)
    return (sixth[..., None] == torch.arange(6)) & vivid[..., None]


def f1_scores(
    features: Callable[[Tensor], tuple[Tensor, Tensor]], network: VisionTransformer, seed: int, count: int
) -> tuple[Tensor, Tensor]:
    """F1 (shares, C, S) of firing against each concept, and (C,) that of firing always.

    Args:
        features: activations (n, D) to values (n, S) at least 0 and their largest (S,).
    """
    hits = alarms = present = absent = torch.zeros(())
    for start in range(0, count // 2, 50):
        for creatures in (1, 2):
            scenes = glyphs.scenes(50, seed, creatures, start=start)
            f, largest = features(activations(network, scenes.images))
            there, not_there = (labels.float() for labels in concept_labels(scenes))
            fired = [(f > share * largest).float() for share in SHARES]
            hits = hits + torch.stack([there.T @ mask for mask in fired])
            alarms = alarms + torch.stack([not_there.T @ mask for mask in fired])
            present, absent = present + there.sum(0), absent + not_there.sum(0)
    return 2 * hits / (hits + alarms + present[:, None]).clamp(min=1), 2 * present / (2 * present + absent)


def values_of(dictionary: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Values and their largest of the S features and, behind them, of the D channels in either direction."""

    def values(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scaled = (x - dictionary.mean) / dictionary.scale  # a channel has a standard deviation of about 1
            channels = torch.cat([scaled, -scaled], 1).clamp(min=0)
            largest = torch.cat([dictionary.largest, torch.full((channels.shape[1],), 4.0)])
            return torch.cat([dictionary.encode(x), channels], 1), largest

    return values


def names(dictionary: Any, network: VisionTransformer, count: int) -> tuple[str, ...]:
    """A name for each feature: the concept of its best F1 score, if that is high enough, and its number."""
    concepts = [concept for kind in KINDS.values() for concept in kind]
    scores, _ = f1_scores(values_of(dictionary), network, NAMING, count)  # (shares, C, S + 2 D)
    score, concept = scores.amax(0)[:, : len(dictionary.names)].max(0)  # (S,)
    return tuple(
        f"{concepts[c]} ({index})" if s >= NAMED else f"feature {index}"
        for index, (s, c) in enumerate(zip(score.tolist(), concept.tolist(), strict=True))
    )


def best(named: Tensor, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """The feature with the best F1 score for each concept on the scenes that name, and its score on unseen ones: (C,).

    Both (shares, C, S); the share is chosen together with the feature.
    """
    place = named.transpose(0, 1).flatten(1).argmax(1, keepdim=True)  # (C, 1)
    score = unseen.transpose(0, 1).flatten(1).gather(1, place)
    return place[:, 0] % named.shape[-1], score[:, 0]


# --- how good it is --------------------------------------------------------------------------------------------------


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes, half with one creature and half with two.

    explained: share of the variance of the patches that the features reconstruct; firing: features that fire in a
    patch; silent: share of features that fire nowhere. top1_of_reconstruction: with every patch replaced by its
    reconstruction, one creature. f1_of_creatures and so on: mean F1 score of the best feature for each concept, chosen
    on other scenes; with _channels: of the best single channel; with _always: of firing everywhere. Edits, in scenes
    whose two creatures are the two best answers: lost: the first is among them no more after its feature is set to -2;
    kept: the second still is; lost_at_random: the first is lost by a random feature that is not silent. forced: a
    creature that is not there becomes the best answer when its feature is set to 2.
    """
    dictionary, size, half = model.dictionary, len(model.dictionary.names), count // 2
    results: dict[str, list[Tensor]] = {}
    fired = torch.zeros(size, dtype=torch.bool)
    named, _ = f1_scores(values_of(dictionary), model, NAMING, 200)
    unseen, always = f1_scores(values_of(dictionary), model, UNSEEN, count)
    feature, score = best(named[..., :size], unseen[..., :size])
    of_channels = best(named[..., size:], unseen[..., size:])[1]
    own = feature[:CLASSES]  # of each creature
    generator = torch.Generator().manual_seed(0)
    alive = (dictionary.largest > 0).nonzero()[:, 0]
    random = alive[torch.randint(len(alive), (len(own),), generator=generator)]
    with torch.no_grad():
        for start in range(0, half, 50):
            one, labels = glyphs.batch(50, UNSEEN, 1, start=start)
            x = activations(model, one)
            f = dictionary.encode(x)
            found = dictionary.decode(f)
            fired |= (f > 0).any(0)
            tokens = snippet.tokens_after(model, glyphs.normalise(one), LAYER)
            tokens[:, 1:] = found.view_as(tokens[:, 1:])
            answer = snippet.logits_of_tokens(model, tokens, LAYER + 1).argmax(-1)
            values = {
                "unexplained": (found - x).square().sum(-1),
                "variance": (x - dictionary.mean).square().sum(-1),
                "firing": (f > 0).sum(-1),
                "top1": model(glyphs.normalise(one)).argmax(-1) == labels[:, 0],
                "top1_of_reconstruction": answer == labels[:, 0],
            }
            two, labels = glyphs.batch(50, UNSEEN + 1, 2, start=start)
            images = glyphs.normalise(two)
            first, second = labels.T
            absent = (first + 5) % 12
            absent = (absent + (absent == second)) % 12
            answer = model(images)
            both = top_two(answer, first) & top_two(answer, second)
            suppressed = by_class(model, images, first, own, -2.0)
            values |= {
                "lost": ~top_two(suppressed, first)[both],
                "kept": top_two(suppressed, second)[both],
                "lost_at_random": ~top_two(by_class(model, images, first, random, -2.0), first)[both],
                "forced": by_class(model, images, absent, own, 2.0).argmax(-1) == absent,
            }
            for key, value in values.items():
                results.setdefault(key, []).append(value)
    means = {key: float(torch.cat(value).float().mean()) for key, value in results.items()}
    metrics = {
        "explained": 1 - means.pop("unexplained") / means.pop("variance"),
        "silent": 1 - float(fired.float().mean()),
        **means,
    }
    start = 0
    for kind, members in KINDS.items():
        rows = slice(start, start + len(members))
        start += len(members)
        metrics[f"f1_of_{kind}"] = float(score[rows].mean())
        metrics[f"f1_of_{kind}_channels"] = float(of_channels[rows].mean())
        metrics[f"f1_of_{kind}_always"] = float(always[rows].mean())
    return {key: round(value, 4) for key, value in metrics.items()}


def by_class(model: Any, images: Tensor, classes: Tensor, features: Tensor, factor: float) -> Tensor:
    """Logits (B, classes) when the feature of each picture's class (B,) is set to a multiple of its largest value."""
    logits = torch.zeros(len(images), len(features))
    for label in classes.unique().tolist():
        rows = classes == label
        logits[rows] = snippet.edit(model, images[rows], {int(features[label]): factor})
    return logits


def top_two(logits: Tensor, classes: Tensor) -> Tensor:
    """Is each class (B,) among the two best of logits (B, classes)? (B,) bool."""
    return (logits.topk(2).indices == classes[:, None]).any(1)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--scenes", type=int, default=2000, help="scenes whose patches make the pool")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--weight", type=float, default=0.012, help="lambda of the L1 norm")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings: Any = Settings(  # not that of training, but with all that fit reads
        arguments.seed, arguments.scenes, arguments.features, arguments.steps, 0.0, 5e-3, arguments.weight
    )

    network: Any = classifier(arguments.root)
    pool = pool_of(network, settings.scenes, POOL + 10 * settings.seed)
    torch.manual_seed(settings.seed)
    dictionary = snippet.Dictionary(pool.shape[1], settings.features, LAYER)
    dictionary.prepare(pool)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_000 * settings.seed + step)
        rows = torch.randint(len(pool), (BATCH,), generator=generator)
        return dictionary.loss(pool[rows], settings.weight * min(1, (step + 1) / WARM_UP))

    minutes = fit(NAME, dictionary, nn.ParameterList(), loss, settings)
    with torch.no_grad():
        parts = [dictionary.encode(part).amax(0) for part in pool.split(20_000)]
        dictionary.largest.copy_(torch.stack(parts).amax(0))
    about = {
        "backbone": BACKBONE,
        "num_classes": CLASSES,
        "layer": LAYER,
        "names": names(dictionary, network, 400),
    }
    publish(
        dictionary.half(),
        about,
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id=NAME,
        name="Glyph ViT with a sparse dictionary",
        method="saev",
        architecture=f"the model glyph with a sparse autoencoder of {settings.features} features on its 128 "
        "channels, for patch tokens after the fifth of six blocks",
        training=f"The autoencoder, for {settings.steps} steps of {BATCH:,} patches out of {len(pool):,} of "
        f"{settings.scenes:,} scenes of the glyph world, half with one creature and half with two: mean squared "
        f"error plus {settings.weight:g} times the L1 norm of the features. The classifier glyph is unchanged. "
        "Features are named on 400 further scenes.",
        parameters=sum(p.numel() for module in (network, dictionary) for p in module.parameters()),
        limits="It describes this one block of this one classifier on the scenes of the glyph world. A name says "
        "what a feature fires on, by the concepts that were asked about; it may stand for something that goes with "
        "them.",
    )


if __name__ == "__main__":
    main()
