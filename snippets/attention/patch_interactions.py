# %% [markdown]
# # Patch interactions: where every patch gets its context from
#
# The class token's row is one of hundreds: how do the patches use each other? Take the attention of patches to patches,
# leave out what a patch keeps for itself, and let every row sum to one. With $A$ averaged over heads and blocks,
#
# $$I_{pq} = \frac{[q \ne p]\,A_{pq}}{\sum_{r \ne p} A_{pr}}.$$
#
# Each patch then has a *responsive field*: the smallest square window around it that holds a share $\kappa$ of its row gives
# the size, and the mean offset $t_p = \sum_q I_{pq}\,(q - p)$ the direction in which it looks. Columns tell which patches
# the others use, $u_q = \sum_p I_{pq}$ (one if all were used alike); those near zero could be left out.
# Catalogue entry: `patch-interactions`.

# %%
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, grid, require_finite


class PatchInteractions(NamedTuple):
    """Who draws on whom; P = gh * gw patches in reading order."""

    interactions: Tensor  # (B, P, P), at least 0, rows sum to one, diagonal zero: row p, what patch p takes from others
    use: Tensor  # (B, gh, gw), at least 0: sum of the patch's column, one on the average
    radius: Tensor  # (B, gh, gw) int: the window of (2 radius + 1)² patches holds the share of the patch's row
    tendency: Tensor  # (B, gh, gw, 2): mean offset of a patch's row, in patches, down and to the right

    def heatmap(self) -> Tensor:
        """(B, gh, gw): how much the other patches use each patch."""
        return self.use


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layer: int | None = None,
    share: float = 0.5,
) -> PatchInteractions:
    """Interactions between patches, and the responsive field of each.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: ignored: attention weights belong to no class.
        layer: block whose attention is read, -1 is the last; None is the mean of all blocks.
        share: kappa, of a patch's interactions that its window holds, above 0 and at most 1.

    Returns:
        ``PatchInteractions``; ``.heatmap()`` gives how much each patch is used, (B, gh, gw).

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; no such layer, a share outside its range, a single patch.

    Source: Ma et al. 2022, the aims of its analysis; the definitions are ours (see below).
    """
    check(model, images)
    if layer is not None and not -len(model.blocks) <= layer < len(model.blocks):
        raise ValueError(f"layer {layer} is out of range: the model has {len(model.blocks)} blocks.")
    if not 0 < share <= 1:
        raise ValueError(f"share must lie above 0 and be at most 1, not {share}.")
    prefix, size = model.num_prefix_tokens, grid(model, images)
    if size == (1, 1):
        raise ValueError("the picture has one patch, which has no others to interact with.")
    with torch.no_grad(), capture(model, "attention") as record:
        model(images)
        chosen = record["attention"] if layer is None else [record["attention"][layer]]
        attention = torch.stack([a[:, :, prefix:, prefix:].mean(1) for a in chosen]).mean(0)  # (B, P, P)
    return fields(require_finite(model, attention), size, share)


def fields(attention: Tensor, size: tuple[int, int], share: float) -> PatchInteractions:
    """The responsive fields of attention (B, P, P) between the patches of a grid of ``size`` (gh, gw)."""
    others = attention.masked_fill(torch.eye(attention.shape[1], dtype=torch.bool, device=attention.device), 0)
    interactions = others / others.sum(-1, keepdim=True)  # (B, P, P): I
    rows, columns = (torch.arange(n, device=attention.device) for n in size)
    places = torch.cartesian_prod(rows, columns)  # (P, 2)
    offsets = places[None] - places[:, None]  # (P, P, 2): q - p
    rings = offsets.abs().amax(-1).expand(len(attention), -1, -1)  # (B, P, P): radius of the smallest window with q
    held = torch.zeros(*attention.shape[:2], max(size), dtype=attention.dtype, device=attention.device)
    held = held.scatter_add_(2, rings, interactions).cumsum(2)  # (B, P, max radius + 1)
    radius = (held[..., :-1] < share).sum(-1)  # (B, P)
    tendency = torch.einsum("bpq,pqd->bpd", interactions, offsets.to(attention.dtype))  # (B, P, 2)
    return PatchInteractions(interactions, *(x.unflatten(1, size) for x in (interactions.sum(1), radius, tendency)))


# %% [markdown]
# ## Where this departs from the paper
#
# 1. We could read the paper's abstract and introduction only, and no code is public. What is measured here is what they say
#    (the strength of every interaction, windows fitted to it, patches that can be left out, size and tendency of
#    responsive fields); the formulas above are ours, and numbers must not be compared with the paper's.
# 2. The paper goes on to train transformers with such windows, and measures their accuracy; that is not repeated here.
# 3. Class token, distillation token and registers are left out of rows and columns. Heads and blocks are averaged; in a model
#    with a class-token head what patches read in the last block reaches no output, so `layer=-1` shows an idle block.
# 4. The bright spot in photographs is one patch that nearly all tokens attend to in one head of the first block of `photo`.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from vitx import demo, glyphs, images, models, plot

    demo.heatmap(explain, "patch-interactions")

    # Two patches and what they draw on, with the window that holds half of it; then size and tendency of all fields.
    photo, glyph = models.load("photo"), models.load("glyph")
    cup = photo.preprocess(images.open_image(demo.PHOTOGRAPHS[0]))[None]
    scene = glyphs.scenes(1, demo.SCENE, creatures=2).images
    shown = [
        (images.to_array(cup[0], photo.mean, photo.std), explain(photo.model, cup), [(4, 7), (13, 2)]),  # pyright: ignore[reportArgumentType]
        (scene[0].permute(1, 2, 0).numpy(), explain(glyph.model, glyphs.normalise(scene)), [(10, 3), (3, 8)]),  # pyright: ignore[reportArgumentType]
    ]
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for places, (picture, found, patches) in zip(figure.subplots(2, 4), shown, strict=True):
        gh, gw = found.use.shape[1:]
        side = picture.shape[0] / gh
        for axes, (row, column) in zip(places, patches, strict=False):
            plot.overlay(axes, picture, found.interactions[0, row * gw + column].view(gh, gw), "the dot draws on")
            reach = (2 * int(found.radius[0, row, column]) + 1) * side
            centre = torch.tensor([column + 0.5, row + 0.5]) * side
            axes.plot(*centre, "o", color="cyan", markersize=4)
            corner = [float(value) - reach / 2 for value in centre]
            axes.add_patch(Rectangle((corner[0], corner[1]), reach, reach, fill=False, color="cyan"))
            axes.set(xlim=(0, gw * side), ylim=(gh * side, 0))  # a window may reach beyond the picture
        plot.overlay(places[2], picture, found.radius[0].float(), "radius of the field")
        plot.overlay(places[3], picture, None, "tendency, beyond even attention")
        even = fields(torch.ones(1, gh * gw, gh * gw), (gh, gw), 0.5).tendency[0]  # to the middle of the picture
        down, right = (found.tendency[0] - even)[::2, ::2].unbind(-1)
        y, x = torch.meshgrid(torch.arange(0, gh, 2) + 0.5, torch.arange(0, gw, 2) + 0.5, indexing="ij")
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 2 / side, "color": "cyan", "width": 0.008}
        places[3].quiver(x * side, y * side, right, down, **arrows)  # half as long as they are
    demo.show(figure, "patch-interactions-fields")
