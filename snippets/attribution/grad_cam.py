# %% [markdown]
# # Grad-CAM
#
# Where are the features that speak for this class? Take one layer of feature maps $A^k$, weight every channel $k$ by the
# spatial mean of its gradient, add, and keep what is positive:
#
# $$\alpha_k^c = \frac1Z \sum_{i,j} \frac{\partial y^c}{\partial A^k_{ij}},\qquad
# L^c = \mathrm{ReLU}\Big(\sum_k \alpha_k^c A^k\Big).$$
#
# In a Vision Transformer the patch tokens are the positions $(i, j)$ and the embedding dimensions are the channels.
# Catalogue entry: `grad-cam`.

# %%
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import check, features_and_gradient, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layer: int = -1,
    relu: bool = True,
) -> Tensor:
    """Gradient-weighted sum of the features of one layer.

    Args:
        model: timm VisionTransformer in eval mode, with or without class token.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        layer: block whose normalised input (the output of ``norm1``) is read; -1 is the last.
        relu: keep only what speaks for the class, as published; False keeps the sign.

    Returns:
        (B, gh, gw); values of at least 0 unless ``relu=False``. All zero when nothing in the layer speaks for the class.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; no such layer.

    Source: Selvaraju et al. 2017, equations 1 and 2.
    """
    check(model, images)
    features, gradient = features_and_gradient(model, images, target, layer)  # (B, P, D): A and dy/dA
    weights = gradient.mean(1, keepdim=True)  # (B, 1, D): alpha_k
    cam = (weights * features).sum(-1)  # (B, P)
    return to_grid(model, images, cam.relu() if relu else cam)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper reads the last convolutional layer. A class-token head reads no patch token after the last block, so
#    the gradient there is zero and the map would be empty; the last layer whose patch tokens still reach the head is the
#    input of the last block's attention. We read it after `norm1`, the usual choice for Vision Transformers.
# 2. Prefix tokens (class, distillation, registers) are no positions of the picture and are left out, both of the mean
#    over positions and of the map.
# 3. The paper upsamples to the picture's size; the result here stays on the patch grid.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "grad-cam")
