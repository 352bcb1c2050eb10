"""Train the model uvc-glyph: heads, neurons and blocks of the glyph model under one budget of operations.

    python snippets/models/train_uvc_glyph.py

It starts from the model glyph and learns from scenes, half with one creature and half with two, by their labels and
by what glyph itself says of them. For the first two thirds of the steps a primal-dual method looks for the numbers of
heads and neurons and for the blocks that meet the budget; then the weights that are left learn on. A run that was
interrupted goes on from its last minute. Writes snippets/models/uvc-glyph.safetensors, in half precision, and its model
card with the metrics measured on unseen scenes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GLYPH,
    UNSEEN,
    Settings,
    accuracies,
    all_but,
    arguments_parser,
    class_shares,
    fit,
    half_and_half,
    last_state,
    plain_attention,
    publish,
    tokens,
    with_glyph_weights,
)
from vitx import ATLAS, load_module
from vitx.vit import gated_units, replaced_forwards

BATCH = 64  # scenes in a step
TEMPERATURE = 0.5  # of the Gumbel softmax over skipping and keeping a block
RATE = 5e-4  # of the weights, at its peak
STEPS = {"s_rate": 1e-4, "y_rate": 2e-4, "z_rate": 100.0}
GATE_WEIGHT = 1e-3  # of the budget's price z in the gradient of the skip logits
DISTILLATION = 0.5  # weight of the divergence from glyph
RATES = (0.5, 0.4, 0.3)

snippet = load_module("uvc")


def untrained(root: Path) -> Any:
    """The model glyph with nothing pruned."""
    return with_glyph_weights(snippet.UvcTransformer(**GLYPH), root)


def keep_probability(gates: Tensor, step: int) -> Tensor:
    """Soft sample (L,) of running each block, by the Gumbel softmax of its two logits; noise from the step."""
    noise = -torch.empty(gates.shape).exponential_(generator=torch.Generator().manual_seed(step)).log()
    return ((gates + noise) / TEMPERATURE).softmax(1)[:, 1]


def mixed_blocks(model: Any, keep: Tensor) -> list[tuple]:
    """Blocks that pass on a mixture of their output and their input."""

    def forward(x: Tensor, block: Any, share: Tensor) -> Tensor:
        return share * type(block).forward(block, x) + (1 - share) * x

    return [
        (block, lambda x, block=block, share=share: forward(x, block, share))
        for block, share in zip(model.blocks, keep, strict=True)
    ]


def measure(model: Any, count: int) -> dict[str, float]:
    """Accuracy on unseen scenes of one creature, beside the model glyph, and what is kept."""
    models = {"top1_plain": untrained(ATLAS).eval(), "top1": snippet.prune(model)}
    models |= {f"top1_at_{rate:g}": snippet.prune(model, rate) for rate in RATES}
    values = accuracies(models, UNSEEN, count)
    kept, costs = snippet.chosen(model, 1.0), snippet.unit_costs(model)
    runs = kept["blocks"][:, None]
    values["operations_of_blocks"] = sum(float((kept[kind] & runs).sum()) * costs[kind] for kind in costs)
    values |= {f"{kind}_kept": float((kept[kind] & runs).float().mean()) for kind in costs}
    values["blocks_kept"] = float(kept["blocks"].float().mean())
    return {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the operations of the blocks")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    steps = arguments.steps
    settings = Settings(arguments.seed, 0, steps, rate=RATE, head_rate=1e-2, explanation=arguments.budget)
    search = 2 * steps // 3  # steps under the budget

    torch.manual_seed(settings.seed)
    model, teacher = untrained(arguments.root), plain_attention(untrained(arguments.root)).eval()

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        wanted = class_shares(labels)
        with torch.no_grad():
            taught = teacher.head(tokens(teacher, images, step)[:, 0]).softmax(1)
        price = torch.zeros(())
        if step < search:
            keep = keep_probability(model.skip_gates, step)
            if step:
                snippet.primal_dual(model, keep.detach(), arguments.budget, RATE, **STEPS)
            if step % 20 == 0:
                share = float(snippet.resource(model, keep.detach()))
                print(
                    f"step {step}: R {share:.3f}, z {float(model.z):.0f}, pruned {model.pruned.ceil().int().T.tolist()}"
                )
            masks = [
                1 - snippet.smallest(norms, model.pruned[:, i].ceil()).float()
                for i, norms in enumerate(snippet.group_norms(model).values())
            ]
            price = GATE_WEIGHT * model.z * snippet.resource(model, keep)
            with gated_units(model, *masks), replaced_forwards(mixed_blocks(model, keep)):
                logits = model.head(tokens(model, images, step)[:, 0])
        else:
            model.pruned.ceil_()
            snippet.bury(model)  # the last step moved what is gone
            logits = model.head(tokens(model, images, step)[:, 0])
        told = nn.functional.cross_entropy(logits, wanted) + DISTILLATION * nn.functional.cross_entropy(logits, taught)
        return told + price

    minutes = fit("uvc-glyph", model, all_but(model, "skip_gates"), loss, settings)
    model.load_state_dict(last_state("uvc-glyph"))
    snippet.bury(model)
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="uvc-glyph",
        name="UVC Glyph ViT",
        method="uvc",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with the "
        "variables of its compression; pruned heads and neurons, and skipped blocks, have weights of zero",
        training=f"Fine-tuned from the model glyph on {steps * BATCH:,} fresh scenes of the glyph world, half with "
        "one creature and half with two, by their labels and by distillation from glyph: two thirds of the steps "
        f"under a budget of {arguments.budget:.0%} of the operations of the blocks, the rest with what was kept.",
        limits="It knows the twelve creatures of the glyph world and nothing else. It was trained for minutes, so "
        "what it keeps is the outcome of one short run, not a settled optimum.",
    )


if __name__ == "__main__":
    main()
