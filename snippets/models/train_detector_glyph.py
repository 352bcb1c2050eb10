"""Train the model detector-glyph: a small DETR that finds the creatures of the glyph world and names them.

    python snippets/models/train_detector_glyph.py

The encoder starts from the model glyph, of which all but the last two blocks stay as they are; the decoder and its
object queries are new. It learns from scenes, half with one creature and half with two: each creature is matched
with one query (Hungarian method), which is to name it and draw its box, and the other queries are to say that there is
nothing. In every fourth step random patches take the mean colour, because methods that perturb the input do the same. A
run that was interrupted goes on from its last minute. Writes snippets/models/detector-glyph.safetensors, in half
precision, and its model card with the metrics measured on unseen scenes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
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

NAME = "detector-glyph"
BATCH = 32  # scenes in a step
DECODER: dict[str, Any] = {"classes": CLASSES, "queries": 6, "layers": 3, "heads": 4}
L1, GIOU = 5.0, 2.0  # DETR's weights of the box losses and costs, where the class has 1
FIXED = 4  # blocks of the encoder, the first ones, that stay those of glyph
NOTHING = 0.2  # weight of "no object" in the class loss: DETR has 0.1 for 100 queries, here are six
HIDING = 4  # every so many steps random patches are hidden
MOST_HIDDEN = 0.6  # largest share of patches that are hidden

snippet = load_module("generic-attention-detr")


# --- boxes ---------------------------------------------------------------------------------------------------------


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) middle x and y, width, height to left, top, right, bottom."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def middles(boxes: Tensor) -> Tensor:
    """(..., 4) left, top, right, bottom in pixels to middle x and y, width, height as shares of the picture."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1) / glyphs.SIZE


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and its generalised form, of boxes (..., 4) given by corners, which broadcast: (...)."""
    inner = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    outer = torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])
    shared, hull = inner.prod(-1), outer.prod(-1)
    union = (one[..., 2:] - one[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1) - shared
    iou = shared / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


# --- the loss of DETR ----------------------------------------------------------------------------------------------


def costs(logits: Tensor, boxes: Tensor, labels: Tensor, true: Tensor) -> Tensor:
    """What it costs to let a query (B, Q) stand for a creature (B, C): (B, Q, C).

    Args:
        logits: (B, Q, K + 1). boxes: (B, Q, 4). labels: (B, C), -1 for no creature. true: (B, C, 4). Boxes by middles.
    """
    named = logits.softmax(-1).gather(2, labels.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1))
    far = (boxes[:, :, None] - true[:, None]).abs().sum(-1)
    _, giou = overlap(corners(boxes)[:, :, None], corners(true)[:, None])
    return L1 * far - named - GIOU * giou


def matched(cost: Tensor, labels: Tensor) -> Tensor:
    """The query of each creature (B, C) in the cheapest matching of each picture; 0 where there is no creature."""
    queries = torch.zeros_like(labels)
    for row, (table, present) in enumerate(zip(cost.detach().numpy(), labels >= 0, strict=True)):
        found, creature = linear_sum_assignment(table[:, present.numpy()])
        queries[row, creature] = torch.as_tensor(found)  # the creatures that are there come first
    return queries


def detection_loss(logits: Tensor, boxes: Tensor, labels: Tensor, true: Tensor) -> Tensor:
    """DETR's loss of one layer of the decoder; arguments as in ``costs``."""
    present = labels >= 0
    queries = matched(costs(logits, boxes, labels, true), labels)
    batch = torch.arange(len(labels))[:, None].expand_as(labels)[present]
    wanted = torch.full(logits.shape[:2], CLASSES)
    wanted[batch, queries[present]] = labels[present]
    weight = torch.ones(CLASSES + 1)
    weight[CLASSES] = NOTHING
    named = cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)
    ours, theirs = boxes[batch, queries[present]], true[present]  # (creatures, 4)
    _, giou = overlap(corners(ours), corners(theirs))
    return named + L1 * (ours - theirs).abs().sum(-1).mean() + GIOU * (1 - giou).mean()


def drawn(step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised images (B, 3, 112, 112), labels (B, 2) and true boxes (B, 2, 4), by middles, of a step."""
    half = BATCH // 2
    parts = [glyphs.scenes(half, SCENES + 10 * seed + creatures, creatures, start=step * half) for creatures in (1, 2)]
    images = glyphs.normalise(torch.cat([part.images for part in parts]))
    if step % HIDING == 0:
        images = images * visible(len(images), SCENES + 1_000_000 * seed + step)
    return images, torch.cat([part.labels for part in parts]), middles(torch.cat([part.boxes for part in parts]))


def visible(count: int, seed: int) -> Tensor:
    """(count, 1, 112, 112): 0 on patches at random, a share of up to MOST_HIDDEN of each picture, and 1 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    share = MOST_HIDDEN * torch.rand(count, 1, 1, 1, generator=generator)
    return interpolate((torch.rand(count, 1, GRID, GRID, generator=generator) >= share).float(), scale_factor=8)


# --- ground truth --------------------------------------------------------------------------------------------------


def average_precision(classes: Tensor, scores: Tensor, hits: Tensor, truths: Tensor) -> float:
    """Area below the precision, made falling, over the recall; mean over the classes that occur.

    Args:
        classes, scores, hits: (n,) class, score and success of every detection. truths: (K,) objects of each class.
    """
    areas = []
    for label in truths.nonzero()[:, 0].tolist():
        mine = classes == label
        right = hits[mine][scores[mine].argsort(descending=True, stable=True)].double().numpy()
        recall = right.cumsum() / float(truths[label])
        precision = right.cumsum() / np.arange(1, len(right) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher one
        areas.append(float((np.diff(recall, prepend=0) * best).sum()))
    return float(np.mean(areas))


def successes(classes: Tensor, scores: Tensor, boxes: Tensor, labels: Tensor, true: Tensor) -> Tensor:
    """(B, Q) bool: detections that find a creature: its class, a box that overlaps by half, the surest of such.

    Args:
        classes, scores: (B, Q). boxes: (B, Q, 4). labels: (B, C), no class twice in a picture. true: (B, C, 4).
    """
    iou, _ = overlap(boxes[:, :, None], true[:, None])  # (B, Q, C)
    right = (classes[:, :, None] == labels[:, None]) & (iou >= 0.5)
    first = torch.where(right, scores[:, :, None], -1.0).argmax(1, keepdim=True)  # (B, 1, C)
    return (right & (torch.arange(classes.shape[1])[:, None] == first)).any(2)


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes, count with one creature and count with two.

    ap50: average precision at an overlap of one half. found: creatures that are detected with a probability of at least
    one half, under their name and with a box that overlaps by half. box_iou: overlap of the box of the query that is
    surest of a creature's class. top1, both_of_two: the surest classes are those of the creatures. The maps are those
    of generic attention for each creature: their mass on its patches (own) and on the other's, and the overlap of
    Otsu's mask with the creature (iou) and with that of the next scene (chance).
    """
    values: dict[str, list[Tensor]] = {}
    metrics: dict[str, float] = {}
    for creatures in (1, 2):
        detections: dict[str, list[Tensor]] = {}
        for start in range(0, count, 100):
            scenes = glyphs.scenes(min(100, count - start), UNSEEN, creatures, start=start)
            images, labels = glyphs.normalise(scenes.images), scenes.labels[:, :creatures]
            true, masks = scenes.boxes[:, :creatures], scenes.object_masks[:, :creatures]
            with torch.no_grad():
                found = model.detect(images)
            scores, classes = found.probabilities[..., :-1].max(-1)  # (B, Q)
            hits = successes(classes, scores, found.boxes, labels, true)
            gather(detections, classes=classes.flatten(), scores=scores.flatten(), hits=hits.flatten(), labels=labels)
            strongest = found.probabilities[..., :-1].amax(1).argsort(-1, descending=True)[:, :creatures]
            right = (strongest.sort(-1).values == labels.sort(-1).values).all(-1)
            confident = (hits & (scores >= 0.5)).sum(1) / creatures
            gather(values, **{"top1" if creatures == 1 else "both_of_two": right, f"found_{creatures}": confident})
            share = glyphs.patch_fraction(masks, (GRID, GRID))  # (B, C, 14, 14)
            for which in range(creatures):
                result = snippet.explain(model, images, labels[:, which])
                mass = (result.relevance[:, None] * share).sum((2, 3)) / result.relevance.sum((1, 2))[:, None]  # (B, C)
                inside = snippet.segment(result.relevance, (glyphs.SIZE, glyphs.SIZE))
                kept = {
                    "box_iou": overlap(result.box, true[:, which])[0],
                    "map_own": mass[:, which],
                    "map_iou": mask_overlap(inside, masks[:, which]),
                    "map_chance": mask_overlap(inside, masks[:, which].roll(1, 0)),
                }
                if creatures == 2:
                    kept["map_other"] = mass[:, 1 - which]
                gather(values, **{f"{name}_{creatures}": value for name, value in kept.items()})
        whole = {key: torch.cat(value) for key, value in detections.items()}
        truths = whole["labels"].flatten().bincount(minlength=CLASSES)
        ap = average_precision(whole["classes"], whole["scores"], whole["hits"], truths)
        metrics[f"ap50_{creatures}"] = round(ap, 4)
    return metrics | means(values)


def mask_overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of masks (B, H, W) bool: (B,)."""
    return (one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)


def untrained(root: Path) -> Any:
    """The network with the weights of the model glyph in its encoder, those of its first blocks fixed."""
    encoder: Any = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=0), root)
    fixed = [encoder.patch_embed, *encoder.blocks[:FIXED]]
    for parameter in [encoder.cls_token, encoder.pos_embed, *(p for part in fixed for p in part.parameters())]:
        parameter.requires_grad_(False)
    return snippet.Detector(encoder, **DECODER)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=2e-4, head_rate=1e-3)

    torch.manual_seed(settings.seed)
    model = untrained(arguments.root)

    def loss(step: int) -> Tensor:
        images, labels, true = drawn(step, settings.seed)
        decoded = model.decode(model.memory(tokens(model.encoder, images, step)))
        said = [model.read(state) for state in decoded.states]  # logits and boxes behind every layer
        return torch.stack([detection_loss(logits, boxes, labels, true) for logits, boxes in said]).sum()

    minutes = fit(NAME, model, model.encoder, loss, settings)
    publish(
        model.half(),
        {"encoder": BACKBONE, "decoder": DECODER},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id=NAME,
        name="Detector Glyph DETR",
        method="generic-attention-detr",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, under a decoder "
        "of three layers with four heads and six object queries, a linear class head and a box head of three layers",
        training="From the model glyph, of whose encoder the last two blocks were fine-tuned, on "
        f"{settings.steps * BATCH:,} fresh scenes of the glyph world, half with one creature and half with two, by "
        "their labels and boxes: DETR's loss (Hungarian matching, cross-entropy, L1 and generalised intersection over "
        "union of the boxes) behind every layer of the decoder. In every fourth step up to "
        f"{MOST_HIDDEN:.0%} of the patches were hidden.",
        limits="It knows the twelve creatures of the glyph world and nothing else, and has never seen more than two of "
        "them, or two of a class. The model glyph, from which it starts, was trained to name creatures in patches.",
    )


if __name__ == "__main__":
    main()
