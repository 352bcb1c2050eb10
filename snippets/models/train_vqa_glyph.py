"""Train vqa-glyph or vqa-merged-glyph: models that answer questions about scenes of the glyph world.

    python snippets/models/train_vqa_glyph.py
    python snippets/models/train_vqa_glyph.py --fusion merged

The picture's transformer starts from the model glyph, without its head; everything else is new. The patches and the
words of a question meet in layers of co-attention, or of one attention over both (merged). Half of the creatures have
free combinations of the part variants, so that a part has to be looked at and does not follow from the others. The
training begins with crops around one creature and ends with full scenes, a third of them with one creature and the
others with two. A run that was interrupted goes on from its last minute. Writes snippets/models/<id>.safetensors, in
half precision, and its model card with the metrics measured on unseen scenes.
"""

import colorsys
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GRID,
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
from vitx import glyphs, load_module

FUSION = {"co-attention": ("cross", "self", "cross", "self"), "merged": ("merged",) * 4}
IDS = {"co-attention": "vqa-glyph", "merged": "vqa-merged-glyph"}
CROP = 56
CROPS, FULL, ASKED = 64, 48, 3  # crops in a step, scenes in a step, questions to each of them
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # hues 0, 60, ... degrees
COLOURED = ("tail", "crest", "body")  # in the order of Parameters.colours, whose fourth is the pattern's, dark or pale
CLEAR = 22  # degrees: a hue further from that of a name has no name
SEEN = 12  # pixels of a part that must be visible before it is asked about
APART = 10  # pixels between the centres of two creatures, below which neither is left of the other
NUMBERS = ("one", "two", "three")
ANSWERS = (
    *glyphs.CLASS_NAMES,
    *(variant for part in ("body", "crest", "tail", "pattern") for variant in glyphs.VARIANTS[part]),
    *NUMBERS,
    *COLOURS,
    *("yes", "no", "nothing"),
)
FORM = (
    "what",
    "which",
    "does",
    "is",
    "the",
    "a",
    "have",
    "of",
    "how",
    "many",
    "are",
    "there",
    "called",
    "left",
    "right",
)
WORDS = tuple(
    sorted(
        {*FORM, "colour", "creature", "creatures"}
        | set(glyphs.PARTS)
        | {variant for variants in glyphs.VARIANTS.values() for variant in variants}
        | set(glyphs.CLASS_NAMES)
    )
)
TEXT: dict[str, Any] = {"words": WORDS, "length": 12, "width": BACKBONE["embed_dim"], "depth": 1, "heads": 4}
NAME = "what is the creature called"

snippet = load_module("generic-attention-co-attention")


class Asked(NamedTuple):
    """A question about a scene, and where its answer can be seen."""

    text: str
    answer: str
    kind: str  # part, whether, colour, name, count or place
    evidence: tuple[tuple[int, str | None], ...]  # creatures and parts; None is the whole creature


# --- questions -----------------------------------------------------------------------------------------------------


def free(parameters: glyphs.Parameters, seed: int) -> glyphs.Parameters:
    """The same scenes with part variants drawn at random, which belong to no class."""
    generator = torch.Generator().manual_seed(seed)
    return parameters._replace(variants=torch.randint(3, parameters.variants.shape, generator=generator))


def hue(colour: list[float]) -> str | None:
    """The name of an RGB colour; None when its hue lies between two names."""
    degrees = 360 * colorsys.rgb_to_hsv(*colour)[0]
    nearest = round(degrees / 60)
    return COLOURS[nearest % 6] if abs(degrees - 60 * nearest) <= CLEAR else None


def questions(scenes: glyphs.Scenes, named: bool, seed: int) -> list[list[Asked]]:
    """All questions that make sense, for each scene; creatures are called by their names only where ``named``."""
    draw, p = Random(seed), scenes.parameters
    seen = scenes.part_masks.sum((3, 4)).tolist()  # (B, 2, 5) pixels
    labels, variants, colours = scenes.labels.tolist(), p.variants.tolist(), p.colours.tolist()
    places, found = p.centres[..., 0].tolist(), []
    for row, looks in enumerate(variants):
        asked: list[Asked] = []
        x = places[row]
        if len(looks) == 1:
            ways = {0: "creature"}
        elif abs(x[0] - x[1]) >= APART:
            left = int(x[1] < x[0])
            ways = {left: "left creature", 1 - left: "right creature"}
        else:
            ways = {}
        for which, way in ways.items():
            for part, variant, pixels in zip(glyphs.PARTS, looks[which], seen[row][which], strict=True):
                if pixels < SEEN:
                    continue
                names, evidence = glyphs.VARIANTS[part], ((which, part),)
                if part == "eyes":
                    asked.append(Asked(f"how many eyes does the {way} have", NUMBERS[variant], "part", evidence))
                else:
                    asked.append(Asked(f"which {part} does the {way} have", names[variant], "part", evidence))
                other = variant if draw.random() < 0.5 else (variant + draw.choice((1, 2))) % 3
                whether = (
                    f"does the {way} have a {names[other]} {part}"
                    if part in ("crest", "tail")
                    else f"is the {way} {names[other]}"
                )
                asked.append(Asked(whether, "yes" if other == variant else "no", "whether", evidence))
            for part, colour in zip(COLOURED, colours[row][which], strict=False):
                name = hue(colour)
                if name and seen[row][which][glyphs.PARTS.index(part)] >= SEEN:
                    asked.append(Asked(f"what colour is the {part} of the {way}", name, "colour", ((which, part),)))
            if named:
                name = glyphs.CLASS_NAMES[labels[row][which]]
                asked.append(Asked(f"what is the {way} called", name, "name", ((which, None),)))
        everything = tuple((which, None) for which in range(len(looks)))
        if scenes.images.shape[-1] == glyphs.SIZE:
            asked.append(Asked("how many creatures are there", NUMBERS[len(looks) - 1], "count", everything))
        if named and len(ways) == 2:
            for which, way in ways.items():
                for side in ("left", "right"):
                    name, other = (glyphs.CLASS_NAMES[labels[row][k]] for k in (which, 1 - which))
                    answer = "nothing" if way.startswith(side) else other
                    asked.append(Asked(f"what is {side} of the {name}", answer, "place", everything))
        found.append(asked)
    return found


def chosen(asked: list[Asked], count: int, draw: Random) -> list[Asked]:
    """Some of the questions: a kind first, then one of that kind, so that rare kinds are not drowned."""
    kinds = sorted({one.kind for one in asked})
    weights = [{"part": 3, "whether": 3, "colour": 2, "name": 1, "count": 0.5, "place": 1}[kind] for kind in kinds]
    if not kinds:
        return []
    return [draw.choice([one for one in asked if one.kind == kind]) for kind in draw.choices(kinds, weights, k=count)]


def evidence(scenes: glyphs.Scenes, row: int, asked: Asked) -> Tensor:
    """Pixels (S, S) bool where the answer can be seen."""
    masks = [
        scenes.object_masks[row, which] if part is None else scenes.part_masks[row, which, glyphs.PARTS.index(part)]
        for which, part in asked.evidence
    ]
    return torch.stack(masks).any(0)


def drawn(count: int, seed: int, creatures: int, start: int, named: bool, size: int = glyphs.SIZE) -> glyphs.Scenes:
    """Scenes of a seed, with the classes' parts where ``named`` and free ones elsewhere."""
    labels, parameters = glyphs.draw(count, seed, creatures, size, start)
    return glyphs.render(parameters if named else free(parameters, 1_000_003 * seed + start), labels)


def batch(step: int, settings: Settings) -> tuple[Tensor, list[list[Asked]]]:
    """Normalised pictures of a step, and the questions to each."""
    seed, draw = SCENES + 10 * settings.seed + 7, Random(step)
    pictures, asked = [], []
    for named in (True, False):
        if step < settings.crops:
            parts = [drawn(CROPS // 2, seed + named, 1, step * CROPS, named, CROP)]
        else:
            one, two = FULL // 6, FULL // 3
            parts = [
                drawn(one, seed + 2 + named, 1, step * FULL, named),
                drawn(two, seed + 4 + named, 2, step * FULL, named),
            ]
        for scenes in parts:
            pictures.append(glyphs.normalise(scenes.images))
            asked += [chosen(every, ASKED, draw) for every in questions(scenes, named, step)]
    return torch.cat(pictures), asked


# --- ground truth --------------------------------------------------------------------------------------------------


def unseen(count: int, start: int, seed: int = UNSEEN) -> list[tuple[glyphs.Scenes, list[tuple[int, Asked]]]]:
    """Scenes that no training saw, of each kind ``count``, and (row, question): one of every kind to each scene."""
    found = []
    for number, (creatures, named) in enumerate(((1, True), (1, False), (2, True), (2, False))):
        scenes, draw = drawn(count, seed + number, creatures, start, named), Random(start)
        rows = []
        for row, every in enumerate(questions(scenes, named, start)):
            for kind in sorted({one.kind for one in every}):
                rows.append((row, draw.choice([one for one in every if one.kind == kind])))
        found.append((scenes, rows))
    return found


def measure(path: Path, count: int) -> dict[str, float]:
    """By kind of question: right answers, relevance on the evidence, and the share of the picture that this is."""
    model, values = snippet.load_pretrained(path), {}

    def add(**found: Tensor) -> None:
        for key, value in found.items():
            values.setdefault(key, []).append(value)

    for start in range(0, count, 25):
        for scenes, rows in unseen(25, start):
            images = glyphs.normalise(scenes.images)
            pictures = images[[row for row, _ in rows]]
            found = snippet.explain(model, pictures, [one.text for _, one in rows])
            right = torch.tensor([answer == one.answer for answer, (_, one) in zip(found.answers, rows, strict=True)])
            inside = torch.stack([evidence(scenes, row, one) for row, one in rows])
            inside = glyphs.patch_fraction(inside, (GRID, GRID)) > 0
            share = (found.image * inside).sum((1, 2)) / found.image.sum((1, 2))
            add(right=right)
            for kind in sorted({one.kind for _, one in rows}):
                of_kind = torch.tensor([one.kind == kind for _, one in rows])
                add(
                    **{
                        f"{kind}_right": right[of_kind],
                        f"{kind}_relevance_on_evidence": share[of_kind],
                        f"{kind}_chance": inside[of_kind].float().mean((1, 2)),
                    }
                )
        images, labels = glyphs.batch(100, UNSEEN, 1, start=4 * start)
        with torch.no_grad():
            add(top1=model(glyphs.normalise(images)).argmax(1) == labels[:, 0])
    return means(values)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--fusion", choices=tuple(FUSION), default="co-attention")
    parser.add_argument("--crops", type=int, default=600, help="the first steps see crops of one creature")
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--test", type=int, default=250, help="unseen scenes of each kind that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, arguments.crops, arguments.steps, rate=4e-4, head_rate=1e-3)
    fusion, name = FUSION[arguments.fusion], IDS[arguments.fusion]

    torch.manual_seed(settings.seed)
    network = with_glyph_weights(VisionTransformer(**BACKBONE, num_classes=0))
    model = snippet.QuestionAnswering(network, snippet.Question(**TEXT), ANSWERS, CLASSES, fusion, NAME)
    with torch.no_grad():  # patches say where they are as they did to the first block
        places = network.pos_embed[0, 1:]
        model.place.copy_(0.5 * places / places.std())
    index = {answer: number for number, answer in enumerate(ANSWERS)}

    def loss(step: int) -> Tensor:
        images, asked = batch(step, settings)
        rows = torch.tensor([row for row, every in enumerate(asked) for _ in every])
        flat = [one for every in asked for one in every]
        patches = tokens(network, images, step)[:, 1:]  # (B, n, D)
        side = images.shape[-1] // BACKBONE["patch_size"]
        corner = torch.randint(0, GRID - side + 1, (len(images), 2), generator=torch.Generator().manual_seed(step))
        window = (corner[:, :1] + torch.arange(side))[:, :, None] * GRID + (corner[:, 1:] + torch.arange(side))[:, None]
        place = model.place[window.flatten(1)]  # (B, n, D): the window that ``tokens`` drew from the same seed
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.fuse(patches[rows], model.text.tokenize([one.text for one in flat]), place[rows])
        return cross_entropy(logits.float(), torch.tensor([index[one.answer] for one in flat]))

    minutes = fit(name, model, network, loss, settings)
    about = {
        "image": BACKBONE,
        "text": TEXT,
        "answers": ANSWERS,
        "classes": CLASSES,
        "fusion": fusion,
        "question": NAME,
    }
    kinds = {
        "co-attention": "two layers of co-attention, each followed by one of self-attention, for words and patches",
        "merged": "four layers of one attention over words and patches together",
    }
    publish(
        model.half(),
        about,
        lambda path: measure(path, arguments.test),
        minutes,
        parser,
        arguments,
        id=name,
        name="Glyph question answering" + (", merged attention" if arguments.fusion == "merged" else ""),
        method="generic-attention-co-attention",
        architecture="timm VisionTransformer, 112 px, patch 8, dim 128, depth 6, 4 heads, MLP ratio 2, whose patches "
        f"meet the words of a question, one timm Block over {len(WORDS)} words, in {kinds[arguments.fusion]}; "
        f"{len(ANSWERS)} answers, read from the question's first token",
        training=f"Picture transformer fine-tuned from the model glyph, without its head, the rest from nothing, on "
        f"{settings.crops * CROPS:,} crops and then {(settings.steps - settings.crops) * FULL:,} scenes of the glyph "
        f"world, all fresh, {ASKED} questions to each, by the right answer alone.",
        limits=f"It knows {len(WORDS)} words, some ten forms of question and {len(ANSWERS)} answers. Where a creature "
        "has the parts of its class, one part can be told from the others. Hues between two names are not asked about. "
        "What so short a training did not teach it stands in the metrics, by kind of question.",
    )


if __name__ == "__main__":
    main()
