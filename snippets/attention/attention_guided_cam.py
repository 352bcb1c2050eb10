# %% [markdown]
# # Attention-guided CAM
#
# Which patches does the class token read, block by block, to the good of the class? The feature maps are the class token's
# attention scores, squashed by a sigmoid instead of the softmax, which exaggerates peaks. They are weighted by the positive
# part of the gradient of the class logit by the attention $A_h^k$ of head $h$ in block $k$:
#
# $$F_h^k = \mathrm{sigmoid}\Big(\frac{q_{\mathrm{cls}} K^{\top}}{\sqrt d}\Big),\qquad
# \alpha_h^{k,c} = \frac{\partial y^c}{\partial A_h^k},\qquad
# L^c = \sum_k \sum_h F_h^k \odot \mathrm{ReLU}(\alpha_h^{k,c}).$$
#
# The gradient flows from the class logit to every block straight along the skip connections and the MLPs; what would go
# through the attention of later blocks is left out. Catalogue entry: `attention-guided-cam`.

# %%
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import UnsupportedModel, capture, check, embed, plain_blocks, target_scores, to_grid


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Sigmoid of the class token's attention scores, weighted by positive direct gradients, over all heads and blocks.

    Args:
        model: timm VisionTransformer in eval mode whose head reads the class token.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        (B, gh, gw); values of at least 0. All zero when no attention weight raises the class score.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; a head that reads other tokens than the class token, blocks
            that are not pre-norm or without plain attention.

    Source: Leem, Seo 2024 (AAAI).
    """
    check(model, images, class_token=True)
    blocks = plain_blocks(model)
    if model.global_pool != "token":
        raise UnsupportedModel(
            f"the head of this model reads global_pool={model.global_pool!r}, and this method follows the class token."
        )
    attentions = [block.attn for block in blocks if type(block.attn) is Attention and block.attn.gate is None]
    if len(attentions) < len(blocks):
        raise UnsupportedModel("this method needs plain attention, and this model has another or a gated kind.")
    rows = 2 if hasattr(model, "dist_token") else 1  # that the head reads
    with torch.no_grad(), capture(model, "attn.qkv") as record:
        tokens = embed(model, images)
        model.blocks(tokens)
    scores, weights = [], []
    with torch.enable_grad():
        # Without the paths through later attention the class token meets no other: its row alone is a forward pass.
        x = tokens[:, :rows].detach()  # (B, rows, D)
        for block, attention, projections in zip(blocks, attentions, record["attn.qkv"], strict=True):
            q, k, v = projections.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
            q, k = attention.q_norm(q[:, :, :rows]), attention.k_norm(k)
            scores.append((attention.scale * q @ k.mT).detach())  # (B, h, rows, N)
            weights.append(scores[-1].softmax(-1).requires_grad_())  # A_h^k
            mixed = attention.norm((weights[-1] @ v).transpose(1, 2).flatten(2))  # (B, rows, D)
            x = x + block.drop_path1(block.ls1(attention.proj_drop(attention.proj(mixed))))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        logits = model.forward_head(model.norm(x))
        gradients = torch.autograd.grad(target_scores(logits, target).sum(), weights)
    with torch.no_grad():
        cam = torch.stack(scores).sigmoid() * torch.stack(gradients).relu()  # F * ReLU(alpha): (L, B, h, rows, N)
        cam = cam.sum((0, 2, 3))  # (B, N)
    return to_grid(model, images, cam[:, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. None for a class-token model, except that the paper upsamples to the picture's size. The authors' code cuts the graph
#    in front of every attention and differentiates the whole network; since the class token then meets no other token,
#    the same gradient is taken here from its row alone, and the backward pass costs next to nothing.
# 2. A distilled model's head reads two tokens, class and distillation; the maps of both rows are added.
# 3. Prefix tokens (class, distillation, registers) are left out of the map. A head that pools patches is refused, since
#    the class token's row would not reach it.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "attention-guided-cam")
