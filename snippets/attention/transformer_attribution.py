# %% [markdown]
# # Transformer attribution
#
# Rollout knows no class and gradients know no path. Transformer attribution sends the class score back through the
# network as relevance, layer by layer, keeps the relevance $R^{(l)}$ that arrives at every attention matrix, and weights it
# with the gradient of the same score:
#
# $$\bar A^{(l)} = I + \mathbb E_h\big[(\nabla A^{(l)} \odot R^{(l)})^{+}\big],\qquad
# C = \bar A^{(L)} \cdots \bar A^{(1)},$$
#
# and shows the class token's row of $C$. Relevance passes a linear layer by its positive terms $x_j w_{ji}$ (deep Taylor),
#
# $$R_j = \sum_i \frac{(x_j w_{ji})^{+}}{\sum_{j'} (x_{j'} w_{j'i})^{+}}\, R_i,$$
#
# and non-parametric operations of two operands $u, v$ (matrix product, residual sum) in proportion to what each
# contributed; there the two shares are rescaled so that together they keep the sum,
# $\bar R_u = R_u \cdot \frac{|\sum R_u|}{|\sum R_u| + |\sum R_v|} \cdot \frac{\sum R}{\sum R_u}$.
# Catalogue entry: `transformer-attribution`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import (
    RELEVANCE_TENSORS,
    block_relevance,
    capture,
    check,
    head_relevance,
    plain_relevance_blocks,
    readout,
    target_classes,
    target_scores,
    to_grid,
)


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Relevance of every patch for the class: layer-wise relevance of the attention, weighted with its gradient.

    Args:
        model: timm VisionTransformer of plain pre-norm blocks in eval mode; class-token, distilled or average-pooling head.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        (B, gh, gw); values of at least 0.

    Raises:
        UnsupportedModel: blocks or a head for which the paper gives no rule (parallel or post-norm blocks, gated MLPs and
            attention, attention pooling, max pooling).
        ValueError: see ``vitx.vit.check``.

    Source: Chefer, Gur, Wolf 2021 (CVPR), equations 1 to 14.
    """
    check(model, images)
    blocks = plain_relevance_blocks(model)
    with torch.enable_grad(), capture(model, *RELEVANCE_TENSORS) as record:
        logits = model(images)
        gradients = torch.autograd.grad(target_scores(logits, target).sum(), record["attention"])
    with torch.no_grad():
        relevance = head_relevance(model, record["block_output"][-1], target_classes(logits, target))  # (B, N, D)
        row = readout(model, record)[:, None]  # (B, 1, N): one row of the product of all layers is enough
        for index in reversed(range(len(blocks))):
            layer = {name: tensors[index] for name, tensors in record.items()}
            of_attention, relevance = block_relevance(blocks[index], layer, relevance, last=index == 0)
            row = row + row @ (gradients[index] * of_attention).clamp(min=0).mean(1)
    return to_grid(model, images, row[:, 0, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The factor of a matrix product. Both operands of a product claim the whole relevance, so the paper's normalisation
#    gives each one half wherever no entry of the product is zero; like the authors' code, we divide by two outright.
# 2. The paper says nothing of layer scale, query and key norms and registers, which came later. Layer scale and norms pass
#    relevance on unchanged, as the paper treats its LayerNorms; registers are tokens like any other.
# 3. Heads: a distilled model's mean of two heads is treated as one linear layer on both tokens; average pooling passes
#    relevance in proportion to each token's value. The paper has the class token only.
# 4. The normalisation of a residual sum takes its sums per picture. The authors' code takes them over the batch, which is
#    the same for the single pictures that it runs on.
# 5. Relevance is not carried below the first block's attention, which the map does not need.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "transformer-attribution")
