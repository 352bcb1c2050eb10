# %% [markdown]
# # LayerCAM
#
# Grad-CAM gives a channel one weight for the whole picture, which is too coarse for shallow layers, where one channel may
# help in one place and hurt in another. LayerCAM weights every position of every channel by its own positive gradient:
#
# $$w_{ij}^k = \mathrm{ReLU}\Big(\frac{\partial y^c}{\partial A^k_{ij}}\Big),\qquad
# M^c_{ij} = \mathrm{ReLU}\Big(\sum_k w_{ij}^k A^k_{ij}\Big).$$
#
# Patch tokens are the positions, embedding dimensions the channels, as in `grad-cam`. Catalogue entry: `layer-cam`.

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
    """Features of one layer, each weighted by its own positive gradient and summed over the channels.

    Args:
        model: timm VisionTransformer in eval mode, with or without class token.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        layer: block whose normalised input (the output of ``norm1``) is read; -1 is the last.
        relu: keep only what speaks for the class, as published; False keeps the sign, as the authors' code does.

    Returns:
        (B, gh, gw); values of at least 0 unless ``relu=False``. All zero when nothing in the layer speaks for the class.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; blocks that are not pre-norm, no such layer.

    Source: Jiang et al. 2021.
    """
    check(model, images)
    features, gradient = features_and_gradient(model, images, target, layer)  # (B, P, D): A and dy/dA
    cam = (gradient.relu() * features).sum(-1)  # (B, P)
    return to_grid(model, images, cam.relu() if relu else cam)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The layer is the one of `grad-cam`: after `norm1`, in the last block by default, the last place where patch tokens
#    still reach a class-token head. `layer` reads any other block. Prefix tokens are no positions and are left out.
# 2. The paper fuses the maps of several stages by their maximum, shallow ones scaled by a tanh. All blocks of a Vision
#    Transformer have one grid and nothing is gained in resolution; the map of one layer is shown.
# 3. The authors' code leaves out the outer ReLU. Behind a ReLU the features are not negative and it changes nothing; the
#    tokens of a Vision Transformer are signed, and it does. `relu=False` leaves it out.
# 4. The result stays on the patch grid.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "layer-cam")
