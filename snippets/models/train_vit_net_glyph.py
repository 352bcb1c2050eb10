"""Train the model vit-net-glyph: a tree of prototypes on the glyph world.

    python snippets/models/train_vit_net_glyph.py

It starts from the model glyph and learns from scenes with one creature, by their labels. Then every prototype is moved
onto the nearest patch of a training scene, which is written into the file, and the leaves alone are trained on. A run
that was interrupted goes on from its last minute. Writes snippets/models/vit-net-glyph.safetensors, in half precision
but for prototypes and leaves, and its model card with the metrics measured on unseen scenes.
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
    arguments_parser,
    fit,
    gather,
    means,
    publish,
    tokens,
    with_glyph_weights,
)
from vitx import glyphs, load_module

BATCH = 64  # scenes in a step
TREE: dict[str, Any] = {"classes": CLASSES, "depth": 4, "width": 32}
INFORMATION = 1.0  # weight of the mutual information of leaf and class
LEAF_STEPS = 300  # after the prototypes have been moved

snippet = load_module("vit-net")


def information(reach: Tensor, labels: Tensor) -> Tensor:
    """Mutual information, in nats, of the leaf that is reached, (B, L) probabilities, and the class (B,)."""
    joint = torch.zeros(CLASSES, reach.shape[1]).index_add(0, labels, reach) / len(reach)  # (K, L)
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    return (joint * ((joint + 1e-9) / (apart + 1e-9)).log()).sum()


def project(model: Any, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Move every prototype onto the nearest patch of a training scene.

    Returns:
        The maxima over the patches at the leaves, (n, L, d), and the labels, (n,), of the scenes.
    """
    nodes = len(model.prototypes)
    nearest, chosen = torch.full((nodes,), torch.inf), torch.zeros_like(model.prototypes)
    pooled, labels = [], []
    with torch.inference_mode():
        for start in range(0, count, 50):
            images, label = glyphs.batch(50, seed, start=start)
            levels = model.levels(model.backbone.forward_features(glyphs.normalise(images)))
            pooled.append(levels[-1].amax(2))
            labels.append(label[:, 0])
            for node in range(nodes):
                level = (node + 1).bit_length() - 1
                patches = levels[level][:, node + 1 - 2**level]  # (50, P, d)
                distance = (patches - model.prototypes[node]).norm(dim=-1)  # (50, P)
                scene, patch = divmod(int(distance.argmin()), distance.shape[1])
                if distance[scene, patch] < nearest[node]:
                    nearest[node], chosen[node] = distance[scene, patch], patches[scene, patch]
                    model.sources[node] = torch.tensor([seed, start + scene, patch])
    model.prototypes.data = chosen.clone()
    return torch.cat(pooled).clone(), torch.cat(labels)


def train_leaves(model: Any, count: int, seed: int, pooled: Tensor, labels: Tensor) -> None:
    """Train the leaves on the scenes that gave the prototypes, everything before them as it is."""
    reach = []
    with torch.inference_mode():
        for start in range(0, count, 50):
            images, _ = glyphs.batch(50, seed, start=start)
            reach.append(model.walk(model.backbone.forward_features(glyphs.normalise(images))).reach)
    reach = torch.cat(reach).clone()
    leaves = [parameter for name, parameter in model.named_parameters() if name.startswith("leaf")]
    optimiser = torch.optim.Adam(leaves, 3e-3)
    for _ in range(LEAF_STEPS):
        answer = torch.einsum("bl,blk->bk", reach, model.answer(pooled))
        loss = torch.nn.functional.nll_loss((answer + 1e-12).log(), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def hard_answers(walk: Any, flipped: bool = False) -> tuple[Tensor, Tensor]:
    """Leaf (B,) where each turn takes the likelier side, and its answer (B, K). Flipped: the root takes the other."""
    rows, node = torch.arange(len(walk.left)), torch.zeros(len(walk.left), dtype=torch.long)
    while int(node[0]) < walk.left.shape[1]:
        right = walk.left[rows, node] <= 0.5
        node = 2 * node + 1 + (right ^ (node == 0) if flipped else right).long()
    leaf = node - walk.left.shape[1]
    return leaf, walk.answers[rows, leaf]


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on count unseen scenes with one creature."""
    values: dict[str, list[Tensor]] = {}
    for start in range(0, count, 100):
        scenes = glyphs.scenes(100, UNSEEN, 1, start=start)
        images, label = glyphs.normalise(scenes.images), scenes.labels[:, 0]
        found = snippet.explain(model, images)
        with torch.inference_mode():
            walk = model.walk(model.backbone.forward_features(images))
        leaf, answer = hard_answers(walk)
        _, other = hard_answers(walk, flipped=True)
        predicted = found.logits.argmax(-1)
        near = torch.nn.functional.max_pool2d(
            glyphs.patch_fraction(scenes.object_masks[:, :1], (GRID, GRID)), 3, 1, 1
        ).flatten(1)  # (B, P): is there creature in the 3 x 3 patches around?
        on = near.gather(1, found.best) > 0
        gather(
            values,
            top1=predicted == label,
            top1_of_one_path=answer.argmax(-1) == label,
            share_of_one_leaf=found.share,
            shown_path_is_the_likelier=found.leaf == leaf,
            other_side_of_root_changes_class=other.argmax(-1) != predicted,
            left_turns_on_creature=on[found.turns],
            leaf=leaf,
            label=label,
        )
    leaves, labels = (torch.cat(values.pop(key)) for key in ("leaf", "label"))
    most = torch.zeros(len(model.prototypes) + 1, CLASSES).index_put(
        (leaves, labels), torch.tensor(1.0), accumulate=True
    )
    return means(values) | {
        "top1_of_the_leaf_s_class": round(float(most.amax(1).sum() / len(labels)), 4),
        "leaves_used": float((most.sum(1) >= len(labels) / 100).sum()),
    }


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--pool", type=int, default=2000, help="training scenes whose patches may become prototypes")
    parser.add_argument("--test", type=int, default=500, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=2e-4, head_rate=3e-3)

    torch.manual_seed(settings.seed)
    network = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=0), arguments.root)
    seed = SCENES + 10 * settings.seed + 1
    model = snippet.ViTNeT(network, **TREE)

    def loss(step: int) -> Tensor:
        images, labels = glyphs.batch(BATCH, seed, start=step * BATCH)
        walk = model.walk(tokens(network, glyphs.normalise(images), step))
        classification = torch.nn.functional.nll_loss(snippet.log_answer(walk), labels[:, 0])
        told = information(walk.reach, labels[:, 0])
        if step % 25 == 0:
            print(f"step {step}: cross-entropy {classification:.3f}, information {told:.3f}", flush=True)
        return classification - INFORMATION * told

    minutes = fit("vit-net-glyph", model, network, loss, settings)
    model.half().float()  # what the file will hold
    before = measure(model, min(arguments.test, 500))
    print("before the prototypes were moved:", before)
    train_leaves(model, arguments.pool, seed, *project(model, arguments.pool, seed))
    exact = {
        name: value.clone() for name, value in model.state_dict().items() if name.startswith(("leaf", "prototypes"))
    }
    model.half()
    for name, value in exact.items():
        model.get_parameter(name).data = value  # not rounded: prototypes equal their patches
    publish(
        model,
        {"backbone": BACKBONE, "tree": TREE, "sources": model.sources.tolist()},
        lambda path: (
            measure(snippet.load_pretrained(path), arguments.test) | {"top1_before_projection": before["top1"]}
        ),
        minutes,
        parser,
        arguments,
        id="vit-net-glyph",
        name="ViT-NeT Glyph ViT",
        method="vit-net",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, under a "
        "tree of depth 4 with 15 prototypes of 32 channels, context modules on its edges and 16 leaves",
        training=f"Fine-tuned from the model glyph on {settings.steps * BATCH:,} fresh scenes of the glyph world "
        f"with one creature, by their labels only: cross-entropy, less {INFORMATION:g} times the mutual "
        f"information of leaf and class. Then every prototype was moved onto the nearest patch of "
        f"{arguments.pool:,} of these scenes, and the leaves alone were trained on them for {LEAF_STEPS} steps.",
        limits="It knows the twelve creatures of the glyph world, one in a scene, and nothing else. The model "
        "glyph, from which it starts, was trained to see the creatures' parts.",
    )


if __name__ == "__main__":
    main()
