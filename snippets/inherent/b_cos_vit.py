# %% [markdown]
# # B-cos ViT: a transformer that is one linear map for each picture
#
# By how much did each pixel raise or lower the logit, with nothing left over? A linear unit is replaced by the B-cos
# unit, which is large only where its input points the way of its weights $\hat w$ (of unit length, no bias):
#
# $$\text{B-cos}(x; w) = \lvert\cos(x, \hat w)\rvert^{B-1}\,\hat w^\top x .$$
#
# Given the picture, $\lvert\cos\rvert^{B-1}$ is a number, so the unit is linear in $x$. So is attention once its weights
# $A(x)$ are given, $x \mapsto A(x)\,x\,W_V$, and LayerNorm without bias once its deviation is. A network of such steps is
# one linear map of the picture, and its row for class $c$ shares out the logit over colours and pixels exactly:
#
# $$\text{logit}_c = b + W_c(x)^\top x = b + \sum_i \big[W_c(x)\big]_i\,x_i,\qquad b = -\log(K-1)\ \text{for all } K \text{ classes}.$$
#
# Training raises a logit only by turning $W_c(x)$ towards the picture, so that its row can be looked at in colour.
# Catalogue entry: `b-cos-vit`.

# %%
import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from vitx.vit import (
    UnsupportedModel,
    check,
    constant_deviation,
    pool_patches,
    require_finite,
    stored,
    target_scores,
    to_grid,
)


class BcosLinear(nn.Module):
    """A layer of B-cos units. ``held`` keeps the values and takes the cosines for constants in the backward pass."""

    def __init__(self, inputs: int, outputs: int, b: float):
        super().__init__()
        self.weight, self.b = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs)), b

    def forward(self, x: Tensor, held: bool = False) -> Tensor:
        projection = linear(x, normalize(self.weight, dim=1))  # |x| cos(x, w)
        cosine = projection / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        scale = cosine.abs() ** (self.b - 1)
        return (scale.detach() if held else scale) * projection


def layer_norm(norm: nn.LayerNorm, x: Tensor, held: bool) -> Tensor:
    """LayerNorm; ``held`` takes its deviation for a constant in the backward pass."""
    return constant_deviation(norm, x) if held else norm(x)


class BcosBlock(nn.Module):
    """Attention and MLP, every step linear once cosines, deviations and attention weights are given.

    The place of a patch enters as a learned prior added to the attention scores of each head, by the offset (rows,
    columns) between two patches; offsets beyond ``reach`` share the last value.
    """

    def __init__(self, width: int, heads: int, hidden: int, b: float, reach: int):
        super().__init__()
        self.heads, self.reach = heads, reach
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.prior = nn.Parameter(torch.zeros(heads, 2 * reach + 1, 2 * reach + 1))
        self.proj = BcosLinear(width, width, b)
        self.fc1, self.fc2 = BcosLinear(width, hidden, b), BcosLinear(hidden, width, b)

    def forward(self, x: Tensor, offsets: Tensor, held: bool = False) -> Tensor:
        qkv = self.qkv(layer_norm(self.norm1, x, held))  # (B, P, 3 D)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, P, d) each
        rows, columns = offsets.clamp(-self.reach, self.reach) + self.reach  # (P, P) each
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + self.prior[:, rows, columns]
        attention = scores.softmax(-1)  # A: (B, h, P, P)
        mixed = (attention.detach() if held else attention) @ v  # (B, h, P, d)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2), held)
        return x + self.fc2(self.fc1(layer_norm(self.norm2, x, held), held), held)  # no activation: |cos| is one


class BcosTransformer(VisionTransformer):
    """A Vision Transformer of B-cos units, without class token and biases; its logits are read from the mean patch.

    Args:
        classes: K. hidden: units of an MLP. b: B. reach: see ``BcosBlock``.
        mean, deviation: of each colour, by which the pictures were normalised.
    """

    def __init__(
        self,
        classes: int,
        img_size: Any = 112,
        patch_size: int = 8,
        embed_dim: int = 128,
        depth: int = 6,
        num_heads: int = 4,
        hidden: int = 256,
        b: float = 2,
        reach: int = 6,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        deviation: tuple[float, ...] = (0.25, 0.25, 0.25),
    ):
        shape: dict[str, Any] = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim, "depth": 0}
        super().__init__(**shape, num_classes=0, class_token=False, global_pool="avg", pos_embed="none", fc_norm=False)
        self.num_classes, self.patch_embed.proj = classes, nn.Identity()
        self.mean, self.deviation, self.logit_bias = mean, deviation, -math.log(classes - 1)
        self.stem = BcosLinear(6 * patch_size**2, embed_dim, b)
        self.blocks = nn.ModuleList([BcosBlock(embed_dim, num_heads, hidden, b, reach) for _ in range(depth)])  # type: ignore
        self.norm, self.head = nn.LayerNorm(embed_dim, bias=False), BcosLinear(embed_dim, classes, b)  # type: ignore

    def encode(self, images: Tensor) -> Tensor:
        """x: the colours (r, g, b, 1 - r, 1 - g, 1 - b) in [0, 1] of normalised images, (B, 6, H, W)."""
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.deviation))
        colours = images * deviation + mean
        return torch.cat([colours, 1 - colours], 1)  # so that black is not the absence of input, and has a direction

    def tokens(self, x: Tensor, held: bool = False) -> Tensor:
        """Patch tokens (B, P, D) of encoded pictures (B, 6, H, W) of any size."""
        height, width = self.patch_embed.patch_size
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, 6, gh, p, gw, p)
        gh, gw = patches.shape[2], patches.shape[4]
        z = self.stem(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), held)  # (B, P, D)
        index = torch.arange(gh * gw, device=x.device)
        places = torch.stack([index // gw, index % gw])  # (2, P): row and column
        offsets = places[:, None] - places[:, :, None]  # (2, P, P): key less query
        for block in self.blocks:
            z = block(z, offsets, held)
        return z

    def logits(self, tokens: Tensor, held: bool = False) -> Tensor:
        """(B, K) of patch tokens (B, P, D)."""
        return self.head(layer_norm(self.norm, tokens.mean(1), held), held) + self.logit_bias  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, 3, H, W)."""
        return self.logits(self.tokens(self.encode(x)))


def linear_map(model: BcosTransformer, images: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x and the row W_c(x) of the map that the model is for these pictures, (B, 6, H, W) each; arguments as ``explain``."""
    with torch.enable_grad():
        x = model.encode(images.detach()).requires_grad_()  # (B, 6, H, W)
        logits = require_finite(model, model.logits(model.tokens(x, held=True), held=True))
        (row,) = torch.autograd.grad(target_scores(logits, target).sum(), x)
    return x.detach(), row


def colours(row: Tensor) -> Tensor:
    """What W_c(x) looks like: (B, 4, H, W) red, green, blue and opacity in [0, 1], of rows (B, 6, H, W)."""
    positive = (row / row.abs().amax(1, keepdim=True).clamp(min=1e-12)).clamp(min=0)
    colour = positive[:, :3] / (positive[:, :3] + positive[:, 3:]).clamp(min=1e-12)  # each pair (r, 1 - r) sums to one
    strength = row.norm(dim=1, keepdim=True)
    most = strength.flatten(1).quantile(0.995, dim=1)[:, None, None, None]
    return torch.cat([colour, (strength / most.clamp(min=1e-12)).clamp(max=1)], 1)


def explain(
    model: BcosTransformer, images: Tensor, target: Tensor | None = None, *, pool: str | None = "patch"
) -> Tensor:
    """What every patch or pixel added to the logit; with ``model.logit_bias``, the same for all classes, it sums to it.

    Args:
        model: a BcosTransformer in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        pool: "patch" sums over every patch; None keeps the pixels.

    Returns:
        (B, gh, gw), or (B, H, W) with ``pool=None``; negative values speak against the class.

    Raises:
        UnsupportedModel: the model has no B-cos units.
        ValueError: see ``vitx.vit.check``.

    Source: Böhle, Singh, Fritz, Schiele 2023 (v2 of B-cos networks); the authors' bcos/modules and bcos/models/vit.py.
    """
    if not hasattr(model, "logit_bias"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} is not made of B-cos units, so no linear map gives its logits exactly: the method "
            "explains only a BcosTransformer (the model b-cos-vit-glyph)."
        )
    check(model, images)
    x, row = linear_map(model, images, target)
    contributions = (x * row).sum(1)  # (B, H, W)
    patches = to_grid(model, images, pool_patches(model, contributions))
    return contributions if pool is None else patches


def load_pretrained(path) -> BcosTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the arguments."""
    about, weights = stored(path)
    model = BcosTransformer(**about["options"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Places enter as a prior on the attention scores. The authors' code adds sines and cosines to the tokens instead, and
#    then a part of every logit comes from places and not from pixels; with the prior none does, and the sum is exact.
# 2. The model below is small (0.8 M parameters, patches of 8 pixels, no convolutional stem) and sees pictures of one
#    generator. $B = 2$, no activation in the MLP, plain queries, keys and values, six colours, the bias of the logits and
#    binary cross-entropy are the authors'.
# 3. It did not learn from labels alone, nor from nothing: its weights start with the directions of those of the model
#    `glyph`, and in the few minutes of its training its tokens also imitate that model's, through layers that are then thrown
#    away. So where its evidence lies is in part learned from `glyph`.
# 4. The heat map sums the contributions over patches; `pool=None` gives pixels. The picture in colour takes the strength of
#    each pixel's row as its opacity, as the authors' code does, without its smoothing by 15 pixels and without hiding pixels
#    that speak against the class.
#
# What the small model cannot show: patches of 8 pixels without overlap give rows with seams, where the paper's models, with
# a stem of convolutions, draw smooth outlines. And exactness is about the sum: that a pixel added much does not mean that
# the logit would fall by as much without it, since the map $W(x)$ would be another one.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes of two creatures, asked for each: contributions of the patches, and the row of the map in colour."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        images = glyphs.normalise(scenes.images)
        model = models.load("b-cos-vit-glyph").model
        figure = Figure(figsize=(10.5, 6.6), layout="constrained")
        axes = figure.subplots(3, 5)
        for column, target in enumerate(scenes.labels.T):
            heat = explain(model, images, target)  # pyright: ignore[reportArgumentType]
            picture = colours(linear_map(model, images, target)[1])  # pyright: ignore[reportArgumentType]
            for row, label in enumerate(target.tolist()):
                scene, name = scenes.images[row].permute(1, 2, 0).numpy(), glyphs.CLASS_NAMES[label]
                plot.overlay(axes[row, 0], scene)
                total = float(heat[row].sum())
                plot.overlay(axes[row, 1 + 2 * column], scene, heat[row], f"{name}: all patches {total:+.2f}")
                axes[row, 2 + 2 * column].imshow(picture[row].permute(1, 2, 0).numpy())
                axes[row, 2 + 2 * column].set_title(f"its linear map for {name}", fontsize=8, pad=3)
                axes[row, 2 + 2 * column].axis("off")
        demo.show(figure, "b-cos-vit")

    show(seed=7)
