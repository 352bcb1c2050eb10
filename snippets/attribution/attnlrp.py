# %% [markdown]
# # AttnLRP
#
# Layer-wise relevance propagation with rules for all that an attention layer does, so that relevance reaches queries and
# keys as well as values. Each rule is a Taylor expansion of the step at the very input. With $s=\mathrm{softmax}(x)$,
#
# $$\text{softmax: } R(x_i) = x_i\Big(R(s_i) - s_i\sum_j R(s_j)\Big),\qquad
# \text{product } O = A V\text{: } R(A_{ji}) = \sum_p \frac{A_{ji} V_{ip}}{2\, O_{jp}}\, R(O_{jp}),$$
#
# $$\text{LayerNorm and GELU: the identity, } R(x_i) = R(y_i),\qquad
# \text{linear: } R(x_j) = \sum_i \frac{x_j w_{ij}}{z_i}\, R(z_i).$$
#
# Written as $R(x) = x \cdot g$ they need no division: the softmax keeps its own gradient, products hand half of it to each
# factor, LayerNorm takes its deviation for a constant and GELU multiplies by $f(x)/x$. One forward and one backward pass.
# Catalogue entry: `attnlrp`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import backward_rules, check, gamma_rule, pool_patches, target_scores, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    gamma: float = 0.0,
    through_softmax: bool = True,
    pool: str | None = "patch",
) -> Tensor:
    """Relevance of every patch for the class logit, by attention-aware layer-wise relevance propagation.

    Args:
        model: timm VisionTransformer in eval mode, with LayerNorms.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        gamma: for all linear layers and the patch embedding, by how much terms of the output's sign count more than
            others. 0 is the rule above; the authors' example for Vision Transformers tries values up to 1. Any other
            value than 0 doubles the cost.
        through_softmax: let half of the relevance of each attention output flow through the attention weights; False
            gives all of it to the values, as the authors' code does for Vision Transformers.
        pool: "patch" sums over colours and over every patch; None sums over colours only.

    Returns:
        (B, gh, gw), or (B, H, W) with ``pool=None``; signed.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check`` and ``vitx.vit.backward_rules``; a negative ``gamma``.

    Source: Achtibat et al. 2024, propositions 3.1 to 3.4 and appendix A.2.3.
    """
    check(model, images)
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, not {gamma}.")
    rules = {"attention": 0.5 if through_softmax else 0.0, "gate": 0.5, "activation": True}
    linear = (lambda layer, x: gamma_rule(layer, x, gamma)) if gamma else None
    with torch.enable_grad(), backward_rules(model, **rules, linear=linear):
        images = images.detach().requires_grad_()
        scores = target_scores(model(images), target)  # (B,)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    relevance = (images * gradient).detach().sum(1)  # (B, H, W)
    patches = to_grid(model, images, pool_patches(model, relevance))  # (B, gh, gw)
    return relevance if pool is None else patches


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The default is the rule for linear layers without $\gamma$ and with $\varepsilon \to 0$: in gradient form nothing is
#    divided by an activation, so no stabiliser is needed. For Vision Transformers, whose relevance is noisy, the paper
#    turns to $\gamma > 0$ with a value searched for per model; pass `gamma`.
# 2. What does not reach the pixels: biases and positions, which keep their share, and the constant term of the softmax's
#    expansion, whose relevance the paper lets go.
# 3. Query and key norms follow the rule of LayerNorm. In attention pooling the query is a constant, so the keys take the
#    whole share of the weights. Gated MLPs halve the product and give the activation the identity, as published for
#    language models. Models with RMSNorm, differential or gated attention are refused.
# 4. The paper's pixels are the network's input; here they are normalised, so a pixel of the mean colour receives nothing.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "attnlrp")
