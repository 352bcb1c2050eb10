"""Train the model ia-red2-glyph: interpreters that drop the patches of a glyph scene that are not informative.

    python snippets/models/train_ia_red2_glyph.py

It starts from the model glyph. The three interpreters are trained one after the other by policy gradients: while one
learns, those before it decide and those after it keep all. The blocks behind it and the head learn beside it, by
cross-entropy on the shorter sequences. All scenes hold one creature. A run that was interrupted goes on from its last
minute. Writes snippets/models/ia-red2-glyph.safetensors, in half precision, and its model card with the metrics
measured on unseen scenes.
"""

import math
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

NAME = "ia-red2-glyph"
BATCH, DRAWS = 48, 4  # scenes in a step, and draws of the policy for each
GROUPS = 3
PENALTIES = (3.0, 5.0, 8.0)  # tau of each interpreter, as in the authors' tool
LOGIT = 1.1  # of the scores before training: an interpreter starts by keeping three quarters

snippet = load_module("ia-red2")


def untrained(root: Path) -> Any:
    """An InterpretedTransformer with the weights of the model glyph, whose interpreters keep everything at first."""
    model = with_glyph_weights(snippet.InterpretedTransformer(GROUPS, **GLYPH), root)
    width = BACKBONE["embed_dim"] // BACKBONE["num_heads"]
    for interpreter in model.interpreters:
        for layer in (interpreter.query, interpreter.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.constant_(layer.bias, math.sqrt(LOGIT / math.sqrt(width)))
    return model


def decide(model: Any, tokens: Any, group: int) -> Any:
    """Tokens behind the group when its interpreter decides without drawing."""
    keep = snippet.decision(model.scores(tokens, group)) & tokens.real
    return model.run_group(model.drop(tokens, keep), group)


def finish(model: Any, tokens: Any, first: int) -> Tensor:
    """Logits (B, classes) when the groups from ``first`` on keep all that is left."""
    for group in range(first, GROUPS):
        tokens = model.run_group(tokens, group)
    return model.forward_head(model.norm(tokens.x)).float()


def losses(
    model: Any, images: Tensor, labels: Tensor, group: int, penalty: float, generator: torch.Generator
) -> Tensor:
    """Policy loss of one interpreter plus cross-entropy of the sequences that it drew."""
    with torch.no_grad():
        tokens = model.start(images)
        for before in range(group):
            tokens = decide(model, tokens, before)
        patches = BACKBONE["img_size"] ** 2 // BACKBONE["patch_size"] ** 2
        greedy = model.drop(tokens, snippet.decision(model.scores(tokens, group)) & tokens.real)
        answer = finish(model, greedy, group).argmax(-1)
        baseline = snippet.reward(greedy.real.sum(1) / patches, answer == labels, penalty)  # R(u hat)
    scores = model.scores(tokens, group).float()  # (B, n)
    many = type(tokens)(*(part.repeat(DRAWS, *[1] * (part.ndim - 1)) for part in tokens))
    drawn = (torch.rand(many.real.shape, generator=generator) < scores.detach().repeat(DRAWS, 1)) & many.real  # u
    kept = model.drop(many, drawn)
    first, others = (type(tokens)(*(part[rows] for part in kept)) for rows in (slice(BATCH), slice(BATCH, None)))
    with torch.no_grad():
        answers = finish(model, others, group).argmax(-1)
    logits = finish(model, first, group)  # the weights learn from one draw, the interpreter from all
    correct = torch.cat([logits.argmax(-1), answers]) == labels.repeat(DRAWS)
    advantage = snippet.reward(drawn.sum(1) / patches, correct, penalty) - baseline.repeat(DRAWS)
    policy = snippet.policy_loss(scores.repeat(DRAWS, 1), drawn, advantage, many.real)
    return policy + nn.functional.cross_entropy(logits, labels)


def report(model: Any, images: Tensor, labels: Tensor) -> str:
    """What all interpreters do now."""
    found = snippet.explain(model.eval(), images)
    kept = found.alive.flatten(2).float().mean((0, 2))[:: len(model.blocks) // GROUPS]
    model.train()
    return f"kept {kept.tolist()}, right {(found.logits.argmax(-1) == labels).float().mean():.3f}"


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes of one creature, beside the model glyph.

    kept: share of patches alive at the end; kept_first, kept_second: behind the first two interpreters. on_creature:
    share of what is kept that lies on the creature, where chance is creature; covered: share of the creature kept.
    The names that end in _at_r are measured when each interpreter keeps the share r of the patches before it.
    """
    values: dict[str, list[Tensor]] = {}
    glyph = classifier()
    with torch.inference_mode():
        for start in range(0, count, 100):
            size = min(100, count - start)
            scenes = glyphs.scenes(size, UNSEEN, start=start)
            images, labels = glyphs.normalise(scenes.images), scenes.labels[:, 0]
            truth = glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14)) > 0.5  # (B, 14, 14)
            found = {"top1_glyph": glyph(images).argmax(-1) == labels, "creature": truth.flatten(1).float().mean(1)}
            for name, options in [("", {})] + [(f"_at_{rate}", {"keep_rate": rate}) for rate in (0.9, 0.7, 0.5)]:
                result = snippet.explain(model, images, **options)
                alive = result.alive[:, -1]
                found[f"top1{name}"] = result.logits.argmax(-1) == labels
                found[f"kept{name}"] = alive.flatten(1).float().mean(1)
                found[f"on_creature{name}"] = (alive & truth).sum((1, 2)) / alive.sum((1, 2)).clamp(min=1)
                found[f"covered{name}"] = (alive & truth).sum((1, 2)) / truth.sum((1, 2)).clamp(min=1)
                if not options:
                    first, second = result.alive[:, 0], result.alive[:, 2]
                    found["kept_first"] = first.flatten(1).float().mean(1)
                    found["kept_second"] = second.flatten(1).float().mean(1)
            gather(values, **found)
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=140, help="steps for each interpreter")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = untrained(arguments.root)
    learner = nn.ParameterList(model.interpreters.parameters())
    trunk = all_but(model, "interpreters")
    assert len(learner) + len(trunk) == len(list(model.parameters()))
    minutes = 0.0
    for group in range(GROUPS):
        settings = Settings(
            arguments.seed, group, arguments.steps, rate=1e-4, head_rate=3e-3, explanation=PENALTIES[group]
        )

        def loss(step: int, group: int = group) -> Tensor:
            place = group * arguments.steps + step
            images, labels = glyphs.batch(BATCH, SCENES + 10 * arguments.seed + 1, start=place * BATCH)
            generator = torch.Generator().manual_seed(SCENES + 1_000_000 * arguments.seed + place)
            images, labels = glyphs.normalise(images), labels[:, 0]
            if step % 20 == 0:
                print(f"interpreter {group + 1}, step {step}: {report(model, images, labels)}", flush=True)
            with torch.autocast("cpu", torch.bfloat16):
                return losses(model, images, labels, group, PENALTIES[group], generator)

        minutes += fit(f"{NAME}-{group + 1}", model, trunk, loss, settings)
    publish(
        model.half(),
        {"backbone": BACKBONE, "num_classes": CLASSES, "groups": GROUPS},
        lambda path: measure(snippet.load_pretrained(path), arguments.test),
        minutes,
        parser,
        arguments,
        id=NAME,
        name="IA-RED² Glyph ViT",
        method="ia-red2",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, with an "
        "interpreter of 4 heads (two linear layers, 128 to 128) before blocks 1, 3 and 5",
        training=f"From the model glyph on {GROUPS * arguments.steps * BATCH:,} fresh scenes of one creature: the "
        f"interpreters one after the other by policy gradients ({DRAWS} draws for each scene, a wrong answer costs "
        f"{', '.join(f'{penalty:g}' for penalty in PENALTIES)}), blocks and head beside them by cross-entropy on the "
        "sequences drawn.",
        limits="It knows the twelve creatures of the glyph world and nothing else, and was trained with "
        "one creature in a scene. Its interpreters keep what is enough on average, not for every picture.",
    )


if __name__ == "__main__":
    main()
