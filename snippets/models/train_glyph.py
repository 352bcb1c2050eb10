"""Train the model glyph: a small timm VisionTransformer that names the creatures of the glyph world.

    python snippets/models/train_glyph.py

Every picture is fresh. The first stage sees small pictures of one creature, each in the place of a random window of
the position grid; the next ones, scenes that have lost half of their patches or more, those without creatures first;
the last, whole scenes. So each goes on where the one before stopped, and most steps are cheap. In a quarter of the
last steps random patches are dropped, because methods that perturb the input do the same. Patches on a creature are
trained to name it through the same head (token labelling: Jiang et al., "All Tokens Matter", NeurIPS 2021), which
teaches the model which parts belong together when two creatures are in the picture. The weights are averaged.

An interrupted run goes on from vitx.cache_dir(). Writes snippets/models/glyph.safetensors and, with the numbers
measured on unseen scenes, catalog/models/glyph.yml.
"""

import hashlib
import math
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from training import (  # pyright: ignore[reportMissingImports]
    BACKBONE,
    CLASSES,
    GLYPH,
    GRID,
    arguments_parser,
    plain_attention,
    write_card,
)
from vitx import cache_dir, glyphs
from vitx.schema import ModelCard

PATCH = BACKBONE["patch_size"]
WORKERS = 2  # threads, each with its share of a batch on one core
BATCH = 64  # scenes in such a share
WEIGHT_DECAY = 0.05
WARM_UP = 100  # steps, at the start of each stage
FLOOR = 0.02  # of the stage's learning rate, where its cosine ends
AVERAGE = 0.998  # decay of the average of the weights
DROPPING = 4  # every so many steps of the last stage, random patches are dropped
SMALLEST_SHARE = 0.4  # of the patches that stay
TRAIN_SEED = 1_000_000  # scenes to train on have seeds from here on
TEST_SEED = 900_000  # ... and to measure on, this one and the next
MEASURED = 4000  # scenes of either kind
SAVE_EVERY, MEASURE_EVERY = 100, 500  # steps


class Stage(NamedTuple):
    """Some steps at one size of picture."""

    size: int  # pixels
    patches: int  # of each picture that are kept, those of the creatures first
    steps: int
    rate: float  # largest learning rate
    two: bool  # whether two batches of three show two creatures


STAGES = (
    Stage(56, 49, 2400, 2e-3, False),
    Stage(glyphs.SIZE, 98, 1700, 1.5e-3, True),
    Stage(glyphs.SIZE, 80, 1800, 1.5e-3, True),
    Stage(glyphs.SIZE, 196, 900, 8e-4, True),
)
STEPS = sum(stage.steps for stage in STAGES)


def network() -> VisionTransformer:
    """The untrained model."""
    return VisionTransformer(**GLYPH)


def window(size: int, generator: torch.Generator) -> Tensor:
    """Places (B, n) in the position grid for pictures of `size` pixels: a window at random, one for each picture."""
    side = size // PATCH
    corner = torch.randint(0, GRID - side + 1, (BATCH, 2), generator=generator)
    axis = torch.arange(side)
    rows, columns = corner[:, :1] + axis, corner[:, 1:] + axis
    return (rows[:, :, None] * GRID + columns[:, None]).flatten(1)


def logits(model: VisionTransformer, images: Tensor, places: Tensor, kept: Tensor | None) -> Tensor:
    """(B, 1 + n, classes): what the head says of the class token, as model(images) does, and of each patch.

    The pictures lie in a window of the grid and may lose patches. places: (B, n) in the position grid; kept: (B, k)
    which of the n patches stay, or None for all.
    """
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2)  # (B, n, D)
    positions = model.pos_embed  # (1, 1 + GRID GRID, D)
    assert positions is not None
    assert model.cls_token is not None
    x = x + positions[0, 1:][places]
    if kept is not None:
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    first = (model.cls_token + positions[:, :1]).expand(len(x), -1, -1)
    return model.head(model.norm(model.blocks(torch.cat([first, x], 1))))


def stage_of(step: int) -> tuple[int, int]:
    """Number of the stage that a step belongs to, and the step within it."""
    for number, stage in enumerate(STAGES):
        if step < stage.steps:
            return number, step
        step -= stage.steps
    raise IndexError(step)


def gradients(
    model: VisionTransformer, creatures: int, stage: int, inner: int, seed: int, worker: int
) -> tuple[float, tuple[Tensor, ...]]:
    """Loss and its gradients on one worker's share of a batch, a function of the numbers only."""
    torch.set_num_threads(1)
    size, patches = STAGES[stage].size, STAGES[stage].patches
    number = inner * WORKERS + worker
    scenes = glyphs.scenes(BATCH, TRAIN_SEED + seed * len(STAGES) + stage, creatures, size, start=number * BATCH)
    generator = torch.Generator().manual_seed((seed * len(STAGES) + stage) * 1_000_000 + number)
    labels = scenes.labels[:, :creatures]
    side = size // PATCH
    share, owner = glyphs.patch_fraction(scenes.object_masks, (side, side)).flatten(2).max(1)  # (B, n)
    patch_labels = labels.gather(1, owner.clamp(max=creatures - 1)).masked_fill(share < 0.5, -1)
    kept = None
    if patches < side * side:
        order = torch.rand(share.shape, generator=generator) + (share > 0)
        kept = order.argsort(1, descending=True)[:, :patches]
    elif size == glyphs.SIZE and inner % DROPPING == 0:
        left = SMALLEST_SHARE + (1 - SMALLEST_SHARE) * torch.rand((), generator=generator).item()
        kept = torch.rand(share.shape, generator=generator).argsort(1)[:, : round(left * side * side)]
    if kept is not None:
        patch_labels = patch_labels.gather(1, kept)
    # The cache of autocast is shared by all threads and would tie their graphs together.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        output = logits(model, glyphs.normalise(scenes.images), window(size, generator), kept)
    output = output.float()
    # Two creatures share the probability of the class token; a patch on a creature names that one.
    loss = -log_softmax(output[:, 0], -1).gather(1, labels).mean()
    loss = loss + cross_entropy(output[:, 1:].flatten(0, 1), patch_labels.flatten(), ignore_index=-1)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def train_step(
    model: VisionTransformer, optimiser: torch.optim.Optimizer, pool: Executor, seed: int, step: int
) -> float:
    """One step; what it draws depends on seed and step only. Returns the loss."""
    number, inner = stage_of(step)
    stage = STAGES[number]
    creatures = 2 if stage.two and step % 3 else 1
    jobs = [pool.submit(gradients, model, creatures, number, inner, seed, w) for w in range(WORKERS)]
    losses, parts = zip(*(job.result() for job in jobs), strict=True)
    for parameter, *pieces in zip(model.parameters(), *parts, strict=True):
        parameter.grad = torch.stack(pieces).mean(0)
    cosine = (1 + math.cos(math.pi * inner / stage.steps)) / 2
    for group in optimiser.param_groups:
        group["lr"] = stage.rate * min(1, (inner + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * cosine)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return sum(losses) / WORKERS


@torch.inference_mode()
def measure(weights: dict[str, Tensor], count: int, seed: int = TEST_SEED) -> dict[str, float]:
    """Shares of unseen scenes: one creature named right; two creatures, both of them the two largest logits."""
    model = network().eval()
    model.load_state_dict(weights)
    right = both = 0
    for start in range(0, count, BATCH):
        number = min(BATCH, count - start)
        images, labels = glyphs.batch(number, seed, 1, start=start)
        right += int((model(glyphs.normalise(images)).argmax(1) == labels[:, 0]).sum())
        images, labels = glyphs.batch(number, seed + 1, 2, start=start)
        top = model(glyphs.normalise(images)).topk(2).indices
        both += int((top.sort(1).values == labels.sort(1).values).all(1).sum())
    return {"top1": round(right / count, 4), "top2_of_two_creatures": round(both / count, 4)}


def train(seed: int) -> tuple[dict[str, Tensor], float]:
    """Averaged weights and minutes of training, going on from the cache if a run was interrupted."""
    torch.manual_seed(seed)
    model = plain_attention(network())
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    average = {name: value.clone() for name, value in model.state_dict().items()}
    step, seconds = 0, 0.0
    recipe = repr((STAGES, WORKERS, BATCH, seed))
    checkpoint = cache_dir() / "train-glyph.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["recipe"] == recipe:
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            average, step, seconds = saved["average"], saved["step"], saved["seconds"]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as progress, ThreadPoolExecutor(WORKERS) as pool:
        task = progress.add_task("glyph", total=STEPS, completed=step)
        recent = 0.0
        while step < STEPS:
            begin = time.perf_counter()
            loss = train_step(model, optimiser, pool, seed, step)
            decay = min(AVERAGE, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, 1 - decay)
            step += 1
            seconds += time.perf_counter() - begin
            recent = loss if recent == 0 else 0.98 * recent + 0.02 * loss
            progress.update(task, completed=step)
            if step % SAVE_EVERY == 0 or step == STEPS:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                state = {
                    "recipe": recipe,
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average,
                    "step": step,
                    "seconds": seconds,
                }
                torch.save(state, checkpoint.with_suffix(".part"))
                checkpoint.with_suffix(".part").replace(checkpoint)
                progress.print(f"step {step}  {seconds / 60:.1f} min  loss {recent:.3f}")
            if step % MEASURE_EVERY == 0 and stage_of(step - 1)[0] > 0:
                progress.print(f"step {step}  {measure(average, 500)}")
    return average, seconds / 60


def main() -> None:
    arguments = arguments_parser(__doc__).parse_args()
    weights, minutes = train(arguments.seed)
    metrics = measure(weights, MEASURED)
    content = save({name: value.contiguous() for name, value in weights.items()})
    pictures = ", then ".join(
        f"{stage.steps * WORKERS * BATCH} of {stage.size} px, {stage.patches} patches each" for stage in STAGES
    )
    card = ModelCard(
        id="glyph",
        name="Glyph ViT",
        architecture="timm VisionTransformer: img_size 112, patch_size 8, embed_dim 128, depth 6, num_heads 4, "
        "mlp_ratio 2, class token, 12 classes",
        parameters=sum(p.numel() for p in network().parameters()),
        input_size=glyphs.SIZE,
        classes=CLASSES,
        licence="MIT",
        training=f"From scratch on fresh scenes of the glyph world: {pictures}. From the second on, "
        "two batches of three show two creatures, which share the target of the class token; in every fourth batch of "
        "the last, random patches are dropped. Patches on a creature are trained to name it too. AdamW, averaged "
        "weights.",
        command="python snippets/models/train_glyph.py",
        seed=arguments.seed,
        minutes=round(minutes, 1),
        sha256=hashlib.sha256(content).hexdigest(),
        metrics={**metrics, "measured_scenes": MEASURED},
        limits="It knows the twelve creatures of the glyph world and nothing else, and gives one of them for "
        "whatever it sees. It is here to be explained.",
        source="Trained here, on pictures drawn by vitx.glyphs; no outside data or weights.",
    )
    path = arguments.root / "snippets" / "models" / "glyph.safetensors"
    for folder in (path.parent, arguments.root / "catalog" / "models"):
        folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_bytes(content)
    beside.replace(path)
    write_card(arguments.root, card)
    print(metrics, f"{minutes:.1f} minutes")


if __name__ == "__main__":
    main()
