"""Train the model protovit-glyph: prototypes of adaptable sub-patches on the glyph world.

    python snippets/models/train_protovit_glyph.py

It starts from the model glyph and learns from scenes, half with one creature and half with two, by their labels. Then
every prototype is moved onto the patches of the training scene of its class that it matches best, which are written
into the file; then it learns which parts to leave out, and last the weights of the prototypes. A run that was
interrupted goes on from its last minute. Writes snippets/models/protovit-glyph.safetensors, in half precision but for
the prototypes and what follows them, and its model card with the metrics measured on unseen scenes.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GRID,
    SCENES,
    UNSEEN,
    Settings,
    accuracies,
    arguments_parser,
    fit,
    gather,
    half_and_half,
    label_loss,
    means,
    publish,
    right,
    tokens,
    with_glyph_weights,
)
from vitx import glyphs, load_module
from vitx.vit import capture

BATCH = 64  # scenes in a step
HEAD: dict[str, Any] = {"classes": CLASSES, "each": 4, "parts": 4, "radius": 1}
CLUSTER, SEPARATION, ORTHOGONAL, COHERENCE = 0.8, 0.1, 1e-3, 3e-3  # weights of the losses, the authors'
SLOTS, SPARSE = 1e-6, 1e-3  # of coherence where parts are left out, the authors'; of L1 in the last layer
LAST_STEPS = 200  # of each of the two last stages

snippet = load_module("protovit")
NEAR = snippet.neighbours((GRID, GRID), HEAD["radius"], torch.device("cpu"))


def start(model: Any, seed: int) -> None:
    """Prototypes begin as four patches of a scene of the class: that which the class token attends to most, and three
    of its neighbours. Squares at random places would be background, of which most of a scene consists."""
    images, labels = glyphs.batch(300, seed, start=0)
    with torch.inference_mode(), capture(model.backbone, "attention") as record:
        x = model.focus(glyphs.normalise(images))
    strongest = record["attention"][-1].mean(1)[:, 0, 1:].argmax(1)  # (n,)
    for label in range(CLASSES):
        scenes = (labels[:, 0] == label).nonzero()[:, 0]
        for place in range(HEAD["each"]):
            y, column = (min(i, GRID - 2) for i in divmod(int(strongest[scenes[place]]), GRID))
            square = [GRID * y + column, GRID * y + column + 1, GRID * (y + 1) + column, GRID * (y + 1) + column + 1]
            model.prototypes.data[HEAD["each"] * label + place] = x[scenes[place], square]


def project(model: Any, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Move every prototype onto the patches of a training scene of its class.

    Returns:
        Cosines (n, M, S) of the moved prototypes in the same scenes, and the labels (n,).
    """
    own = torch.arange(len(model.prototypes)) // HEAD["each"]
    highest, chosen = torch.full((len(own),), -torch.inf), model.prototypes.detach().clone()
    with torch.inference_mode():
        for begin in range(0, count, 50):
            images, labels = glyphs.batch(50, seed, start=begin)
            x = model.focus(glyphs.normalise(images))
            found = model.match(x, NEAR)
            total = found.cosines.sum(-1).masked_fill(labels[:, :1] != own, -torch.inf)  # (50, M)
            for k in range(len(own)):
                scene = int(total[:, k].argmax())
                taken = bool((model.sources[:, 1] == begin + scene).any())  # no scene twice
                if total[scene, k] > highest[k] and not taken:
                    highest[k], chosen[k] = total[scene, k], x[scene, found.patches[scene, k]]
                    model.sources[k] = torch.tensor([seed, begin + scene, *found.patches[scene, k].tolist()])
        model.prototypes.data = chosen.clone()
        cosines, answers = [], []
        for begin in range(0, count, 50):
            images, labels = glyphs.batch(50, seed, start=begin)
            cosines.append(model.match(model.focus(glyphs.normalise(images)), NEAR).cosines)
            answers.append(labels[:, 0])
    return torch.cat(cosines).clone(), torch.cat(answers)


def leave_out(model: Any, cosines: Tensor, labels: Tensor) -> None:
    """Learn which parts to leave out, through a steep sigmoid, with everything else as it is."""
    select = torch.full_like(model.select, 0.1).requires_grad_()
    unit = torch.nn.functional.normalize(model.prototypes.detach(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)  # (M, S, S)
    optimiser = torch.optim.Adam([select], 7e-4)
    for _ in range(LAST_STEPS):
        slots = (20 * select).sigmoid()
        weights = slots * slots.shape[1] / slots.sum(1, keepdim=True)
        logits = (cosines * weights).sum(-1) @ model.last.detach().T
        pairs = distance * slots[:, :, None] * slots[:, None]
        loss = torch.nn.functional.cross_entropy(logits, labels) + SLOTS * pairs.flatten(1).amax(1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.select.data = select.detach()


def train_last(model: Any, cosines: Tensor, labels: Tensor) -> None:
    """Train the last layer alone, with an L1 penalty on what prototypes give to other classes."""
    scores = (cosines * model.weights().detach()).sum(-1)
    last, others = model.last.detach().clone().requires_grad_(), model.last.detach() <= 0
    optimiser = torch.optim.Adam([last], 1e-3)
    for _ in range(LAST_STEPS):
        loss = torch.nn.functional.cross_entropy(scores @ last.T, labels) + SPARSE * last[others].abs().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.last.data = last.detach()


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes: count with one creature and count with two."""
    values: dict[str, list[Tensor]] = {}
    kept = snippet.kept_parts(model.select)  # (M, S)
    source = torch.cat([glyphs.scenes(1, s, start=i).object_masks[:, 0] for s, i, *_ in model.sources.tolist()])
    cover = glyphs.patch_fraction(source, (GRID, GRID)).flatten(1)  # (M, P)
    gather(values, parts_kept=kept, prototypes_on_creature=(cover.gather(1, model.sources[:, 2:]) > 0)[kept])
    for begin in range(0, count, 100):
        scenes = glyphs.scenes(100, UNSEEN, 1, start=begin)
        found = snippet.explain(model, glyphs.normalise(scenes.images), scenes.labels[:, 0])
        cover = glyphs.patch_fraction(scenes.object_masks[:, 0], (GRID, GRID)).flatten(1)  # (B, P)
        inside = (cover > 0).gather(1, found.patches.flatten(1)).view_as(found.patches)
        positive = found.map.clamp(min=0).flatten(1)
        gather(
            values,
            top1=found.logits.argmax(-1) == scenes.labels[:, 0],
            matches_on_creature=inside[found.of_target[..., None] & (found.weights > 0)],
            map_on_creature=(positive * (cover > 0)).sum(1) / positive.sum(1).clamp(min=1e-9),
            map_on_creature_chance=(cover > 0).float().mean(1),
        )
        scenes = glyphs.scenes(100, UNSEEN, 2, start=begin)
        with torch.inference_mode():
            gather(values, both_of_two=right(model(glyphs.normalise(scenes.images)), scenes.labels))
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--pool", type=int, default=2000, help="training scenes whose patches may become prototypes")
    parser.add_argument("--test", type=int, default=500, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, 0, arguments.steps, rate=2e-4, head_rate=3e-3)

    torch.manual_seed(settings.seed)
    network = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=0), arguments.root)
    model = snippet.ProtoViT(network, **HEAD)
    model.select.requires_grad_(False)
    model.last.requires_grad_(False)
    seed = SCENES + 10 * settings.seed + 1  # of the scenes whose patches may become prototypes
    start(model.eval(), seed)
    own = torch.arange(len(model.prototypes)) // HEAD["each"]

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, BATCH)
        half = BATCH // 2  # with one creature
        x = tokens(network, images, step)
        cosines = model.match(x[:, 1:] - x[:, :1], NEAR).cosines  # (B, M, S)
        classification = label_loss(cosines.sum(-1) @ model.last.T, labels)
        single, is_own = cosines[:half].amax(-1), labels[:half, :1] == own  # (B/2, M)
        near = single.masked_fill(~is_own, -1).amax(1).mean()
        far = single.masked_fill(is_own, -1).amax(1).mean()
        unit = torch.nn.functional.normalize(model.prototypes, dim=-1).view(CLASSES, HEAD["each"], -1)
        overlap = (unit @ unit.transpose(1, 2) - torch.eye(HEAD["each"])).abs().sum()
        coherence = snippet.incoherence(model.prototypes).sum()
        return classification - CLUSTER * near + SEPARATION * far + ORTHOGONAL * overlap + COHERENCE * coherence

    minutes = fit("protovit-glyph", model, network, loss, settings)
    model.half().float()  # what the file will hold
    found = accuracies({"top1_before_projection": model}, UNSEEN, min(arguments.test, 500))
    cosines, labels = project(model, arguments.pool, seed)
    found |= accuracies({"top1_after_projection": model}, UNSEEN, min(arguments.test, 500))
    leave_out(model, cosines, labels)
    train_last(model, cosines, labels)
    exact = model.prototypes.data, model.select.data, model.last.data
    model.half()
    model.prototypes.data, model.select.data, model.last.data = exact  # not rounded: prototypes equal their patches
    publish(
        model,
        {"backbone": BACKBONE, "head": HEAD, "sources": model.sources.tolist()},
        lambda path: measure(snippet.load_pretrained(path), arguments.test) | found,
        minutes,
        parser,
        arguments,
        id="protovit-glyph",
        name="ProtoViT Glyph ViT",
        method="protovit",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, under four "
        "prototypes of up to four sub-patches for each class",
        training=f"Fine-tuned from the model glyph on {settings.steps * BATCH:,} fresh scenes of the glyph world, "
        "half with one creature and half with two, by their labels only, with prototypes that began where the class "
        "token of glyph looks: cross-entropy and the authors' cluster, separation, orthogonality and coherence "
        "losses. Then every prototype was moved onto the patches that "
        f"it matches best in {arguments.pool:,} scenes, parts were left out, and the last layer was trained.",
        limits="It knows the twelve creatures of the glyph world and nothing else. The model glyph, from which it "
        "starts, was trained to see the creatures' parts, so it says little about how prototypes fare without.",
    )


if __name__ == "__main__":
    main()
