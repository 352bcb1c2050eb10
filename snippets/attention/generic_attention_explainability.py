# %% [markdown]
# # Generic attention explainability, for a single-stream transformer
#
# Which patches did attention bring to the class token that also raised the class score? Attention weights are kept where
# their gradient is positive, averaged over the heads, and accumulated from the first layer to the last:
#
# $$\bar A^{(l)} = \mathbb E_h\big[(\nabla A^{(l)} \odot A^{(l)})^{+}\big],\qquad
# R \leftarrow R + \bar A^{(l)} R,\quad R_0 = I.$$
#
# The class token's row of $R$ is the map; $\nabla A$ is the derivative of the class logit. The same update serves
# encoder-decoder and two-stream models. Catalogue entry: `generic-attention-explainability`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, pool_row, readout, target_scores, to_grid


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Relevance of every patch for the class, by gradient-weighted attention through all layers.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        (B, gh, gw); values of at least 0. All zero when no attention weight raises the class score.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``.

    Source: Chefer, Gur, Wolf 2021 (ICCV), equations 5 and 6.
    """
    check(model, images)
    with torch.enable_grad(), capture(model, "attention") as record:
        scores = target_scores(model(images), target)  # (B,) logits
        weights = [*record["attention"], *record.get("pool_attention", [])]
        gradients = torch.autograd.grad(scores.sum(), weights)
    with torch.no_grad():
        relevance = [(g * a).clamp(min=0).mean(1) for g, a in zip(gradients, weights, strict=True)]  # (B, N, N) each
        # One row of (I + A_L) ... (I + A_1): start where the head reads, end at the input tokens.
        row = pool_row(model, relevance.pop()[:, 0]) if "pool_attention" in record else readout(model, record)
        row = row[:, None]  # (B, 1, N)
        for matrix in reversed(relevance):  # last layer first
            row = row + row @ matrix
    return to_grid(model, images, row[:, 0, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. None for a class-token model. $R$ is never formed: the class token's row is carried down through the layers.
# 2. Average pooling starts from the mean of the patch rows instead of the class row, and so counts each patch's own
#    residual path once; attention pooling is treated as the paper treats cross-attention, by its own $\bar A$. A distilled
#    model starts from the class and distillation rows, one half each.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "generic-attention-explainability")
