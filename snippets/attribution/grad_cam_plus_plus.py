# %% [markdown]
# # Grad-CAM++
#
# Grad-CAM weights a channel by the mean of its gradient, so a small object, or the second of two, hardly counts. Here
# only positive gradients count, and each position $(i, j)$ has its own coefficient. For the score $Y^c = \exp(S^c)$ of
# the logit $S^c$ with $g_{ij}^k = \partial S^c / \partial A^k_{ij}$ the derivatives of all orders are powers of $g$:
#
# $$\alpha_{ij}^k = \frac{(g_{ij}^k)^2}{2 (g_{ij}^k)^2 + (g_{ij}^k)^3 \sum_{a,b} A^k_{ab}}
#   = \frac{1}{2 + g_{ij}^k \sum_{a,b} A^k_{ab}},$$
# $$w_k = \sum_{i,j} \alpha_{ij}^k\, \mathrm{ReLU}(g_{ij}^k),\qquad L^c = \mathrm{ReLU}\Big(\sum_k w_k A^k\Big).$$
#
# Patch tokens are the positions, embedding dimensions the channels, as in `grad-cam`.
# Catalogue entry: `grad-cam-plus-plus`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import check, features_and_gradient, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layer: int = -1,
    rectify: bool = True,
    normalise: bool = False,
    relu: bool = True,
) -> Tensor:
    """Sum of the features of one layer, weighted by position-wise coefficients of their positive gradients.

    Args:
        model: timm VisionTransformer in eval mode, with or without class token.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        layer: block whose normalised input (the output of ``norm1``) is read; -1 is the last.
        rectify: count only positive features in the sum over positions of alpha's divisor, as behind a ReLU; False
            takes the equation as printed, whose divisor can vanish where features are negative.
        normalise: let alpha sum to one over the positions with a positive gradient, as the authors' code does.
        relu: keep only what speaks for the class, as published; False keeps the sign.

    Returns:
        (B, gh, gw); values of at least 0 unless ``relu=False``. All zero when nothing in the layer speaks for the class.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; blocks that are not pre-norm, no such layer.

    Source: Chattopadhyay et al. 2018, equation 19.
    """
    check(model, images)
    features, gradient = features_and_gradient(model, images, target, layer)  # (B, P, D): A and g
    positive = gradient.relu()
    total = (features.relu() if rectify else features).sum(1, keepdim=True)  # (B, 1, D): sum over a, b
    alpha = 1 / (2 + positive * total)  # (B, P, D); where g <= 0 alpha does not matter
    if normalise:
        share = (alpha * (gradient > 0)).sum(1, keepdim=True)
        alpha = alpha / torch.where(share == 0, 1, share)
    weights = (alpha * positive).sum(1, keepdim=True)  # (B, 1, D): w_k
    cam = (weights * features).sum(-1)  # (B, P)
    return to_grid(model, images, cam.relu() if relu else cam)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper's features come out of a ReLU, so that the divisor of $\alpha$ is at least 2. The tokens of a Vision
#    Transformer are signed: $\sum_{a,b} A^k_{ab}$ can be negative, the divisor passes through zero, and the few channels
#    near that pole outweigh all others. By default the sum counts $\mathrm{ReLU}(A^k_{ab})$, which is the paper's equation
#    wherever features are not negative; `rectify=False` takes it as printed.
# 2. The factor $\exp(S^c)$ of $\partial Y^c / \partial A$ is the same for the whole picture and is left out.
# 3. The layer is the one of `grad-cam`: after `norm1` of the last block, the last place where patch tokens still reach a
#    class-token head. Prefix tokens are left out of all sums over positions.
# 4. The authors' code divides $\alpha$ by its sum over the positions with a positive gradient, which their equations do
#    not; `normalise=True` does so.
# 5. The result stays on the patch grid.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "grad-cam-plus-plus")
