# %% [markdown]
# # DINO self-attention maps
#
# What does each head of the last block look at? Self-supervised Vision Transformers answer with the outline of objects, one
# head with another part than the next. The class token's attention is shown head by head and cut down to a mask: of the
# $P$ patches, sorted by weight, the strongest are kept until they hold a share $\kappa$ of what the head gives to patches,
#
# $$a^{(m)} = \frac{A^{(L,m)}_{\mathrm{cls},\,1:P}}{\sum_p A^{(L,m)}_{\mathrm{cls},\,p}},\qquad
# M^{(m)} = \text{the smallest set of strongest patches with } \sum_{p \in M^{(m)}} a^{(m)}_p \ge \kappa = 0.6 .$$
#
# The masks are a property of the training, not of a class. Catalogue entry: `dino-self-attention`.

# %%
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, grid, readout, require_finite


class HeadMaps(NamedTuple):
    """What every head of the last block attends to."""

    attention: Tensor  # (B, h, gh, gw), at least 0; with the prefix tokens' share each head sums to one
    masks: Tensor  # (B, h, gh, gw) bool: the strongest patches of each head

    def heatmap(self) -> Tensor:
        """(B, gh, gw): attention inside the masks, averaged over the heads."""
        return (self.attention * self.masks).mean(1)


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, keep: float = 0.6) -> HeadMaps:
    """Attention of the last block from what the head reads, for every attention head, and its thresholded mask.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: ignored: attention weights belong to no class.
        keep: share of each head's attention to patches that its mask keeps, above 0 and at most 1.

    Returns:
        ``HeadMaps``: attention (B, h, gh, gw), masks (B, h, gh, gw) and ``.heatmap()`` (B, gh, gw).
        Of equally strong patches at the edge of a mask the first is kept.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; a share outside its range.

    Source: Caron et al. 2021, section 4.2.2 and figures 3 and 4.
    """
    check(model, images)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie above 0 and be at most 1, not {keep}.")
    with torch.no_grad(), capture(model, "attention") as record:
        model(images)
        row = readout(model, record)[:, None, None] @ record["attention"][-1]  # (B, h, 1, N): the class token's rows
    attention = require_finite(model, row[:, :, 0, model.num_prefix_tokens :])  # (B, h, P)
    share = attention / attention.sum(-1, keepdim=True)
    strongest, patch = share.sort(dim=-1, descending=True, stable=True)  # (B, h, P)
    stronger = strongest.cumsum(-1) - strongest  # the share that all stronger patches hold
    masks = torch.zeros_like(stronger, dtype=torch.bool).scatter_(-1, patch, stronger < keep)
    return HeadMaps(*(maps.unflatten(-1, grid(model, images)) for maps in (attention, masks)))


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper shows heads side by side, or the one head that fits an annotated object best. `heatmap()` averages what the
#    heads keep, so that the method can stand beside those that give one map.
# 2. The paper's models are trained by self-distillation without labels. Here `photo` is a later model of that kind (DINOv2,
#    then tuned for saliency), and `glyph` is trained with labels.
# 3. Without class token the rows are weighted as the head reads them: their mean for average pooling, the pooling weights for
#    attention pooling; a distilled model counts class and distillation row one half each. Registers are no positions of
#    the picture: they are left out before the shares are taken.

# %%
if __name__ == "__main__":
    from vitx import demo, images, models, plot

    demo.heatmap(explain, "dino-self-attention")

    photo = models.load("photo")
    x = torch.stack([photo.preprocess(images.open_image(name)) for name in demo.PHOTOGRAPHS])
    found = explain(photo.model, x)  # pyright: ignore[reportArgumentType]
    rows = []
    for picture, attention, masks in zip(x, found.attention, found.masks, strict=True):
        picture = images.to_array(picture, photo.mean, photo.std)
        rows.append([plot.Cell(picture, head, f"head {m + 1}") for m, head in enumerate(attention)])
        rows.append([plot.Cell(picture, mask.float(), "its 60 %") for mask in masks])
    demo.show(plot.grid(rows), "dino-self-attention-heads")
