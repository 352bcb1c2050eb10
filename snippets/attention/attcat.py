# %% [markdown]
# # AttCAT
#
# Attention says how much a token is read but not what it says. AttCAT takes gradient times feature of every token in every
# layer, its class activation token, and weights it with the attention that the token receives:
#
# $$\mathrm{CAT}_i^l = \frac{\partial y^c}{\partial h_i^l} \odot h_i^l,\qquad
# \mathrm{AttCAT}_i = \sum_{l=1}^{L} \mathbb E_H\big[\alpha_i^l\big] \sum_{d} \mathrm{CAT}^l_{i,d}.$$
#
# $h_i^l$ is token $i$ at the input of layer $l$ and $\alpha_i^l$ the attention that it receives there, averaged over the
# queries; $\mathbb E_H$ is the mean over heads. The sign says for or against the class. Catalogue entry: `attcat`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, target_scores, to_grid


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Gradient times feature of every patch token, weighted with the attention it receives, summed over layers.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        (B, gh, gw); positive values speak for the class, negative ones against it.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``.

    Source: Qiang et al. 2022; authors' code, Generator.generate_TransCAM.
    """
    check(model, images)
    with torch.enable_grad(), capture(model, "block_input", "attention") as record:
        scores = target_scores(model(images), target)  # (B,) logits y^c
        gradients = torch.autograd.grad(scores.sum(), record["block_input"])  # (B, N, D) each
    with torch.no_grad():
        relevance = torch.zeros_like(gradients[0][..., 0])  # (B, N)
        for gradient, tokens, attention in zip(gradients, record["block_input"], record["attention"], strict=True):
            relevance += attention.mean((1, 2)) * (gradient * tokens).sum(-1)  # mean over heads and queries
    return to_grid(model, images, relevance[:, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The layer index. Features and attention of one layer belong together, so $h^l$ is what layer $l$ attends to: its input, as
#    in the authors' code. (A class-token head reads no patch from the last layer's output: its gradient there is zero.)
# 2. The authors' BERT normalises after each residual sum, a Vision Transformer before each branch; $h^l$ is the residual stream
#    before that norm.
# 3. The scores of the class token and other prefix tokens are left out of the map. The attention of an attention-pooling head
#    is not used; its gradient is.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "attcat")
