# %% [markdown]
# # Register tokens: norms and outliers of the patch tokens
#
# Large Vision Transformers turn a few patches of the background into scratch paper: their tokens grow about ten times as long as
# the others, hold something about the whole picture instead of their own patch, and draw attention, which spoils attention
# maps. Extra tokens given during training, the registers, take over that role. To see whether a model has such tokens,
# measure the Euclidean norm of every patch token $z^{(l)}_p$ after every block,
#
# $$\lVert z^{(l)}_p \rVert_2,\qquad \text{outliers} = \{p : \lVert z^{(L)}_p \rVert_2 > c\},$$
#
# beside the attention that the head's token pays to the patch, and how much the patch is like its neighbours $\mathcal N(p)$,
# where outliers are expected: $\frac{1}{|\mathcal N(p)|}\sum_{q \in \mathcal N(p)} \cos(e_p, e_q)$ with the patch embeddings
# $e$. Catalogue entry: `registers`.

# %%
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import capture, check, grid, readout, require_finite


class TokenNorms(NamedTuple):
    """How long the patch tokens are, and what would come with it."""

    norms: Tensor  # (B, L, gh, gw), at least 0: Euclidean norm after every block
    outliers: Tensor  # (B, gh, gw) bool: norms after the last block above the cutoff
    attention: Tensor  # (B, L, gh, gw), at least 0: head-averaged attention in every block, from what the head reads
    similarity: Tensor  # (B, gh, gw) in [-1, 1]: mean cosine of a patch embedding with its up to four neighbours

    def heatmap(self) -> Tensor:
        """(B, gh, gw): norms after the last block."""
        return self.norms[:, -1]


def explain(
    model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, cutoff: float | None = None
) -> TokenNorms:
    """Norms of the patch tokens in all blocks, outliers, attention and likeness to the neighbours.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: ignored: norms belong to no class.
        cutoff: norm above which a token is an outlier, such as the paper's 150 for DINOv2 ViT-g; None takes three times
            the median norm of the picture's patches.

    Returns:
        ``TokenNorms``; ``.heatmap()`` gives the norms after the last block, (B, gh, gw), before the final norm layer.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; a negative cutoff.

    Source: Darcet et al. 2023, section 2.1 and figures 3 to 5.
    """
    check(model, images)
    if cutoff is not None and not cutoff >= 0:
        raise ValueError(f"cutoff is a norm and must be at least 0, not {cutoff}.")
    prefix, size = model.num_prefix_tokens, grid(model, images)
    with torch.no_grad(), capture(model, "block_output", "attention") as record:
        model(images)
        rows = readout(model, record)[:, None]  # (B, 1, N)
        attention = torch.stack([(rows @ a.mean(1))[:, 0, prefix:] for a in record["attention"]], 1)  # (B, L, P)
        norms = torch.stack([tokens[:, prefix:].norm(dim=-1) for tokens in record["block_output"]], 1)  # (B, L, P)
        embeddings = model.patch_embed(images).reshape(len(images), *size, -1)  # (B, gh, gw, D)
    last = require_finite(model, norms)[:, -1]  # (B, P)
    limit = 3 * last.median(dim=1, keepdim=True).values if cutoff is None else cutoff
    return TokenNorms(
        norms.unflatten(2, size),
        (last > limit).unflatten(1, size),
        attention.unflatten(2, size),
        neighbour_similarity(embeddings),
    )


def neighbour_similarity(embeddings: Tensor) -> Tensor:
    """Mean cosine (B, gh, gw) of each of ``embeddings`` (B, gh, gw, D) with those above, below, left and right."""
    unit = nn.functional.normalize(embeddings, dim=-1)
    total, count = torch.zeros_like(unit[..., 0]), torch.zeros_like(unit[..., 0])
    for dim in (1, 2):
        length = unit.shape[dim] - 1
        here, there = unit.narrow(dim, 0, length), unit.narrow(dim, 1, length)
        cosine = (here * there).sum(-1)  # every pair of neighbours once, counted for both
        for start in (0, 1):
            total.narrow(dim, start, length).add_(cosine)
            count.narrow(dim, start, length).add_(1)
    return total / count.clamp(min=1)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper picks its cutoff, 150, by eye from the histogram of one model and says that it varies between models. Three
#    times the median of the picture's patches lies about midway, in ratio, between the bulk and outliers ten times as long.
# 2. The paper speaks of the output of the model. The norms here are those of the residual stream, before the final
#    LayerNorm gives all tokens nearly one length.
# 3. The paper trains models with registers, and linear probes for position, pixels and class; that is not repeated here.
#    Models that have registers are measured like others, and their registers are no patches.
# 4. Neither bundled model has outliers. So it should be: in the paper only ViT-Large and larger have them. Attention can
#    gather on single patches all the same: in the first block of `photo` one head sends the attention of nearly all tokens
#    to one and the same patch, whose norm is ordinary.
# 5. Without class token, attention starts from what the head reads (`vitx.vit.readout`).

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, images, models, plot

    demo.heatmap(explain, "registers")

    photo, glyph = models.load("photo"), models.load("glyph")
    x = torch.stack([photo.preprocess(images.open_image(name)) for name in demo.PHOTOGRAPHS])
    found = {
        "photo": explain(photo.model, x),  # pyright: ignore[reportArgumentType]
        "glyph": explain(glyph.model, glyphs.normalise(glyphs.scenes(16, seed=7).images)),  # pyright: ignore[reportArgumentType]
    }
    rows = []  # every map on a scale of its own
    for picture, norms, attention, likeness in zip(
        x, found["photo"].norms, found["photo"].attention, found["photo"].similarity, strict=True
    ):
        picture = images.to_array(picture, photo.mean, photo.std)
        shown = {
            "norms, middle block": norms[5],
            "norms, last block": norms[-1],
            "attention, first block": attention[0],
            "attention, last block": attention[-1],
            "likeness to neighbours": likeness,
        }
        rows.append([plot.Cell(picture, None), *(plot.Cell(picture, m, title) for title, m in shown.items())])
    demo.show(plot.grid(rows), "registers-photographs")

    # All norms as multiples of the median of their picture and block; the dashed line is the cutoff.
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, tokens) in zip(figure.subplots(1, 2), found.items(), strict=True):
        multiples = tokens.norms.flatten(2) / tokens.norms.flatten(2).median(dim=2, keepdim=True).values  # (B, L, P)
        axes.violinplot([block.flatten().numpy() for block in multiples.unbind(1)], showextrema=True)
        axes.axhline(3, color="black", linewidth=0.8, linestyle="dashed")
        axes.set(
            title=f"{name}: {int(tokens.outliers.sum())} outliers", xlabel="block", ylabel="norm over median", ylim=0
        )
    demo.show(figure, "registers-norms")
