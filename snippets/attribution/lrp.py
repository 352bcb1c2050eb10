# %% [markdown]
# # Layer-wise relevance propagation, on a Vision Transformer
#
# Start with the class score as relevance and hand it back layer by layer, each unit paying those who contributed to it. With
# $z_{ij} = x_i w_{ij}$ what unit $i$ sends to unit $j$, and $z_j = \sum_i z_{ij} + b_j$, the published rules for a linear
# layer are
#
# $$\varepsilon:\ R_i = \sum_j \frac{z_{ij}}{z_j + \varepsilon\,\mathrm{sign}(z_j)} R_j,\qquad
# \alpha\beta:\ R_i = \sum_j \Big(\alpha\,\frac{z_{ij}^+}{z_j^+} + \beta\,\frac{z_{ij}^-}{z_j^-}\Big) R_j,\quad \alpha + \beta = 1,$$
#
# and later $\gamma$, where terms of the sign of $z_j$ count $1 + \gamma$ times. The method is older than attention. Here
# GELU hands on what it receives; LayerNorm is linear, its deviation constant; in the product of attention weights and values
# the values take all and the softmax, with queries and keys, nothing; residual sums pay in proportion.
# Catalogue entry: `lrp`.

# %%
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import (
    backward_rules,
    check,
    gamma_rule,
    linear_map,
    linear_transpose,
    pool_patches,
    target_scores,
    to_grid,
)


class EpsilonRule(torch.autograd.Function):
    """Relevance in gradient form: with R = x * g, the rule is g_i = sum_j w_ij z_j / (z_j + epsilon sign z_j) g_j."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, epsilon: float) -> Tensor:
        output = linear_map(layer, x, layer.weight, layer.bias)
        ctx.layer, ctx.epsilon = layer, epsilon
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        x, output = ctx.saved_tensors
        share = gradients[0] * output.abs() / (output.abs() + ctx.epsilon)
        return linear_transpose(ctx.layer, x, share, ctx.layer.weight), None, None


class AlphaBetaRule(torch.autograd.Function):
    """The same for alpha and beta = 1 - alpha. A unit without positive (negative) terms drops that part of its relevance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, alpha: float) -> Tensor:
        output = linear_map(layer, x, layer.weight, layer.bias)
        ctx.layer, ctx.alpha = layer, alpha
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        (x, output), layer, alpha = ctx.saved_tensors, ctx.layer, ctx.alpha
        up, down = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        bias_up, bias_down = (None, None) if layer.bias is None else (layer.bias.clamp(min=0), layer.bias.clamp(max=0))
        above, below = x.clamp(min=0), x.clamp(max=0)
        positive = linear_map(layer, above, up, bias_up) + linear_map(layer, below, down)  # z_j+
        negative = linear_map(layer, above, down, bias_down) + linear_map(layer, below, up)  # z_j-
        relevance = gradients[0] * output
        a = torch.where(positive == 0, 0, alpha * relevance / positive)
        b = torch.where(negative == 0, 0, (1 - alpha) * relevance / negative)
        of_above = linear_transpose(layer, x, a, up) + linear_transpose(layer, x, b, down)
        of_below = linear_transpose(layer, x, a, down) + linear_transpose(layer, x, b, up)
        return torch.where(x > 0, of_above, of_below), None, None


RULES = {
    "epsilon": lambda layer, x, epsilon: EpsilonRule.apply(x, layer, epsilon),
    "alpha-beta": lambda layer, x, alpha: AlphaBetaRule.apply(x, layer, alpha),
    "gamma": gamma_rule,
}
DEFAULTS = {"epsilon": 0.01, "alpha-beta": 2.0, "gamma": 0.25}


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    rule: str = "epsilon",
    amount: float | None = None,
    pool: str | None = "patch",
) -> Tensor:
    """Relevance of every patch for the class logit.

    Args:
        model: timm VisionTransformer in eval mode, with LayerNorms.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        rule: for linear layers and the patch embedding: "epsilon", "alpha-beta" or "gamma".
        amount: the epsilon (at least 0), alpha (at least 1) or gamma (at least 0) of the rule; None takes 0.01, 2, 0.25.
        pool: "patch" sums over colours and over every patch; None sums over colours only.

    Returns:
        (B, gh, gw), or (B, H, W) with ``pool=None``; signed. With epsilon 0 and without biases it sums to the logit.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check`` and ``vitx.vit.backward_rules``; an unknown ``rule``, or an
            ``amount`` that is too small.

    Source: Bach et al. 2015, equations 58 and 60; the gamma rule: Montavon et al. 2019, section 10.2.
    """
    check(model, images)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}.")
    amount, least = DEFAULTS[rule] if amount is None else amount, float(rule == "alpha-beta")
    if amount < least:
        raise ValueError(f"the amount of the {rule} rule must be at least {least:g}, not {amount}.")
    rules = {"attention": 0.0, "gate": 0.0, "activation": True}
    with torch.enable_grad(), backward_rules(model, **rules, linear=lambda layer, x: RULES[rule](layer, x, amount)):
        images = images.detach().requires_grad_()
        scores = target_scores(model(images), target)  # (B,)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    relevance = (images * gradient).detach().sum(1)  # (B, H, W)
    patches = to_grid(model, images, pool_patches(model, relevance))  # (B, gh, gw)
    return relevance if pool is None else patches


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper knows linear layers, pooling and element-wise functions. The rules for LayerNorm, softmax and products above
#    are the later convention that a gate takes nothing (Arras et al. 2017); with $\varepsilon = 0$ they are those of
#    `conservative-lrp` with the identity for GELU. `attnlrp` sends relevance through the softmax too.
# 2. The linear rule holds for linear layers and the patch embedding. Residual sums, layer scale and the centring in LayerNorm
#    always pay in exact proportion ($\varepsilon = 0$); where a residual sum nearly cancels, shares far larger than the sum
#    arise, so $\alpha\beta$ does not bound the map of a transformer as it does that of a ReLU network.
# 3. Biases, positions and the class token keep their share of relevance. In $\alpha\beta$ a bias is one of the terms of its
#    sign, as published.
# 4. The paper gives no default amounts; its experiments use several. $\gamma$ takes one more product forwards and one more
#    backwards in each linear layer, $\alpha\beta$ four and three. The gate of a gated MLP takes nothing. Models with
#    RMSNorm, differential or gated attention are refused.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "lrp")
