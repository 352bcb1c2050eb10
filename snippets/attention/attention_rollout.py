# %% [markdown]
# # Attention rollout
#
# How much of each input patch has reached the class token, if attention were all that moved information? In deep layers
# a token is already a mixture, so one layer's weights do not refer to the picture. Rollout adds the residual path to each
# layer's head-averaged attention and multiplies the layers:
#
# $$\tilde A^{(l)} = \tfrac12\Big(\frac1h\sum_m A^{(l,m)} + I\Big),\qquad
# R = \tilde A^{(L)} \tilde A^{(L-1)} \cdots \tilde A^{(1)}.$$
#
# The class token's row of $R$ is the map. Catalogue entry: `attention-rollout`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, readout, to_grid


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Share of every input patch in what the head reads, by attention and residual paths through all layers.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: ignored: attention weights belong to no class.

    Returns:
        (B, gh, gw); values of at least 0 that sum to at most one (the rest lies on the prefix tokens).

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``.

    Source: Abnar, Zuidema 2020, section 3 and equation 1.
    """
    check(model, images)
    with torch.no_grad(), capture(model, "attention") as record:
        model(images)
        row = readout(model, record)[:, None]  # (B, 1, N): only one row of the product is needed
        for attention in reversed(record["attention"]):  # last layer first
            row = (row @ attention.mean(1) + row) / 2  # row @ (A + I) / 2
    return to_grid(model, images, row[:, 0, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. None in the equation. The full matrix product is never formed: the row of the class token is carried down through the
#    layers, which is a vector-matrix product for each.
# 2. Models without class token start from what their head reads (`vitx.vit.readout`): the mean row for average pooling, the
#    pooling weights for attention pooling. The paper has the class token only.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "attention-rollout")
