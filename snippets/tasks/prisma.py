# %% [markdown]
# # Prisma: activation patching on a Vision Transformer
#
# Two pictures get two answers. Where inside the network does the difference sit? Run the model on the clean picture, whose
# answer is the class $c$, and on a corrupted one, whose answer is another, the foil $c'$. Run the corrupted picture once
# more, but put a piece of the clean run in its place, and see how much of the answer comes back. For a set $S$ of tokens in
# the residual stream $h^l$ at the input of block $l$, and with the logit difference $\Delta = y_c - y_{c'}$,
#
# $$\tilde h^l_t = \begin{cases} h^l_t(x_\text{clean}) & t \in S\\ h^l_t(x_\text{corrupted}) & t \notin S,\end{cases}\qquad
# g_S = \Delta(\tilde h^l) - \Delta(x_\text{corrupted}),\qquad
# r_S = \frac{g_S}{\Delta(x_\text{clean}) - \Delta(x_\text{corrupted})} .$$
#
# The recovered share $r_S$ is 1 when all tokens are patched and 0 when none is. Patching the output
# $z^{lm} = A^{lm} V^{lm}$ of head $m$ in block $l$ in the same way tells which heads carry the difference.
# Catalogue entry: `prisma`.

# %%
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import (
    capture,
    check,
    embed,
    grid,
    logits_of_tokens,
    plain_blocks,
    require_finite,
    target_classes,
    to_grid,
)


class Runs(NamedTuple):
    """The clean and the corrupted run, before anything is patched."""

    clean: list[Tensor]  # h^0 to h^L, (B, N, D) each: the input of every block and the output of the last
    corrupted: list[Tensor]
    pair: Tensor  # (B, 2): target and foil
    differences: Tensor  # (2, B): Delta of the clean and of the corrupted run


class Patching(NamedTuple):
    """What the logit difference gains when parts of the residual stream come from the clean run."""

    gain: Tensor  # (B, gh, gw): g of each patch, in logits
    prefix: Tensor  # (B,): g of the prefix tokens (class token, registers) together; 0 where there are none
    clean: Tensor  # (B,): Delta of the clean run
    corrupted: Tensor  # (B,): Delta of the corrupted run
    foil: Tensor  # (B,): class c'

    def heatmap(self) -> Tensor:
        """(B, gh, gw): g of each patch."""
        return self.gain

    def recovered(self, gain: Tensor) -> Tensor:
        """The share r (B, ...) of gains (B, ...): 1 is the clean answer, 0 the corrupted one."""
        return gain / (self.clean - self.corrupted).view(-1, *[1] * (gain.ndim - 1))


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    corrupted: Tensor | None = None,
    foil: Tensor | None = None,
    layer: int | None = None,
    cell: int = 1,
    chunk: int = 32,
) -> Patching:
    """Gain of the logit difference when the residual stream of one patch is restored, patch by patch.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised: the clean pictures.
        target: (B,) class indices c; None is the class predicted for the clean picture.
        corrupted: (B, 3, H, W), normalised: a picture for each clean one. None is the clean picture's mean colour,
            everywhere: nothing of its content is left.
        foil: (B,) class indices c'; None is the class other than c that scores highest for the corrupted picture.
        layer: l, 0 to L: patch the input of block l; L is the output of the last block. None is the middle, L // 2.
        cell: side of the square of patches that is restored at a time and shares one value.
        chunk: pictures per forward pass; bounds the memory.

    Returns:
        Patching; its ``gain`` is signed.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``, for both pictures; a corrupted picture of another shape, a
            foil that is the target, a layer or a cell out of range.

    Source: Joseph et al. 2025, by the main demonstration of the library, and TransformerLens, which it builds on.
    """
    runs = two_runs(model, images, target, corrupted, foil)
    (gh, gw), depth, prefix = grid(model, images), len(model.blocks), model.num_prefix_tokens
    layer = depth // 2 if layer is None else layer
    if not 0 <= layer <= depth:
        raise ValueError(f"layer must lie between 0 and the {depth} blocks of the model, not {layer}.")
    if not 1 <= cell <= max(gh, gw):
        raise ValueError(f"cell must lie between 1 and the grid of {gh} x {gw} patches, not {cell}.")
    rows, columns = torch.arange(gh, device=images.device) // cell, torch.arange(gw, device=images.device) // cell
    own = (rows[:, None] * -(-gw // cell) + columns).flatten()  # (P,): the cell of each patch, T cells
    tokens = nn.functional.pad(own + 1, (prefix, 0))  # (N,): the set of each token, 0 for all prefix tokens
    sets = tokens == torch.arange(int(tokens.max()) + 1, device=own.device)[:, None]  # (1 + T, N)
    logits = patched_logits(model, runs, layer, sets, chunk)  # (B, 1 + T, classes)
    gains = logit_difference(logits, runs.pair) - runs.differences[1][:, None]  # (B, 1 + T)
    return Patching(
        gain=to_grid(model, images, gains[:, own + 1]),
        prefix=gains[:, 0] if prefix else torch.zeros_like(gains[:, 0]),
        clean=runs.differences[0],
        corrupted=runs.differences[1],
        foil=runs.pair[:, 1],
    )


def two_runs(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    corrupted: Tensor | None = None,
    foil: Tensor | None = None,
) -> Runs:
    """The clean and the corrupted run. Arguments and errors as ``explain``."""
    check(model, images)
    if corrupted is None:
        corrupted = images.mean((2, 3), keepdim=True).expand_as(images)
    check(model, corrupted)
    if corrupted.shape != images.shape:
        raise ValueError(f"there must be one corrupted picture for each of the {len(images)} clean ones, of its size.")
    streams, logits = [], []
    with torch.no_grad():
        for pictures in (images, corrupted):
            stream = [embed(model, pictures)]
            for block in model.blocks:
                stream.append(block(stream[-1]))
            streams.append(stream)
            logits.append(require_finite(model, logits_of_tokens(model, stream[-1], first=len(model.blocks))))
        target = target_classes(logits[0], target)
        others = logits[1].scatter(1, target[:, None], -torch.inf)
        foil = target_classes(others, foil)
        if (foil == target).any():
            raise ValueError("the foil must be another class than the target, or no logit difference is left.")
        pair = torch.stack([target, foil], 1)
        differences = torch.stack([logit_difference(values, pair) for values in logits])
    return Runs(streams[0], streams[1], pair, differences)


def logit_difference(logits: Tensor, pair: Tensor) -> Tensor:
    """Delta = y_c - y_c' (B, ...) of logits (B, ..., classes) for target and foil (B, 2)."""
    index = pair.view(len(pair), *[1] * (logits.ndim - 2), 2).expand(*logits.shape[:-1], 2)
    target, foil = logits.gather(-1, index).unbind(-1)
    return target - foil


def patched_logits(model: VisionTransformer, runs: Runs, layer: int, sets: Tensor, chunk: int = 32) -> Tensor:
    """Logits (B, K, classes) of the corrupted run whose residual stream at ``layer`` is clean at a set of tokens.

    Args:
        sets: (K, N) bool: K sets of tokens; each is patched in a run of its own, many runs in one batch.
    """
    clean, corrupted = runs.clean[layer], runs.corrupted[layer]  # (B, N, D)
    logits = []
    with torch.no_grad():
        for run in torch.arange(len(clean) * len(sets), device=clean.device).split(chunk):
            picture, chosen = run // len(sets), run % len(sets)
            tokens = torch.where(sets[chosen][..., None], clean[picture], corrupted[picture])  # (n, N, D)
            logits.append(logits_of_tokens(model, tokens, first=layer))
    return torch.cat(logits).unflatten(0, (len(clean), len(sets)))


def logits_with_clean_heads(
    model: VisionTransformer, tokens: Tensor, outputs: list[Tensor], chosen: Tensor, first: int = 0
) -> Tensor:
    """Logits (n, classes) when chosen heads hand over their output of the clean run, at all tokens.

    Args:
        tokens: (n, N, D) of the corrupted run at the input of block ``first``.
        outputs: z of every block in the clean run, (n, N, heads * width); read where a head is chosen.
        chosen: (n, L, h) bool.

    Raises:
        UnsupportedModel: blocks that are not plain.
    """
    handles = []
    try:
        for index, block in enumerate(plain_blocks(model)):
            if chosen[:, index].any():
                attention: Any = block.attn
                own = chosen[:, index].repeat_interleave(attention.head_dim, -1)[:, None]  # (n, 1, heads * width)

                def put(_: nn.Module, args: tuple, own: Tensor = own, clean: Tensor = outputs[index]) -> tuple:
                    return (torch.where(own, clean, args[0]), *args[1:])

                handles.append(attention.proj.register_forward_pre_hook(put))
        return logits_of_tokens(model, tokens, first)
    finally:
        for handle in handles:
            handle.remove()


def head_outputs(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """z of every block, (B, N, heads * width), the heads side by side as the output projection reads them."""
    with torch.no_grad(), capture(model, "attn.proj.input") as record:
        model(images)
    return record["attn.proj.input"]


def head_gains(model: VisionTransformer, images: Tensor, runs: Runs, chunk: int = 32) -> Tensor:
    """g (B, L, h) when the output of one head comes from the clean run ``images`` (B, 3, H, W), at all tokens."""
    attention: Any = plain_blocks(model)[0].attn
    depth, heads = len(model.blocks), attention.num_heads
    outputs = head_outputs(model, images)
    gains = []
    with torch.no_grad():
        for index in range(depth):
            for run in torch.arange(len(images) * heads, device=images.device).split(chunk):
                picture, head = run // heads, run % heads
                chosen = torch.zeros(len(run), depth, heads, dtype=torch.bool, device=images.device)
                chosen[torch.arange(len(run)), index, head] = True
                clean = [*outputs[:index], outputs[index][picture], *outputs[index + 1 :]]
                logits = logits_with_clean_heads(model, runs.corrupted[index][picture], clean, chosen, first=index)
                gains.append(logit_difference(logits, runs.pair[picture]) - runs.differences[1][picture])
    return torch.cat(gains).view(depth, len(images), heads).transpose(0, 1)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Prisma is a library: hooks at every activation, caches, sparse autoencoders, logit lens, attention viewers, for images and
#    video. This is one experiment that it is made for, activation patching from a clean into a corrupted run. The paper's text
#    and the demonstration's notebook could not be read; the equations are those of TransformerLens, from which the library
#    is derived, at the same places of the block (residual stream before it, head outputs before their projection).
# 2. The corrupted picture that fits a question differs from the clean one in nothing else; the scenes below differ in one
#    creature. Where none is given there is no such partner: the mean colour removes everything at once, and the map tells
#    which patch alone, put into an empty picture, brings the answer back.
# 3. The gain is given in logits; `recovered` divides it as usual. Where clean and corrupted picture hardly differ in their
#    logit difference, or the target is not what the clean picture shows, the share means little or has the wrong sign.
# 4. One gain for one patch, or for one cell: what two patches restore together is more or less than the sum. Patches of a
#    later layer have seen the whole picture, so a gain there tells where the model keeps the evidence, which need not be
#    where the evidence is seen. `layer=0` patches pixels.
#
# What the small model cannot show: its twelve classes are decided by three of five parts, and it has 24 heads; nobody has
# found out here what a head computes. A circuit is more than the list of heads that matter.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, images, models, plot

    def swapped(scenes: glyphs.Scenes) -> glyphs.Scenes:
        """The same scenes with the first creature of another class: its parts change, all else stays."""
        labels, variants = scenes.labels.clone(), scenes.parameters.variants.clone()
        labels[:, 0] = (labels[:, 0] + 5) % 12
        labels[:, 0] = (labels[:, 0] + (labels[:, 0] == labels[:, 1])) % 12  # nor the class of the second creature
        variants[:, 0] = torch.tensor(glyphs.CLASS_PARTS)[labels[:, 0]]
        return glyphs.render(scenes.parameters._replace(variants=variants), labels)

    def row(
        axes: Any, model: Any, clean: Tensor, other: Tensor, pictures: list, names: list[str], cell: int, **pair: Tensor
    ) -> None:
        """Clean and corrupted picture, maps of four layers, and the heads."""
        for place, picture, name in zip(axes, pictures, names, strict=False):
            plot.overlay(place, picture, None, name)
        depth = len(model.blocks)
        for place, layer in zip(axes[2:6], (0, depth // 3, depth // 2, depth - 1), strict=True):
            found = explain(model, clean, corrupted=other, layer=layer, cell=cell, **pair)  # pyright: ignore[reportArgumentType]
            share = float(found.recovered(found.prefix)[0])
            plot.overlay(place, pictures[0], found.gain[0], f"input of block {layer}\nclass token: {share:.0%}")
        runs = two_runs(model, clean, corrupted=other, **pair)
        gains = head_gains(model, clean, runs)[0] / float(runs.differences[0, 0] - runs.differences[1, 0])  # (L, h)
        largest = float(gains.abs().max())
        axes[6].imshow(gains, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        axes[6].set_title(f"heads: at most {float(gains.max()):.0%}", fontsize=8, pad=3)
        axes[6].set_xlabel("head", fontsize=7)
        axes[6].set_ylabel("block", fontsize=7)
        axes[6].tick_params(labelsize=6, length=0)

    def show(seed: int) -> None:
        """A scene whose first creature changes its class, and a photograph against another one."""
        figure = Figure(figsize=(14, 4.6), layout="constrained")
        axes = figure.subplots(2, 7)
        scene = glyphs.scenes(1, seed, creatures=2)
        changed = swapped(scene)
        model = models.load("glyph").model
        pictures = [s.images[0].permute(1, 2, 0).numpy() for s in (scene, changed)]
        names = [glyphs.CLASS_NAMES[int(s.labels[0, 0])] for s in (scene, changed)]
        clean, other = glyphs.normalise(scene.images), glyphs.normalise(changed.images)
        names = [f"clean: {names[0]}", f"corrupted: {names[1]}"]
        pair = {"target": scene.labels[:, 0], "foil": changed.labels[:, 0]}
        row(axes[0], model, clean, other, pictures, names, 1, **pair)
        photo = models.load("photo")
        clean, other = (photo.preprocess(images.open_image(name))[None] for name in ("motorcycle", "coffee"))
        pictures = [images.to_array(x[0], photo.mean, photo.std) for x in (clean, other)]
        with torch.no_grad():
            names = [photo.class_names[int(photo.model(x).argmax())] for x in (clean, other)]
        row(axes[1], photo.model, clean, other, pictures, [f"clean: {names[0]}", f"corrupted: {names[1]}"], 2)
        demo.show(figure, "prisma")

    show(seed=7)
