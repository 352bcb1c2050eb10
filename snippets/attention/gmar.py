# %% [markdown]
# # GMAR
#
# Rollout averages the heads of a layer as if they mattered alike. GMAR weights each head by the size of the class gradient
# of its attention and then rolls the weighted layers out:
#
# $$w^l_m = \frac{\lVert G^l_m\rVert_p}{\sum_{m'} \lVert G^l_{m'}\rVert_p},\quad
# G^l_m = \frac{\partial y^c}{\partial A^l_m},\qquad
# \bar A^l = \sum_m w^l_m A^l_m,\qquad R = (\bar A^L + I) \cdots (\bar A^1 + I)$$
#
# with $p = 1$ or $2$ and every factor divided by its row sum, which is two. The class token's row of $R$ is the map.
# Catalogue entry: `gmar`.

# %%
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import UnsupportedModel, capture, check, readout, target_scores, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    norm: Literal["l1", "l2"] = "l1",
    authors_code: bool = False,
) -> Tensor:
    """Attention rollout whose heads are weighted by the norm of their class gradient.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        norm: "l1" sums the magnitudes of a head's gradient, "l2" takes the root of the sum of squares.
        authors_code: do what the authors' code does instead, see ``rollout_of_the_code``; class-token models only.

    Returns:
        (B, gh, gw); values of at least 0 that sum to at most one (the rest lies on the prefix tokens).

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; a norm that is neither; a class without any gradient.

    Source: Jo, Jang, Park 2025.
    """
    check(model, images, class_token=authors_code)
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm must be 'l1' or 'l2', not {norm!r}.")
    names = ("attention", "norm1") if authors_code else ("attention",)
    with torch.enable_grad(), capture(model, *names) as record:
        scores = target_scores(model(images), target)  # (B,) logits y^c
        read = record["norm1"][-1:] if authors_code else record["attention"]
        gradients = torch.autograd.grad(scores.sum(), read)  # (B, h, N, N) each
    with torch.no_grad():
        if authors_code:
            return to_grid(model, images, rollout_of_the_code(model, record["attention"], gradients[0], norm))
        row = readout(model, record)[:, None]  # (B, 1, N): only one row of the product is needed
        for attention, gradient in zip(reversed(record["attention"]), reversed(gradients), strict=True):
            weights = head_weights(gradient.flatten(2), norm)  # (B, h)
            row = (row @ (weights[..., None, None] * attention).sum(1) + row) / 2
    return to_grid(model, images, row[:, 0, model.num_prefix_tokens :])


def head_weights(gradients: Tensor, norm: str) -> Tensor:
    """Norms of the gradients (B, h, any number) of every head, divided by their sum over heads: (B, h)."""
    norms = gradients.norm(p=1 if norm == "l1" else 2, dim=-1)
    if (norms.sum(-1) == 0).any():
        raise ValueError("no head has a gradient: the class score does not depend on the attention of some layer.")
    return norms / norms.sum(-1, keepdim=True)


def rollout_of_the_code(model: VisionTransformer, attentions: list[Tensor], gradient: Tensor, norm: str) -> Tensor:
    """What the authors' code does instead: a map (B, P).

    One weight for each head serves all layers: the norm of the gradient (B, N, D) of the last ``norm1`` output on patches,
    channels cut into as many groups as there are heads. Every head is rolled out alone, first layer on the left, with
    5e-5 / 4 times the mean of the matrices on the diagonal. The first head's rows of the patches, (P, N), are read as N
    maps of P values, which are averaged: position p collects the entries whose row and column add up to p modulo P.
    """
    if len({attention.shape[1] for attention in attentions}) > 1:
        raise UnsupportedModel("the authors' code needs the same number of heads in every layer.")
    _, heads, tokens, _ = attentions[0].shape
    patches = gradient[:, model.num_prefix_tokens :].unflatten(-1, (heads, -1))  # (B, P, h, D / h)
    weights = head_weights(patches.transpose(1, 2).flatten(2), norm)  # (B, h)
    sums = torch.ones_like(weights)  # (B, h): every row of a head's matrix has this sum, so the mean follows
    matrix = torch.eye(tokens).to(attentions[0]).expand(len(weights), -1, -1)  # (B, N, N), of the first head
    for attention in attentions:
        matrix, sums = matrix @ (weights[:, :1, None] * attention[:, 0]), sums * weights
        diagonal = 0.25 * 5e-5 * sums.mean(1, keepdim=True) / tokens  # (B, 1)
        matrix, sums = matrix + diagonal[..., None] * torch.eye(tokens).to(matrix), sums + diagonal
    return matrix[:, model.num_prefix_tokens :].flatten(1).unflatten(1, (tokens, -1)).mean(1)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The residual path has the weight of rollout: one half attention, one half identity.
# 2. The authors' code computes something else: its head weights come from features after a norm, whose channels belong to no
#    head yet; its layers are multiplied in the other order, almost without residual; and its map is a mean over diagonals of
#    the first head's matrix. `authors_code=True` does that, per picture, where the code takes its mean over the batch.
# 3. Models without class token start from what their head reads (`vitx.vit.readout`). Pooling attention is not reweighted.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "gmar")
