"""Train the model md-vit-glyph: one set of weights for many ways to prune, and the policies that suit it best.

    python snippets/models/train_md_vit_glyph.py

Heads and neurons of the model glyph are scored by their dependence on its answers. Its weights then learn from scenes,
half with one creature and half with two, by their labels only, under policies drawn anew at every step. At last
policies for every budget are searched by a Gaussian process with expected improvement. A training that was interrupted
goes on from its last minute. Writes snippets/models/md-vit-glyph.safetensors, in half precision, and its model card
with the metrics measured on unseen scenes.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GLYPH,
    SCENES,
    UNSEEN,
    Settings,
    accuracies,
    arguments_parser,
    class_shares,
    fit,
    half_and_half,
    publish,
    with_glyph_weights,
)
from vitx import ATLAS, glyphs, load_module
from vitx.vit import gated_units

BATCH = 64  # scenes in a step
RATES = (0.8, 0.6, 0.5)
JUDGES = 1_500_000  # seed of the scenes on which policies are judged
HIGHEST = 0.5  # ratio

snippet = load_module("md-vit")


def untrained(root: Path) -> Any:
    """The model glyph with the scores of its units and without policies."""
    return with_glyph_weights(snippet.MdVitTransformer(len(RATES), **GLYPH), root).eval()


def drawn_policies(model: Any, count: int, rate: float, generator: np.random.Generator) -> np.ndarray:
    """Random policies (count, 2L + 1) whose operations are within a fiftieth of the rate.

    The largest ratio of each policy is drawn first, so that high rates are met too.
    """
    found: list[np.ndarray] = []
    while len(found) < count:
        highest = generator.uniform(0, HIGHEST, (2000, 1))
        policies = generator.uniform(0, highest, (2000, model.policies.shape[1]))
        found += list(policies[np.abs(snippet.operations(model, policies) / rate - 1) < 0.02])
    return np.stack(found[:count])


def accuracy(model: Any, policy: np.ndarray, images: Tensor, labels: Tensor) -> float:
    """Of the model pruned by a policy."""
    model.rates[0], model.policies[0] = 0.123, torch.as_tensor(policy)
    with torch.inference_mode():
        return float((snippet.prune(model, 0.123)(images).argmax(-1) == labels).float().mean())


def searched(model: Any, rate: float, first: int, more: int, seed: int) -> tuple[np.ndarray, list[float]]:
    """The best policy of ``first`` random ones and ``more`` by expected improvement, and all accuracies."""
    generator = np.random.default_rng(seed)
    images, labels = glyphs.batch(200, JUDGES, 1)
    images, labels = glyphs.normalise(images), labels[:, 0]
    tried = list(drawn_policies(model, first, rate, generator))
    found = [accuracy(model, policy, images, labels) for policy in track(tried, description=f"policies of {rate:g}")]
    for _ in track(range(more), description="expected improvement"):
        candidates = drawn_policies(model, 200, rate, generator)
        expected = snippet.expected_improvement(np.stack(tried), np.array(found), candidates)
        tried.append(candidates[expected.argmax()])
        found.append(accuracy(model, tried[-1], images, labels))
    return tried[int(np.argmax(found))], found


def measure(model: Any, count: int) -> dict[str, float]:
    """Accuracy on unseen scenes of one creature, beside the model glyph, and the operations left."""
    models = {"top1_plain": untrained(ATLAS), "top1_unpruned": model}
    models |= {f"top1_at_{rate:g}": snippet.prune(model, rate) for rate in RATES}
    values = accuracies(models, UNSEEN, count)
    for rate, policy in zip(RATES, model.policies, strict=True):
        values[f"operations_at_{rate:g}"] = float(snippet.operations(model, policy[None].double().numpy())[0])
        values[f"token_ratio_at_{rate:g}"] = float(policy[-1])
    return {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--first", type=int, default=8, help="random policies for each budget")
    parser.add_argument("--more", type=int, default=8, help="policies by expected improvement for each budget")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    steps = arguments.steps
    settings = Settings(arguments.seed, 0, steps, rate=3e-4, head_rate=3e-4)

    torch.manual_seed(settings.seed)
    model = untrained(arguments.root)
    images, _ = glyphs.batch(128, SCENES + 10 * settings.seed, 1)
    for kind, scores in snippet.dependence_scores(model, glyphs.normalise(images)).items():
        model.get_buffer(kind).copy_(scores)

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        wanted = class_shares(labels)
        policy = torch.rand(model.policies.shape[1], generator=torch.Generator().manual_seed(step)) * HIGHEST
        kept = snippet.chosen(model, policy)
        model.token_ratio = float(policy[-1])
        with torch.autocast("cpu", torch.bfloat16), gated_units(model, kept["heads"].float(), kept["neurons"].float()):
            tokens = model.forward_features(images)
        model.token_ratio = 0.0
        return nn.functional.cross_entropy(model.head(tokens.float()[:, 0]), wanted)

    minutes = fit("md-vit-glyph", model, model, loss, settings)
    start = time.monotonic()
    best = []
    for rate in RATES:
        policy, found = searched(model, rate, arguments.first, arguments.more, settings.seed)
        print(f"rate {rate:g}: random {max(found[: arguments.first]):.3f}, searched {max(found):.3f}", flush=True)
        best.append(torch.as_tensor(policy))
    model.rates.copy_(torch.tensor(RATES))
    model.policies.copy_(torch.stack(best))
    minutes += (time.monotonic() - start) / 60
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id="md-vit-glyph",
        name="Multi-dimensional Glyph ViT",
        method="md-vit",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, "
        f"with dependence scores of its units and {len(RATES)} policies that prune heads, neurons and tokens",
        training=f"Fine-tuned from the model glyph on {steps * BATCH:,} fresh scenes of the glyph world, half with "
        "one creature and half with two, by their labels only, under random policies; then "
        f"{arguments.first + arguments.more} policies were judged for each budget on 200 scenes.",
        limits="It knows the twelve creatures of the glyph world and nothing else. Its policies were picked from "
        "few, by their accuracy on 200 scenes, so the ratios of single blocks say little.",
    )


if __name__ == "__main__":
    main()
