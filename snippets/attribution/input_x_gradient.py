# %% [markdown]
# # Input x gradient
#
# How much did every pixel contribute to the class score, if the model were as linear everywhere as it is at this picture?
# A gradient says how fast the score changes with a pixel; times the pixel's value it estimates the change that the pixel
# has already made, counted from a picture of zeros:
#
# $$R_i(x) = x_i\,\frac{\partial F_c(x)}{\partial x_i}.$$
#
# For a linear model the estimate is exact and the map adds up to $F_c(x) - F_c(0)$. For any other model it is the first
# term of a Taylor series, and the same thing as integrated gradients (`integrated-gradients`) with a single step at the
# picture itself. Catalogue entry: `input-x-gradient`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import check, pool_patches, target_scores, to_grid


def explain(
    model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, pool: str | None = "patch"
) -> Tensor:
    """First-order contribution of every patch to the class logit.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised; their zero is the point from which contributions are counted.
        target: (B,) class indices; None explains the predicted class.
        pool: "patch" sums over colours and over every patch; None sums over colours only.

    Returns:
        (B, gh, gw), or (B, H, W) with ``pool=None``; signed. A map sums to the derivative of the logit along the ray from
        the zero picture to this one.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``.

    Source: Shrikumar, Greenside, Shcherbina, Kundaje 2016, where it is "gradient * input".
    """
    check(model, images)
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        scores = target_scores(model(images), target)  # (B,) logits F_c
        (gradient,) = torch.autograd.grad(scores.sum(), images)  # (B, 3, H, W)
    attribution = (images.detach() * gradient).sum(1)  # (B, H, W)
    patches = to_grid(model, images, pool_patches(model, attribution))  # (B, gh, gw)
    return attribution if pool is None else patches


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper multiplies by its network's own input. Here that is the normalised picture, whose zero is the mean colour of
#    the training data: a pixel of that colour receives nothing, and pixels darker and lighter than it count with opposite
#    signs. Another zero point gives another map.
# 2. Colours and the pixels of a patch are summed, which keeps the total; `pool=None` gives the map of pixels.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "input-x-gradient")
