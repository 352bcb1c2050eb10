"""Train the model protopformer-glyph: global and local prototypes on the glyph world.

    python snippets/models/train_protopformer_glyph.py

It starts from the model glyph and learns from scenes, half with one creature and half with two, by their labels. At the
end every prototype is moved onto the nearest token of a training scene of its class, and which scene and patch that was
is written into the file. A run that was interrupted goes on from its last minute. Writes
snippets/models/protopformer-glyph.safetensors, in half precision but for the prototypes, and its model card with the
metrics measured on unseen scenes.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GRID,
    SCENES,
    UNSEEN,
    Settings,
    accuracies,
    arguments_parser,
    fit,
    gather,
    half_and_half,
    label_loss,
    means,
    publish,
    right,
    with_glyph_weights,
)
from vitx import glyphs, load_module

BATCH = 64  # scenes in a step
HEAD: dict[str, Any] = {"classes": CLASSES, "local": 5, "whole": 3, "width": 64, "keep": 30, "weight": 0.5}
POOL = 2400  # training scenes whose tokens may become prototypes
SPREAD, APART, CLUSTER = 0.1, 0.5, 0.1  # weights of the losses beside the cross-entropy

snippet = load_module("protopformer")


def pool(model: Any, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of training scenes as prototypes see them, (n, d) and (n, keep, d); patches (n, keep) and labels (n,)."""
    found = []
    with torch.inference_mode():
        for start in range(0, count, 100):
            images, labels = glyphs.batch(100, seed, start=start)
            first, patches, kept = model.embed(glyphs.normalise(images))
            found.append((first[:, 0], patches, kept, labels[:, 0]))
    first, patches, kept, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return first, patches, kept, labels


def start(model: Any, count: int, seed: int) -> None:
    """Prototypes begin as tokens of scenes: local ones as patches at random, each of another scene of the class."""
    first, patches, _, labels = pool(model, count, seed)
    generator = torch.Generator().manual_seed(seed)
    for label in range(CLASSES):
        scenes = (labels == label).nonzero()[:, 0].repeat(5)  # a short pool may have few of a class
        local, whole = HEAD["local"], HEAD["whole"]
        chosen = torch.randint(0, HEAD["keep"], (local,), generator=generator)
        model.local_prototypes.data[local * label : local * (label + 1)] = patches[scenes[:local], chosen]
        model.global_prototypes.data[whole * label : whole * (label + 1)] = first[scenes[:whole]]


def project(model: Any, count: int, seed: int) -> None:
    """Move every prototype onto the nearest token of a training scene of its class; no token serves two prototypes."""
    first, patches, kept, labels = pool(model, count, seed)
    for label in range(CLASSES):
        scenes = (labels == label).nonzero()[:, 0]
        tokens, places = patches[scenes].flatten(0, 1), kept[scenes].flatten()
        for tensor, chosen, sources, each in (
            (tokens, model.local_prototypes.data, model.local_sources, HEAD["local"]),
            (first[scenes], model.global_prototypes.data, model.global_sources, HEAD["whole"]),
        ):
            rows = slice(each * label, each * (label + 1))
            distance = torch.cdist(chosen[rows], tensor, compute_mode="donot_use_mm_for_euclid_dist")
            for place in range(each):
                nearest = int(distance[place].argmin())
                distance[:, nearest] = torch.inf
                chosen[each * label + place] = tensor[nearest]
                if tensor is tokens:
                    scene = int(scenes[nearest // kept.shape[1]])
                    sources[each * label + place] = torch.tensor([seed, scene, int(places[nearest])])
                else:
                    sources[each * label + place] = torch.tensor([seed, int(scenes[nearest])])


def covered_by(scenes: glyphs.Scenes, patches: Tensor) -> Tensor:
    """Share of each part, and of the whole creature, in the 3 x 3 patches around patches (B, k): (B, k, 6)."""
    masks = torch.cat([scenes.part_masks[:, 0], scenes.object_masks[:, :1]], 1)  # (B, 6, S, S)
    cover = glyphs.patch_fraction(masks, (GRID, GRID))
    cover = torch.nn.functional.avg_pool2d(cover, 3, 1, 1, count_include_pad=False).flatten(2)  # (B, 6, P)
    return cover.gather(2, patches[:, None].expand(-1, 6, -1)).transpose(1, 2)


def sources_parts(sources: Tensor) -> Tensor:
    """Shares (M, 6) as in ``covered_by`` of the training patches (M, 3) that prototypes are."""
    rows = [
        covered_by(glyphs.scenes(1, seed, start=index), torch.tensor([[patch]]))
        for seed, index, patch in sources.tolist()
    ]
    return torch.cat(rows)[:, 0]


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature and count with two."""
    values: dict[str, list[Tensor]] = {}
    of_source = sources_parts(model.local_sources)  # (M, 6)
    own_part = of_source[:, :5].argmax(-1)
    gather(values, prototypes_on_creature=of_source[:, 5] > 0.1)
    for start in range(0, count, 100):
        scenes = glyphs.scenes(100, UNSEEN, 1, start=start)
        found = snippet.explain(model, glyphs.normalise(scenes.images), scenes.labels[:, 0])
        own = found.of_target.nonzero()[:, 1].view(100, -1)  # (B, m) prototypes of the class
        cover = covered_by(scenes, found.best.gather(1, own))  # (B, m, 6)
        same = torch.nn.functional.one_hot(own_part[own], 5).bool()  # (B, m, 5)
        share = glyphs.patch_fraction(scenes.object_masks[:, 0], (GRID, GRID))
        gather(
            values,
            top1=found.logits.argmax(-1) == scenes.labels[:, 0],
            matches_on_creature=cover[..., 5] > 0.1,
            matches_on_same_part=cover[..., :5][same] > 0.02,
            matches_on_another_part=cover[..., :5][~same] > 0.02,
            creature_in_foreground=(share * found.foreground).sum((1, 2)) / share.sum((1, 2)),
        )
        scenes = glyphs.scenes(100, UNSEEN, 2, start=start)
        with torch.inference_mode():
            gather(values, both_of_two=right(model(glyphs.normalise(scenes.images)), scenes.labels))
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--pool", type=int, default=POOL, help="training scenes whose tokens may become prototypes")
    parser.add_argument("--test", type=int, default=500, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=0, head_rate=3e-3)

    torch.manual_seed(settings.seed)
    network = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=0), arguments.root)
    network.requires_grad_(False)  # its attention chooses the foreground
    model = snippet.ProtoPFormer(network, **HEAD)
    seed = SCENES + 10 * settings.seed + 1  # of the scenes whose tokens may become prototypes
    start(model.eval(), arguments.pool // 4, seed)

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        half = BATCH // 2  # with one creature
        with torch.autocast("cpu", torch.bfloat16):
            first, patches, kept = model.embed(images)
        whole = snippet.similarity(first.float(), model.global_prototypes)
        local = snippet.similarity(patches.float(), model.local_prototypes)  # (B, n, M)
        classification = label_loss(model.classify(whole, local), labels)
        alone = label_loss(local.amax(1) @ model.votes(model.local_prototypes), labels)
        own = HEAD["local"] * labels[:half, :1] + torch.arange(HEAD["local"])  # (B/2, m), of the one creature
        maps = local[:half].gather(2, own[:, None].expand(-1, local.shape[1], -1)).transpose(1, 2)  # (B/2, m, n)
        places = torch.stack([kept[:half] // GRID, kept[:half] % GRID], -1).float()
        spread, apart = snippet.concentration(maps, places)
        globals_ = HEAD["whole"] * labels[:half, :1] + torch.arange(HEAD["whole"])
        cluster = -maps.amax(-1).mean() - whole[:half, 0].gather(1, globals_).mean()
        return classification + alone + SPREAD * spread + APART * apart + CLUSTER * cluster

    minutes = fit("protopformer-glyph", model, network, loss, settings)
    model.half().float()  # what the file will hold
    before = accuracies({"top1_before_projection": model}, UNSEEN, min(arguments.test, 500))
    project(model, arguments.pool, seed)
    prototypes = model.local_prototypes.data, model.global_prototypes.data
    model.half()
    model.local_prototypes.data, model.global_prototypes.data = prototypes  # not rounded: they equal their tokens
    sources = model.local_sources.tolist(), model.global_sources.tolist()
    publish(
        model,
        {"backbone": BACKBONE, "head": HEAD, "local_sources": sources[0], "global_sources": sources[1]},
        lambda path: measure(snippet.load_pretrained(path), arguments.test) | before,
        minutes,
        parser,
        arguments,
        id="protopformer-glyph",
        name="ProtoPFormer Glyph ViT",
        method="protopformer",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, whose last "
        f"block sees {HEAD['keep']} of 196 patches, under five local and three global prototypes of 64 channels for "
        "each class",
        training=f"On top of the model glyph, which stays as it is, on {settings.steps * BATCH:,} fresh scenes of the "
        "glyph world, half with one creature and half with two, by their labels only: cross-entropy, also of the local "
        "prototypes alone, plus the concentration "
        f"losses ({SPREAD:g} for the spread, {APART:g} for the distance) and {CLUSTER:g} times a cluster loss. "
        f"Then every prototype was moved onto the nearest token of {arguments.pool:,} training scenes.",
        limits="It knows the twelve creatures of the glyph world and nothing else. The model glyph, from which it "
        "starts, was trained to see the creatures' parts, so it says little about how prototypes fare without.",
    )


if __name__ == "__main__":
    main()
