"""Train the model svite-glyph: sparse training of heads and neurons on the glyph world, which drops and grows them.

    python snippets/models/train_svite_glyph.py

It starts from the model glyph with a random part of the heads and neurons of every block alive, and learns from scenes,
half with one creature and half with two, by their labels only. Every 40 steps, for the first four fifths of the
training, the weakest live units are dropped and others grow. A run that was interrupted goes on from its last minute.
Writes snippets/models/svite-glyph.safetensors, in half precision, and its model card with the metrics measured on
unseen scenes.
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
    arguments_parser,
    class_shares,
    fit,
    half_and_half,
    last_state,
    publish,
    tokens,
    with_glyph_weights,
)
from vitx import load_module

BATCH = 64  # scenes in a step
EVERY = 40  # steps between two updates of what is alive
RATES = (0.7, 0.6, 0.5, 0.3)

snippet = load_module("svite")


def untrained(root: Path, density: float, seed: int) -> Any:
    """The model glyph with a random part of its units alive."""
    model = with_glyph_weights(snippet.SviteTransformer(**GLYPH), root)
    generator = torch.Generator().manual_seed(seed)
    for alive in (model.heads_alive, model.neurons_alive):
        alive.copy_(snippet.sparse_start(alive, density, generator))
    model.bury()
    return model


def measure(model: Any, count: int) -> dict[str, float]:
    """Accuracy on unseen scenes of one creature, beside the model glyph, and the share of weights in blocks kept."""
    plain = with_glyph_weights(snippet.SviteTransformer(**GLYPH)).eval()
    models = {"top1_plain": plain} | {f"top1_at_{rate:g}": snippet.prune(model, rate) for rate in RATES}
    values = accuracies(models, UNSEEN, count)
    values |= {f"{kind}_alive": float(model.get_buffer(f"{kind}_alive").mean()) for kind in ("heads", "neurons")}
    sizes = [sum(p.numel() for p in of.blocks.parameters()) for of in (models["top1_at_0.7"], plain)]
    values["block_weights_kept"] = sizes[0] / sizes[1]
    return {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--density", type=float, default=0.7, help="share of the heads and of the neurons that live")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    steps = arguments.steps
    settings = Settings(arguments.seed, 0, steps, rate=5e-4, head_rate=5e-4, explanation=arguments.density)

    torch.manual_seed(settings.seed)
    model = untrained(arguments.root, arguments.density, settings.seed)

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        wanted = class_shares(labels)
        model.bury()  # the last step moved what is dead
        if step % EVERY == 0 and 0 < step < 0.8 * steps:
            found = snippet.criteria(model, images, wanted)
            rate = snippet.drop_rate(step, int(0.8 * steps))
            for kind in ("heads", "neurons"):
                alive = model.get_buffer(f"{kind}_alive")
                new = snippet.drop_and_grow(alive, found.drop[kind], found.grow[kind], rate)
                print(f"step {step}: {int((new > alive).sum())} other {kind} live", flush=True)
                alive.copy_(new)
            model.bury()
        return nn.functional.cross_entropy(model.head(tokens(model, images, step)[:, 0]), wanted)

    minutes = fit("svite-glyph", model, model, loss, settings)
    model.load_state_dict(last_state("svite-glyph"))
    model.bury()
    with torch.no_grad():
        batches = [half_and_half(steps + place, settings.seed, BATCH) for place in range(4)]
        scores = [snippet.criteria(model, images, class_shares(labels)).drop["heads"] for images, labels in batches]
        model.head_scores.copy_(torch.stack(scores).mean(0))
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="svite-glyph",
        name="S2ViTE Glyph ViT",
        method="svite",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2; in every "
        "block half of the heads and 70 % of the neurons are alive, and the weights of the others are zero",
        training="Fine-tuned from the model glyph, a random part of whose units was left alive, on "
        f"{steps * BATCH:,} fresh scenes of the glyph world, half with one creature and half with two, by their "
        f"labels only. Every {EVERY} steps the weakest live heads and neurons are dropped and others grow.",
        limits="It knows the twelve creatures of the glyph world and nothing else. It started from weights that "
        "were trained with all units alive, so it does not show how sparse training from nothing would do.",
    )


if __name__ == "__main__":
    main()
