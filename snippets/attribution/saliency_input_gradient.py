# %% [markdown]
# # Saliency: the gradient of a class score with respect to the picture
#
# Which pixels would change the class score most if they changed a little? One backward pass answers, for any
# differentiable classifier. With the class score $S_c$ (the logit, not the probability) of picture $I$, the saliency of
# pixel $(i, j)$ is the largest derivative over the colour channels,
#
# $$M_{ij} = \max_k \left| \frac{\partial S_c(I)}{\partial I_{ijk}} \right|.$$
#
# It measures sensitivity, not contribution: a pixel may be sensitive and yet have added nothing to the score.
# Catalogue entry: `saliency-input-gradient`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import check, pool_patches, target_scores, to_grid


def explain(
    model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, pool: str | None = "patch"
) -> Tensor:
    """Absolute gradient of the class logit, the largest over colours, summed over every patch.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        pool: "patch" sums over every patch; None keeps the pixels.

    Returns:
        (B, gh, gw), or (B, H, W) with ``pool=None``; values of at least 0.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``.

    Source: Simonyan, Vedaldi, Zisserman 2013, section 3.1.
    """
    check(model, images)
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        scores = target_scores(model(images), target)  # (B,) logits S_c
        (gradient,) = torch.autograd.grad(scores.sum(), images)  # (B, 3, H, W)
    saliency = gradient.abs().amax(1)  # (B, H, W)
    patches = to_grid(model, images, pool_patches(model, saliency))  # (B, gh, gw)
    return saliency if pool is None else patches


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper shows a map of pixels. A Vision Transformer reads patches, so the default sums the pixel map over each
#    patch, to be comparable with the other methods; `pool=None` gives the paper's map.
# 2. The paper differentiates with respect to raw pixel values; here the picture is already normalised, which scales each
#    colour channel by its standard deviation and can change which channel has the largest derivative.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "saliency-input-gradient")
