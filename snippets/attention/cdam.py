# %% [markdown]
# # Class-discriminative attention maps (CDAM)
#
# The last layer's attention shows where a self-supervised model looks, for no class in particular. CDAM scores the tokens
# that enter this attention by gradient times input, for one class:
#
# $$S_{i,c} = \sum_j T_{ij} \frac{\partial f_c}{\partial T_{ij}},$$
#
# with $T_i$ the normalised token $i$ of the last block and $f_c$ the logit. Positive scores are evidence for the class,
# negative ones against it. Smooth and Integrated CDAM average $S$ over tokens with noise, or scaled up from zero.
# Catalogue entry: `cdam`.

# %%
from typing import Literal

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from vitx.vit import check, embed, logits_of_tokens, plain_blocks, target_classes, target_scores, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    variant: Literal["vanilla", "smooth", "integrated"] = "vanilla",
    samples: int = 50,
    noise: float = 0.05,
    chunk: int = 32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gradient times input of the tokens that enter the last attention.

    Args:
        model: timm VisionTransformer of pre-norm blocks in eval mode.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        variant: "vanilla" is the equation above; "smooth" averages it over tokens with Gaussian noise; "integrated" over
            tokens scaled by 0, 1/samples, ..., 1, with noise.
        samples: number of altered token sets.
        noise: standard deviation, as a fraction of the range of the picture's tokens.
        chunk: altered pictures per pass through the last block; bounds the memory.
        generator: source of the noise, the same for every picture; None seeds a new one with 0.

    Returns:
        (B, gh, gw); positive values speak for the class, negative ones against it.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; blocks that are not pre-norm; unknown variant, fewer than one
            sample, negative noise.

    Source: Brocki, Binda, Chung 2023; authors' README and notebook.
    """
    check(model, images)
    last = plain_blocks(model)[-1]
    if variant not in ("vanilla", "smooth", "integrated"):
        raise ValueError(f"variant must be 'vanilla', 'smooth' or 'integrated', not {variant!r}.")
    if samples < 1 or chunk < 1 or noise < 0:
        raise ValueError("samples and chunk must be at least 1, and noise at least 0.")
    with torch.no_grad():
        tokens = embed(model, images)
        for block in model.blocks[:-1]:
            tokens = block(tokens)  # (B, N, D)
        normed = last.norm1(tokens)  # (B, N, D): T
        classes = target_classes(logits_of_tokens(model, tokens, first=len(model.blocks) - 1), target)
        scales, draws = torch.ones(1), torch.zeros(1, *normed.shape[1:])  # vanilla: the tokens as they are
        if variant != "vanilla":
            scales = torch.ones(samples) if variant == "smooth" else torch.linspace(0, 1, samples + 1)
            generator = torch.Generator().manual_seed(0) if generator is None else generator
            draws = noise * torch.randn(len(scales), *normed.shape[1:], generator=generator)  # (S, N, D)
        scales, draws = scales.to(normed), draws.to(normed)
        spread = normed.amax((1, 2)) - normed.amin((1, 2))  # (B,)
    relevance = torch.zeros_like(normed[..., 0])  # (B, N)
    for pairs in torch.arange(len(scales) * len(images), device=images.device).split(chunk):
        sample, picture = pairs // len(images), pairs % len(images)
        altered = scales[sample, None, None] * normed[picture] + spread[picture, None, None] * draws[sample]
        gradient = gradient_of(model, last, tokens[picture], altered, classes[picture])  # (chunk, N, D)
        relevance.index_add_(0, picture, (altered * gradient).sum(-1) / len(scales))
    return to_grid(model, images, relevance[:, model.num_prefix_tokens :])


def gradient_of(model: VisionTransformer, last: Block, tokens: Tensor, normed: Tensor, classes: Tensor) -> Tensor:
    """Gradient (B, N, D) of the class logits by what the last attention reads, in place of its own normalised tokens."""
    normed = normed.clone().requires_grad_()
    handle = last.norm1.register_forward_hook(lambda *_: normed)
    try:
        with torch.enable_grad():
            scores = target_scores(logits_of_tokens(model, tokens, first=len(model.blocks) - 1), classes)
            return torch.autograd.grad(scores.sum(), normed)[0]
    finally:
        handle.remove()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. None for the vanilla map of a class-token model. The paper also explains the similarity to a concept in place of a
#    logit; only logits are explained here.
# 2. The two averaged variants follow a later implementation, in Obz AI, in noise, number of steps and in that token
#    and gradient are both taken at the altered token. The tool takes the range of tokens over the batch; here each picture has
#    its own.
# 3. The residual path around the last attention is not part of $S$. With a class token that path carries no patch; in models
#    with average or attention pooling it does, and their maps show the attention's part only.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "cdam")
