# %% [markdown]
# # Raw attention: what the class token attends to
#
# The attention weights of one layer, read in the row of the class token and averaged over the heads:
#
# $$R = \frac1h \sum_{m=1}^{h} A^{(l,m)}_{\mathrm{cls},\,1:P}.$$
#
# They come for free with a forward pass. They know nothing of the class that is asked for, nothing of the layers below
# the chosen one, and nothing of the values that they weigh. Catalogue entry: `raw-attention`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, readout, to_grid


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, layer: int = -1) -> Tensor:
    """Head-averaged attention from what the head reads to the patches, in one layer.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: ignored: attention weights belong to no class.
        layer: block whose attention is shown; -1 is the last.

    Returns:
        (B, gh, gw); values of at least 0 that sum to at most one (the rest lies on the prefix tokens).

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; no such layer.

    Source: Dosovitskiy et al. 2020; shown in this form by Caron et al. 2021.
    """
    check(model, images)
    if not -len(model.blocks) <= layer < len(model.blocks):
        raise ValueError(f"layer {layer} is out of range: the model has {len(model.blocks)} blocks.")
    with torch.no_grad(), capture(model, "attention") as record:
        model(images)
        attention = record["attention"][layer].mean(1)  # (B, N, N): mean over heads
        row = readout(model, record)[:, None] @ attention  # (B, 1, N): the class token's row
    return to_grid(model, images, row[:, 0, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The work that introduced Vision Transformers shows attention accumulated by rollout; the map of one layer became
#    customary later. It has no single origin.
# 2. A model without class token has no class row. Average pooling reads all patches alike, so the mean of their rows is
#    shown; attention pooling reads them by its own attention, which weights the rows. With a distillation token the
#    class row and its row count one half each, as in the head.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "raw-attention")
