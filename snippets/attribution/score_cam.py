# %% [markdown]
# # Score-CAM
#
# How much of a channel's map does the class need? Instead of a gradient, use the map itself as a mask: enlarge it to the
# size of the picture, scale it to 0 to 1, show the model only what lies under it, and weight the channel by the score:
#
# $$H_k = s(\mathrm{Up}(A^k)),\qquad S_k = f^c(X \circ H_k) - f^c(X_b),\qquad
# \alpha_k = \frac{e^{S_k}}{\sum_l e^{S_l}},\qquad L^c = \mathrm{ReLU}\Big(\sum_k \alpha_k A^k\Big),$$
#
# with $s$ the scaling to 0 to 1. One forward pass for every channel and no gradient.
# Patch tokens are the positions, embedding dimensions the channels, as in `grad-cam`. Catalogue entry: `score-cam`.

# %%
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import check, embed, grid, logits_of_tokens, plain_blocks, target_classes, target_scores, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layer: int = -1,
    weights: str = "softmax",
    channels: int | None = None,
    relu: bool = True,
    chunk: int = 8,
) -> Tensor:
    """Sum of the features of one layer, each channel weighted by the class score of the picture under its mask.

    Args:
        model: timm VisionTransformer in eval mode, with or without class token.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        layer: block whose normalised input (the output of ``norm1``) is read; -1 is the last.
        weights: "softmax" of the logits over the channels, as in the paper's algorithm; "probability" weights each
            channel by the class probability itself, as the authors' code does.
        channels: how many channels to try; None tries all. The tried ones are those whose masks lie farthest apart, and
            every other channel takes the score of the tried one with the most similar mask.
        relu: keep only what speaks for the class, as published; False keeps the sign.
        chunk: pictures per forward pass; bounds the memory. On a CPU a few at a time are also fastest.

    Returns:
        (B, gh, gw); values of at least 0 unless ``relu=False``. All zero when nothing in the layer speaks for the class.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; blocks that are not pre-norm, no such layer, unknown
            ``weights``, ``channels`` that the model does not have.

    Source: Wang et al. 2020, algorithm 1.
    """
    check(model, images)
    blocks = plain_blocks(model)
    depth, prefix = len(blocks), model.num_prefix_tokens
    if not -depth <= layer < depth:
        raise ValueError(f"layer {layer} is out of range: the model has {depth} blocks.")
    if weights not in ("softmax", "probability"):
        raise ValueError(f"weights is 'softmax' or 'probability', not {weights!r}.")
    if channels is not None and not 1 <= channels <= model.embed_dim:
        raise ValueError(f"channels must lie between 1 and the model's {model.embed_dim}, not {channels}.")
    layer = layer % depth
    with torch.inference_mode():
        tokens = model.blocks[:layer](embed(model, images))  # (B, N, D)
        classes = target_classes(logits_of_tokens(model, tokens, first=layer), target)
        maps = blocks[layer].norm1(tokens)[:, prefix:].mT  # (B, D, P): A^k
        tried, nearest = spread(unit(maps), channels or maps.shape[1])  # (B, K), (B, D)
        scores = []  # in chunks of all pairs (picture, tried channel)
        for pair in torch.arange(tried.numel(), device=images.device).split(chunk):
            picture = pair // tried.shape[1]
            masks = enlarge(model, images, maps[picture, tried.flatten()[pair]])  # (chunk, 1, H, W): H_k
            logits = model(images[picture] * masks)
            scores.append(target_scores(logits if weights == "softmax" else logits.softmax(-1), classes[picture]))
        alpha = torch.cat(scores).view(tried.shape).gather(1, nearest)  # (B, D): S_k
        if weights == "softmax":
            alpha = alpha.softmax(1)  # the baseline's score is the same for all channels and cancels
        cam = (alpha[..., None] * maps).sum(1)  # (B, P)
    return to_grid(model, images, (cam.relu() if relu else cam).clone())


def unit(values: Tensor) -> Tensor:
    """Each row of (..., P) scaled to 0 to 1; a constant row becomes 0."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / torch.where(high == low, 1, high - low)


def enlarge(model: VisionTransformer, images: Tensor, maps: Tensor) -> Tensor:
    """Maps (C, P) over the pixels, bilinearly, then scaled to 0 to 1: (C, 1, H, W). A constant map hides everything."""
    (gh, gw), (ph, pw), (height, width) = grid(model, images), model.patch_embed.patch_size, images.shape[-2:]
    pixels = nn.functional.interpolate(maps.view(-1, 1, gh, gw), size=(gh * ph, gw * pw), mode="bilinear")
    pixels = unit(pixels[..., :height, :width].flatten(1)).view(len(maps), 1, min(gh * ph, height), -1)
    return nn.functional.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))


def spread(masks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Channels whose masks (B, D, P) lie farthest apart, (B, count), and for every channel the nearest of them, (B, D).

    Farthest-point sampling (Gonzalez 1985): no other choice of ``count`` masks leaves less than half the distance
    between the worst served channel and its nearest mask.
    """
    if count == masks.shape[1]:
        every = torch.arange(count, device=masks.device).expand(len(masks), -1)
        return every, every
    apart = torch.cdist(masks, masks)  # (B, D, D)
    tried = [torch.zeros(len(masks), dtype=torch.long, device=masks.device)]
    distance, nearest = apart[:, 0], torch.zeros_like(apart[:, 0], dtype=torch.long)
    for index in range(1, count):
        tried.append(distance.argmax(1))  # the channel that is served worst
        fresh = apart[torch.arange(len(masks), device=masks.device), tried[-1]]
        nearest = torch.where(fresh < distance, index, nearest)
        distance = torch.minimum(distance, fresh)
    return torch.stack(tried, 1), nearest


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The layer is the one of `grad-cam`: after `norm1` of the last block, the last place where patch tokens still reach a
#    class-token head. Prefix tokens are no positions and are left out.
# 2. The picture is normalised before it is masked, so that the hidden part has the mean colour of the training data; the
#    baseline $X_b$ would be that colour everywhere, and its score cancels in the softmax over the channels.
# 3. The paper's text prefers class probabilities to logits as the score, its algorithm takes a softmax over the channels,
#    and the authors' code has the one and not the other: each channel counts by its probability. The default is the
#    algorithm with logits, as in common libraries; `weights="probability"` is the code.
# 4. `channels` saves passes and is ours. The score is a continuous function of the mask: channels with nearly the same mask
#    have nearly the same score, and of a given number of masks the ones farthest apart serve the others best. Skipping
#    exact duplicates is exact; skipping more is an approximation, since the softmax gives most of the weight to a few
#    channels, and the map suffers where one of those is skipped.
# 5. The result stays on the patch grid.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "score-cam")
