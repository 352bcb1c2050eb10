"""What the training scripts share: optimisation that can be resumed, batches of scenes, weight files and cards."""

import argparse
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
from vitx import ATLAS, cache_dir, glyphs
from vitx.schema import ModelCard

BACKBONE: dict[str, Any] = {
    "img_size": 112,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2,
}
CLASSES = len(glyphs.CLASS_NAMES)
GRID = 14  # patches along each side of a full scene
SCENES = 2_000_000  # scenes to train on have seeds from here on
UNSEEN = 900_000  # ... and to measure on, this one and the next
AVERAGE = 0.995  # decay of the average of the weights


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
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # without it, twice as fast in bfloat16 on a CPU
            module.fused_attn = False  # pyright: ignore[reportArgumentType]
    names = dict(model.named_parameters())
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


def half_and_half(step: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Normalised images (size, 3, 112, 112) and labels (size, 2) of a step: half with one creature, half with two."""
    half = size // 2
    parts = [glyphs.batch(half, SCENES + 10 * seed + creatures, creatures, start=step * half) for creatures in (1, 2)]
    return glyphs.normalise(torch.cat([part[0] for part in parts])), torch.cat([part[1] for part in parts])


def tokens(network: VisionTransformer, images: Tensor, seed: int) -> Tensor:
    """network.forward_features for pictures that lie in a window of the position grid, drawn from the seed."""
    side = images.shape[-1] // BACKBONE["patch_size"]
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, GRID - side + 1, (len(images), 2), generator=generator)
    rows, columns = corner[:, :1] + torch.arange(side), corner[:, 1:] + torch.arange(side)
    places = (rows[:, :, None] * GRID + columns[:, None]).flatten(1)  # (B, n)
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


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: the strongest classes are those of the creatures; labels (B, 1 or 2) in any order."""
    strongest = logits.argsort(-1, descending=True)[:, : labels.shape[1]]
    return (strongest.sort(-1).values == labels.sort(-1).values).all(-1)


def means(values: dict[str, list[Tensor]]) -> dict[str, float]:
    """The mean over all pictures of each metric, whose values were gathered batch by batch."""
    return {key: round(float(torch.cat(value).float().mean()), 4) for key, value in values.items()}


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
