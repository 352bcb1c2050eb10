"""Train the model b-cos-vit-glyph: a B-cos Vision Transformer on the glyph world.

    python snippets/models/train_b_cos_vit_glyph.py

It starts from the weights of the model glyph, of which only the directions and no biases are left, so that it computes
something else; and it is told the labels of the pictures. Its patch tokens, through linear layers that are thrown away,
also learn to say what those of the model glyph say half-way and at the end (distillation), which a training this short
needs. Crops around one creature come first, then full scenes, half with one creature and half
with two. A run that was interrupted goes on from its last minute. Writes snippets/models/b-cos-vit-glyph.safetensors,
in half precision, and its model card with the metrics measured on unseen scenes.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    HALF,
    UNSEEN,
    Settings,
    arguments_parser,
    classifier,
    crops_then_scenes,
    fit,
    lessons,
    measure_evidence,
    plain_attention,
    present_classes,
    publish,
    unlike,
    window,
)
from vitx import load_module

CROPS, BATCH = 128, 64  # crops and scenes in a step

snippet = load_module("b-cos-vit")


def untrained(network: VisionTransformer) -> Any:
    """A BcosTransformer whose weights point where those of the model glyph do; its attention knows no places yet."""
    model = snippet.BcosTransformer(classes=CLASSES)
    weights = network.state_dict()
    pixels = weights["patch_embed.proj.weight"]  # (D, 3, p, p): of colours, and with the other sign of their inverses
    known = {"stem.weight": torch.cat([pixels, -pixels], 1).flatten(1)}
    for name in model.state_dict():
        source = name.replace("qkv", "attn.qkv").replace("proj", "attn.proj").replace("fc", "mlp.fc")
        if source in weights:
            known[name] = weights[source]
    model.load_state_dict(known, strict=False)
    return model


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--crops", type=int, default=2400, help="steps on crops")
    parser.add_argument("--scenes", type=int, default=800, help="steps on full scenes")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    steps = arguments.crops + arguments.scenes
    settings = Settings(arguments.seed, arguments.crops, steps, rate=2e-3, head_rate=2e-3)

    torch.manual_seed(settings.seed)
    options: dict[str, Any] = {"classes": CLASSES}
    glyph = plain_attention(classifier())
    model = untrained(glyph)
    width = BACKBONE["embed_dim"]
    pupils = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])  # thrown away
    middle: list[Tensor] = []
    hook = model.blocks[HALF - 1].register_forward_hook(lambda block, args, tokens: middle.append(tokens))

    def loss(step: int) -> Tensor:
        images, labels = crops_then_scenes(step, settings, CROPS, BATCH)
        first, last = lessons(glyph, images, window(images, step))
        with torch.autocast("cpu", torch.bfloat16):
            end = model.tokens(model.encode(images))
            logits = model.logits(end)
            taught = unlike(pupils[0](middle.pop()), first) + unlike(pupils[1](end), last)
        named = binary_cross_entropy_with_logits(logits.float(), present_classes(labels), reduction="none")
        return named.sum(1).mean() + taught

    minutes = fit("b-cos-vit-glyph", nn.ModuleDict({"model": model, "pupils": pupils}), pupils, loss, settings)
    hook.remove()
    publish(
        model.half(),
        {"options": options},
        lambda path: measure_evidence(snippet.load_pretrained(path), snippet.explain, arguments.test, UNSEEN),
        minutes,
        parser,
        arguments,
        id="b-cos-vit-glyph",
        name="B-cos Glyph ViT",
        method="b-cos-vit",
        architecture="BcosTransformer of snippets/inherent/b_cos_vit.py: 112 px in six colours, patch 8, dim 128, "
        "depth 6, 4 heads, 256 hidden units, B = 2, no biases, no class token",
        training="From the directions of the weights of the model glyph, without biases, on "
        f"{settings.crops * CROPS:,} crops and then "
        f"{(settings.steps - settings.crops) * BATCH:,} scenes of the glyph world, all fresh, the scenes half with "
        "one creature and half with two: binary cross-entropy of every class, and distillation of the patch tokens "
        "of the model glyph after its third and last block, by cosine.",
        limits="It knows the twelve creatures of the glyph world and nothing else. Its teacher, the model glyph, "
        "was trained to name creatures in their patches, so where its evidence lies is in part learned from that.",
    )


if __name__ == "__main__":
    main()
