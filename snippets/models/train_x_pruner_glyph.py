"""Train the model x-pruner-glyph: masks for each class on heads and neurons of the model glyph, and what they prune.

    python snippets/models/train_x_pruner_glyph.py

Three stages. First the masks learn, through the frozen model glyph, on scenes with their labels. Then the thresholds
learn which half of the heads and neurons may go, together with the weights. At last the weights learn at rates that are
drawn anew for every step. A run that was interrupted goes on from its last minute. Writes
snippets/models/x-pruner-glyph.safetensors, in half precision, and its model card with the metrics measured on unseen
scenes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GLYPH,
    SCENES,
    UNSEEN,
    Settings,
    all_but,
    arguments_parser,
    classifier,
    fit,
    gather,
    means,
    publish,
    with_glyph_weights,
)
from vitx import glyphs, load_module
from vitx.vit import gated_units

NAME = "x-pruner-glyph"
BATCH = 64  # scenes in a step
RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, None)  # kept in the last stage; None is what the thresholds keep

snippet = load_module("x-pruner")


class Search(nn.Module):
    """The model, and the multipliers of the loss on the pruned share, which climb."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.multipliers = nn.Parameter(torch.tensor([10.0, 0.0]))  # beta, gamma
        self.multipliers.register_hook(torch.neg)


def untrained(root: Path) -> Any:
    """A MaskedTransformer with the weights of the model glyph, all masks one and all thresholds half the mean."""
    model = with_glyph_weights(snippet.MaskedTransformer(**GLYPH), root)
    for thresholds in model.masks.thresholds.values():
        thresholds.data.fill_(0.5)
    return model


def scenes(step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised scenes of one creature and their labels (B,)."""
    images, labels = glyphs.batch(BATCH, SCENES + 10 * seed + 1, start=step * BATCH)
    return glyphs.normalise(images), labels[:, 0]


def gated_loss(model: Any, images: Tensor, labels: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """Cross-entropy with the units multiplied by gates."""
    with torch.autocast("cpu", torch.bfloat16), gated_units(model, *(gates[kind] for kind in snippet.KINDS)):
        logits = model(images)
    return nn.functional.cross_entropy(logits.float(), labels)


def learn(model: Any, names: tuple[str, ...]) -> None:
    """Let only the parameters learn whose name starts with one of these."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes of one creature, beside the model glyph.

    top1: with what the thresholds keep; kept_heads, kept_neurons: how much that is; top1_at_r: with the share r.
    top1_at_0.5_reversed: with the half that is called less relevant. fall_own, fall_other: how far the class logit of
    the model glyph falls without the tenth of its neurons whose mask for this class, or for another, stands out most
    from the mean over all classes.
    """
    values: dict[str, list[Tensor]] = {}
    kept = snippet.kept_units(model)
    half = snippet.kept_units(model, 0.5)
    smaller = {f"_at_{rate}": snippet.prune(model, rate) for rate in (1.0, 0.9, 0.7, 0.5, 0.3)} | {
        "": snippet.prune(model)
    }
    masks, glyph = model.masks.values["neurons"].detach(), classifier()  # masks (C, L, hidden)
    special = (masks - masks.mean(0)).flatten(1)
    most = special.argsort(1, descending=True)[:, : special.shape[1] // 10]
    without = torch.ones_like(special).scatter(1, most, 0.0).view_as(masks)  # (C, L, hidden)
    with torch.inference_mode():
        for start in range(0, count, 100):
            size = min(100, count - start)
            drawn = glyphs.scenes(size, UNSEEN, start=start)
            images, labels = glyphs.normalise(drawn.images), drawn.labels[:, 0]
            found = {"top1_glyph": glyph(images).argmax(-1) == labels}
            for name, network in smaller.items():
                found[f"top1{name}"] = network(images).argmax(-1) == labels
            with gated_units(model, *((~half[kind]).float() for kind in snippet.KINDS)):
                found["top1_at_0.5_reversed"] = model(images).argmax(-1) == labels
            whole = glyph(images).gather(1, labels[:, None])
            for name, classes in (
                ("own", labels),
                ("other", (labels + 1 + torch.arange(size) % (CLASSES - 1)) % CLASSES),
            ):
                with gated_units(glyph, None, without[classes].transpose(0, 1)):
                    found[f"fall_{name}"] = (whole - glyph(images).gather(1, labels[:, None]))[:, 0]
            gather(values, **found)
    shares = {f"kept_{kind}": round(float(stays.float().mean()), 4) for kind, stays in kept.items()}
    return means(values) | shares


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--masks", type=int, default=150, help="steps for the masks")
    parser.add_argument("--thresholds", type=int, default=120, help="steps for the thresholds")
    parser.add_argument("--steps", type=int, default=160, help="steps for the weights at all rates")
    parser.add_argument("--weight", type=float, default=1.0, help="lambda, of the size of the masks")
    parser.add_argument("--pruned", type=float, default=0.5, help="alpha, share to prune")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    seed, minutes, done = arguments.seed, 0.0, 0

    torch.manual_seed(seed)
    model = untrained(arguments.root)
    search = Search(model)
    trunk = all_but(model, "masks.")

    def masks(step: int) -> Tensor:
        images, labels = scenes(step, seed)
        return gated_loss(model, images, labels, model.masks.gates(labels)) + arguments.weight * model.masks.penalty(
            labels
        )

    def thresholds(step: int) -> Tensor:
        images, labels = scenes(arguments.masks + step, seed)
        gates = model.masks.soft_gates()
        pruned = snippet.pruned_share(gates, model)
        if step % 20 == 0:
            print(f"step {step}: {float(pruned.detach()):.3f} pruned", flush=True)
        loss = gated_loss(model, images, labels, gates)
        return loss + snippet.share_loss(pruned, arguments.pruned, search.multipliers)

    def weights(step: int) -> Tensor:
        images, labels = scenes(arguments.masks + arguments.thresholds + step, seed)
        generator = torch.Generator().manual_seed(SCENES + 1_000_000 * seed + step)
        rate = RATES[int(torch.randint(len(RATES), (), generator=generator))]
        with torch.no_grad():
            gates = {kind: stays.float() for kind, stays in snippet.kept_units(model, rate).items()}
        return gated_loss(model, images, labels, gates)

    weights_of = ("model.blocks", "model.norm", "model.head")
    limits = ("model.masks.thresholds", "multipliers", *weights_of)
    stages = (
        ("masks", masks, ("model.masks.values",), arguments.masks),
        ("thresholds", thresholds, limits, arguments.thresholds),
        ("weights", weights, weights_of, arguments.steps),
    )
    for number, (name, loss, names, steps) in enumerate(stages):
        learn(search, names)
        settings = Settings(seed, number, steps, rate=2e-4, head_rate=0.05, explanation=arguments.weight)
        minutes += fit(f"{NAME}-{name}", search, trunk, loss, settings)
        done += steps
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id=NAME,
        name="X-Pruner Glyph ViT",
        method="x-pruner",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with 12 "
        "mask values, one for each class, for every head and MLP neuron, and two thresholds for each block",
        training=f"From the model glyph on {done * BATCH:,} fresh scenes of one creature: masks by cross-entropy "
        f"plus {arguments.weight:g} times their mean square ({arguments.masks} steps), thresholds that prune the "
        f"share {arguments.pruned:g} ({arguments.thresholds} steps), weights at shares from 0.3 to 1 "
        f"({arguments.steps} steps).",
        limits="It knows the twelve creatures of the glyph world and nothing else. Its masks tell which units "
        "speak for a class in this one model.",
    )


if __name__ == "__main__":
    main()
