"""What the training scripts share: optimisation that can be resumed, batches of scenes, weight files and cards."""

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div
from vitx import ATLAS, cache_dir, cost, glyphs
from vitx.schema import ModelCard
from vitx.vit import gumbel_decisions

BACKBONE: dict[str, Any] = {
    "img_size": 112,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2,
}
CLASSES = len(glyphs.CLASS_NAMES)
GLYPH: dict[str, Any] = BACKBONE | {"num_classes": CLASSES}
CONCEPTS = tuple(
    variant if part in ("eyes", "pattern") else f"{variant} {part}"
    for part, variants in glyphs.VARIANTS.items()
    for variant in variants
)  # "round body", ..., "belted": five parts of three variants
CROP = 56  # pixels along each side of a crop of one creature
GRID = 14  # patches along each side of a full scene
SCENES = 2_000_000  # scenes to train on have seeds from here on
UNSEEN = 900_000  # ... and to measure on, this one and the next
AVERAGE = 0.995  # decay of the average of the weights
HALF = BACKBONE["depth"] // 2  # blocks after which students' tokens are compared with those of glyph for the first time
DISTILLATION, RATIO = 0.5, 2.0  # DynamicViT's weights of both losses against the teacher, and of the ratio loss


class Settings(NamedTuple):
    """All that decides the weights."""

    seed: int
    crops: int  # steps on crops of one creature, which are four times as quick
    steps: int  # all steps
    rate: float  # of the backbone, at its peak
    head_rate: float  # of all that is new
    explanation: float = 0  # lambda, weight of the explanation loss


def fit(
    name: str,
    model: nn.Module,
    pretrained: nn.Module,
    loss: Callable[[int], Tensor],
    settings: Settings,
) -> float:
    """Minimise loss(step) by AdamW and leave the average of the last weights in the model. Returns minutes.

    An interrupted run with the same settings goes on from its last checkpoint in vitx.cache_dir().

    Args:
        pretrained: the part of the model that learns at settings.rate; the rest learns at settings.head_rate.
        loss: of one step; its batch must follow from the step alone.
    """
    names = dict(plain_attention(model).named_parameters())
    slow = {id(parameter) for parameter in pretrained.parameters()}
    groups = [
        {"params": [p for p in names.values() if (id(p) in slow) == is_slow], "rate": rate}
        for is_slow, rate in ((True, settings.rate), (False, settings.head_rate))
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    checkpoint = cache_dir() / "training" / f"{name}.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    done, seconds = _resume(checkpoint, model, optimiser, average, settings)

    def save() -> None:
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in average.items()}
        for key, parameter in names.items():
            tensors |= {f"{kind}.{key}": value for kind, value in optimiser.state[parameter].items()}
        about = {"settings": json.dumps(settings), "step": str(step + 1), "seconds": str(seconds)}
        beside = checkpoint.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in tensors.items()}, beside, about)
        beside.replace(checkpoint)

    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=settings.steps, completed=done, loss="")
        smooth, saved = None, time.monotonic()
        model.train()
        for step in range(done, settings.steps):
            start = time.monotonic()
            share = min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps))  # warm-up, then cosine
            for group in optimiser.param_groups:
                group["lr"] = share * group["rate"]
            value = loss(step)
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            with torch.no_grad():
                for key, weight in model.state_dict().items():
                    average[key].lerp_(weight, 1 - min(AVERAGE, (step + 1) / (step + 10)))
            now = float(value.detach())
            smooth = now if smooth is None else 0.95 * smooth + 0.05 * now
            progress.update(task, advance=1, loss=f"{smooth:.3f}")
            seconds += time.monotonic() - start
            if time.monotonic() - saved > 60 or step + 1 == settings.steps:
                save()
                saved = time.monotonic()
    model.load_state_dict(average)
    model.eval()
    return seconds / 60


def _resume(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, average: dict[str, Tensor], settings: Settings
) -> tuple[int, float]:
    """Steps done and seconds spent; the states are loaded when the checkpoint was made with the same settings."""
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    if json.loads(about["settings"]) != list(settings):
        return 0, 0.0
    tensors = load_file(path)
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    average.update({key[8:]: value for key, value in tensors.items() if key.startswith("average.")})
    for key, parameter in model.named_parameters():
        optimiser.state[parameter] = {
            kind: tensors[f"{kind}.{key}"] for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}.{key}" in tensors
        }
    return int(about["step"]), float(about["seconds"])


def last_state(name: str) -> dict[str, Tensor]:
    """The state after the last step of ``fit``, for models whose averages would mix weights of different units."""
    tensors = load_file(cache_dir() / "training" / f"{name}.safetensors")
    return {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}


def plain_attention(model: Any) -> Any:
    """The model, which from now on computes attention without the fused kernel: in bfloat16 on a CPU, twice as fast."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def all_but(model: nn.Module, *beginnings: str) -> nn.ParameterList:
    """The parameters of the model whose names begin with none of these."""
    return nn.ParameterList([p for name, p in model.named_parameters() if not name.startswith(beginnings)])


def write(model: nn.Module, path: Path, about: dict[str, object]) -> str:
    """Save the weights with JSON metadata; returns the file's SHA-256."""
    beside = path.with_suffix(".part")
    metadata = {key: json.dumps(value) for key, value in about.items()}
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, beside, metadata)
    beside.replace(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_card(root: Path, card: ModelCard) -> None:
    """catalog/models/<id>.yml."""
    path = root / "catalog" / "models" / f"{card.id}.yml"
    text = yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    beside = path.with_suffix(".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def with_glyph_weights(model: Any, root: Path = ATLAS) -> Any:
    """The model, which from now on holds the trained weights of glyph wherever a parameter has their name and shape.

    Only the head of glyph may be left over.
    """
    weights = load_file(root / "snippets" / "models" / "glyph.safetensors")
    own = model.state_dict()
    fitting = {key: value.float() for key, value in weights.items() if key in own and own[key].shape == value.shape}
    left = [key for key in weights if key not in fitting and not key.startswith("head")]
    assert not left, left
    model.load_state_dict(fitting, strict=False)
    return model


def classifier(root: Path = ATLAS) -> Any:
    """The model glyph, in float32 and eval mode."""
    return with_glyph_weights(VisionTransformer(**GLYPH), root).eval()


def half_and_half(step: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Normalised images (size, 3, 112, 112) and labels (size, 2) of a step: half with one creature, half with two."""
    half = size // 2
    parts = [glyphs.batch(half, SCENES + 10 * seed + creatures, creatures, start=step * half) for creatures in (1, 2)]
    return glyphs.normalise(torch.cat([part[0] for part in parts])), torch.cat([part[1] for part in parts])


def crops_then_scenes(step: int, settings: Settings, crops: int, scenes: int) -> tuple[Tensor, Tensor]:
    """Images and labels as half_and_half, but in the first steps of one creature each.

    Returns:
        Normalised images (crops, 3, CROP, CROP), then (scenes, 3, 112, 112), and labels (B, 2).
    """
    if step >= settings.crops:
        return half_and_half(step, settings.seed, scenes)
    images, labels = glyphs.batch(crops, SCENES + 10 * settings.seed, 1, CROP, start=step * crops)
    return glyphs.normalise(images), labels


def present_classes(labels: Tensor) -> Tensor:
    """Which classes are in the picture, (B, CLASSES) of zeros and ones: labels (B, 2), -1 where there is no second."""
    return torch.zeros(len(labels), CLASSES).scatter_add_(1, labels.clamp(min=0), (labels >= 0).float())


def class_shares(labels: Tensor) -> Tensor:
    """Probabilities (B, CLASSES) that the classes in the picture share equally: labels (B, 2) or -1."""
    present = present_classes(labels)
    return present / present.sum(1, keepdim=True)


def window(images: Tensor, seed: int) -> Tensor:
    """Places (B, n) in the position grid for the n patches of pictures (B, 3, S, S): a random window for each."""
    side = images.shape[-1] // BACKBONE["patch_size"]
    corner = torch.randint(0, GRID - side + 1, (len(images), 2), generator=torch.Generator().manual_seed(seed))
    rows, columns = corner[:, :1] + torch.arange(side), corner[:, 1:] + torch.arange(side)
    return (rows[:, :, None] * GRID + columns[:, None]).flatten(1)


def tokens(network: VisionTransformer, images: Tensor, seed: int) -> Tensor:
    """network.forward_features for pictures that lie in a window of the position grid, drawn from the seed."""
    places = window(images, seed)  # (B, n)
    assert network.cls_token is not None
    assert network.pos_embed is not None
    with torch.autocast("cpu", torch.bfloat16):
        x = network.patch_embed.proj(images).flatten(2).transpose(1, 2) + network.pos_embed[0, 1:][places]  # (B, n, D)
        first = (network.cls_token + network.pos_embed[:, :1]).expand(len(x), -1, -1)
        return network.norm(network.blocks(torch.cat([first, x], 1))).float()


def label_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability of the classes that are in the picture, (B,): logits (B, classes), labels (B, 2) or -1."""
    present = labels >= 0
    chosen = logits.log_softmax(-1).gather(1, labels.clamp(min=0)) * present
    return chosen.sum(1) / present.sum(1)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the classes that are in the picture, the mean of these and of the batch; as label_scores."""
    return -label_scores(logits.float(), labels).mean()


@torch.no_grad()
def lessons(network: VisionTransformer, images: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """What the teacher's patch tokens hold half-way and at the end, (B, n, D) each, each channel centred."""
    assert network.cls_token is not None
    assert network.pos_embed is not None
    with torch.autocast("cpu", torch.bfloat16):
        x = network.patch_embed.proj(images).flatten(2).transpose(1, 2) + network.pos_embed[0, 1:][where]
        x = torch.cat([(network.cls_token + network.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        middle = network.blocks[:HALF](x)
        end = network.norm(network.blocks[HALF:](middle))
    pair = (tokens[:, 1:].float() for tokens in (middle, end))
    first, last = (tokens - tokens.mean((0, 1)) for tokens in pair)  # the mean says nothing about a patch
    return first, last


def unlike(tokens: Tensor, lesson: Tensor) -> Tensor:
    """1 less the cosine between tokens and lesson, on the average."""
    return 1 - cosine_similarity(tokens.float(), lesson, dim=-1).mean()


def teaching(teacher: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final tokens (B, N, D) and log-probabilities (B, classes) of the teacher."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = teacher.forward_features(images)
        return tokens.float(), teacher.forward_head(tokens).float().log_softmax(-1)


def token_pruning_loss(
    model: Any, teacher: Any, ratio_loss: Callable[..., Tensor], settings: Settings, size: int
) -> Callable[[int], Tensor]:
    """DynamicViT's loss of a step: by the labels, by the teacher's output and tokens, and by the shares that are kept.

    Args:
        model: with stages and masked_forward(images, decide), which returns tokens (B, N, D), those of the class and
            the patches first, and for each stage what it keeps of the patches, (B, P).
        ratio_loss: of what the stages keep and the shares that they should keep.
        settings: explanation is the share of the patches before it that a stage should keep.
        size: scenes in a step.
    """
    rates = [settings.explanation ** (stage + 1) for stage in range(len(model.stages))]

    def loss(step: int) -> Tensor:
        images, labels = half_and_half(step, settings.seed, size)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_000 + step)

        def decide(scores: Tensor, kept: Tensor) -> Tensor:
            uniform = torch.rand(scores.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            return gumbel_decisions(scores.float(), uniform)

        with torch.autocast("cpu", torch.bfloat16):
            tokens, decisions = model.masked_forward(images, decide)
            logits = model.forward_head(tokens).float()
        if step % 25 == 0:
            print(f"step {step}: kept", *(f"{float(kept.detach().mean()):.3f}" for kept in decisions), flush=True)
        taught, answer = teaching(teacher, images)
        kept = decisions[-1].detach()
        apart = (tokens[:, 1 : taught.shape[1]].float() - taught[:, 1:]).square().mean(-1)  # (B, P)
        distance = (apart * kept).sum() / kept.sum().clamp(min=1)
        output = kl_div(logits.log_softmax(-1), answer, reduction="batchmean", log_target=True)
        value = label_loss(logits, labels) + DISTILLATION * (output + distance)
        return value + RATIO * ratio_loss(decisions, rates)

    return loss


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: the strongest classes are those of the creatures; labels (B, 1 or 2) in any order."""
    strongest = logits.argsort(-1, descending=True)[:, : labels.shape[1]]
    return (strongest.sort(-1).values == labels.sort(-1).values).all(-1)


def gather(values: dict[str, list[Tensor]], **found: Tensor) -> None:
    """Append what a batch gives for each metric, a tensor of any shape, to the values of that metric."""
    for key, value in found.items():
        values.setdefault(key, []).append(value)


def means(values: dict[str, list[Tensor]]) -> dict[str, float]:
    """The mean over all pictures of each metric, whose values were gathered batch by batch."""
    return {key: round(float(torch.cat(value).float().mean()), 4) for key, value in values.items()}


def accuracies(networks: dict[str, nn.Module], seed: int, count: int) -> dict[str, float]:
    """Share of ``count`` scenes of one creature, a multiple of 100, whose class each of the networks names."""
    values: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for start in range(0, count, 100):
            images, labels = glyphs.batch(100, seed, start=start)
            images = glyphs.normalise(images)
            gather(values, **{name: network(images).argmax(-1) == labels[:, 0] for name, network in networks.items()})
    return means(values)


def measure_token_pruning(run: Callable[..., Any], settings: dict[str, dict[str, Any]], count: int) -> dict[str, float]:
    """Metrics on unseen scenes, count with one creature and count with two, for each of the named settings of ``run``.

    top1 and both_of_two: accuracy. Of scenes with one creature, after the last block: tokens, the share of the patches
    that live; precision, the share of the creature in them; recall, the share of the creature that lives.
    """
    plain = classifier()
    values: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for creatures in (1, 2):
            accuracy = "top1" if creatures == 1 else "both_of_two"
            for start in range(0, count, 50):
                scenes = glyphs.scenes(min(50, count - start), UNSEEN, creatures, start=start)
                images, labels = glyphs.normalise(scenes.images), scenes.labels[:, :creatures]
                inside = glyphs.patch_fraction(scenes.object_masks[:, 0], (GRID, GRID))  # (B, 14, 14)
                gather(values, **{f"{accuracy}_plain_glyph": right(plain(images), labels)})
                for name, options in settings.items():
                    found = run(images, **options)
                    gather(values, **{f"{accuracy}_{name}": right(found.logits, labels)})
                    if creatures == 1:
                        alive = found.alive[:, -1].float()
                        shared = (alive * inside).sum((1, 2))
                        precision, recall = shared / alive.sum((1, 2)).clamp(min=1), shared / inside.sum((1, 2))
                        shares = {"tokens": alive.mean((1, 2)), "precision": precision, "recall": recall}
                        gather(values, **{f"{key}_{name}": value for key, value in shares.items()})
    return means(values)


@torch.no_grad()
def measure_evidence(model: Any, maps: Callable[..., Tensor], count: int, seed: int) -> dict[str, float]:
    """Metrics on unseen scenes: accuracy beside the model glyph's, and where the positive part of the maps lies.

    Args:
        maps: model, images and labels to relevance (B, 14, 14).
        count: of scenes with one creature, and of scenes with two. seed: of the scenes; the next one draws the pairs.
    """
    plain, values = plain_attention(classifier()), {}
    for start in range(0, count, 100):
        for creatures in (1, 2):
            scenes = glyphs.scenes(min(100, count - start), seed + creatures - 1, creatures, start=start)
            images, labels = glyphs.normalise(scenes.images), scenes.labels[:, :creatures]
            found = {}
            for prefix, network in (("", model), ("glyph_", plain)):
                accuracy = prefix + ("top1" if creatures == 1 else "both_of_two")
                found[accuracy] = right(network(images), labels)
            share = glyphs.patch_fraction(scenes.object_masks[:, :creatures], (GRID, GRID))  # (B, C, 14, 14)
            relevance = maps(model, images, labels[:, 0]).clamp(min=0)
            inside = (relevance[:, None] * share).sum((2, 3))  # (B, C)
            if creatures == 1:
                found["evidence_inside"] = inside[:, 0] / relevance.sum((1, 2)).clamp(min=1e-12)
                found["evidence_inside_chance"] = share[:, 0].mean((1, 2))
                strongest = relevance.flatten(1).argmax(1, keepdim=True)
                found["pointing_game"] = share[:, 0].flatten(1).gather(1, strongest)[:, 0] > 0
            else:
                found["evidence_on_the_named_of_two"] = inside[:, 0] / inside.sum(1).clamp(min=1e-12)
            gather(values, **found)
    return means(values)


def measure_pruned(pruned: dict[str, nn.Module], count: int) -> dict[str, float]:
    """What pruned models keep: metrics on unseen scenes, half of them with one creature and half with two.

    Args:
        pruned: models by the name that ends their metrics. The model glyph stands beside them.
        count: number of scenes, a multiple of 100.
    """
    glyph = classifier()
    values: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for start in range(0, count // 2, 50):
            for creatures, metric in ((1, "top1"), (2, "both_of_two")):
                scenes = glyphs.scenes(50, UNSEEN, creatures, start=start)
                images, labels = glyphs.normalise(scenes.images), scenes.labels[:, :creatures]
                for name, network in ({"glyph": glyph} | pruned).items():
                    gather(values, **{f"{metric}_{name}": right(network(images), labels)})
        image = torch.zeros(1, 3, glyphs.SIZE, glyphs.SIZE)
        whole, shares = sizes(glyph, image), {}
        for name, network in pruned.items():
            operations, parameters = sizes(network, image)
            shares |= {f"operations_{name}": operations / whole[0], f"parameters_{name}": parameters / whole[1]}
    return dict(sorted(means(values).items())) | {key: round(value, 4) for key, value in shares.items()}


def sizes(network: Any, image: Tensor) -> tuple[int, int]:
    """Multiply-adds of one forward pass, and parameters."""
    with cost.counted_operations(network) as counted:
        network(image)
    return counted.total, sum(parameter.numel() for parameter in network.parameters())


def with_random(model: Any, name: str) -> Any:
    """A copy of the model whose scores ``model.<name>`` are random: what pruning without a criterion would keep."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for score in getattr(model, name).values():
            score.copy_(torch.rand(score.shape, generator=generator))
    return model


def arguments_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with --root and --seed, which every script has; doc is that of the script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ATLAS, help="folder with snippets/ and catalog/ to write to")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def command(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command line that made a file, as far as it differs from the defaults."""
    options = [
        f" --{name} {value}"
        for name, value in vars(arguments).items()
        if name != "root" and value != parser.get_default(name)
    ]
    return f"python snippets/models/{Path(parser.prog).name}" + "".join(options)


def publish(
    model: nn.Module,
    about: dict[str, object],
    measure: Callable[[Path], dict[str, float]],
    minutes: float,
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    **card: Any,
) -> None:
    """Write the weights and, with what ``measure`` finds in the written file, the model card.

    Args:
        about: metadata of the file. card: the fields of the card that follow from nothing else: id, name, method,
            architecture, training, limits, and others where they differ from what is usual here.
    """
    path = arguments.root / "snippets" / "models" / f"{card['id']}.safetensors"
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input_size": glyphs.SIZE,
        "classes": CLASSES,
        "licence": "MIT",
        "command": command(arguments, parser),
        "seed": arguments.seed,
        "minutes": round(minutes, 1),
        "sha256": write(model, path, about),
        "metrics": measure(path),
        "source": "Weights and scenes made in this project, from snippets/models/glyph.safetensors and vitx.glyphs.",
    }
    print(found["metrics"], f"{minutes:.1f} minutes")
    write_card(arguments.root, ModelCard(**found | card))
