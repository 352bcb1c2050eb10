"""Train the model lesion: it names the lesions that are painted on the invented eyes of vitx.lesions.

    python snippets/models/train_lesion.py

The transformer starts from the model glyph, without its head, and learns from fresh pictures with their labels alone;
it never sees a mask. A run that was interrupted goes on from its last minute. Writes
snippets/models/lesion.safetensors, in half precision, and its model card with the metrics measured on unseen pictures.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    SCENES,
    UNSEEN,
    Settings,
    arguments_parser,
    fit,
    means,
    publish,
    tokens,
    with_glyph_weights,
)
from vitx import glyphs, lesions

BATCH = 48  # pictures in a step


def network() -> Any:
    return VisionTransformer(num_classes=len(lesions.CLASS_NAMES), **BACKBONE)


def written(path: Path) -> Any:
    """The model in the file, before the catalogue knows it."""
    model = network()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval()


@torch.no_grad()
def measure(model: Any, count: int, seed: int) -> dict[str, float]:
    """Accuracy on unseen pictures, for every class, and how often the lesion's absence is noticed."""
    values: dict[str, list[Tensor]] = {"top1": [], "healthy_once_removed": []}
    values |= {f"recall_{name.replace(' ', '_')}": [] for name in lesions.CLASS_NAMES}
    for start in range(0, count, 100):
        size = min(100, count - start)
        scenes = lesions.scenes(size, seed, start)
        without = lesions.scenes(size, seed, start, labels=torch.zeros_like(scenes.labels))
        found, clean = (model(glyphs.normalise(some.images)).argmax(1) for some in (scenes, without))
        values["top1"].append(found == scenes.labels)
        values["healthy_once_removed"].append(clean[scenes.labels > 0] == 0)
        for label, name in enumerate(lesions.CLASS_NAMES):
            values[f"recall_{name.replace(' ', '_')}"].append(found[scenes.labels == label] == label)
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--test", type=int, default=2000, help="unseen pictures that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=5e-4, head_rate=2e-3)

    torch.manual_seed(settings.seed)
    model = with_glyph_weights(network())

    def loss(step: int) -> Tensor:
        scenes = lesions.scenes(BATCH, SCENES + 10 * settings.seed, start=step * BATCH)
        first = tokens(model, glyphs.normalise(scenes.images), step)[:, 0]
        return cross_entropy(model.head(first), scenes.labels)

    old = nn.ParameterList([parameter for name, parameter in model.named_parameters() if not name.startswith("head")])
    minutes = fit("lesion", model, old, loss, settings)
    publish(
        model.half(),
        {"backbone": BACKBONE, "class_names": lesions.CLASS_NAMES},
        lambda path: measure(written(path), arguments.test, UNSEEN),
        minutes,
        parser,
        arguments,
        id="lesion",
        name="Lesion ViT",
        method="komorowski-medical-eval",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, class token",
        classes=len(lesions.CLASS_NAMES),
        training=f"Fine-tuned from the model glyph, whose head was left out, on {settings.steps * BATCH:,} fresh "
        "pictures of vitx.lesions with their labels: cross-entropy. It has seen no mask.",
        limits="Its pictures are invented: painted blots on painted eyes, no photograph of a retina, no patient and no "
        "disease. It must not be used on medical pictures, and nothing medical follows from what it does.",
        source="Weights and pictures made in this project, from snippets/models/glyph.safetensors and vitx.lesions.",
    )


if __name__ == "__main__":
    main()
