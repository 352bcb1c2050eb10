# %% [markdown]
# # Partial LRP: the relevance of the last attention
#
# Which heads, and which links of the last attention layer, carried the decision? Relevance starts at the class logit and is
# propagated back only a part of the way, to the attention matrix $A$ of the last block, by the rules for linear layers,
# residual sums and the product of attention and values,
#
# $$R_j = \sum_i \frac{(x_j w_{ji})^+}{\sum_{j'} (x_{j'} w_{j'i})^+} R_i,\qquad
# R_u = \frac{u}{u + v} R,\qquad R(A_{ij}) = \frac12 \sum_d \frac{A_{ij} V_{jd}}{O_{id}} R(O_{id}).$$
#
# A head's share of relevance says how much it matters; as a picture, the positive relevance of the links is averaged over the
# $h$ heads, $M_j = \frac1h \sum_m R(A^m_{\mathrm{cls},\,j})^+$. No gradient is taken and no other block is visited.
# Catalogue entry: `partial-lrp`.

# %%
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import (
    capture,
    check,
    embed,
    head_relevance,
    linear_relevance,
    logits_of_tokens,
    plain_relevance_blocks,
    product_relevance,
    ratio,
    target_classes,
    to_grid,
)

# The tensors of the last block that the walk reads.
READ = (
    "block_input",
    "attn.qkv",
    "attention",
    "attn.proj.input",
    "norm2.input",
    "mlp.fc1.input",
    "mlp.fc2.input",
    "block_output",
)


def by_sign(relevance: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``linear_relevance`` for the positive and for the negative inputs apart: each part is paid the whole relevance."""
    return linear_relevance(relevance, x.clamp(min=0), weight) + linear_relevance(relevance, x.clamp(max=0), weight)


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, conserve: bool = True) -> Tensor:
    """Relevance of every patch as a key of the last attention, averaged over heads.

    Args:
        model: timm VisionTransformer of plain pre-norm blocks in eval mode; class-token, distilled or average-pooling head.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        conserve: a linear layer divides its relevance among all positive terms, as the rule says; False pays the terms of
            positive inputs and those of negative inputs the whole relevance each, as the code of the published baseline.

    Returns:
        (B, gh, gw); values of at least 0.

    Raises:
        UnsupportedModel: blocks or a head without a rule (parallel or post-norm blocks, gated MLPs and attention, attention
            pooling, max pooling).
        ValueError: see ``vitx.vit.check``.

    Source: Voita et al. 2019 (relevance of heads); the map is a baseline of Chefer, Gur, Wolf 2021 (CVPR).
    """
    relevance = attention_relevance(model, images, target, linear_relevance if conserve else by_sign)  # (B, h, N, N)
    # With a class-token head only the class token's query has relevance; other heads sum over what they read.
    row = relevance.clamp(min=0).mean(1).sum(1)  # (B, N)
    return to_grid(model, images, row[:, model.num_prefix_tokens :])


def importance_of_heads(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Share of the last block's relevance that each head's output holds: (B, h), each row summing to one."""
    relevance = attention_relevance(model, images, target).sum((2, 3))  # half of what the head's output holds
    return relevance / relevance.sum(1, keepdim=True)


def attention_relevance(
    model: VisionTransformer, images: Tensor, target: Tensor | None, linear: Callable = linear_relevance
) -> Tensor:
    """Relevance (B, h, N, N) of the last block's attention matrices, when the class logit holds relevance one."""
    check(model, images)
    block = plain_relevance_blocks(model)[-1]
    with torch.no_grad():
        tokens = embed(model, images)
        for lower in list(model.blocks)[:-1]:
            tokens = lower(tokens)
        with capture(model, *READ) as record:  # of the last block alone
            logits = logits_of_tokens(model, tokens, first=len(model.blocks) - 1)
        layer = {name: tensors[0] for name, tensors in record.items()}
        x, middle, output, attention = (layer[n] for n in ("block_input", "norm2.input", "block_output", "attention"))
        relevance = head_relevance(model, output, target_classes(logits, target), linear)  # (B, N, D)
        share = ratio(relevance, output)  # residual sum: each operand is paid in proportion
        branch = linear((output - middle) * share, layer["mlp.fc2.input"], block.get_parameter("mlp.fc2.weight"))
        branch = linear(branch, layer["mlp.fc1.input"], block.get_parameter("mlp.fc1.weight"))
        share = ratio(middle * share + branch, middle)
        branch = linear((middle - x) * share, layer["attn.proj.input"], block.get_parameter("attn.proj.weight"))
        heads = (attention.shape[1], -1)
        values = layer["attn.qkv"].unflatten(-1, (3, *heads))[:, :, 2].transpose(1, 2)  # (B, h, N, d)
        mixed, branch = (t.unflatten(-1, heads).transpose(1, 2) for t in (layer["attn.proj.input"], branch))
        return product_relevance(branch, attention, values, mixed)[0]


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Voita et al. explain translation and need the relevance of heads only (`importance_of_heads`, here for the last block). The map of
#    a Vision Transformer is that of Chefer et al., who compare with it; their rules are used, with $\alpha = 1$, where Voita's
#    code gives one half each to positive and negative contributions and lets biases take part.
# 2. The published baseline's code divides the relevance of a linear layer twice, among the terms of positive inputs and again
#    among those of negative inputs, so that relevance nearly doubles at each layer, and not evenly. `conserve=False` does so.
# 3. Layer scale, GELU and LayerNorm hand on what they receive. A distilled model's mean of two heads is one linear layer on
#    both tokens; average pooling pays tokens in proportion to their values. In both, a patch's relevance is summed over all
#    queries.
# 4. Residual sums are paid in proportion, without the normalisation of `transformer-attribution`, so shares can exceed the sum
#    where the two operands nearly cancel.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "partial-lrp")
