# %% [markdown]
# # RISE: the mean of random masks, weighted by the score of what they show
#
# How likely is the class when this pixel is visible, whatever else is? Show the picture $I$ through $N$ random smooth
# masks $M_i$ and average the masks, each weighted by the class probability of the masked picture:
#
# $$S(\lambda) = \frac{1}{\mathbb E[M]\, N} \sum_{i=1}^{N} f_c(I \odot M_i)\, M_i(\lambda) .$$
#
# A mask begins as a grid of $h \times w$ cells, each open with probability $p$; it is enlarged bilinearly to one cell
# more than the picture and cut out at a random shift. Catalogue entry: `rise`.

# %%

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import check, pool_patches, random_masks, target_classes, target_scores, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    masks: int = 4000,
    cells: int = 7,
    probability: float = 0.5,
    chunk: int = 16,
    pool: str | None = "patch",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean class probability of the masked pictures in which a patch was visible.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised; a masked pixel tends to zero, the mean colour of the training data.
        target: (B,) class indices; None explains the predicted class.
        masks: N, the number of masks. cells: h = w, of the coarse grid. probability: p, that a cell is open.
        chunk: pictures per forward pass; bounds the memory.
        pool: "patch" sums over every patch; None keeps the pixels, whose values are probabilities.
        generator: draws the masks, the same for all pictures; None is a new one seeded 0.

    Returns:
        (B, gh, gw), or (B, H, W) with ``pool=None``; values of at least 0. Only differences within a map mean
        something: it is as high everywhere as the class is probable.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; a number out of range.

    Source: Petsiuk, Das, Saenko 2018, equation 6 and section 3.2.
    """
    check(model, images)
    mask_of = random_masks(images, masks, cells, probability, generator)
    total = torch.zeros_like(images[:, 0])  # (B, H, W)
    with torch.inference_mode():
        classes = target_classes(model(images), target)
        for pair in torch.arange(masks * len(images)).split(chunk):
            row, picture = pair // len(images), (pair % len(images)).to(images.device)
            mask = mask_of(row)  # (n, H, W)
            scores = target_scores(model(images[picture] * mask[:, None]).softmax(-1), classes[picture])  # f_c
            total.index_add_(0, picture, scores[:, None, None] * mask)
    saliency = total / (probability * masks)  # E[M] = p
    patches = to_grid(model, images, pool_patches(model, saliency))  # (B, gh, gw)
    return saliency if pool is None else patches


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The map of pixels is summed over every patch; `pool=None` gives the paper's map.
# 2. The paper's masks darken towards zero after its own normalisation; so do these, towards the mean colour of the
#    training data.
# 3. The paper does not say how the bilinear enlargement treats the border. As in the authors' code the grid is mirrored
#    there, so that every pixel is visible with the same probability $p$.
# 4. The paper uses 4,000 masks for VGG-16 and 8,000 for ResNet-50; the default is the first.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "rise")
