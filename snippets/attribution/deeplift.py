# %% [markdown]
# # DeepLIFT, rescale rule, on a Vision Transformer
#
# A gradient is blind where a function is flat. DeepLIFT compares the picture $x$ with a reference $x^0$ and explains the
# difference of the score: every step gets a multiplier, the slope between the two points instead of at one of them,
#
# $$m_{\Delta x \Delta y} = \frac{\Delta y}{\Delta x} = \frac{f(x) - f(x^0)}{x - x^0},\qquad
# m_{\Delta x \Delta t} = \sum_y m_{\Delta x \Delta y}\, m_{\Delta y \Delta t},\qquad
# C_{\Delta x \Delta t} = m_{\Delta x \Delta t}\, \Delta x,$$
#
# and the contributions sum to the difference, $\sum_x C_{\Delta x \Delta t} = \Delta t$. The rescale rule covers functions of
# one number. A transformer also multiplies: $\Delta(uv) = \bar v\,\Delta u + \bar u\,\Delta v$ with the mean of picture
# and reference, $\bar u = (u + u^0)/2$, gives each factor its Shapley value. LayerNorm is a chain of such steps: centring,
# square, mean, inverse root, product. In the softmax $p_j = \exp(\log p_j)$ has the multiplier
# $L_j = \Delta p_j / \Delta \log p_j$, and since the $p_j$ always sum to one,
# $\Delta p_j = L_j (\Delta s_j - \sum_k L_k \Delta s_k / \sum_k L_k)$.
# Catalogue entry: `deeplift`.

# %%
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, check, plain_blocks, pool_patches, replaced_forwards, target_scores, to_grid


class Rescale(torch.autograd.Function):
    """y = f(x) element by element, with the multiplier (f(x) - f(x0)) / (x - x0) for a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reference: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        output, difference = function(x), x - reference
        near = difference.abs() < torch.finfo(x.dtype).eps ** (1 / 3)  # there the quotient is less exact than the slope
        with torch.enable_grad():
            middle = ((x + reference) / 2).detach().requires_grad_()
            (slope,) = torch.autograd.grad(function(middle).sum(), middle)
        quotient = (output - function(reference)) / torch.where(near, 1, difference)
        ctx.save_for_backward(torch.where(near, slope, quotient))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        return gradients[0] * ctx.saved_tensors[0], None, None


class Product(torch.autograd.Function):
    """y = u @ v; each factor is multiplied by the mean, of picture and reference, of the other."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, u_reference: Tensor, v_reference: Tensor) -> Tensor:
        ctx.save_for_backward((u + u_reference) / 2, (v + v_reference) / 2)
        return u @ v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        u, v = ctx.saved_tensors
        return gradients[0] @ v.transpose(-2, -1), u.transpose(-2, -1) @ gradients[0], None, None


class Softmax(torch.autograd.Function):
    """p = exp(log p): the rescale rule gives L = (p - p0) / (log p - log p0), and sum L (x - x0 - change of log sum) = 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reference: Tensor) -> Tensor:
        log_p, log_p0 = x.log_softmax(-1), reference.log_softmax(-1)
        ratio = (log_p - log_p0).abs()
        mean = torch.where(ratio == 0, 1, -torch.expm1(-ratio) / ratio) * torch.maximum(log_p, log_p0).exp()
        ctx.save_for_backward(mean)  # L, the logarithmic mean of p and p0
        return log_p.exp()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        (mean,) = ctx.saved_tensors
        total = (gradients[0] * mean).sum(-1, keepdim=True) / mean.sum(-1, keepdim=True)
        return mean * (gradients[0] - total), None


class Norm(torch.autograd.Function):
    """Centring c, variance v, inverse root r, product c r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reference: Tensor, norm: nn.LayerNorm) -> Tensor:
        c, c0 = (t - t.mean(-1, keepdim=True) for t in (x, reference))
        root, root0 = ((t.square().mean(-1, keepdim=True) + norm.eps).sqrt() for t in (c, c0))
        mean_r, of_variance = (1 / root + 1 / root0) / 2, -1 / (root * root0 * (root + root0))
        weight = torch.ones_like(x[:1]) if norm.weight is None else norm.weight
        ctx.save_for_backward((c + c0) / 2, mean_r, of_variance, weight)
        return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        c, r, of_variance, weight = ctx.saved_tensors
        gradient = gradients[0] * weight
        of_r = (gradient * c).sum(-1, keepdim=True)
        gradient = gradient * r + of_r * of_variance * 2 * c / c.shape[-1]
        return gradient - gradient.mean(-1, keepdim=True), None, None


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    baseline: Tensor | None = None,
    pool: str | None = "patch",
) -> Tensor:
    """Contribution of every patch to the difference of the class logit between picture and reference.

    Args:
        model: timm VisionTransformer of plain pre-norm blocks in eval mode; class-token, distilled or average-pooling head.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the class predicted for the picture itself.
        baseline: the reference x0, (1, 3, H, W) or (B, 3, H, W), normalised like the images; None is the zero tensor, the
            mean colour of the training data.
        pool: "patch" sums over colours and over every patch; None sums over colours only.

    Returns:
        (B, gh, gw), or (B, H, W) with ``pool=None``; signed. A map sums to the difference of the logits.

    Raises:
        UnsupportedModel: blocks or a head without a rule here (gates, attention or max pooling, norms other than LayerNorm).
        ValueError: see ``vitx.vit.check``; a baseline of another shape.

    Source: Shrikumar, Greenside, Kundaje 2017, sections 3.1 to 3.3 and 3.5.2 (rescale rule).
    """
    check(model, images)
    baseline = torch.zeros_like(images[:1]) if baseline is None else baseline.to(images)
    if baseline.shape[1:] != images.shape[1:] or len(baseline) not in (1, len(images)):
        raise ValueError(
            f"baseline must have shape (1 or {len(images)}, *{tuple(images.shape[1:])}), not {tuple(baseline.shape)}."
        )
    memory: list[tuple[Tensor, ...]] = []  # what the steps of the reference read, first step first
    with torch.no_grad(), replaced_forwards(steps(model, lambda *tensors: memory.append(tensors) or tensors)):
        model(baseline)
    stored: Iterator[tuple[Tensor, ...]] = iter(memory)
    with torch.enable_grad(), replaced_forwards(steps(model, lambda *_: next(stored))):
        images = images.detach().requires_grad_()
        scores = target_scores(model(images), target)  # (B,)
        (multiplier,) = torch.autograd.grad(scores.sum(), images)  # (B, 3, H, W)
    contribution = ((images - baseline) * multiplier).detach().sum(1)  # (B, H, W)
    patches = to_grid(model, images, pool_patches(model, contribution))  # (B, gh, gw)
    return contribution if pool is None else patches


def steps(model: VisionTransformer, refer: Callable[..., tuple]) -> list[tuple[nn.Module, Callable]]:
    """Forwards of all that is not linear. ``refer`` turns what a step reads into what it read from the reference."""
    blocks = plain_blocks(model)
    if model.global_pool not in ("token", "avg"):
        raise UnsupportedModel(f"DeepLIFT has no rule here for a head that reads global_pool={model.global_pool!r}.")
    replaced: list[tuple[nn.Module, Callable]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            replaced.append((module, lambda x, m=module: Norm.apply(x, *refer(x), m)))
        elif "norm" in name.rsplit(".")[-1] and not isinstance(module, nn.Identity):
            raise UnsupportedModel(f"DeepLIFT has a rule for LayerNorm, and {name} is a {type(module).__name__}.")
    for index, block in enumerate(blocks):
        attention, mlp = block.attn, block.mlp
        if type(attention) is not Attention or attention.gate is not None or type(mlp) is not Mlp:
            raise UnsupportedModel(
                f"DeepLIFT has rules for plain attention and two-layer MLPs, and block {index} has others."
            )
        replaced.append((mlp.act, lambda x, f=mlp.act.forward: Rescale.apply(x, *refer(x), f)))
        replaced.append((attention, lambda x, a=attention, **_: attend(a, x, refer)))
    return replaced


def attend(attention: Attention, x: Tensor, refer: Callable[..., tuple]) -> Tensor:
    """timm's Attention, with multipliers in its two products and its softmax."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, N, d) each
    q, k = attention.q_norm(q) * attention.scale, attention.k_norm(k).transpose(-2, -1)
    q0, k0, v0 = refer(q, k, v)
    scores0 = q0 @ k0
    weights = Softmax.apply(Product.apply(q, k, q0, k0), scores0)  # (B, h, N, N)
    mixed = Product.apply(weights, v, scores0.softmax(-1), v0)
    return attention.proj(attention.norm(mixed.transpose(1, 2).flatten(2)))


# %% [markdown]
# ## Where this departs from the paper
#
# 1. DeepLIFT was made for linear layers and functions of one input; its authors say so of gates. Products, softmax and
#    LayerNorm above are composed of its rules and of the Shapley value for two factors, so that summation to the difference
#    holds exactly. Softmax could be cut into other steps, such as exponential, sum and reciprocal; those are exact too, but
#    their multipliers grow without bound where the reference attends elsewhere, while these never exceed the larger weight.
# 2. Only the rescale rule is here, not RevealCancel, which treats positive and negative parts apart.
# 3. Where an input barely differs from its reference, the slope half way between the two replaces the quotient; the paper
#    takes a gradient too.
# 4. The paper leaves the reference to the user. `explain` receives normalised pictures, so its default is zero, the mean
#    colour of the training data. A pixel that equals its reference receives nothing.
# 5. Class token, positions and registers are the same in the reference and receive nothing. Parallel blocks, gates,
#    attention pooling and RMSNorm are refused.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "deeplift")
