# %% [markdown]
# # Grad-SAM
#
# Which tokens are attended to where attention helps the class? Grad-SAM multiplies every attention map by the positive
# part of its own gradient and averages over layers, heads and queries. Nothing is multiplied from layer to layer:
#
# $$r_j = \frac1{LMN} \sum_{l=1}^{L} \sum_{m=1}^{M} \sum_{i=1}^{N}
# A^{lm}_{ij}\,\mathrm{ReLU}\Big(\frac{\partial s}{\partial A^{lm}_{ij}}\Big)$$
#
# for $L$ layers, $M$ heads, $N$ tokens and the class logit $s$; $i$ attends to $j$. Catalogue entry: `grad-sam`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, pool_row, target_scores, to_grid


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Mean attention that every patch receives, weighted with the positive part of its gradient.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        (B, gh, gw); values of at least 0. All zero when no attention weight raises the class score.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``.

    Source: Barkan et al. 2021.
    """
    check(model, images)
    with torch.enable_grad(), capture(model, "attention") as record:
        scores = target_scores(model(images), target)  # (B,) logits
        weights = [*record["attention"], *record.get("pool_attention", [])]
        gradients = torch.autograd.grad(scores.sum(), weights)
    with torch.no_grad():
        # (B, h, N, N) each, summed over heads and queries: what every key receives.
        received = [(g.clamp(min=0) * a).sum((1, 2)) for g, a in zip(gradients, weights, strict=True)]
        if "pool_attention" in record:
            received[-1] = pool_row(model, received[-1])
        _, heads, tokens, _ = weights[0].shape
        relevance = torch.stack(received).sum(0) / (len(weights) * heads * tokens)  # (B, N)
    return to_grid(model, images, relevance[:, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. None for a class-token model. The paper explains words; here the tokens are patches, and the scores of the class token
#    and of other prefix tokens are left out of the map.
# 2. There is no code of the authors to compare with. A token is scored by what it receives, as input evidence; reimplementations exist that
#    score it by what it attends to.
# 3. Attention pooling is counted as one more layer, with a single query.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "grad-sam")
