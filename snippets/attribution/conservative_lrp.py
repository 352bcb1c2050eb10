# %% [markdown]
# # Conservative propagation (LRP for transformers)
#
# How much did each patch add to the class score? Gradient times input answers exactly when every step of the backward
# pass hands on as much relevance as it received. Two steps of a transformer do not: attention, whose weights depend on
# the tokens as its values do, and LayerNorm, whose deviation does. With $p_{ij}$ the attention weight of token $i$ in the
# sum $y_j = \sum_i x_i p_{ij}$, and $N$ the number of entries that are normalised, the rules are
#
# $$R(x_i) = \sum_j \frac{x_i\, p_{ij}}{\sum_{i'} x_{i'}\, p_{i'j}}\, R(y_j),\qquad
# R(x_i) = \sum_j \frac{x_i\,(\delta_{ij} - \frac1N)}{\sum_{i'} x_{i'}\,(\delta_{i'j} - \frac1N)}\, R(y_j),$$
#
# which is gradient times input with the attention weights and the deviation taken for constants. One forward and one
# backward pass are enough. Catalogue entry: `conservative-lrp`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import backward_rules, check, embed, logits_of_tokens, target_scores, to_grid


def explain(
    model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, activation: str = "gradient"
) -> Tensor:
    """Relevance of every patch token for the class logit, by conservative propagation.

    Args:
        model: timm VisionTransformer in eval mode, with LayerNorms.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        activation: what GELU hands on. "gradient": its gradient times its input, as the paper does with all that is
            neither attention nor LayerNorm. "identity": exactly what it received, so that only biases take relevance.

    Returns:
        (B, gh, gw), signed: token embedding with position, times gradient, summed over channels. With "identity" and
        without biases, the map and the relevance of the prefix tokens sum to the logit.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check`` and ``vitx.vit.backward_rules``; an unknown ``activation``.

    Source: Ali et al. 2022, the rules for attention heads and LayerNorm and their implementation as gradient times input.
    """
    check(model, images)
    if activation not in ("gradient", "identity"):
        raise ValueError(f'activation must be "gradient" or "identity", not {activation!r}.')
    with torch.no_grad():
        tokens = embed(model, images)  # (B, N, D)
    identity = activation == "identity"
    with torch.enable_grad(), backward_rules(model, attention=0, gate=0, activation=identity):
        tokens = tokens.detach().requires_grad_()
        scores = target_scores(logits_of_tokens(model, tokens), target)  # (B,)
        (gradient,) = torch.autograd.grad(scores.sum(), tokens)
    relevance = (tokens * gradient).sum(-1)  # (B, N)
    return to_grid(model, images, relevance[:, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper's transformers have no GELU between two linear layers. What it leaves to the gradient stays with the
#    gradient here, and GELU is not linear: $x f'(x) \neq f(x)$, so each MLP loses or gains some relevance.
#    `activation="identity"` closes that leak.
# 2. Biases, of linear layers and of LayerNorms, keep the relevance that is theirs, as they do in gradient times input; what
#    reaches the tokens is the logit less their share. The class token's own embedding receives relevance too, which is not
#    part of the map.
# 3. A token is its patch embedding plus its position, as in the authors' code for text; a map of pixels would leave the
#    positions' share out.
# 4. The gate of a gated MLP is taken for a constant, like the attention weights. Query and key norms lie inside the
#    attention weights and do not matter. Pooling heads are treated like any attention. Models with RMSNorm, differential
#    or gated attention are refused.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "conservative-lrp")
