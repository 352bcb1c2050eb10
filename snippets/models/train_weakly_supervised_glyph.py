"""Train ts-cam-glyph, mctformer-glyph or transcam-glyph: models that find creatures after learning their names only.

    python snippets/models/train_weakly_supervised_glyph.py --method ts-cam

The transformer starts from the model glyph, without its head; everything else is new. It learns from scenes, half
with one creature and half with two, with the labels of the pictures. A run that was interrupted goes on from its last
minute. Writes snippets/models/<method>-glyph.safetensors, in half precision, and its model card with the metrics
measured on unseen scenes. The threshold above which a map is an object is chosen, for every kind of map, by 200 scenes
that neither training nor the metrics use.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, multilabel_soft_margin_loss
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    UNSEEN,
    Settings,
    arguments_parser,
    crops_then_scenes,
    fit,
    gather,
    label_loss,
    means,
    present_classes,
    publish,
    right,
    window,
)
from vitx import ATLAS, catalog, glyphs, load_module

BATCH = 64  # scenes in a step
CHOICE = 950_000  # seed of the scenes that choose thresholds
THRESHOLDS = [step / 20 for step in range(20)]  # of maps scaled to [0, 1]
STEPS = {"ts-cam": 160, "mctformer": 900, "transcam": 180}
CROPS = {"ts-cam": 0, "mctformer": 400, "transcam": 0}  # the first of these steps see crops of one creature
NAMES = {"ts-cam": "TS-CAM Glyph ViT", "mctformer": "MCTformer Glyph ViT", "transcam": "TransCAM Glyph Conformer"}
ARCHITECTURES = {
    "ts-cam": "a 3 x 3 convolution over its patch tokens, averaged over the picture, in place of its head",
    "mctformer": "twelve class tokens, whose channel means are the logits, without final norm, and a 3 x 3 convolution "
    "over its patch tokens",
    "transcam": "coupled at every block but the first with a convolutional branch of two stages, 64 and 128 channels, "
    "under a 3 x 3 convolution; the logits of both branches are added",
}
LOSSES = {
    "ts-cam": "cross-entropy, with two creatures the mean of both classes'",
    "mctformer": "the multi-label soft margin loss of the class tokens' logits plus that of the patches' mean",
    "transcam": "the multi-label soft margin loss of the sum of both branches' logits",
}


def untrained(method: str, root: Path) -> tuple[Any, nn.ParameterList]:
    """The network with the blocks of the model glyph, and the parameters that come from there."""
    snippet = load_module(method)
    weights = {key: value.float() for key, value in load_file(root / "snippets/models/glyph.safetensors").items()}
    weights = {key: value for key, value in weights.items() if not key.startswith("head")}
    if method == "ts-cam":
        model = snippet.SemanticTransformer(CLASSES, **BACKBONE)
    elif method == "mctformer":
        model = snippet.ClassTokenTransformer(CLASSES, **BACKBONE)
        weights = {key: value for key, value in weights.items() if not key.startswith("norm")}
        places = weights["pos_embed"]  # (1, 1 + P, D)
        weights["pos_embed"] = torch.cat([places[:, :1].expand(-1, CLASSES, -1), places[:, 1:]], 1)
        # Each class starts with its direction in glyph's head: of equal tokens, none would know what it is to look for.
        head = load_file(root / "snippets/models/glyph.safetensors")["head.weight"].float()  # (C, D)
        token = weights["cls_token"]  # (1, 1, D)
        tokens = token + head / head.square().mean().sqrt() * token.square().mean().sqrt()
        weights["cls_token"], weights["reg_token"] = tokens[:, :1], tokens[:, 1:]
    else:
        model = snippet.Conformer(CLASSES, **BACKBONE)
        for coupling in model.couplings:
            for parameter in coupling.down_norm.parameters():
                nn.init.zeros_(parameter)  # at first the tokens hear nothing from the convolutions
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected
    old = weights.keys() - {"cls_token", "reg_token"} if method == "mctformer" else weights.keys()
    return model, nn.ParameterList([parameter for name, parameter in model.named_parameters() if name in old])


def logits_of_crops(model: Any, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Both logits of a ClassTokenTransformer for crops in a window of the position grid, drawn from the seed."""
    side, classes = images.shape[-1] // BACKBONE["patch_size"], model.num_classes
    places = window(images, seed)  # (B, n)
    patches = model.patch_embed.proj(images).flatten(2).mT + model.pos_embed[0, classes:][places]  # (B, n, D)
    first = torch.cat([model.cls_token, model.reg_token], 1) + model.pos_embed[:, :classes]
    tokens = model.blocks(torch.cat([first.expand(len(images), -1, -1), patches], 1))
    activation = model.patch_head(tokens[:, classes:].mT.unflatten(2, (side, side)))
    return model.forward_head(tokens), activation.mean((2, 3))


def loss_of(method: str, model: Any, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """The method's loss of normalised pictures (B, 3, H, W) and their labels (B, 2), -1 where there is none."""
    with torch.autocast("cpu", torch.bfloat16):
        if images.shape[-1] < glyphs.SIZE:
            logits = logits_of_crops(model, images, step)
        else:
            logits = model.both_logits(images) if method == "mctformer" else (model(images),)
    if method == "ts-cam":
        return label_loss(logits[0].float(), labels)
    wanted = present_classes(labels)
    return torch.stack([multilabel_soft_margin_loss(one.float(), wanted) for one in logits]).sum()


# --- ground truth --------------------------------------------------------------------------------------------------


def kinds_of_map(method: str, model: Any, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The method's map and what it is made of, each (B, K, gh, gw), by name; and the logits (B, K)."""
    snippet = load_module(method)
    if method == "ts-cam":
        found = snippet.branches(model, images)
        attention = found.attention[:, None].expand_as(found.semantic)
        maps = {method: attention * found.semantic, "semantic": found.semantic, "attention": attention}
    else:
        found = snippet.class_maps(model, images)
        if method == "mctformer":
            maps = {method: found.refined(found.fused()), "fused": found.fused(), "attention": found.attention}
        else:
            maps = {method: found.refined().relu()}
        maps["activation"] = found.activation.relu()
    return maps, found.logits


def segmented(maps: Tensor, threshold: float, size: int = glyphs.SIZE) -> Tensor:
    """Pixels (B, C, S, S) bool where the map of a class (B, C, gh, gw), scaled to [0, 1], exceeds all others and the
    threshold."""
    pixels = interpolate(maps, (size, size), mode="bilinear")
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    scaled = (pixels - low) / (high - low).clamp(min=1e-12)
    first = scaled.argmax(1, keepdim=True) == torch.arange(maps.shape[1])[:, None, None]
    return first & (scaled > threshold)


def overlap(found: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks (B, C, S, S) bool, flat: (B C,)."""
    return ((found & truth).sum((2, 3)) / (found | truth).sum((2, 3)).clamp(min=1)).flatten()


def box_overlap(found: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of boxes (B, 4) left, top, right, bottom: (B,)."""
    sides = (torch.minimum(found[:, 2:], truth[:, 2:]) - torch.maximum(found[:, :2], truth[:, :2])).clamp(min=0)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (found, truth)]
    return sides.prod(1) / (areas[0] + areas[1] - sides.prod(1))


def of_labels(maps: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The maps (B, C, gh, gw) of the classes that are in the picture, (B, C)."""
    return {kind: every[torch.arange(len(labels))[:, None], labels] for kind, every in maps.items()}


def chosen_thresholds(method: str, model: Any) -> dict[str, float]:
    """For each kind of map the threshold of the best mean overlap, over 100 scenes of one and 100 of two creatures."""
    overlaps: dict[str, list[Tensor]] = {}
    for creatures in (1, 2):
        scenes = glyphs.scenes(100, CHOICE, creatures)
        maps, _ = kinds_of_map(method, model, glyphs.normalise(scenes.images))
        truth = scenes.object_masks[:, :creatures]
        for kind, one in of_labels(maps, scenes.labels[:, :creatures]).items():
            row = torch.stack([overlap(segmented(one, threshold), truth).mean() for threshold in THRESHOLDS])
            overlaps.setdefault(kind, []).append(row)
    return {kind: THRESHOLDS[int(torch.stack(rows).mean(0).argmax())] for kind, rows in overlaps.items()}


def measure(method: str, model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature and count with two; "chance" takes the next scene's map."""
    snippet, thresholds = load_module(method), chosen_thresholds(method, model)
    values: dict[str, list[Tensor]] = {}
    for creatures in (1, 2):
        for start in range(0, count, 100):
            scenes = glyphs.scenes(100, UNSEEN, creatures, start=start)
            labels, truth = scenes.labels[:, :creatures], scenes.object_masks[:, :creatures]
            maps, logits = kinds_of_map(method, model, glyphs.normalise(scenes.images))
            found = {"top1" if creatures == 1 else "both_of_two": right(logits, labels)}
            chosen = of_labels(maps, labels)
            for kind, one in chosen.items():
                found[f"iou_{creatures}_{kind}"] = overlap(segmented(one, thresholds[kind]), truth)
            other = segmented(chosen[method].roll(1, 0), thresholds[method])
            found[f"iou_{creatures}_chance"] = overlap(other, truth)
            if method == "ts-cam":
                size = (glyphs.SIZE, glyphs.SIZE)
                boxes = snippet.outline(chosen[method].flatten(0, 1), size, thresholds[method]).box.float()
                true = scenes.boxes[:, :creatures].flatten(0, 1)
                found[f"box_found_{creatures}"] = box_overlap(boxes, true) >= 0.5
                found[f"box_found_{creatures}_chance"] = box_overlap(boxes.roll(creatures, 0), true) >= 0.5
            gather(values, **found)
    return means(values) | {"threshold": thresholds[method]}


def main() -> None:
    parser = arguments_parser(__doc__)
    known = [id for id in STEPS if (ATLAS / catalog.snippet_name(id, "tasks")).is_file()]
    parser.add_argument("--method", choices=known, required=True)
    parser.add_argument("--steps", type=int, default=None, help=f"by default {STEPS}")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    method, name = arguments.method, f"{arguments.method}-glyph"
    settings = Settings(arguments.seed, CROPS[method], arguments.steps or STEPS[method], rate=5e-4, head_rate=2e-3)

    torch.manual_seed(settings.seed)
    model, trunk = untrained(method, arguments.root)

    def loss(step: int) -> Tensor:
        images, labels = crops_then_scenes(step, settings, BATCH, BATCH)
        return loss_of(method, model, images, labels, step)

    minutes = fit(name, model, trunk, loss, settings)
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure(method, load_module(method).load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id=name,
        name=NAMES[method],
        method=method,
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with "
        + ARCHITECTURES[method],
        training="Fine-tuned from the model glyph, whose head was left out, on "
        + (f"{settings.crops * BATCH:,} crops around one creature and then " if settings.crops else "")
        + f"{(settings.steps - settings.crops) * BATCH:,} fresh scenes of the glyph world, half with one creature "
        f"and half with two, by their labels only: {LOSSES[method]}.",
        limits="It knows the twelve creatures of the glyph world and nothing else. The model glyph, from which it "
        "starts, was also trained to name creatures in their patches, so it says little about how well the method "
        "does from labels of whole pictures alone.",
    )


if __name__ == "__main__":
    main()
