# %% [markdown]
# # Focused attention: look again, closer, where the map was bright
#
# A map over patches is too coarse for lesions of a few pixels. But a Vision Transformer does not mind where its patches are
# cut: with a convolution of half the stride they overlap, and there are four times as many. Too many to read at once, so
# only those are read that the map so far finds relevant. Focused attention starts from the relevance $a$ of the usual
# patches (`transformer-attribution`) and repeats, with stride $s_i = p / 2^i$:
#
# 1. enlarge $a$ to the finer grid and draw patches $S$ from it, $\Pr(j) = a_j / \sum_k a_k$, and take their four neighbours;
# 2. run the model on class token and drawn patches alone, and find their relevance $r$, scaled to $[0, 1]$;
# 3. blend, $a_j \leftarrow \tau\, r_j + (1 - \tau)\, a_j$ for $j \in S$; steps 1 to 3 are done $\lfloor 1.5^i \rfloor$ times.
#
# Catalogue entry: `focused-attention-retina`.

# %%
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import (
    RELEVANCE_TENSORS,
    UnsupportedModel,
    block_relevance,
    capture,
    check,
    embed,
    head_relevance,
    keep_tokens,
    logits_of_tokens,
    plain_relevance_blocks,
    readout,
    require_finite,
    target_classes,
    target_scores,
)


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    iterations: int = 4,
    samples: int = 256,
    smoothing: float = 0.5,
    pool: str | None = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Relevance found by looking again, with ever finer steps, at what was found relevant.

    Args:
        model: timm VisionTransformer of plain pre-norm blocks in eval mode, with positions that are added to its tokens.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        iterations: grids, each with half the stride of the one before; 1 is `transformer-attribution` alone.
        samples: patches drawn at a time, before their neighbours are added. smoothing: tau, weight of what is new.
        pool: "mean" over every patch, or None for the map at the size of the pictures.
        generator: draws the patches, with the same numbers for all pictures; None is a new one seeded 0.

    Returns:
        (B, gh, gw), or (B, H, W) with ``pool=None``; values from 0 to 1.

    Raises:
        UnsupportedModel: no such positions, or blocks or a head without relevance rules.
        ValueError: see ``vitx.vit.check``; a number out of range, or more iterations than the stride can be halved.

    Source: Playout et al. 2022, by the authors' code.
    """
    check(model, images)
    plain_relevance_blocks(model)
    if model.pos_embed is None or not isinstance(model.patch_embed.proj, nn.Conv2d):
        raise UnsupportedModel("this model adds no positions to its patches, which finer patches would need.")
    patch = model.patch_embed.patch_size
    if not 1 <= iterations <= min(patch).bit_length() or samples < 1 or not 0 <= smoothing <= 1:
        raise ValueError(
            f"a stride of {min(patch)} pixels allows 1 to {min(patch).bit_length()} iterations; samples must be at least 1 "
            "and smoothing from 0 to 1."
        )
    if pool not in ("mean", None):
        raise ValueError(f"pool is 'mean' or None, not {pool!r}.")
    generator = generator or torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = target_classes(model(images), target)
    tokens, size = fine_tokens(model, images, 1)
    relevance = attribution(model, tokens, target).unflatten(1, size)
    for i in range(1, iterations):
        tokens, size = fine_tokens(model, images, 2**i)
        relevance = nn.functional.interpolate(relevance[:, None], size, mode="bilinear").flatten(1).clamp(0, 1)
        total = relevance.sum(1, keepdim=True)
        chances = torch.where(total > 0, relevance, 1).double()
        chances = (chances / chances.sum(1, keepdim=True)).cumsum(1)  # (B, n)
        for _ in range(int(1.5**i)):
            drawn = torch.rand(samples, generator=generator, dtype=torch.float64).to(images.device)
            chosen = torch.searchsorted(chances, drawn.expand(len(images), -1).contiguous())
            chosen = with_neighbours(chosen.clamp(max=size[0] * size[1] - 1), size)  # (B, 5 samples)
            found = attribution(model, keep_tokens(model, tokens, chosen), target)
            low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
            found = torch.where(high > low, (found - low) / (high - low).clamp(min=1e-30), 0)
            blended = smoothing * found + (1 - smoothing) * relevance.gather(1, chosen)
            relevance = relevance.scatter(1, chosen, blended)  # a patch drawn twice has the same value both times
        relevance = relevance.unflatten(1, size)
    relevance = require_finite(model, relevance).clamp(0, 1)
    pixels = nn.functional.interpolate(relevance[:, None], images.shape[-2:], mode="nearest")
    return (pixels if pool is None else nn.functional.adaptive_avg_pool2d(pixels, model.patch_embed.grid_size))[:, 0]


def fine_tokens(model: VisionTransformer, images: Tensor, factor: int) -> tuple[Tensor, tuple[int, int]]:
    """Tokens (B, prefix + n, D) of patches cut with 1 / factor of the stride, and their grid. Each has the position of the
    nearest usual patch."""
    projection: Any = model.patch_embed.proj
    stride = [max(1, step // factor) for step in projection.stride]
    with torch.no_grad():
        patches = nn.functional.conv2d(images, projection.weight, projection.bias, stride)  # (B, D, rows, columns)
        rows, columns = patches.shape[-2:]
        gh, gw = model.patch_embed.grid_size
        positions = model.pos_embed[:, -gh * gw :].mT.unflatten(2, (gh, gw))  # type: ignore[index]
        positions = nn.functional.interpolate(positions, (rows, columns), mode="nearest").flatten(2).mT
        fine = model.norm_pre(model.patch_embed.norm(patches.flatten(2).mT) + positions)
        return torch.cat([embed(model, images)[:, : model.num_prefix_tokens], fine], 1), (rows, columns)


def with_neighbours(chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """Patches (B, K) of a grid and, behind them, those above, below, left and right of each: (B, 5 K)."""
    rows, columns = chosen // size[1], chosen % size[1]
    steps = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
    return torch.cat(
        [(rows + y).clamp(0, size[0] - 1) * size[1] + (columns + x).clamp(0, size[1] - 1) for y, x in steps], 1
    )


def attribution(model: VisionTransformer, tokens: Tensor, target: Tensor) -> Tensor:
    """Relevance (B, n) of n patch tokens for the class, when the model reads tokens (B, prefix + n, D) and no others."""
    with torch.enable_grad(), capture(model, *RELEVANCE_TENSORS) as record:
        logits = logits_of_tokens(model, tokens)
        gradients = torch.autograd.grad(target_scores(logits, target).sum(), record["attention"])
    with torch.no_grad():
        relevance = head_relevance(model, record["block_output"][-1], target)  # (B, N, D)
        row = readout(model, record)[:, None]  # (B, 1, N): what the head reads
        for index, block in reversed(list(enumerate(plain_relevance_blocks(model)))):
            layer = {name: tensors[index] for name, tensors in record.items()}
            of_attention, relevance = block_relevance(block, layer, relevance)
            row = row + row @ (gradients[index] * of_attention).clamp(min=0).mean(1)
    return row[:, 0, model.num_prefix_tokens :].detach()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. **Nothing here is medical.** The paper grades photographs of the retina and OCT scans, and retina specialists judge the
#    maps. The model `lesion` reads invented eyes with painted blots (`vitx.lesions`); the demo's last row is scikit-image's
#    photograph of a retina on which specks are painted. No number here says anything about eyes or diseases.
# 2. Taken over from the authors' code: strides, draws from the map, neighbours, repetitions, blending with one half,
#    nearest positions, bilinear enlargement from grid to grid and nearest at the end. That stretches each grid over the
#    whole picture, although the finer ones end half a patch short of its border: a shift of up to 4 pixels there.
# 3. A patch drawn twice enters the sequence twice, as in the code, and so weighs more in the attention of that pass.
# 4. Neighbours stay within the grid. The code counts patches in one row, so that the left neighbour of a patch at the left
#    border is the last patch of the row above.
# 5. All pictures of a batch share the random numbers. The default result is averaged over patches, like every map here;
#    `pool=None` gives the fine one, which is the point of the method.
# 6. Scaled down: ViTs of 384 pixels with patches of 16 or 32 became one of 112 pixels with patches of 8. What it cannot
#    show: the specialists' judgement, which was the paper's test.

# %%
if __name__ == "__main__":
    from skimage import data
    from vitx import demo, glyphs, images, lesions, models, plot

    def show(seed: int) -> None:
        """How closely maps of one, two and four grids fit the specks, pixel by pixel, and pictures of them."""
        loaded = models.load("lesion")
        model: Any = loaded.model
        scenes = lesions.scenes(3, seed, labels=torch.full((3,), 2))
        retina = loaded.preprocess(images.Image.fromarray(data.retina()))
        plain = torch.as_tensor(images.to_array(retina, loaded.mean, loaded.std)).permute(2, 0, 1)[None]
        painted = lesions.paint(plain, torch.tensor([2]), seed)
        shown = lesions.Scenes(*(torch.cat(pair) for pair in zip(scenes, painted, strict=True)))
        x = glyphs.normalise(shown.images)
        with torch.no_grad():
            print("predicted:", [lesions.CLASS_NAMES[label] for label in model(x).argmax(1)])
        options: dict[str, Any] = {"samples": 96, "pool": None}  # fewer draws than the default, for time
        maps = {grids: explain(model, x, shown.labels, iterations=grids, **options) for grids in (1, 2, 4)}
        for grids, found in maps.items():
            grades, chance = (lesions.grade(some, shown.masks) for some in (found, found.roll(1, 0)))
            line = [
                f"{name} {float(values.mean()):.3f} (by chance {float(getattr(chance, name).mean()):.3f})"
                for name, values in grades._asdict().items()
            ]
            print(f"{grids} grids, by pixels: " + ", ".join(line))
        rows = []
        for row, picture in enumerate(shown.images.permute(0, 2, 3, 1).numpy()):
            cells = [
                plot.Cell(picture, None, "photograph, painted" if row == 3 else "invented"),
                plot.Cell(picture, shown.masks[row].float(), "truth: bright specks"),
            ]
            rows.append(cells + [plot.Cell(picture, found[row], f"grids: {grids}") for grids, found in maps.items()])
        demo.show(plot.grid(rows, cell=2.2), "focused-attention-retina")

    show(seed=11)
