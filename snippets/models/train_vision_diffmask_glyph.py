"""Train the gates vision-diffmask-glyph: which patches of a glyph scene the model glyph needs (Vision DiffMask).

    python snippets/models/train_vision_diffmask_glyph.py

The classifier stays as it is. The gates and the placeholder learn on fresh full scenes, half with one creature and half
with two: in every step one depth is drawn, the gates up to it vote, and the masked scene is classified again. A run
that was interrupted goes on from its last minute. Writes snippets/models/vision-diffmask-glyph.safetensors, without
the classifier, and its model card with the metrics measured on unseen scenes.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress, TextColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    UNSEEN,
    arguments_parser,
    classifier,
    gather,
    means,
    plain_attention,
    publish,
)
from vitx import cache_dir, glyphs, load_module

NAME = "vision-diffmask-glyph"
BATCH = 32  # scenes in a step, half with one creature and half with two
SCENES = 3_000_000  # scenes to train on have seeds from here on
RATE, PLACEHOLDER_RATE = 1e-3, 3e-3
MULTIPLIER, MULTIPLIER_RATE, LARGEST = 5.0, 2.0, 200.0  # alpha of every depth: start, ascent, bound


diffmask = load_module("vision-diffmask")


class Settings(NamedTuple):
    """All that decides the weights."""

    seed: int
    steps: int
    tolerance: float  # epsilon of the KL divergence


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")}


def divergence(whole: Tensor, masked: Tensor) -> Tensor:
    """KL(whole || masked) of logits (B, classes), (B,)."""
    whole, masked = whole.log_softmax(-1), masked.log_softmax(-1)
    return (whole.exp() * (whole - masked)).sum(-1)


def losses(model: Any, images: Tensor, depth: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL divergence and mean expected share of kept patches when the first ``depth`` gates vote.

    Args:
        uniform: (B, P, depth) numbers in (0, 1).
    """
    with torch.no_grad():
        logits, states = model.hidden_states(images)
    votes = model.vote_logits([state.float() for state in states], depth)  # (B, P, depth)
    kept = diffmask.sample_votes(votes, uniform).prod(-1)  # (B, P)
    masked = model.masked_logits(states[0], kept)
    return divergence(logits.float(), masked.float()).mean(), diffmask.kept_probability(votes).mean()


def fit(model: Any, settings: Settings) -> float:
    """Train the gates of the model. Returns minutes. A run with the same settings goes on from its last checkpoint."""
    names = trainable(plain_attention(model))
    rest = [parameter for name, parameter in names.items() if name != "placeholder"]
    groups = [{"params": rest, "rate": RATE}, {"params": [model.placeholder], "rate": PLACEHOLDER_RATE}]
    optimiser = torch.optim.Adam(groups)
    multipliers = torch.full((len(model.gates),), MULTIPLIER)
    checkpoint = cache_dir() / "training" / f"{NAME}.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    done, seconds = _resume(checkpoint, names, optimiser, multipliers, settings)

    def save() -> None:
        tensors = {f"model.{key}": value.detach() for key, value in names.items()} | {"multipliers": multipliers}
        for key, parameter in names.items():
            tensors |= {f"{kind}.{key}": value for kind, value in optimiser.state[parameter].items()}
        about = {"settings": json.dumps(settings), "step": str(step + 1), "seconds": str(seconds)}
        beside = checkpoint.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in tensors.items()}, beside, about)
        beside.replace(checkpoint)

    columns = (*Progress.get_default_columns(), TextColumn("KL {task.fields[kl]} kept {task.fields[kept]}"))
    with Progress(*columns) as progress:
        task = progress.add_task(NAME, total=settings.steps, completed=done, kl="", kept="")
        saved = time.monotonic()
        for step in range(done, settings.steps):
            start = time.monotonic()
            share = min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps))  # warm-up, then cosine
            for group in optimiser.param_groups:
                group["lr"] = share * group["rate"]
            seed = SCENES + 10 * settings.seed
            generator = torch.Generator().manual_seed(seed + step)
            depth = int(torch.randint(1, len(model.gates) + 1, (), generator=generator))
            scenes = [glyphs.scenes(BATCH // 2, seed + n, n, start=step * BATCH // 2) for n in (1, 2)]
            images = glyphs.normalise(torch.cat([some.images for some in scenes]))
            places = (len(images), (images.shape[-1] // 8) ** 2, depth)
            uniform = torch.rand(places, generator=generator).clamp(1e-6, 1 - 1e-6)
            with torch.autocast("cpu", torch.bfloat16):
                kl, kept = losses(model, images, depth, uniform)
            excess = kl - settings.tolerance
            optimiser.zero_grad()
            (multipliers[depth - 1] * excess + kept).backward()
            nn.utils.clip_grad_norm_(rest, 1.0)
            optimiser.step()
            climbed = multipliers[depth - 1] + MULTIPLIER_RATE * excess.detach()
            multipliers[depth - 1] = climbed.clamp(0, LARGEST)
            progress.update(task, advance=1, kl=f"{kl.item():.3f}", kept=f"{kept.item():.3f}")
            seconds += time.monotonic() - start
            if time.monotonic() - saved > 60 or step + 1 == settings.steps:
                save()
                saved = time.monotonic()
    return seconds / 60


def _resume(
    path: Path,
    names: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    multipliers: Tensor,
    settings: Settings,
) -> tuple[int, float]:
    """Steps done and seconds spent; the states are loaded when the checkpoint was made with the same settings."""
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    if json.loads(about["settings"]) != list(settings):
        return 0, 0.0
    tensors = load_file(path)
    multipliers.copy_(tensors["multipliers"])
    with torch.no_grad():
        for key, parameter in names.items():
            parameter.copy_(tensors[f"model.{key}"])
            kinds = [kind for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}.{key}" in tensors]
            optimiser.state[parameter] = {kind: tensors[f"{kind}.{key}"] for kind in kinds}
    return int(about["step"]), float(about["seconds"])


def measure(model: Any, count: int) -> dict[str, float]:
    """Metrics on unseen scenes, half with one creature and half with two.

    kept: expected share of patches kept. divergence: KL of sampled masks. agreement: predictions that stay when every
    patch with a probability below one half is masked; agreement_of_shuffled: the same with the probabilities of a
    picture in random order. kept_on_creatures and kept_elsewhere: mean probability there.
    """
    results: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for start in range(0, count // 2, 50):
            for creatures in (1, 2):
                scenes = glyphs.scenes(50, UNSEEN, creatures, start=start)
                images = glyphs.normalise(scenes.images)
                logits, states = model.hidden_states(images)
                votes = model.vote_logits(states, len(model.gates))
                kept = diffmask.kept_probability(votes)
                uniform = torch.rand(votes.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
                sampled = model.masked_logits(states[0], diffmask.sample_votes(votes, uniform).prod(-1))
                hard = (kept > 0.5).float()
                shuffled = hard[:, torch.randperm(hard.shape[1], generator=generator)]
                truth = glyphs.patch_fraction(scenes.object_masks[:, :creatures].any(1), (14, 14)).flatten(1)
                answers = [model.masked_logits(states[0], mask).argmax(-1) for mask in (hard, shuffled)]
                found = {
                    "kept": kept.mean(1),
                    "divergence": divergence(logits, sampled),
                    "agreement": (answers[0] == logits.argmax(-1)).float(),
                    "agreement_of_shuffled": (answers[1] == logits.argmax(-1)).float(),
                    "kept_on_creatures": kept[truth > 0.5],
                    "kept_elsewhere": kept[truth == 0],
                }
                gather(results, **found)
    return means(results)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--tolerance", type=float, default=0.1, help="largest KL divergence, epsilon")
    parser.add_argument("--test", type=int, default=1000, help="unseen scenes that measure")
    arguments = parser.parse_args()
    settings = Settings(arguments.seed, arguments.steps, arguments.tolerance)

    torch.manual_seed(settings.seed)
    model = diffmask.VisionDiffMask(classifier(arguments.root))
    minutes = fit(model, settings)
    model.eval()
    metrics = measure(model, arguments.test)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.backbone = nn.Identity()  # the file holds the gates alone
    publish(
        model,
        {"backbone": BACKBONE, "num_classes": CLASSES},
        lambda _: metrics,
        minutes,
        parser,
        arguments,
        id=NAME,
        name="Vision DiffMask Glyph gates",
        method="vision-diffmask",
        architecture="the model glyph under eight gates, each two linear layers with tanh on patch embedding and "
        "hidden state (256 to 32 to 1), and a placeholder vector",
        training=f"Gates and placeholder on {settings.steps * BATCH:,} fresh scenes of the glyph world, half with "
        "one creature and half with two: fewest patches such that the KL divergence between the predictions with "
        f"and without the mask stays below {settings.tolerance} on average. The classifier glyph is unchanged.",
        limits="The gates know this one classifier and the scenes of the glyph world. What they keep is enough on "
        "average, which is no promise for one picture.",
        parameters=parameters,
    )


if __name__ == "__main__":
    main()
