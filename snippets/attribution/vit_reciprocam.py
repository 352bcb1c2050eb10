# %% [markdown]
# # ViT-ReciproCAM
#
# What would the last block conclude if it could attend to one neighbourhood only? After the first layer normalisation of
# the last block, hide all patch tokens but a small window around patch $n$, keep the class token, and finish the pass:
#
# $$\tilde Z^{(n)} = M^{(n)} \odot \mathrm{LN}(X),\qquad
# S^c_n = \mathrm{softmax}\big(g(X + \mathrm{MSA}(\tilde Z^{(n)}))\big)_c ,$$
#
# where $M^{(n)}$ is a $3 \times 3$ Gaussian around patch $n$, one for the class token and zero elsewhere, and $g$ is the rest
# of the network. The skip connection carries the tokens $X$ as they were. The map shows by how much the window around
# a patch beats the worst window of the picture. Catalogue entry: `vit-reciprocam`.

# %%
from typing import TypeGuard

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import check, embed, grid, logits_of_tokens, plain_blocks, target_classes, target_scores, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layer: int = -1,
    gaussian: bool = True,
    chunk: int = 64,
) -> Tensor:
    """Class probability when the attention of one block sees a single neighbourhood of patches.

    Args:
        model: timm VisionTransformer in eval mode, with or without class token.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        layer: block whose normalised input (the output of ``norm1``) is masked; -1 is the last.
        gaussian: keep 3 x 3 patches with Gaussian weights; False keeps the one patch.
        chunk: masked copies per pass through the upper blocks; bounds the memory.

    Returns:
        (B, gh, gw); differences of probabilities, 0 to 1: by how much the window around the patch beats the worst. All
        zero when the block's attention makes no difference.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; blocks that are not pre-norm, no such layer.

    Source: Byun, Lee 2023, figure 1.
    """
    check(model, images)
    blocks = plain_blocks(model)
    depth, prefix = len(blocks), model.num_prefix_tokens
    if not -depth <= layer < depth:
        raise ValueError(f"layer {layer} is out of range: the model has {depth} blocks.")
    layer = layer % depth
    block = blocks[layer]
    # After the last block a token head reads prefix tokens only: then no other row need be computed.
    rows = prefix if layer == depth - 1 and model.global_pool == "token" else None
    with torch.inference_mode():
        tokens = model.blocks[:layer](embed(model, images))  # (B, N, D): X
        normed = block.norm1(tokens)  # (B, N, D)
        classes = target_classes(logits_of_tokens(model, tokens, first=layer), target)
        masks = nn.functional.pad(windows(grid(model, images), gaussian), (prefix, 0), value=1).to(tokens)  # (P, N)
        relevance = []
        for mask in masks.split(max(1, chunk // len(images))):  # (C, N)
            if rows and is_linear(block.attn):
                mixed = attend(block.attn, normed, mask, rows)
            else:
                mixed = block.attn((mask[..., None] * normed[:, None]).flatten(0, 1)).unflatten(0, (-1, len(mask)))
            x = tokens[:, None, :rows] + block.drop_path1(block.ls1(mixed))[:, :, :rows]  # (B, C, N or rows, D)
            x = (x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))).flatten(0, 1)
            probabilities = logits_of_tokens(model, x, first=layer + 1).softmax(-1)  # (B C, classes)
            scores = target_scores(probabilities, classes.repeat_interleave(len(mask)))
            relevance.append(scores.view(len(images), -1))
        scores = torch.cat(relevance, 1)  # (B, P): S^c
        scores = scores - scores.amin(1, keepdim=True)
    return to_grid(model, images, scores.clone())


def windows(size: tuple[int, int], gaussian: bool) -> Tensor:
    """What each of the P masks lets through: (P, P). Windows that reach over the border are cut off there."""
    patches = torch.eye(size[0] * size[1]).view(-1, 1, *size)
    if not gaussian:
        return patches.flatten(1)
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
    return nn.functional.conv2d(patches, kernel[None, None], padding=1).flatten(1)


def is_linear(attention: nn.Module) -> TypeGuard[Attention]:
    """Are queries, keys and values linear in the tokens, with nothing between them and the softmax?"""
    if type(attention) is not Attention or attention.gate is not None:
        return False
    return isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)


def attend(attention: Attention, normed: Tensor, masks: Tensor, rows: int) -> Tensor:
    """Attention output of the first rows, which no mask hides, for every mask: (B, C, rows, D).

    A masked token has the key m W_k z + b_k. The bias adds the same to all scores of a query, which the softmax
    ignores, so that the scores under a mask are m times the unmasked ones.
    """
    heads, bias = (3, attention.num_heads, -1), attention.qkv.bias
    unbiased = nn.functional.linear(normed, attention.qkv.weight)
    queries, keys, values = unbiased.unflatten(-1, heads).permute(2, 0, 3, 1, 4)  # (B, h, N, d) each, without bias
    shift = torch.zeros_like(attention.qkv.weight[:, 0]) if bias is None else bias
    of_query, _, of_value = shift.view(*heads)[..., None, :]  # (h, 1, d)
    scores = attention.scale * (queries[:, :, :rows] + of_query) @ keys.mT  # (B, h, rows, N)
    masks = masks[:, None, None]  # (C, 1, 1, N)
    weights = (masks * scores[:, None]).softmax(-1)  # (B, C, h, rows, N)
    mixed = (weights * masks) @ values[:, None] + of_value  # (B, C, h, rows, d)
    return attention.proj(attention.norm(mixed.transpose(2, 3).flatten(3)))


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper scales the scores of one picture to 0 to 1. Here their least value is subtracted but the rest is not
#    divided by the range, so that the values stay probabilities and pictures can be compared.
# 2. Prefix tokens other than the class token (distillation, registers) are kept by every mask, too. A model without class
#    token has none to keep, and its skip connection hands all tokens to the pooling.
# 3. With a class token and the last block, only the class token's row of the attention and of the MLP is computed, for all
#    masks at once. It is the same number: nothing else reaches the head.
# 4. The authors' code masks the second-to-last block unless told otherwise and refuses the last, which the paper uses;
#    `layer=-2` does so.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "vit-reciprocam")
