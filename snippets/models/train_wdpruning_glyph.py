"""Train the model wdpruning-glyph: a Vision Transformer with learned widths and shallow classifiers.

    python snippets/models/train_wdpruning_glyph.py

It starts from the model glyph, whose norm and head the shallow classifiers copy. In the first half weights, saliencies,
thresholds and the multipliers of the budget are trained together. In the second the saliencies and thresholds stay, and
the weights are trained on with a budget drawn anew in every step. A run that was interrupted goes on from its last
minute. Writes snippets/models/wdpruning-glyph.safetensors, in half precision, and its model card with the metrics
measured on unseen scenes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from training import (  # pyright: ignore[reportMissingImports]
    GLYPH,
    Settings,
    all_but,
    arguments_parser,
    fit,
    half_and_half,
    label_loss,
    measure_pruned,
    publish,
    with_glyph_weights,
    with_random,
)
from vitx import load_module

BATCH = 64  # scenes in a step
RATES = (1.0, 0.8, 0.6, 0.4)  # that the card tells of
EXITS = (3, 4, 5)  # numbers of blocks before a shallow classifier
START = 3.0  # of the thresholds: 95% of the units
SPEED = 10.0  # of the multipliers, relative to the thresholds
LEAST = 0.3  # smallest budget in the second stage

snippet = load_module("wdpruning")


class Training(nn.Module):
    """The model with the multipliers of its budget; gives the logits of all classifiers."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.multipliers = nn.Parameter(torch.zeros(2))  # of the excess and of its square

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        return snippet.exits(self.model, images)


def budget_loss(multipliers: Tensor, remains: Tensor, budget: float) -> Tensor:
    """Gradients of the augmented Lagrangian: while too much remains, that falls and multipliers rise. Value 0."""
    excess = (remains - budget).clamp(min=0)
    terms = torch.stack([excess, excess.square()])
    return (multipliers.detach() * terms - multipliers * terms.detach()).sum()


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes at ``RATES``, with the learned budget at every depth, and with random saliencies."""
    pruned = {f"{100 * rate:.0f}": snippet.prune(model, rate) for rate in RATES}
    pruned |= {f"learned_depth_{depth}": snippet.prune(model, depth=depth) for depth in (*EXITS, len(model.blocks))}
    pruned[f"{100 * RATES[-1]:.0f}_random"] = snippet.prune(with_random(model, "saliencies"), RATES[-1])
    return measure_pruned(pruned, count)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--search", type=int, default=180, help="steps that learn the masks")
    parser.add_argument("--again", type=int, default=600, help="steps that keep the saliencies")
    parser.add_argument("--budget", type=float, default=0.4, help="share of the blocks' weights that is to remain")
    parser.add_argument("--test", type=int, default=2000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.seed, arguments.again, arguments.search, rate=3e-4, head_rate=5e-2, explanation=arguments.budget
    )

    torch.manual_seed(settings.seed)
    model = with_glyph_weights(snippet.WdTransformer(EXITS, **GLYPH), arguments.root)
    with torch.no_grad():
        for threshold in model.thresholds.values():
            threshold.fill_(START)
        for norm, head in model.shallow.values():
            norm.load_state_dict(model.norm.state_dict())
            head.load_state_dict(model.head.state_dict())
    training = Training(model)
    trunk = all_but(training, "model.saliencies", "model.thresholds", "multipliers")

    def classification(step: int, masks: dict[str, Tensor]) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        weights = {f"model.{name}": value for name, value in snippet.masked(model, masks).items()}
        with torch.autocast("cpu", torch.bfloat16):
            logits = functional_call(training, weights, (images,))
        return torch.stack([label_loss(one, labels) for one in logits.values()]).sum()

    def search(step: int) -> Tensor:
        masks = {
            kind: snippet.TopShare.apply(saliency, model.thresholds[kind], 16)
            for kind, saliency in model.saliencies.items()
        }
        remains = snippet.remaining(model, dict(model.thresholds.items()))
        if step % 20 == 0:
            print(f"step {step}: {float(remains.detach()):.3f} of the weights remain", flush=True)
        return classification(step, masks) + budget_loss(SPEED * training.multipliers, remains, arguments.budget)

    minutes = fit("wdpruning-glyph-search", training, trunk, search, settings)
    with torch.no_grad():  # the average of the thresholds lags behind the budget that they had come to
        for kind, threshold in snippet.moved(model, arguments.budget).items():
            model.thresholds[kind].copy_(threshold.half())  # as they will be stored
            model.saliencies[kind].copy_(model.saliencies[kind].half())
    for kind, mask in snippet.keep(model).items():
        print(f"{kind}: kept in every block", mask.sum(1).tolist())

    def again(step: int) -> Tensor:
        rate = LEAST + (1 - LEAST) * float(torch.rand((), generator=torch.Generator().manual_seed(step)))
        return classification(
            settings.steps + step, {kind: mask.float() for kind, mask in snippet.keep(model, rate).items()}
        )

    second = settings._replace(crops=arguments.search, steps=arguments.again)
    minutes += fit("wdpruning-glyph", training, trunk, again, second)
    publish(
        model.half(),
        {"backbone": GLYPH, "exits": EXITS},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="wdpruning-glyph",
        name="WDPruning Glyph ViT",
        method="wdpruning",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with a "
        "saliency for each of the 4 heads, 256 neurons and 2 x 128 outputs of a block, thresholds, and classifiers "
        "after blocks 3, 4 and 5",
        training=f"From the model glyph, on {arguments.search * BATCH:,} fresh scenes of the glyph world with a "
        f"budget of {arguments.budget:.0%} of the blocks' weights; then, with the saliencies that were learned, on "
        f"{arguments.again * BATCH:,} more with a budget of {LEAST:.0%} to 100%, drawn anew in every step. The "
        "losses of the four classifiers are added. Half of the scenes have two creatures, which share the target.",
        limits="It knows the twelve creatures of the glyph world and nothing else, a task so easy that few units "
        "are enough for it. One set of weights serves all budgets; a model trained for one of them would be better "
        "at it.",
    )


if __name__ == "__main__":
    main()
