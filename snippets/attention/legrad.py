# %% [markdown]
# # LeGrad
#
# Which tokens would the features form from, if attention could move towards the class? LeGrad scores the class on the output
# of every layer $l$, differentiates that score by the attention of the same layer, and takes the gradient itself as the map:
#
# $$s^l = \mathrm{head}\Big(\frac1N\sum_i z_i^l\Big)_c,\qquad
# \hat E^l_j = \frac1{hN} \sum_{m,i} \Big(\frac{\partial s^l}{\partial A^{l,m}_{ij}}\Big)^{+},\qquad
# \bar E = \frac1L \sum_l \hat E^l .$$
#
# No gradient passes from one layer to another, so there is nothing to chain and little to compute. Catalogue entry: `legrad`.

# %%
import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, embed, pool_row, target_classes, target_scores, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    first: int = 0,
    class_token: bool = False,
) -> Tensor:
    """Positive gradient of every layer's own class score by that layer's attention, averaged over layers.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        first: first block that counts, 0 for all of them; negative from the end.
        class_token: score a layer by its class token alone instead of by the mean of all its tokens.

    Returns:
        (B, gh, gw); values of at least 0. All zero when no link of attention would raise the score of its layer.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; no such block.

    Source: Bousselham et al. 2025; authors' code, LeWrapper.compute_legrad_clip.
    """
    check(model, images)
    if not -len(model.blocks) <= first < len(model.blocks):
        raise ValueError(f"block {first} is out of range: the model has {len(model.blocks)} blocks.")
    with torch.no_grad():
        tokens = embed(model, images)
        for block in model.blocks[: first % len(model.blocks)]:
            tokens = block(tokens)
    attention_pooling = isinstance(model.attn_pool, AttentionPoolLatent)
    outputs = []
    with torch.set_grad_enabled(not attention_pooling), capture(model, "attention") as record:
        for block in model.blocks[first:]:
            tokens = block(tokens.detach())  # (B, N, D): no gradient leaves the layer
            outputs.append(tokens)
    with torch.no_grad():
        classes = target_classes(model.forward_head(model.norm(tokens)), target)
    with torch.enable_grad(), capture(model, "attention") as pooling:
        if model.global_pool == "token" and not class_token:  # the head finds the mean wherever it looks
            outputs = [z.mean(1, keepdim=True).expand(-1, model.num_prefix_tokens + 1, -1) for z in outputs]
        scores = target_scores(model.forward_head(model.norm(torch.cat(outputs))), classes.repeat(len(outputs)))
        weights = pooling["pool_attention"] if attention_pooling else record["attention"]
        gradients = torch.autograd.grad(scores.sum(), weights)  # (B, h, N, N) each, or one (L B, h, 1, N)
    relevance = torch.cat([g.clamp(min=0).mean((1, 2)) for g in gradients])  # (L B, N): mean over heads and queries
    relevance = relevance.unflatten(0, (len(outputs), -1)).mean(0)
    relevance = pool_row(model, relevance) if attention_pooling else relevance
    return to_grid(model, images, relevance[:, model.num_prefix_tokens :])


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The score. The paper compares pooled tokens with a text embedding; here the model's own final norm and classifier read
#    them, and $s^l$ is a logit. Heads of two tokens (distilled) both read the mean token.
# 2. The pooled token of a layer is the mean of all tokens, prefix tokens included, as in the authors' code for class-token
#    models. `class_token=True` reads the class token instead; only its row of attention then has a gradient. Average-pooling
#    models pool each layer as they pool the last.
# 3. Attention pooling: the head pools every layer's output, and the pooling attention is differentiated, as in the
#    authors' code for such models. That code skips the final norm and removes places that an empty prompt also finds; both
#    are left out here.
# 4. The map is not rescaled to run from 0 to 1.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "legrad")
