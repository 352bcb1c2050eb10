# %% [markdown]
# # Eigen-CAM
#
# What dominates a layer's features? Write the features of all positions as the rows of one matrix and show how strongly
# each row follows the direction that carries most of them, the first right singular vector $v_1$:
#
# $$O = U \Sigma V^{\top},\qquad L = O\, v_1 = \sigma_1 u_1 .$$
#
# No gradient, no score, no class: it shows what the model has gathered, whatever it makes of it.
# Patch tokens are the positions, embedding dimensions the channels, as in `grad-cam`. Catalogue entry: `eigen-cam`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import check, embed, plain_blocks, require_finite, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layer: int = -1,
    centre: bool = False,
) -> Tensor:
    """Projection of the features of one layer on their first right singular vector.

    Args:
        model: timm VisionTransformer in eval mode, with or without class token.
        images: (B, 3, H, W), normalised.
        target: ignored: the features belong to no class.
        layer: block whose normalised input (the output of ``norm1``) is read; -1 is the last.
        centre: subtract the mean over the positions first, which makes it a principal component.

    Returns:
        (B, gh, gw); signed. A singular vector has no sign of its own: the value of largest magnitude is positive.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; blocks that are not pre-norm, no such layer.

    Source: Bany Muhammad, Yeasin 2020.
    """
    check(model, images)
    blocks = plain_blocks(model)
    depth = len(blocks)
    if not -depth <= layer < depth:
        raise ValueError(f"layer {layer} is out of range: the model has {depth} blocks.")
    layer = layer % depth
    with torch.no_grad():
        tokens = model.blocks[:layer](embed(model, images))  # (B, N, D)
        features = blocks[layer].norm1(tokens)[:, model.num_prefix_tokens :]  # (B, P, D): O
        if centre:
            features = features - features.mean(1, keepdim=True)
        features = require_finite(model, features).double()
        values, vectors = torch.linalg.eigh(features @ features.mT)  # of O O^T: sigma^2 ascending, (B, P); U (B, P, P)
        cam = vectors[..., -1] * values[:, -1:].clamp(min=0).sqrt()  # (B, P): sigma_1 u_1
        largest = cam.gather(1, cam.abs().argmax(1, keepdim=True))  # (B, 1)
    return to_grid(model, images, (cam * largest.sign()).to(images.dtype))


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper's features come out of a ReLU; then $v_1$ can be chosen without negative entries, and so the map. The tokens
#    of a Vision Transformer are signed and share a large mean, which the first singular vector mostly follows, so that
#    the map can light the background. `centre=True` removes the mean, as common libraries do; the published equation,
#    without it, is the default.
# 2. The sign of $v_1$ is arbitrary; it is chosen so that the value of largest magnitude is positive.
# 3. $\sigma_1 u_1$ comes from the eigenvectors of $O O^{\top}$, in double precision; it is the same vector.
# 4. The layer is the one of `grad-cam`: after `norm1` of the last block. Prefix tokens are no positions and are left out.
# 5. The result stays on the patch grid.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "eigen-cam")
